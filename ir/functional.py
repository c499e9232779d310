"""In-place operations become functional ones, exactly: a write through a view reaches its base and all other views.

Every node is an alias of one *base* by a chain of view operations. The graph is walked once in program order with the
current value of each base. `y = op_(v, ...)` with `v = chain(base)` becomes `y = op(v, ...)`, and the base takes the
value `chain⁻¹(base, y)`: a scatter for slice, select and split, the inverse permutation or reshape for the bijective
ones. Reads of other aliases of that base recompute their chain on the new value. For the usual case, `relu_(bn(x))`,
the chain is empty and nothing but the name of the operation changes.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from .errors import TraceError

aten = torch.ops.aten


@dataclass(frozen=True)
class _Alias:
    """A node is `links` applied to `base`, computed when the base was at `version`."""

    base: fx.Node
    links: tuple[fx.Node, ...]
    version: int


@dataclass
class _State:
    graph: fx.Graph
    alias: dict[fx.Node, _Alias] = field(default_factory=dict)
    value: dict[fx.Node, fx.Node] = field(default_factory=dict)  # current value of a base
    version: dict[fx.Node, int] = field(default_factory=dict)  # number of writes to a base
    renewed: dict[tuple[fx.Node, int], fx.Node] = field(default_factory=dict)  # last link, version -> its value


def make_functional(graph: fx.Graph) -> None:
    """Replace all in-place operations of an imported graph (nodes carry the fake tensors of the export as `val`).

    A write to an input of the network changes what is computed afterwards, but no longer the caller's tensor.

    Raises:
        TraceError: a write to a parameter or buffer of the model, or one whose functional form is not known.
    """
    if not any(_is_inplace(node) for node in graph.nodes):
        return
    state = _State(graph)
    for node in list(graph.nodes):
        with graph.inserting_before(node):
            node.args = fx.map_arg(node.args, lambda n: _read(state, n))
            node.kwargs = fx.map_arg(node.kwargs, lambda n: _read(state, n))
            if _is_inplace(node):
                _write(state, node)
            else:
                _record(state, node)


def _is_inplace(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


# Reading --------------------------------------------------------------------------------------------------------------


def _record(state: _State, node: fx.Node) -> None:
    """Note whether a node is a view of an alias or a base of its own."""
    source = _viewed(node)
    if source is None:
        state.alias[node] = _Alias(node, (), 0)
        state.value[node], state.version[node] = node, 0
    else:
        parent = state.alias[source]
        _note(state, node, parent.base, (*parent.links, node), node)


def _note(state: _State, node: fx.Node, base: fx.Node, links: tuple[fx.Node, ...], link: fx.Node) -> None:
    version = state.version[base]
    state.alias[node] = _Alias(base, links, version)
    state.renewed[link, version] = node


def _viewed(node: fx.Node) -> fx.Node | None:
    """The argument whose memory a node's result shares; what the export ran is asked, since `reshape`, `to` and an
    inactive `dropout` may or may not copy."""
    if node.op != "call_function":
        return None
    own = _storage(node)
    return next((a for a in node.all_input_nodes if own is not None and _storage(a) == own), None)


def _storage(node: fx.Node) -> int | None:
    value = node.meta.get("val")
    while isinstance(value, (tuple, list)) and value:
        value = value[0]
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else None


def _read(state: _State, node: fx.Node) -> fx.Node:
    """The node that holds what `node` would hold now."""
    alias = state.alias[node]
    if alias.version == state.version[alias.base]:
        return node
    return _renew(state, alias.base, alias.links)


def _renew(state: _State, base: fx.Node, links: tuple[fx.Node, ...]) -> fx.Node:
    if not links:
        return state.value[base]
    link = links[-1]
    known = state.renewed.get((link, state.version[base]))
    if known is None:
        parent = _renew(state, base, links[:-1])
        known = state.graph.call_function(link.target, (parent, *link.args[1:]), dict(link.kwargs))
        known.meta = dict(link.meta)
        _note(state, known, base, links, link)
    return known


# Writing --------------------------------------------------------------------------------------------------------------


def _write(state: _State, node: fx.Node) -> None:
    target = node.args[0]
    written = [a.name for a in node.target._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    if len(written) != 1 or not isinstance(target, fx.Node) or node.target._schema.arguments[0].name != written[0]:
        raise _refusal(node, "writes to several tensors or through `out=`")
    if torch.Tag.inplace_view in node.target.tags:
        node.target = _functional(node)
        _record(state, node)
        return
    alias = state.alias[target]
    if alias.base.op == "get_attr":
        raise _own_tensor(node, alias.base)
    result = _result(state, node, target)
    if result is not target:
        _store(state, alias.base, alias.links, result)
    node.replace_all_uses_with(result)
    state.graph.erase_node(node)


def _result(state: _State, node: fx.Node, target: fx.Node) -> fx.Node:
    """The value that an in-place node leaves in `target`, as a functional node."""
    name, call = node.target._opname, state.graph.call_function
    if name == "copy_":
        return _copied(state, node, target)
    if name == "zero_":
        result = call(aten.zeros_like.default, (target,))
    elif name == "fill_" and node.target._overloadname == "Scalar":
        result = call(aten.full_like.default, (target, node.args[1]))
    else:
        result = call(_functional(node), node.args, dict(node.kwargs))
    result.meta = dict(node.meta)
    return _cast(state, result, target) if _promotes(node, target) else result


def _copied(state: _State, node: fx.Node, target: fx.Node) -> fx.Node:
    """`target.copy_(source)`: the source itself, in the target's shape and type; `target` where nothing changes."""
    source = node.args[1]
    if _same_place(state, source, target):
        return target
    result = source
    if source.meta["val"].shape != target.meta["val"].shape:
        result = state.graph.call_function(aten.expand_as.default, (source, target))
    elif source.meta["val"].dtype == target.meta["val"].dtype:
        result = state.graph.call_function(aten.clone.default, (source,))
    if result is not source:
        result.meta = {**node.meta, "val": node.meta["val"].to(source.meta["val"].dtype)}
    return result if source.meta["val"].dtype == target.meta["val"].dtype else _cast(state, result, target)


