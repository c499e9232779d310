"""Binary layers, and what lies between them, become packed networks that run as one call each."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import fx

from ...ir.graph import Graph
from ...runtime.layers import BinaryLayer, BinaryNetwork
from ..base import PassResult, Skip
from .binary_lowering import Lowered, lower
from .binary_proof import Proof, Recorder, prove_region
from .binary_regions import Region, find_regions, level_steps

NAME = "binary_network"


@dataclass
class Packing:
    """What was packed.

    Attributes:
        layers: names of the layers in packed networks.
        networks: paths of these.
        reasons: binary layers that are in none, and why.
        steps: of all networks.
        stored_bytes: of their tensors.
        float_pools: quantizers behind a pool and a negative factor.
        proof: what was compared, None where nothing was.
    """

    layers: list[str] = field(default_factory=list)
    networks: list[str] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    steps: int = 0
    stored_bytes: int = 0
    float_pools: list[str] = field(default_factory=list)
    proof: Proof | None = None

    def tell(self, result: PassResult) -> None:
        """Notes, skips and metrics for the report."""
        result.skips += [Skip(name, f"not packed: {reason}") for name, reason in self.reasons.items()]
        if not self.networks:
            return
        calls = f"{len(self.networks)} call{'s' if len(self.networks) > 1 else ''}"
        bits = f"{self.stored_bytes:,} bytes with their norms"
        result.notes.append(f"packed {len(self.layers)} binary layers into {calls} of {self.steps} steps: {bits}")
        if self.float_pools:
            names = ", ".join(self.float_pools[:3])
            result.notes.append(f"pooled as floats, as a negative factor stands between pool and quantizer: {names}")
        packed = {"layers": self.layers, "networks": self.networks, "steps": self.steps, "bytes": self.stored_bytes}
        if self.proof is not None:
            proof = self.proof
            result.notes.append(
                f"equal step by step: {proof.levels:,} levels, {proof.ties} of them on a threshold, floats to "
                f"{proof.distance:.0e}"
            )
            packed |= {"levels": proof.levels, "ties": proof.ties, "float_distance": proof.distance}
        result.metrics["packed"] = packed


def pack_binary(graph: Graph, *, verify: bool, author: str) -> Packing:
    """Replace every region of binary layers by a packed network.

    Args:
        graph: edited in place.
        verify: whether to prove each step on the example inputs.
        author: of the edit.

    Raises:
        VerifyError: a step differs from the graph, which is then as it was.
    """
    regions, reasons = find_regions(graph)
    packing = Packing(reasons=reasons)
    if not regions:
        return packing
    steps = level_steps(graph)
    lowered = [lower(graph, region, steps) for region in regions]
    if verify:
        packing.proof = _prove(graph, regions, lowered)
    made: dict[fx.Node, fx.Node] = {}
    with graph.edit(author):
        for region, part in zip(regions, lowered, strict=True):
            made |= _replace(graph, region, part, packing, made)
        _sort(graph.module.graph)
    return packing


def _prove(graph: Graph, regions: list[Region], lowered: list[Lowered]) -> Proof:
    proof = Proof()
    wanted = {node.name for region in regions for node in (*region.nodes, *region.inputs)}
    values = Recorder(graph, wanted).values
    for region, part in zip(regions, lowered, strict=True):
        prove_region(graph, region, part, proof, values)
    return proof


def _replace(
    graph: Graph, region: Region, lowered: Lowered, packing: Packing, earlier: dict[fx.Node, fx.Node]
) -> dict[fx.Node, fx.Node]:
    """Put the call in place; which nodes now give the values of the region's outputs. `earlier`: those before."""
    network = BinaryNetwork.from_tensors(lowered.program, lowered.tensors)
    path = _free_name(graph)
    graph.module.add_module(path, network)
    nodes = graph.module.graph
    with nodes.inserting_after(region.nodes[-1]):
        call = nodes.call_module(path, tuple(earlier.get(node, node) for node in region.inputs))
    specs = [node.meta["spec"] for node in region.outputs]
    several = len(lowered.program.outputs) > 1
    call.meta = {"spec": specs[0]}
    if several:
        call.meta["spec"] = tuple(specs[lowered.outputs.index(at)] for at in range(len(lowered.program.outputs)))
    parts: dict[int, fx.Node] = {}
    members, found = set(region.nodes), {}
    for node, at in zip(region.outputs, lowered.outputs, strict=True):
        if several and at not in parts:
            with nodes.inserting_after(call):
                parts[at] = nodes.call_function(operator.getitem, (call, at))
            parts[at].meta = {"spec": node.meta["spec"]}
        found[node] = parts.get(at, call)
        node.replace_all_uses_with(found[node], delete_user_cb=lambda user: user not in members)
    layers = [str(node.target) for node in region.nodes if isinstance(graph.layer(node), BinaryLayer)]
    packing.layers += layers
    packing.networks.append(path)
    packing.steps += len(lowered.program.steps)
    packing.stored_bytes += network.stored_bytes
    packing.float_pools += lowered.float_pools
    return found


def _free_name(graph: Graph) -> str:
    count, name = 0, NAME
    while hasattr(graph.module, name):
        count += 1
        name = f"{NAME}_{count}"
    return name


def _sort(nodes: fx.Graph) -> None:
    """Bring nodes into an order in which each comes after what it reads; others keep their places."""
    order: list[fx.Node] = []
    done: set[fx.Node] = set()
    for first in list(nodes.nodes):
        stack = [first]
        while stack:
            node = stack[-1]
            open_ = [source for source in node.all_input_nodes if source not in done]
            if open_ and node not in done:
                stack += reversed(open_)
                continue
            stack.pop()
            if node not in done:
                done.add(node)
                order.append(node)
    for before, after in pairwise(order):
        before.append(after)


def settle_latent(graph: Graph) -> int:
    """Give binary layers that stay the weights that they compute with, which a file can keep as bits.

    Returns:
        how many layers.
    """
    layers = [layer for layer in graph.module.modules() if isinstance(layer, BinaryLayer)]
    with torch.no_grad():
        for layer in layers:
            layer.weight = torch.nn.Parameter(layer.binary_weight.detach().clone(), layer.weight.requires_grad)
    return len(layers)
