"""Inverses of view operations: what a tensor holds once a view of it holds something new."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from .explaining import in_place_refusal

aten = torch.ops.aten

_SAME = frozenset({"alias", "detach", "dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout",
                   "contiguous", "to", "lift_fresh", "type_as", "_to_copy"})  # fmt: skip
_SCATTER = {
    "slice": aten.slice_scatter.default,
    "select": aten.select_scatter.default,
    "diagonal": aten.diagonal_scatter.default,
    "as_strided": aten.as_strided_scatter.default,
}
_SELF_INVERSE = frozenset({"transpose", "t", "swapaxes", "swapdims", "mT", "numpy_T"})
_RESHAPES = frozenset({"view", "view_as", "reshape", "reshape_as", "_unsafe_view", "flatten", "unflatten", "squeeze",
                       "unsqueeze", "ravel"})  # fmt: skip
_EXPANDS = frozenset({"expand", "expand_as"})
_PARTS = frozenset({"split", "split_with_sizes", "chunk", "tensor_split"})


def undo(graph: fx.Graph, link: fx.Node, before: fx.Node, new: Any) -> Any:
    """The value of `before` (what `link` is a view of) once the view holds `new`.

    New nodes are put at the graph's insertion point. For a view that is one of several parts (`getitem` of a split)
    `before` is the split, and the value is the list of all parts.

    Raises:
        TraceError: a view whose inverse is not known (overlapping windows, expanded dimensions).
    """
    name = getattr(link.target, "_opname", "getitem")
    if name == "getitem":
        return [new if i == link.args[1] else _part(graph, before, i) for i in range(len(before.meta["val"]))]
    if name in _SAME or (name in _EXPANDS and _shape(link) == _shape(before)):
        return new
    result = _inverse(graph, name, link, before, new)
    result.meta = {**link.meta, "val": before.meta["val"]}
    return result


def _inverse(graph: fx.Graph, name: str, link: fx.Node, before: fx.Node, new: Any) -> fx.Node:
    call, rest = graph.call_function, link.args[1:]
    if name in _SCATTER:
        return call(_SCATTER[name], (before, new, *rest), dict(link.kwargs))
    if name in _SELF_INVERSE:
        return call(link.target, (new, *rest), dict(link.kwargs))  # type: ignore[arg-type]
    if name in ("movedim", "moveaxis"):
        return call(link.target, (new, rest[1], rest[0]))  # type: ignore[arg-type]
    if name == "permute":
        order = [dim % len(_shape(link)) for dim in rest[0]]  # type: ignore[union-attr, operator]
        return call(aten.permute.default, (new, [order.index(dim) for dim in range(len(order))]))
    if name in _RESHAPES:
        return call(aten.reshape.default, (new, _sizes(graph, before)))
    if name == "narrow" and all(isinstance(a, int) for a in rest):
        dim, start, length = rest
        return call(aten.slice_scatter.default, (before, new, dim, start, start + length))  # type: ignore[operator]
    if name in _PARTS:
        return call(aten.cat.default, (new, link.kwargs.get("dim", rest[1] if len(rest) > 1 else 0)))
    if name == "unbind":
        return call(aten.stack.default, (new, link.kwargs.get("dim", rest[0] if rest else 0)))
    raise in_place_refusal(link, "is written to in place, and how that reaches the tensor it is a view of is unknown")


def _part(graph: fx.Graph, parts: fx.Node, index: int) -> fx.Node:
    part = graph.call_function(operator.getitem, (parts, index))
    part.meta = {**parts.meta, "val": parts.meta["val"][index]}
    return part


def _shape(node: fx.Node) -> torch.Size:
    shape: torch.Size = node.meta["val"].shape
    return shape


def _sizes(graph: fx.Graph, node: fx.Node) -> list[Any]:
    """Sizes of a node, symbolic ones asked at run time."""
    sizes: list[Any] = []
    for dim, size in enumerate(_shape(node)):
        if isinstance(size, torch.SymInt):
            asked = graph.call_function(aten.sym_size.int, (node, dim))
            asked.meta = {**node.meta, "val": size}
            sizes.append(asked)
        else:
            sizes.append(size)
    return sizes
