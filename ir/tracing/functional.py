"""In-place operations become functional ones, exactly: a write through a view reaches its base and all other views.

Every node is an *alias*: a base (a tensor with memory of its own) seen through a chain of view operations, its links.
The graph is walked once in program order with the current value of each base. `y = op_(v, ...)` with `v = links(base)`
becomes `y = op(v, ...)`, and the base takes the value `links⁻¹(base, y)` (see `views.py`). A later read of another
alias of that base recomputes its links on the new value. In the usual case, `relu_(bn(x))`, there are no links and
nothing but the name of the operation changes.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from . import views
from .explaining import in_place_refusal, own_tensor_refusal

aten = torch.ops.aten


@dataclass(frozen=True)
class _Alias:
    """A node is `links` applied to `base`, computed when the base had been written to `version` times."""

    base: fx.Node
    links: tuple[fx.Node, ...]
    version: int


@dataclass
class _Memory:
    """What every node and every base stands for at the current point of the program."""

    graph: fx.Graph
    alias: dict[fx.Node, _Alias] = field(default_factory=dict)
    value: dict[fx.Node, fx.Node] = field(default_factory=dict)  # of a base
    version: dict[fx.Node, int] = field(default_factory=dict)  # of a base
    renewed: dict[tuple[fx.Node, int], fx.Node] = field(default_factory=dict)  # last link, version -> its value

    def note(self, node: fx.Node, base: fx.Node, links: tuple[fx.Node, ...]) -> None:
        """`node` holds what `links` of the base are now."""
        version = self.version[base]
        self.alias[node] = _Alias(base, links, version)
        self.renewed[links[-1] if links else base, version] = node


def make_functional(graph: fx.Graph) -> None:
    """Replace all in-place operations of an imported graph (its nodes carry the export's fake tensors as `val`).

    A write to an input of the network changes what is computed afterwards, but no longer the caller's tensor.

    Raises:
        TraceError: a write to a parameter or buffer of the model, or one whose functional form is not known.
    """
    if not any(_writes(node) for node in graph.nodes):
        return
    memory = _Memory(graph)
    for node in list(graph.nodes):
        with graph.inserting_before(node):
            node.args = fx.map_arg(node.args, lambda n: _read(memory, n))
            node.kwargs = fx.map_arg(node.kwargs, lambda n: _read(memory, n))
            if _writes(node):
                _write(memory, node)
            else:
                _record(memory, node)


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


# Reading --------------------------------------------------------------------------------------------------------------


def _record(memory: _Memory, node: fx.Node) -> None:
    """Note whether a node is a view of an alias or a base of its own."""
    source = _viewed(memory, node)
    if source is None:
        memory.value[node], memory.version[node] = node, 0
        memory.note(node, node, ())
    else:
        parent = memory.alias[source]
        memory.note(node, parent.base, (*parent.links, node))


def _viewed(memory: _Memory, node: fx.Node) -> fx.Node | None:
    """The argument whose memory a node's result shares. The fake tensors know: whether `reshape`, `to` or an inactive
    `dropout` copies depends on what it is given."""
    own = _storage(node) if node.op == "call_function" else None
    if own is None:
        return None
    source = next((a for a in node.all_input_nodes if _storage(a) == own), None)
    if node.target is operator.getitem and source is not None and not memory.alias[source].links:
        return None  # one of several results of an operation that is no view
    return source


def _storage(node: fx.Node) -> int | None:
    value = node.meta.get("val")
    while isinstance(value, (tuple, list)) and value:
        value = value[0]
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else None


def _read(memory: _Memory, node: fx.Node) -> fx.Node:
    """The node that holds now what `node` stands for."""
    alias = memory.alias[node]
    if alias.version == memory.version[alias.base]:
        return node
    return _renew(memory, alias.base, alias.links)


def _renew(memory: _Memory, base: fx.Node, links: tuple[fx.Node, ...]) -> fx.Node:
    if not links:
        return memory.value[base]
    link = links[-1]
    known = memory.renewed.get((link, memory.version[base]))
    if known is None:
        parent = _renew(memory, base, links[:-1])
        known = memory.graph.call_function(link.target, (parent, *link.args[1:]), dict(link.kwargs))  # type: ignore[arg-type]
        known.meta = dict(link.meta)
        memory.note(known, base, links)
    return known


# Writing --------------------------------------------------------------------------------------------------------------


def _write(memory: _Memory, node: fx.Node) -> None:
    target = _target(node)
    if torch.Tag.inplace_view in node.target.tags:  # type: ignore[union-attr]
        node.target = _functional(node)
        _record(memory, node)
        return
    alias = memory.alias[target]
    if alias.base.op == "get_attr":
        raise own_tensor_refusal(str(alias.base.target), node)
    result = _result(memory, node, target)
    if result is not target:
        _store(memory, alias.base, alias.links, result)
    node.replace_all_uses_with(result)
    memory.graph.erase_node(node)


def _target(node: fx.Node) -> fx.Node:
    """The tensor that a node writes to: its first argument and no other."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    written = [i for i, a in enumerate(schema) if a.alias_info is not None and a.alias_info.is_write]
    if written != [0] or not isinstance(node.args[0], fx.Node):
        raise in_place_refusal(node, "writes to more than its first argument")
    return node.args[0]


def _store(memory: _Memory, base: fx.Node, links: tuple[fx.Node, ...], value: fx.Node) -> None:
    """Put `value` at `links` of the base; all that was known of the base before is out of date from here on."""
    content: Any = value
    for i in reversed(range(len(links))):
        content = views.undo(memory.graph, links[i], _renew(memory, base, links[:i]), content)
    memory.version[base] += 1
    memory.value[base] = content
    memory.note(content, base, ())
    if content is not value:
        memory.note(value, base, links)


def _result(memory: _Memory, node: fx.Node, target: fx.Node) -> fx.Node:
    """What an in-place node leaves in `target`, as a new functional node; `target` itself where nothing changes."""
    name = node.target._opname  # type: ignore[union-attr]

    def call(op: Any, args: Any, kwargs: Any = None) -> fx.Node:
        return memory.graph.create_node("call_function", op, args, kwargs, name.strip("_"))

    if name == "copy_":
        return _copied(memory, node, target)
    if name == "zero_":
        result = call(aten.zeros_like.default, (target,))
    elif name == "fill_" and node.target._overloadname == "Scalar":  # type: ignore[union-attr]
        result = call(aten.full_like.default, (target, node.args[1]))
    else:
        result = call(_functional(node), node.args, dict(node.kwargs))
    result.meta = {**node.meta, "val": target.meta["val"]}
    if _may_promote(node, target.meta["val"].dtype):
        result.meta["val"] = _fake_result(result)
        return _cast(memory, result, target)
    return result


def _copied(memory: _Memory, node: fx.Node, target: fx.Node) -> fx.Node:
    """`target.copy_(source)`: the source in the target's shape and type."""
    source = node.args[1]
    assert isinstance(source, fx.Node)
    if _same_place(memory, source, target):  # what Python makes of `x[i] += y` ends in this
        return target
    old, new = source.meta["val"], target.meta["val"]
    copy, call = source, memory.graph.call_function
    if old.shape != new.shape:
        copy = call(aten.expand_as.default, (source, target))
    elif old.dtype == new.dtype:
        copy = call(aten.clone.default, (source,))  # a node of its own to stand for the target
    if copy is not source:
        copy.meta = {**node.meta, "val": new if old.dtype == new.dtype else old.expand(new.shape)}
    return copy if old.dtype == new.dtype else _cast(memory, copy, target)


def _same_place(memory: _Memory, a: fx.Node, b: fx.Node) -> bool:
    """Whether two nodes are the same part of the same base."""
    one, other = memory.alias[a], memory.alias[b]
    return one.base is other.base and list(map(_form, one.links)) == list(map(_form, other.links))


def _form(link: fx.Node) -> tuple[Any, ...]:
    return (link.target, link.args[1:], link.kwargs)


def _may_promote(node: fx.Node, own: torch.dtype) -> bool:
    """Whether the functional form may give another type than that of the tensor written to."""
    for argument in node.args[1:]:
        value = argument.meta.get("val") if isinstance(argument, fx.Node) else argument
        if isinstance(value, torch.Tensor) and value.dtype != own:
            return True
        if isinstance(value, (int, float)) and not own.is_floating_point and not own.is_complex:
            return True
    return False


def _cast(memory: _Memory, node: fx.Node, like: fx.Node) -> fx.Node:
    """`node` in the type of `like`, as a write keeps the type of what is written to."""
    cast = memory.graph.call_function(aten.to.dtype, (node, like.meta["val"].dtype))
    cast.meta = {**node.meta, "val": like.meta["val"]}
    return cast


def _fake_result(node: fx.Node) -> torch.Tensor:
    assert isinstance(node.target, torch._ops.OpOverload)
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    result: torch.Tensor = node.target(*args, **kwargs)
    return result


def _functional(node: fx.Node) -> torch._ops.OpOverload:
    """The overload that takes the same arguments and returns what the in-place one leaves in its first."""
    op = node.target
    assert isinstance(op, torch._ops.OpOverload)
    packet = getattr(getattr(torch.ops, op.namespace), op._opname.removesuffix("_"), None)
    if op._opname.endswith("_") and isinstance(packet, torch._ops.OpOverloadPacket):
        for name in packet.overloads():  # type: ignore[no-untyped-call]
            overload: torch._ops.OpOverload = getattr(packet, name)
            if not overload._schema.is_mutable and _signature(overload) == _signature(op):
                return overload
    raise in_place_refusal(node, "has no functional form")


def _signature(op: torch._ops.OpOverload) -> list[tuple[str, str]]:
    """Names and types of the arguments; the first, which is written to, may go by another name (`dropout_`)."""
    first, *rest = op._schema.arguments
    return [("self", str(first.type)), *((argument.name, str(argument.type)) for argument in rest)]
