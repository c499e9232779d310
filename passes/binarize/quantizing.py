"""Putting batch norms without factors, and half-wave quantizers, in front of layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...ir.graph import Graph, TensorSpec
from ...ir.nodes import operand, shape_of
from ...runtime.layers import HalfWaveQuantizer
from .slopes import slopes
from .sources import Behind, Joined, Leaf, Nodes, Ready, Source, leaves, norm_of

Statistics = dict[str, tuple[Tensor, Tensor]]
"""Mean and variance per channel of the tensors of nodes, by name."""


@dataclass(frozen=True)
class Quantised:
    """A quantised tensor.

    Attributes:
        node: gives it.
        slope: factors per channel (dimension 1) for the weights that read it, or None where they are not known.
    """

    node: fx.Node
    slope: Tensor | None


class Quantizing:
    """Builds quantised tensors in a graph that is being edited; each is built once, however many layers read it.

    Args:
        graph: the network.
        make: gives a new quantizer.
        statistics: of tensors that no batch norm gives.
        sources: all that is going to be built.
    """

    def __init__(
        self, graph: Graph, make: Callable[[], HalfWaveQuantizer], statistics: Statistics, sources: Iterable[Source]
    ) -> None:
        self.graph, self.make, self.statistics = graph, make, statistics
        self._unpooled = {leaf.node for source in sources for leaf in leaves(source) if not leaf.pools}
        self._made: dict[tuple[fx.Node, Nodes], fx.Node] = {}
        self.norms = 0
        """Batch norms that were made where there was none."""
        self.blind = 0
        """Those of them that have no statistics yet."""
        self.plain = 0
        """Batch norms that lost their factors and terms."""

    @property
    def count(self) -> int:
        """Quantizers that were made."""
        return len(self._made)

    def build(self, source: Source, before: fx.Node) -> Quantised:
        """The quantised form of a source, with new nodes in front of a node that is going to read it."""
        with self.graph.module.graph.inserting_before(before):
            return self._build(source)

    def _build(self, source: Source) -> Quantised:
        if isinstance(source, Behind):
            part = self._build(source.part)
            return Quantised(self._again(source.node, part.node), _spread(part, shape_of(source.node)))
        if isinstance(source, Joined):
            parts = [self._build(part) for part in source.parts]
            fresh = self.graph.module.graph.call_function(_target(source.node), ([p.node for p in parts], 1))
            fresh.meta = dict(source.node.meta)
            return Quantised(self._shaped(fresh, parts), _joined(parts))
        if isinstance(source, Ready):
            return Quantised(self._pooled(source.node, source.pools), None)
        return Quantised(self._quantizer(source), self._slope(source))

    # -- nodes ----------------------------------------------------------------------------------------------

    def _quantizer(self, leaf: Leaf) -> fx.Node:
        if leaf.pools and leaf.node in self._unpooled:  # somebody reads it as it is: levels are pooled instead
            return self._pooled(self._quantizer(Leaf(leaf.node, (), leaf.activations)), leaf.pools)
        key = (leaf.node, leaf.pools)
        if key not in self._made:
            norm = norm_of(self.graph, leaf)
            base = leaf.node if norm is None else operand(leaf.node)
            pooled = self._pooled(base, leaf.pools)
            name = str(leaf.node.target) if norm is not None else _prefix(self.graph, leaf.node)
            normed = self._call(f"{name}_norm", self._norm(leaf.node, norm, pooled), pooled)
            self._made[key] = self._call(f"{name}_quantizer", self.make(), normed)
        return self._made[key]

    def _norm(self, node: fx.Node, old: _BatchNorm | None, pooled: fx.Node) -> _BatchNorm:
        """A batch norm without factors: as the one that was there, or as known statistics say."""
        shape = shape_of(pooled)
        kind: type[_BatchNorm] = nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d
        like = old.running_mean if old is not None else next(self.graph.module.parameters(), None)
        place = {} if like is None else {"device": like.device, "dtype": like.dtype}
        if old is not None:
            fresh = kind(shape[1], eps=old.eps, momentum=old.momentum, affine=False, **place)  # type: ignore[arg-type]
            known = old.running_mean, old.running_var
            self.plain += old.affine
        else:
            fresh, self.norms = kind(shape[1], affine=False, **place), self.norms + 1  # type: ignore[arg-type]
            known = self.statistics.get(node.name, (None, None))
            self.blind += known[0] is None
        for buffer, value in zip((fresh.running_mean, fresh.running_var), known, strict=True):
            if value is not None:
                assert buffer is not None
                buffer.copy_(value)
        return fresh.train(self.graph.module.training)

    def _call(self, path: str, layer: nn.Module, reads: fx.Node) -> fx.Node:
        known, unique, number = dict(self.graph.module.named_modules()), path, 1
        while unique in known or hasattr(self.graph.module, unique):
            number += 1
            unique = f"{path}_{number}"
        self.graph.module.add_submodule(unique, layer)
        node = self.graph.module.graph.call_module(unique, (reads,))
        node.meta = {key: value for key, value in reads.meta.items() if key in ("spec", "path", "source")}
        return node

    def _pooled(self, node: fx.Node, pools: Nodes) -> fx.Node:
        for pool in pools:
            channels = shape_of(node)[1]
            node = self._again(pool, node)
            shape = shape_of(pool)
            node.meta["spec"] = TensorSpec((shape[0], channels, *shape[2:]), pool.meta["spec"].dtype)
        return node

    def _again(self, node: fx.Node, reads: fx.Node) -> fx.Node:
        """The same operation on another tensor."""
        if operand(node) is reads:
            return node
        fresh = self.graph.module.graph.node_copy(node, lambda source: reads if source is operand(node) else source)
        fresh.meta = dict(node.meta)
        return fresh

    def _shaped(self, node: fx.Node, parts: list[Quantised]) -> fx.Node:
        """A concatenation's shape, which pools may have changed."""
        shape = shape_of(parts[0].node)
        channels = sum(shape_of(part.node)[1] for part in parts)
        node.meta["spec"] = TensorSpec((shape[0], channels, *shape[2:]), node.meta["spec"].dtype)
        return node

    # -- slopes ---------------------------------------------------------------------------------------------

    def _slope(self, leaf: Leaf) -> Tensor | None:
        norm = norm_of(self.graph, leaf)
        if norm is not None:
            ones = torch.ones(norm.num_features)
            scale = ones if norm.weight is None else norm.weight.detach()
            shift = 0 * ones if norm.bias is None else norm.bias.detach()
        elif leaf.node.name in self.statistics:
            shift, variance = self.statistics[leaf.node.name]
            scale = variance.sqrt()
        else:
            return None
        return slopes(self.graph, leaf.activations, self.make(), scale, shift)


def _prefix(graph: Graph, node: fx.Node) -> str:
    """What the modules behind a node are named after: its layer, or itself."""
    return str(node.target) if graph.layer(node) is not None else node.name


def _target(node: fx.Node) -> torch._ops.OpOverload:
    assert isinstance(node.target, torch._ops.OpOverload)
    return node.target


def _spread(part: Quantised, shape: tuple[int, ...]) -> Tensor | None:
    """Slopes behind a flattening, which gives each channel several features."""
    if part.slope is None or len(shape) == len(shape_of(part.node)):
        return part.slope
    return part.slope.repeat_interleave(shape[1] // len(part.slope))


def _joined(parts: list[Quantised]) -> Tensor | None:
    known = [part.slope for part in parts]
    if all(slope is None for slope in known):
        return None
    ones = [torch.ones(shape_of(part.node)[1], dtype=torch.float64) for part in parts]
    return torch.cat([one if slope is None else slope for slope, one in zip(known, ones, strict=True)])
