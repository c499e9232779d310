"""A max pool with which a packed network begins becomes a part of the 8-bit convolution in front of it."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F  # noqa: N812
from torch import fx

from ...ir.graph import Graph
from ...runtime.kernels.int8_ops import MOST_POOLED
from ...runtime.kernels.network_program import Program, Step
from ...runtime.layers import BinaryNetwork, Int8Conv2d
from .binary_lowering import renumbered


def fuse_packed_pools(graph: Graph, author: str) -> int:
    """Let 8-bit convolutions pool what a packed network would pool first; returns how many pools went.

    In the graph a shortcut and a quantizer may each have a pool of their own behind such a convolution, which packing
    has found to be the same one; so this comes after packing.
    """
    count = 0
    for node in graph.nodes:
        if isinstance(graph.layer(node), BinaryNetwork):
            for index, source in enumerate(node.all_input_nodes):
                count += _fuse(graph, author, node, index, source)
    return count


def _fuse(graph: Graph, author: str, node: fx.Node, index: int, source: fx.Node) -> bool:
    """The pool of one input of a packed network; whether it went."""
    network, layer = graph.layer(node), graph.layer(source)
    assert isinstance(network, BinaryNetwork)
    calls = sum(other.op == "call_module" and other.target in (node.target, source.target) for other in graph.nodes)
    alone = len(source.users) == 1 and list(node.args) == node.all_input_nodes and calls == 2
    if not (isinstance(layer, Int8Conv2d) and alone and layer.groups == 1 and not layer.pool):
        return False
    program = network.parsed
    readers = [at for at, step in enumerate(program.steps) if index in step.operands()]
    if len(readers) != 1 or not _fits(program.steps[readers[0]]):
        return False
    if any(output["x"] == len(program.inputs) + readers[0] for output in program.outputs):
        return False
    pool, tensors = program.steps[readers[0]], network.tensors()
    del tensors[readers[0]]
    with graph.edit(author):
        layer.pool = (*pool["kernel"], *pool["stride"], *pool["padding"])
        given = source.meta["spec"]
        pooled = F.max_pool2d(torch.empty(given.shape, device="meta"), pool["kernel"], pool["stride"], pool["padding"])
        source.meta["spec"] = replace(given, shape=tuple(pooled.shape))
        made = BinaryNetwork.from_tensors(_without(program, readers[0], index), tensors)
        graph.module.set_submodule(str(node.target), made)
    return True


def _fits(step: Step) -> bool:
    return (
        step.kind == "max_pool"
        and step["dilation"] == (1, 1)
        and not step["ceil"]
        and max(step["kernel"]) <= MOST_POOLED
    )


def _without(program: Program, gone: int, index: int) -> Program:
    """The program without one step, in whose place its readers read the input `index`."""
    value = len(program.inputs) + gone

    def number(at: int) -> int:
        return index if at == value else at - (at > value)

    steps = (*program.steps[:gone], *program.steps[gone + 1 :])
    outputs = tuple(renumbered(step, number) for step in program.outputs)
    return Program(program.inputs, tuple(renumbered(step, number) for step in steps), outputs)