def _same_place(state: _State, a: fx.Node, b: fx.Node) -> bool:
    """Whether two nodes are the same part of the same base: what `x[i] += y` writes back."""
    one, other = state.alias[a], state.alias[b]
    return one.base is other.base and list(map(_form, one.links)) == list(map(_form, other.links))


def _form(link: fx.Node) -> tuple[Any, ...]:
    return (link.target, link.args[1:], link.kwargs)


def _promotes(node: fx.Node, target: fx.Node) -> bool:
    """Whether the functional form may give another type than the tensor written to."""
    own = target.meta["val"].dtype
    for argument in node.args[1:]:
        value = argument.meta.get("val") if isinstance(argument, fx.Node) else argument
        if isinstance(value, torch.Tensor) and value.dtype != own:
            return True
        if isinstance(value, float) and not own.is_floating_point:
            return True
    return False


def _cast(state: _State, node: fx.Node, like: fx.Node) -> fx.Node:
    cast = state.graph.call_function(aten.to.dtype, (node, like.meta["val"].dtype))
    cast.meta = {**node.meta, "val": like.meta["val"].clone()}
    return cast


def _functional(node: fx.Node) -> torch._ops.OpOverload:
    """The overload of the same name without the trailing underscore."""
    packet = getattr(getattr(torch.ops, node.target.namespace), node.target._opname.removesuffix("_"), None)
    overload = getattr(packet, node.target._overloadname, None)
    if node.target._opname.endswith("_") and overload is not None and not overload._schema.is_mutable:
        found: torch._ops.OpOverload = overload
        return found
    raise _refusal(node, "has no functional form")


def _store(state: _State, base: fx.Node, links: tuple[fx.Node, ...], value: fx.Node) -> None:
    """Put `value` at `links` of the base; from here on all aliases of the base are out of date."""
    content: Any = value
    for i in reversed(range(len(links))):
        content = _undo(state, links[i], _renew(state, base, links[:i]), content)
    state.version[base] += 1
    state.value[base] = content
    _note(state, content, base, (), base)
    if links:
        _note(state, value, base, links, links[-1])


