"""Channel masks disappear into the layers before them."""

from __future__ import annotations

from torch import Tensor, fx, nn

from ...ir.graph import Graph
from ...runtime.layers.channel_mask import ChannelMask
from ..base import Skip
from .affine import LINEAR, NORMS, fold_into, layers_before


def fold_masks(graph: Graph, author: str) -> tuple[int, list[Skip]]:
    """Fold every mask `m y` into the layer before it: `y = w x + b` becomes `y = (m w) x + m b`.

    That layer is a convolution, a linear layer or a norm with factors of its own.

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
    sources = layers_before(graph, node, (*LINEAR, *NORMS), mask.dim)
    if isinstance(sources, str):
        return sources
    for source in sources:
        reason = _unfit(graph.layer(source))
        if reason is not None:
            return f"{source.name} {reason}"
    fold_into(graph, sources, mask.dim, mask.factors.detach())
    node.replace_all_uses_with(node.all_input_nodes[0])
    node.graph.erase_node(node)
    return None


def _unfit(layer: nn.Module | None) -> str | None:
    """Why a norm has no factors per channel that could take up a mask's."""
    if not isinstance(layer, NORMS):
        return None
    if not isinstance(layer.weight, Tensor):
        return "has no factors of its own"
    return None if layer.weight.dim() == 1 else "normalises over more than its channels"
