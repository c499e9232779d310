"""The proof of packed networks, in double precision, step by step.

Outputs prove little here: where a value lies within rounding of a threshold, the level may fall on either side, and all
that follows is then another (equally valid) number. So every step gets the inputs that the graph has at its place, and
its result is compared with the graph's own value: floats must agree but for the rounding of their factors to float32,
and levels must be equal, except where the value lies on the threshold: a tie.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ...ir.errors import VerifyError
from ...ir.graph import Graph
from ...ir.nodes import operand
from ...ir.verify import evaluating
from ...runtime.kernels.network_reference import run_step
from ...runtime.layers import HalfWaveQuantizer
from .binary_lowering import Lowered
from .binary_regions import Region

FLOAT_TOLERANCE = 1e-5
"""Relative distance of floats whose factors were rounded to float32."""
TIE = 1e-5
"""How near to a threshold a value is that counts as on it, in relation to the largest of the two."""


@dataclass
class Proof:
    """What was compared.

    Attributes:
        levels: numbers of levels.
        ties: those that differ, all of them on a threshold.
        distance: largest relative distance of floats.
    """

    levels: int = 0
    ties: int = 0
    distance: float = 0.0


class Recorder(fx.Interpreter):
    """Runs a graph in double precision, and keeps the values of some nodes.

    Args:
        graph: what to run.
        wanted: names of nodes.
        forced: values that nodes give in place of their own.
    """

    def __init__(self, graph: Graph, wanted: Iterable[str], forced: dict[str, Tensor] | None = None) -> None:
        super().__init__(copy.deepcopy(graph.module).double(), garbage_collect_values=True)
        self.wanted, self.forced, self.values = set(wanted), forced or {}, dict[str, Any]()
        leaves = pytree.tree_leaves((graph.example_args, graph.example_kwargs))
        moved = [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in leaves]
        with evaluating(self.module):
            self.returned = self.run(*moved, enable_io_processing=False)

    def run_node(self, n: fx.Node) -> Any:
        """As the interpreter; notes what is wanted."""
        value = super().run_node(n)
        if n.name in self.wanted:
            self.values[n.name] = value
        return self.forced.get(n.name, value)


def prove_region(graph: Graph, region: Region, lowered: Lowered, proof: Proof, values: dict[str, Tensor]) -> None:
    """Compare every step of a region with the graph, on its example inputs.

    Args:
        graph: with the region still in it.
        region: the nodes.
        lowered: their steps.
        proof: what was compared before; added to.
        values: of the region's nodes and inputs, in double precision.

    Raises:
        VerifyError: a step differs; names its node.
    """
    made = [_image(values[node.name]) for node in region.inputs]
    for index, (step, tensors) in enumerate(zip(lowered.program.steps, lowered.tensors, strict=True)):
        value = run_step(step, tensors, [made[at] for at in step.operands()], torch.float64)
        meaning = lowered.meaning.get(len(region.inputs) + index)
        if meaning is not None:
            node, size = meaning
            wanted = _image(values[node.name])
            if size is None:
                proof.distance = max(proof.distance, _compare_floats(node, wanted, value))
            else:
                wanted = (wanted / size).round().to(torch.uint8)
                _compare_levels(graph, node, wanted, value, values, proof)
            value = wanted
        made.append(value)


def _image(value: Tensor) -> Tensor:
    return value if value.dim() == 4 else value[:, :, None, None]


def _compare_floats(node: fx.Node, wanted: Tensor, found: Tensor) -> float:
    distance = float((wanted - found).abs().max() / wanted.abs().max().clamp(min=torch.finfo(torch.float32).tiny))
    if not distance <= FLOAT_TOLERANCE:
        raise VerifyError(
            f"packed node {node.name!r} differs by {distance:.2e} (relative; {FLOAT_TOLERANCE:.0e} allowed)",
            hint="Report the model: this is a bug in packing. `binary: off` keeps the layers as they are",
        )
    return distance


def _compare_levels(
    graph: Graph, node: fx.Node, wanted: Tensor, found: Tensor, values: dict[str, Tensor], proof: Proof
) -> None:
    differ = wanted != found
    proof.levels += wanted.numel()
    count = int(differ.sum())
    proof.ties += count
    layer = graph.layer(node)
    if count and not (
        isinstance(layer, HalfWaveQuantizer) and bool(_tied(layer, _image(values[operand(node).name]))[differ].all())
    ):
        raise VerifyError(
            f"packed node {node.name!r} has {count} of {wanted.numel()} levels that differ and lie on no threshold",
            hint="Report the model: this is a bug in packing. `binary: off` keeps the layers as they are",
        )


def _tied(quantizer: HalfWaveQuantizer, x: Tensor) -> Tensor:
    """Where a value lies on a threshold, but for rounding."""
    edges = torch.tensor(quantizer.thresholds, dtype=x.dtype)
    gap = (x.unsqueeze(-1) - edges).abs().amin(-1)
    return gap <= TIE * x.abs().clamp(min=1)


def prove_folded(before: Graph, after: Graph) -> Proof:
    """Compare two graphs that hold the same quantizers, all of which give the values of the first.

    Raises:
        VerifyError: what a quantizer reads, or an output, differs by more than rounding.
    """
    quantizers = [node for node in before.nodes if isinstance(before.layer(node), HalfWaveQuantizer)]
    wanted = [name for node in quantizers for name in (node.name, operand(node).name)]
    one = Recorder(before, wanted)
    read = {node.name: operand(node).name for node in after.nodes if isinstance(after.layer(node), HalfWaveQuantizer)}
    forced = {node.name: one.values[node.name] for node in quantizers}
    other = Recorder(after, read.values(), forced)
    proof = Proof()
    for node in quantizers:
        ours, theirs = one.values[operand(node).name], other.values[read[node.name]]
        proof.distance = max(proof.distance, _compare_floats(node, ours, theirs))
    for ours, theirs in zip(pytree.tree_leaves(one.returned), pytree.tree_leaves(other.returned), strict=True):
        if isinstance(ours, Tensor):
            proof.distance = max(proof.distance, _compare_floats(after.nodes[-1], ours, theirs))
    return proof