# Inverses of views ----------------------------------------------------------------------------------------------------

_SAME = frozenset({"alias", "detach", "dropout", "feature_dropout", "alpha_dropout", "contiguous", "to", "lift_fresh",
                   "view_as", "type_as", "_to_copy", "clone", "positive"})  # fmt: skip
_SCATTER = {"slice": aten.slice_scatter.default, "select": aten.select_scatter.default,
            "diagonal": aten.diagonal_scatter.default, "as_strided": aten.as_strided_scatter.default}  # fmt: skip
_SELF_INVERSE = frozenset({"transpose", "t", "swapaxes", "swapdims", "mT", "numpy_T"})
_RESHAPES = frozenset({"view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "ravel"})
_PARTS = {"split": aten.cat.default, "split_with_sizes": aten.cat.default, "chunk": aten.cat.default,
          "tensor_split": aten.cat.default, "unbind": aten.stack.default}  # fmt: skip


def _undo(state: _State, link: fx.Node, before: fx.Node, new: Any) -> Any:
    """The value of `before` (what `link` views) once the view holds `new`; a list for one of several parts."""
    name, call = getattr(link.target, "_opname", "getitem"), state.graph.call_function
    if name == "getitem":
        count = len(before.meta["val"])
        return [new if i == link.args[1] else _part(state, before, i) for i in range(count)]
    if name in _SAME or _shape(link) == _shape(before) and name in ("expand", "expand_as", *_RESHAPES):
        return new
    if name in _SCATTER:
        result = call(_SCATTER[name], (before, new, *link.args[1:]), dict(link.kwargs))
    elif name in _SELF_INVERSE:
        result = call(link.target, (new, *link.args[1:]), dict(link.kwargs))
    elif name == "permute":
        rank = len(link.args[1])
        order = [d % rank for d in link.args[1]]
        result = call(aten.permute.default, (new, [order.index(d) for d in range(rank)]))
    elif name in _RESHAPES:
        result = call(aten.reshape.default, (new, _sizes(state, before)))
    elif name in _PARTS:
        dim = link.args[1 if name == "unbind" else 2] if len(link.args) > (1 if name == "unbind" else 2) else 0
        result = call(_PARTS[name], (new, link.kwargs.get("dim", dim)))
    else:
        raise _refusal(link, "is written to in place, and how that reaches the tensor it views is not known")
    result.meta = {**link.meta, "val": before.meta["val"].clone()}
    return result


def _part(state: _State, parts: fx.Node, index: int) -> fx.Node:
    part = state.graph.call_function(operator.getitem, (parts, index))
    part.meta = {**parts.meta, "val": parts.meta["val"][index]}
    return part


def _shape(node: fx.Node) -> Any:
    return getattr(node.meta.get("val"), "shape", None)


def _sizes(state: _State, node: fx.Node) -> list[Any]:
    """Sizes of a node, symbolic ones asked at run time."""
    sizes: list[Any] = []
    for dim, size in enumerate(node.meta["val"].shape):
        if isinstance(size, torch.SymInt):
            asked = state.graph.call_function(aten.sym_size.int, (node, dim))
            asked.meta = {**node.meta, "val": size}
            sizes.append(asked)
        else:
            sizes.append(size)
    return sizes


def _refusal(node: fx.Node, why: str) -> TraceError:
    where = node.meta.get("source") or node.meta.get("path") or "the model"
    return TraceError(
        f"{where}: the in-place operation {node.target} {why}",
        hint="Write it without the in-place form (`x = x + y` for `x += y`).",
    )


def _own_tensor(node: fx.Node, base: fx.Node) -> TraceError:
    where = node.meta.get("source") or node.meta.get("path") or "the model"
    return TraceError(
        f"{where}: the forward pass in eval mode writes to the model's own tensor {base.target!r}",
        hint="Return the new value instead of storing it, or guard the line with `if self.training:`.",
    )
