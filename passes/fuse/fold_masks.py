"""Channel masks disappear into the layers before them."""

from __future__ import annotations

from torch import fx

from ...ir.graph import Graph
from ...runtime.layers.channel_mask import ChannelMask
from ..base import Skip
from .affine import Producer, fold_affine, producer_before


def fold_masks(graph: Graph, author: str) -> tuple[int, list[Skip]]:
    """Fold every mask `m y` into the convolution or linear layer `y = w x + b` before it: `w' = m w`, `b' = m b`.

    Args:
        graph: edited.
        author: name of the pass, for the history.

    Returns:
        How many mask nodes were folded, and the others with their reasons.
    """
    masks = [node for node in graph.nodes if isinstance(graph.layer(node), ChannelMask)]
    skips = []
    with graph.edit(author):
        for node in masks:
            reason = _fold(graph, node)
            if reason is not None:
                skips.append(Skip(node.name, reason))
    return len(masks) - len(skips), skips


def _fold(graph: Graph, node: fx.Node) -> str | None:
    mask = graph.layer(node)
    assert isinstance(mask, ChannelMask)
    source = producer_before(graph, node, mask.dim)
    if isinstance(source, str):
        return source
    layer: Producer = graph.layer(source)  # type: ignore[assignment]
    fold_affine(layer, mask.mask.detach(), None)
    node.replace_all_uses_with(source)
    node.graph.erase_node(node)
    return None
