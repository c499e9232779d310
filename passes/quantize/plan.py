"""Which layers are quantised, and how their weights lie: sub-spaces, taps and groups as one matrix."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from ...ir.graph import Graph
from ...ir.nodes import operand
from ...runtime.layers.pq_codebook import bits, subspaces
from ..base import Skip
from ..fuse.affine import is_tied
from ..layerwise.patches import weight_rows
from .settings import Setting

Dense = nn.Conv2d | nn.Linear
"""The layers that can be quantised."""


@dataclass(frozen=True)
class Layout:
    """Sizes of a layer's problem, and the order of its features: by sub-space, then by tap, then by input.

    Attributes:
        groups: of a grouped convolution; 1 otherwise.
        taps: positions of the kernel.
        inputs: of one group.
        outputs: of one group.
        width: inputs per sub-space, d.
        words: codewords per sub-space, K.
    """

    groups: int
    taps: int
    inputs: int
    outputs: int
    width: int
    words: int

    @property
    def count(self) -> int:
        """Number of sub-spaces, M."""
        return subspaces(self.inputs, self.width)

    @property
    def rows(self) -> int:
        """Features of one sub-space: taps times width."""
        return self.taps * self.width

    @property
    def indices(self) -> int:
        """Number of indices: one per tap, sub-space and output."""
        return self.taps * self.count * self.groups * self.outputs

    @cached_property
    def order(self) -> Tensor:
        """Where features come from, (M * taps * d,), as an index into inputs * taps; -1 fills up the last sub-space."""
        source = torch.full((self.count * self.width, self.taps), -1)
        source[: self.inputs] = torch.arange(self.inputs * self.taps).view(self.inputs, self.taps)
        return source.view(self.count, self.width, self.taps).transpose(1, 2).flatten()

    def bytes(self, precision: str) -> int:
        """Size of the quantised weight: codewords (with a scale per sub-space if they are int8) and packed indices."""
        each = {"fp32": 4, "fp16": 2, "int8": 1}[precision]
        codebook = self.count * (each * self.words * self.width + (4 if precision == "int8" else 0))
        return codebook + -(-self.indices * bits(self.words) // 8)


@dataclass(frozen=True)
class Job:
    """One layer to quantise.

    Attributes:
        name: of its node.
        path: of the layer.
        source: name of the node that it reads.
        layer: the layer as it is.
        setting: how finely.
        layout: sizes and order.
    """

    name: str
    path: str
    source: str
    layer: Dense
    setting: Setting
    layout: Layout

    @property
    def dense_bytes(self) -> int:
        """Size of the weight as it is."""
        return self.layer.weight.numel() * self.layer.weight.element_size()

    @property
    def bytes(self) -> int:
        """Size of the weight as codebook and indices."""
        return self.layout.bytes(self.setting.codebook)


def candidates(graph: Graph) -> dict[str, fx.Node]:
    """Nodes of all convolutions and linear layers by their layers' paths, in the order of execution."""
    found = [node for node in graph.nodes if isinstance(graph.layer(node), (_ConvNd, nn.Linear))]
    return {str(node.target): node for node in found}


def make_jobs(graph: Graph, settings: dict[str, Setting]) -> tuple[list[Job], list[Skip]]:
    """Jobs in the order of execution, and what is left alone, with the reason."""
    jobs: list[Job] = []
    skips: list[Skip] = []
    for path, node in candidates(graph).items():
        found = _job(graph, node, path, settings[path])
        if isinstance(found, Job):
            jobs.append(found)
        else:
            skips.append(Skip(path, found))
    return jobs, skips


def _job(graph: Graph, node: fx.Node, path: str, setting: Setting) -> Job | str:
    if setting.skip:
        return "ignored by option"
    layer = graph.layer(node)
    if not isinstance(layer, (nn.Conv2d, nn.Linear)):
        return f"a {type(layer).__name__} has no quantised form; Conv2d and Linear have"
    reason = _unfit(graph, node, layer)
    if reason is not None:
        return reason
    job = Job(node.name, path, operand(node).name, layer, setting, layout_of(layer, setting))
    if job.bytes >= job.dense_bytes:
        return f"codebook and indices would take {job.bytes:,} bytes, its weight takes {job.dense_bytes:,}"
    return job


def _unfit(graph: Graph, node: fx.Node, layer: Dense) -> str | None:
    if isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels > 1:
        return "depthwise: a sub-space would hold a single input, and indices are no smaller than quantised weights"
    if isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros":
        return f"it pads with {layer.padding_mode!r}; quantised convolutions pad with zeros"
    if len(node.args) > 1 or node.kwargs:
        return "it is called with more than its input"
    calls = sum(other.op == "call_module" and other.target == node.target for other in graph.nodes)
    if calls > 1:
        return f"it is called {calls} times"
    return "a parameter of it is shared with another layer" if is_tied(graph, layer) else None


def layout_of(layer: Dense, setting: Setting) -> Layout:
    """The layout of a layer; a sub-space is no wider than the inputs of a group."""
    taps = prod(layer.kernel_size) if isinstance(layer, nn.Conv2d) else 1
    groups, outputs, features = weight_rows(layer).shape
    inputs = features // taps
    return Layout(groups, taps, inputs, outputs, min(setting.subspace, inputs), setting.codewords)
