"""`insert-masks`: a factor on every channel that could be cut."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Annotated, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, model_validator
from torch import fx, nn

from ...ir.errors import OptionError
from ...ir.graph import Graph
from ...ir.groups import Groups, find_groups
from ...runtime.layers.channel_mask import ChannelMask
from ..base import LOSSY, Context, Pass, PassResult, Semantics
from ..options import InvalidOptionError, nearest
from .anchors import Anchor, find_anchors
from .criteria import Criterion, Source, score_classes

FloatArray = npt.NDArray[np.float64]


class InsertMasks(Pass):
    """Multiply every channel that could be cut with a factor of its own.

    The mask m acts on channel c of a tensor as `y[:, c] = m[c] * x[:, c]`. A factor belongs to a dependency class:
    all places whose tensors hold the class carry the same factor. One `ChannelMask` layer serves every place that
    holds the same classes in the same order: a residual stage has one mask, called behind each of the layers that add
    to it. Masks stand behind the layers that produce channels or add to them (convolutions, depthwise ones too,
    linear layers, norms), behind the norm where one follows at once, and before the activation. So a channel whose
    factor is zero is zero wherever it is read, as long as activations map zero to zero, and `prune-channels` may cut
    it.

    The factors are `masks` (given), or 0 for the share `ratio` of each group's channels that matters least by
    `criterion` and 1 for the rest, or, without either, 1: for a later pass to learn.
    """

    name: ClassVar[str] = "insert-masks"
    semantics: ClassVar[Semantics] = LOSSY

    masks: dict[str, list[float]] | None = None
    """Layer name or glob pattern, such as `layer1.0.conv1`: one factor per output channel of the layer."""
    ratio: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Share of each group's channels that gets the factor 0; at least one channel stays."""
    criterion: Criterion = "l1"
    """What says how much a channel matters; `fxpress.passes.prune.criteria` holds the formulas."""
    ignore: tuple[str, ...] = ()
    """Layers, by name or glob pattern, whose channels get no mask."""

    @model_validator(mode="after")
    def _check(self) -> InsertMasks:
        if self.masks is not None and self.ratio is not None:
            raise InvalidOptionError("'masks' and 'ratio' exclude each other; give one of them")
        return self

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Find the factor of every class, then put the layers in."""
        groups = graph.analyse(find_groups)
        anchors = [anchor for anchor in find_anchors(graph, groups) if not _matches(anchor.path, self.ignore)]
        factors = self._factors(graph, groups, anchors, context)
        layers = insert_layers(graph, anchors, factors, self.name)
        zeros = int((factors[groups.group_of >= 0] == 0).sum())
        note = f"{layers} masks at {len(anchors)} places; {zeros} of {int((groups.group_of >= 0).sum())} channels are 0"
        return PassResult([note], metrics={"masks": layers, "places": len(anchors), "zeros": zeros})

    def _factors(self, graph: Graph, groups: Groups, anchors: list[Anchor], context: Context) -> FloatArray:
        """The factor of every class, shape (classes,)."""
        if self.masks is not None:
            return given_factors(self.masks, anchors, groups.count)
        factors = np.ones(groups.count)
        if self.ratio is not None:
            who = f"{self.title()}, option 'criterion'"
            source = Source(context.data, seed=context.seed, console=context.console, who=who)
            scores = score_classes(graph, groups, self.criterion, source=source)
            touched = np.unique(np.concatenate([np.zeros(0, np.int64), *(anchor.classes for anchor in anchors)]))
            for group in groups.groups:
                classes = group.classes[np.isin(group.classes, touched)]
                weakest = classes[np.argsort(scores[classes], kind="stable")]
                factors[weakest[: min(round(self.ratio * len(classes)), len(group.classes) - 1)]] = 0
        return factors


def given_factors(masks: dict[str, list[float]], anchors: list[Anchor], count: int) -> FloatArray:
    """The factor of every class from factors per layer, shape (count,); 1 where nothing is given.

    Raises:
        OptionError: no such layer, a wrong number of factors, or two factors for channels that belong together.
    """
    factors = np.full(count, np.nan)
    for pattern, values in masks.items():
        matching = [anchor for anchor in anchors if anchor.produces and fnmatchcase(anchor.path, pattern)]
        if not matching:
            known = [anchor.path for anchor in anchors if anchor.produces]
            raise OptionError(
                f"pass 'insert-masks', option 'masks': no layer {pattern!r} whose channels could be masked: "
                f"{nearest(pattern, known)}layers: {', '.join(known[:8])}{', ...' if len(known) > 8 else ''}"
            )
        for anchor in matching:
            _give(factors, anchor, np.asarray(values, dtype=np.float64))
    factors[0] = np.nan
    factors[np.isnan(factors)] = 1.0
    return factors


def insert_layers(graph: Graph, anchors: list[Anchor], factors: FloatArray, author: str) -> int:
    """Put a mask behind every anchor and return the number of layers.

    Equal vectors of classes share a layer; where they lie in another dimension (tokens), the layers share the factors.
    """
    paths: dict[tuple[bytes, int], str] = {}
    masks: dict[bytes, nn.Parameter] = {}
    with graph.edit(author) as nodes:
        for anchor in anchors:
            key = anchor.classes.tobytes()
            if key not in masks:
                masks[key] = _parameter(anchor, factors)
            if (key, anchor.dim) not in paths:
                paths[key, anchor.dim] = _add_layer(graph, anchor, masks[key])
            _insert(nodes, anchor.node, paths[key, anchor.dim])
    return len(paths)


def _give(factors: FloatArray, anchor: Anchor, values: FloatArray) -> None:
    if len(values) != len(anchor.classes):
        raise OptionError(
            f"pass 'insert-masks', option 'masks': {anchor.path} has {len(anchor.classes)} channels, "
            f"given {len(values)} factors"
        )
    for channel, (index, value) in enumerate(zip(anchor.classes, values, strict=True)):
        if index and factors[index] != value and not np.isnan(factors[index]):
            raise OptionError(
                f"pass 'insert-masks', option 'masks': channel {channel} of {anchor.path} is given {value:g} and, "
                f"by a layer or group that it belongs together with, {factors[index]:g}"
            )
        factors[index] = value


def _parameter(anchor: Anchor, factors: FloatArray) -> nn.Parameter:
    return nn.Parameter(torch.from_numpy(factors[anchor.classes]).to(anchor.node.meta["spec"].dtype))


def _add_layer(graph: Graph, anchor: Anchor, mask: nn.Parameter) -> str:
    """A new mask layer with these factors; returns its path."""
    known = dict(graph.module.named_modules())
    base = path = f"masks.{anchor.path.replace('.', '_')}"
    count = 1
    while path in known:
        count += 1
        path = f"{base}_{count}"
    layer = ChannelMask(len(anchor.classes), anchor.dim)
    layer.mask = mask
    graph.module.add_submodule(path, layer)
    return path


def _insert(nodes: fx.Graph, anchor: fx.Node, path: str) -> None:
    with nodes.inserting_after(anchor):
        mask = nodes.call_module(path, (anchor,))
    mask.meta = {key: anchor.meta[key] for key in ("spec", "source") if key in anchor.meta} | {"path": path}
    anchor.replace_all_uses_with(mask, delete_user_cb=lambda user: user is not mask)


def _matches(path: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in patterns)
