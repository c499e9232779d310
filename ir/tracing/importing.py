"""An `ExportedProgram` as a plain fx graph: parameters are `get_attr`, regions are inlined, assertions are left out.

The nodes still carry the `val` of the export (fake tensors); `functional.py` reads them, `raising.py` removes them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from ..errors import TraceError
from . import explaining, provenance

Values = dict[fx.Node, Any]
# states about sizes and values that hold on the example inputs, not operations of the network
_ASSERTIONS = frozenset({
    "_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range", "sym_constrain_range_for_size",
    "_functional_assert_async", "_functional_assert_scalar", "_functional_sym_constrain_range",
    "_functional_sym_constrain_range_for_size", "_assert", "_check",
})  # fmt: skip
_TENSORS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


def import_program(program: ExportedProgram) -> fx.Graph:
    """The program's nodes in a new graph; `get_attr` targets are state-dict names or `lifted_tensor_0`-like names."""
    graph = fx.Graph()
    values: Values = {}
    kinds = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            values[node] = _import_input(graph, node, kinds[node.name])
        elif node.op == "output":
            _import_output(graph, values, program, node)
        else:
            _import_node(graph, values, program.graph_module, node)
    return graph


def _import_input(graph: fx.Graph, node: fx.Node, spec: Any) -> fx.Node:
    if spec.kind in _TENSORS:
        fresh = graph.create_node("get_attr", spec.target)
    elif spec.kind is InputKind.USER_INPUT:
        fresh = graph.placeholder(node.name)
    else:
        raise TraceError(
            f"the model holds {spec.target or node.name!r}, a {spec.kind.name.lower().replace('_', ' ')}, not a tensor",
            hint="Replace it by parameters and buffers.",
        )
    fresh.meta = {"val": node.meta.get("val")}
    return fresh


def _import_output(graph: fx.Graph, values: Values, program: ExportedProgram, node: fx.Node) -> None:
    """Keep what the user's forward returns; a decomposed program lists mutated buffers and inputs before it."""
    signature = program.graph_signature
    if signature.buffers_to_mutate:
        raise explaining.own_tensor_refusal(next(iter(signature.buffers_to_mutate.values())), None)
    results: Any = node.args[0]
    graph.output(_mapped(tuple(results[len(results) - len(signature.user_outputs) :]), values))


def _import_node(graph: fx.Graph, values: Values, owner: torch.nn.Module, node: fx.Node) -> None:
    if node.op == "get_attr":
        values[node] = getattr(owner, str(node.target))  # the body of a region
        return
    packet = getattr(node.target, "_opname", getattr(node.target, "__name__", ""))
    if packet in _ASSERTIONS:
        return
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        values[node] = _inline(graph, values, node)
        return
    source: Any = node.args[0] if node.args else None
    if node.target is operator.getitem and not isinstance(values.get(source), fx.Node):
        values[node] = values[source][node.args[1]]  # an output of an inlined region
        return
    fresh = graph.create_node(node.op, node.target, _mapped(node.args, values), _mapped(node.kwargs, values), node.name)
    fresh.meta = {"val": node.meta.get("val"), "path": provenance.module_path(node.meta)}
    fresh.meta["source"] = provenance.source_line(node.meta.get("stack_trace"))
    values[node] = fresh


def _inline(graph: fx.Graph, values: Values, node: fx.Node) -> Any:
    """Put the nodes of a `torch.no_grad()` or disabled autocast region in place of its call; its outputs."""
    assert isinstance(node.target, torch._ops.HigherOrderOperator)
    name = node.target.name()  # type: ignore[no-untyped-call]
    arguments = list(_mapped(node.args, values))
    position = next((i for i, a in enumerate(arguments) if isinstance(a, fx.GraphModule)), None)
    if position is None or not _neutral(name, arguments[:position]):
        body = next((a for a in arguments if isinstance(a, fx.GraphModule)), None)
        raise explaining.region_refusal(node, name, body)
    region, operands = arguments[position], arguments[position + 1 :]
    inner: Values = {}
    inputs = iter(operands)
    for child in region.graph.nodes:
        if child.op == "placeholder":
            inner[child] = next(inputs)
        elif child.op == "output":
            return _mapped(child.args[0], inner)
        else:
            _import_node(graph, inner, region, child)
    raise explaining.region_refusal(node, name, region)


def _neutral(name: str, options: list[Any]) -> bool:
    """Whether a region computes what its nodes compute outside of it."""
    if name == "wrap_with_set_grad_enabled":
        return True
    return name == "wrap_with_autocast" and not options[2]


def _mapped(arguments: Any, values: Values) -> Any:
    return fx.node.map_aggregate(arguments, _lookup(values))


def _lookup(values: Values) -> Callable[[Any], Any]:
    def look(argument: Any) -> Any:
        return values[argument] if isinstance(argument, fx.Node) else argument

    return look
