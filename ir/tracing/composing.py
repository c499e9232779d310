"""Core ATen back to the operations that layers are made of, for programs that were decomposed before they came here.

`native_layer_norm`, `native_group_norm` and the native batch norms return their statistics beside the result; where
only the result is read they are `layer_norm`, `group_norm` and `batch_norm`. `addmm(b, x, w.T)` is `linear(x, w, b)`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ..nodes import arguments
from .layer_rules import Arguments

aten = torch.ops.aten
Composed = tuple[torch._ops.OpOverload, tuple[Any, ...]]


def compose(graph: fx.Graph) -> None:
    """Replace decomposed norms and linear maps of an imported graph."""
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in _NORMS:
            _compose_norm(graph, node)
        elif node.target in _LINEAR:
            _compose_linear(graph, node)


def _batch_norm(a: Arguments) -> Composed:
    statistics = a.get("running_mean"), a.get("running_var")
    tensors = (a["input"], a["weight"], a["bias"], *statistics)
    return aten.batch_norm.default, (*tensors, a.get("training", False), a["momentum"], a["eps"], False)


def _group_norm(a: Arguments) -> Composed:
    return aten.group_norm.default, (a["input"], a["group"], a["weight"], a["bias"], a["eps"], False)


def _layer_norm(a: Arguments) -> Composed:
    return aten.layer_norm.default, (a["input"], a["normalized_shape"], a["weight"], a["bias"], a["eps"], False)


_NORMS: dict[Any, Callable[[Arguments], Composed]] = {
    aten._native_batch_norm_legit_no_training.default: _batch_norm,
    aten._native_batch_norm_legit.no_stats: _batch_norm,
    aten.native_group_norm.default: _group_norm,
    aten.native_layer_norm.default: _layer_norm,
}
_LINEAR = frozenset({aten.addmm.default, aten.mm.default})


def _compose_norm(graph: fx.Graph, node: fx.Node) -> None:
    parts = list(node.users)
    if any(part.target is not operator.getitem or (part.args[1] != 0 and part.users) for part in parts):
        return
    target, args = _NORMS[node.target](arguments(node))
    for part in parts:
        if part.args[1] == 0:
            _replace(graph, part, target, args, node)


def _compose_linear(graph: fx.Graph, node: fx.Node) -> None:
    a = arguments(node)
    bias, left, right = a.get("self"), a.get("mat1"), a["mat2"]
    if node.target is aten.mm.default:
        bias, left = None, a["self"]
    if a.get("alpha", 1) != 1 or a.get("beta", 1) != 1 or not _is_transpose(right):
        return
    if bias is not None and bias.meta["val"].dim() != 1:
        return
    _replace(graph, node, aten.linear.default, (left, right.args[0], bias), node)


def _is_transpose(node: fx.Node) -> bool:
    """Whether a node is the transpose of a matrix that the model stores."""
    swaps = node.target is aten.t.default
    if node.target is aten.permute.default:
        swaps = [d % 2 for d in arguments(node)["dims"]] == [1, 0]
    elif node.target is aten.transpose.int:
        swaps = arguments(node)["dim0"] % 2 != arguments(node)["dim1"] % 2
    return swaps and node.all_input_nodes[0].op == "get_attr"


def _replace(graph: fx.Graph, node: fx.Node, target: Any, args: tuple[Any, ...], origin: fx.Node) -> None:
    with graph.inserting_before(node):
        fresh = graph.call_function(target, args)
    fresh.meta = {**origin.meta, "val": node.meta["val"]}
    node.replace_all_uses_with(fresh)
