"""Pools that give what they read go."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ...ir.graph import Graph
from ...ir.nodes import arguments, shape_of

_aten = torch.ops.aten
_ADAPTIVE = (_aten.adaptive_avg_pool1d.default, _aten.adaptive_avg_pool2d.default, _aten.adaptive_avg_pool3d.default)
_WINDOWS = (_aten.max_pool2d.default, _aten.avg_pool2d.default)
_POOLS = (*_ADAPTIVE, *_WINDOWS)


def remove_identity_pools(graph: Graph, author: str) -> int:
    """Take out adaptive pools to the size that their input has, and pools of one pixel; returns how many went.

    The size of the input is that of the traced graph: that it can be no other at run time is shown by a path from the
    inputs on which the batch, which alone may vary, stays dimension 0.
    """
    found = [node for node in graph.nodes if node.target in _POOLS and _is_identity(graph, node)]
    with graph.edit(author):
        for node in found:
            node.replace_all_uses_with(node.all_input_nodes[0])
    return len(found)


def _is_identity(graph: Graph, node: fx.Node) -> bool:
    given = arguments(node)
    if node.target in _ADAPTIVE:
        source, size = node.all_input_nodes[0], list(given["output_size"])
        return size == list(shape_of(source)[-len(size) :]) and (not graph.dynamic_batch or _keeps_batch(node))
    ones = all(number == 1 for name in ("kernel_size", "stride") for number in _numbers(given[name]))
    plain = all(number == 0 for number in _numbers(given["padding"])) and given.get("divisor_override") in (None, 1)
    return ones and plain


def _numbers(value: Any) -> list[Any]:
    return [value] if isinstance(value, int | fx.Node) else list(value)


def _keeps_batch(node: fx.Node) -> bool:
    """Whether dimension 0 of all that a node depends on is dimension 0 of the inputs: layers, pools and pointwise
    operations keep it where the number of dimensions stays the same."""
    seen: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        now = waiting.pop()
        if now in seen or now.op in ("placeholder", "get_attr"):
            continue
        seen.add(now)
        pointwise = isinstance(now.target, torch._ops.OpOverload) and torch.Tag.pointwise in now.target.tags
        known = now.op == "call_module" or now.target in _POOLS or now.target is _aten.clone.default or pointwise
        if not known or len({_rank(n) for n in (now, *now.all_input_nodes) if n.op != "get_attr"}) > 1:
            return False
        waiting += now.all_input_nodes
    return True


def _rank(node: fx.Node) -> int | None:
    """Number of dimensions; None for what is no tensor."""
    shape = getattr(node.meta["spec"], "shape", None)
    return None if shape is None else len(shape)
