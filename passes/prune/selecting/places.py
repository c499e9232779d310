"""Where selection masks stand: behind every layer that gives channels of their own to a reader."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Literal

import numpy as np
import torch
from torch import Tensor, fx, nn

from ....ir.errors import CutError
from ....ir.graph import Graph
from ....ir.groups import Group, Groups, find_groups
from ....runtime.layers.channel_mask import ChannelMask
from ....runtime.layers.selection_mask import Alive, SelectionMask
from ..anchors import NORMS, Anchor, find_anchors
from ..insert_masks import insert_layers
from ..selection import BoolArray
from .masks import ClassMasks

Init = Literal["ones", "normal", "uniform", "unit"]
DRAWS: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "ones": lambda n, _: torch.ones(n),
    "normal": lambda n, g: (1 + 0.1 * torch.randn(n, generator=g)).abs(),
    "uniform": lambda n, g: 0.5 + torch.rand(n, generator=g),
    "unit": lambda n, g: torch.rand(n, generator=g),
}
"""First values of n factors: 1, |N(1, 0.1)|, U(0.5, 1.5), U(0, 1)."""


def place_masks(graph: Graph, *, ignore: tuple[str, ...], init: Init, alive: Alive, seed: int) -> ClassMasks:
    """Put a `SelectionMask` behind every layer whose channels may be cut.

    Masks are shared as `insert-masks` shares them: the layers that add to one residual stage have one, a layer inside a
    block has its own. Where `insert-masks` has run, its masks, all ones, are replaced, and no others are added. No mask
    stands where only norms read: batch statistics would undo it, and those norms have masks themselves.

    Args:
        graph: edited.
        ignore: layers, by name or glob pattern, whose channels all stay.
        init: how the factors begin.
        alive: see `SelectionMask`.
        seed: of random factors.

    Raises:
        CutError: there is nothing to select, or masks with factors other than 1.
    """
    covered = _remove_unit_masks(graph)
    groups = graph.analyse(find_groups)
    anchors = find_anchors(graph, groups)
    norms = {a.node for a in anchors if isinstance(graph.layer(a.node), NORMS)}
    needed = [a for a in anchors if a.node in norms or not _only_norms_read(a.node, groups, norms, anchors)]
    chosen = [a for a in needed if covered is None or a.node.name in covered]
    free = _free(groups, needed, chosen, ignore)
    chosen = [a for a in chosen if free[a.classes].any()]
    if not chosen:
        raise CutError(
            "pass 'select-channels' finds no channel that it may select",
            hint="`fxpress explain` shows what is pinned; is everything ignored?",
        )
    insert_layers(graph, chosen, np.ones(groups.count), "select-channels")
    _make_selective(graph, init, alive, torch.Generator().manual_seed(seed))
    return _by_class(graph, chosen, free)


def ignored(group: Group, patterns: tuple[str, ...]) -> bool:
    """Whether one of the layers that hold a group's channels is named."""
    layers = {slot.name.rpartition(".")[0] for slot in group.slots}
    return any(fnmatchcase(layer, pattern) for layer in layers for pattern in patterns)


def _remove_unit_masks(graph: Graph) -> set[str] | None:
    """Take out masks; names of the nodes behind which they stood, None where there were none."""
    found = [node for node in graph.nodes if isinstance(graph.layer(node), ChannelMask)]
    for node in found:
        layer = graph.layer(node)
        assert isinstance(layer, ChannelMask)
        if not bool((layer.factors == 1).all()):
            raise CutError(
                f"pass 'select-channels' learns masks that begin anew, and {node.target} has factors other than 1",
                hint="Run `prune-channels: {masks: given}` (or `learned`) before it.",
            )
    before = [node.all_input_nodes[0] for node in found]
    with graph.edit("select-channels"):
        for node, source in zip(found, before, strict=True):
            node.replace_all_uses_with(source)
            node.graph.erase_node(node)
    return {source.name for source in before} if found else None


def _only_norms_read(node: fx.Node, groups: Groups, norms: set[fx.Node], anchors: list[Anchor]) -> bool:
    """Whether all that becomes of a tensor, through additions and concatenations, first meets a norm with a mask."""
    others = {anchor.node for anchor in anchors} - norms
    seen: set[fx.Node] = set()
    stack = list(node.users)
    while stack:
        user = stack.pop()
        if user in norms or user in seen:
            continue
        if user in groups.labels.readers or user in others or user.op == "output":
            return False
        seen.add(user)
        stack += user.users
    return bool(node.users)


def _free(groups: Groups, needed: list[Anchor], chosen: list[Anchor], ignore: tuple[str, ...]) -> BoolArray:
    """Classes that may be selected: masked wherever they are read, and not ignored; shape (groups.count,)."""
    free = np.zeros(groups.count, dtype=bool)
    for anchor in chosen:
        free[anchor.classes] = True
    names = {anchor.node.name for anchor in chosen}
    for anchor in needed:
        if anchor.node.name not in names:
            free[anchor.classes] = False
    for group in groups.groups:
        if ignored(group, ignore):
            free[group.classes] = False
    free[groups.group_of < 0] = False
    return free


def _make_selective(graph: Graph, init: Init, alive: Alive, generator: torch.Generator) -> None:
    """Turn the new `ChannelMask` layers into `SelectionMask` layers that share factors and cuts as those did."""
    first: dict[int, SelectionMask] = {}
    found = {str(n.target): layer for n in graph.nodes if isinstance(layer := graph.layer(n), ChannelMask)}
    with graph.edit("select-channels"):
        for path, old in found.items():
            layer = SelectionMask(old.channels, old.dim, alive)
            twin = first.setdefault(id(old.mask), layer)
            if twin is layer:
                drawn = DRAWS[init](old.channels, generator)
                layer.mask = nn.Parameter(drawn.to(old.mask.dtype).to(old.mask.device))
                layer.keep = layer.keep.to(old.mask.device)
            layer.mask, layer.keep = twin.mask, twin.keep
            graph.module.add_submodule(path, layer)


def _by_class(graph: Graph, anchors: list[Anchor], free: BoolArray) -> ClassMasks:
    """The masks, and the classes of the graph that now holds them."""
    groups = graph.analyse(find_groups)
    masks = [next(iter(anchor.node.users)) for anchor in anchors]
    selectable = np.zeros(groups.count, dtype=bool)
    layers: dict[int, tuple[SelectionMask, Tensor]] = {}
    for anchor, node in zip(anchors, masks, strict=True):
        layer, axis = graph.layer(node), groups.channels(node)
        assert isinstance(layer, SelectionMask)
        assert axis is not None
        selectable[axis[1]] = free[anchor.classes]
        layers.setdefault(id(layer.mask), (layer, torch.from_numpy(axis[1])))
    selectable[groups.group_of < 0] = False
    return ClassMasks(groups, selectable, list(layers.values()))
