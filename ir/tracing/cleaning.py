"""Leave out of an imported graph what computes nothing: copies, identities, memory layout, values nobody reads."""

from __future__ import annotations

import torch
from torch import fx

aten = torch.ops.aten

_COPIES = frozenset({"clone", "contiguous", "lift_fresh", "lift_fresh_copy", "alias", "positive"})
_CASTS = frozenset({"to", "_to_copy", "type_as"})
_LAYOUT = frozenset({"as_strided", "as_strided_scatter"})  # these see strides
_RESHAPES = {aten.view.default: aten.reshape.default, aten._unsafe_view.default: aten.reshape.default}


def clean(graph: fx.Graph) -> None:
    """Drop copies and identities, turn `view` into `reshape`, erase dead nodes.

    Values are what counts, not memory: with `reshape` in place of `view` nothing depends on strides, and layers may run
    in channels-last. A graph that itself looks at strides (`as_strided`) keeps its copies.
    """
    strided = any(getattr(node.target, "_opname", "") in _LAYOUT for node in graph.nodes)
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        node.target = _RESHAPES.get(node.target, node.target)
        source = _identity(node, strided)
        if source is not None:
            node.replace_all_uses_with(source)
    erase_dead(graph)


def erase_dead(graph: fx.Graph) -> None:
    """Erase the nodes that nothing reads; placeholders stay, they are the signature."""
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)


def _identity(node: fx.Node, strided: bool) -> fx.Node | None:
    """The argument that a node passes on unchanged, None if it computes something."""
    name = getattr(node.target, "_opname", "")
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    if name in _COPIES:
        return None if strided else source
    if name in _CASTS and not strided:
        return source if _same_type(node, source) else None
    if name == "detach" and not getattr(source.meta.get("val"), "requires_grad", True):
        return source
    if name in ("slice", "slice_scatter") and _is_full_slice(node):
        return source if name == "slice" else _fitting(node.args[1], node)
    return None


def _fitting(new: object, node: fx.Node) -> fx.Node | None:
    return new if isinstance(new, fx.Node) and new.meta["val"].shape == node.meta["val"].shape else None


def _same_type(node: fx.Node, source: fx.Node) -> bool:
    one, other = node.meta.get("val"), source.meta.get("val")
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return False
    return one.dtype == other.dtype and one.device == other.device


def _is_full_slice(node: fx.Node) -> bool:
    """Whether a slice (or a write to one) covers the whole dimension."""
    offset = 1 if getattr(node.target, "_opname", "") == "slice" else 2
    names = ("dim", "start", "end", "step")
    given = {**dict(zip(names, node.args[offset:], strict=False)), **node.kwargs}
    start, end, step = given.get("start"), given.get("end"), given.get("step", 1)
    if start not in (None, 0) or step != 1:
        return False
    size = node.all_input_nodes[0].meta["val"].shape[given.get("dim", 0)]
    whole = end is None or (isinstance(end, int) and end == 2**63 - 1)
    return whole or (isinstance(end, int) and isinstance(size, int) and end >= size)
