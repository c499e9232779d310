"""Nodes of a graph as JSON.

{"name": "relu", "op": "call_function", "target": "aten.relu.default", "args": [{"node": "conv1"}], "kwargs": {},
 "meta": {"spec": {"dtype": "float32", "shape": [2, 8, 4, 4]}, "path": "layer1", "source": "model.py:63 x = ..."}}
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Set
from typing import Any

from torch import fx

from ...ir import dialect
from ...ir.errors import GraphError
from ...ir.graph import TensorSpec
from .checks import JSON, FormatError, check_keyword, check_name, check_object, check_text, clean, count
from .values import decode, encode

MAX_NODES = 20_000
MAX_ARGUMENTS = 200_000  # values in the arguments of all nodes; Python's compiler takes some 700 bytes for each
_MAX_ARGS = {"placeholder": 1, "get_attr": 0, "output": 1}
_OPS = ("placeholder", "get_attr", "call_module", "call_function", "output")
_TEXTS = ("path", "source", "author")
_MAX_TEXT = 4096
_BEFORE = "channels_before"  # how many channels a node had before it was cut


def encode_node(node: fx.Node) -> dict[str, JSON]:
    """A node as JSON.

    Raises:
        GraphError: its operation is not in the dialect.
        FormatError: an argument has no form in the format.
    """
    target = dialect.op_name(node.target) if node.op == "call_function" else str(node.target)
    meta: dict[str, JSON] = {key: clean(node.meta[key])[:_MAX_TEXT] for key in _TEXTS if node.meta.get(key)}
    if "spec" in node.meta:
        meta["spec"] = _encode_spec(node.meta["spec"])
    if _BEFORE in node.meta:
        meta[_BEFORE] = int(node.meta[_BEFORE])
    return {
        "name": node.name,
        "op": node.op,
        "target": target,
        "args": [_encode_argument(node, value) for value in node.args],
        "kwargs": {name: _encode_argument(node, value) for name, value in node.kwargs.items()},
        "meta": meta,
    }


def _encode_argument(node: fx.Node, value: Any) -> JSON:
    try:
        return encode(value, lambda leaf: {"node": leaf.name} if isinstance(leaf, fx.Node) else None)
    except FormatError as error:
        raise FormatError(f"node {node.name!r} ({node.target}): {error}") from None


def _encode_spec(spec: Any) -> JSON:
    if isinstance(spec, TensorSpec):
        return {"dtype": str(spec.dtype).removeprefix("torch."), "shape": [int(n) for n in spec.shape]}
    return [_encode_spec(part) for part in spec] if isinstance(spec, (tuple, list)) else encode(spec)


def decode_nodes(rows: list[JSON], targets: Mapping[str, Set[str]]) -> fx.Graph:
    """The nodes in a new graph.

    Args:
        rows: the nodes as JSON.
        targets: what `call_module` and `get_attr` may name.

    Raises:
        FormatError: a node that `encode_node` would not write.
    """
    _check_size(rows)
    graph = fx.Graph()
    known: dict[str, fx.Node] = {}
    for row in rows:
        _decode_node(row, graph, known, targets)
    _check_ends(list(graph.nodes))
    return graph


def _check_size(nodes: list[JSON]) -> None:
    arguments = sum(count(row.get("args")) + count(row.get("kwargs")) for row in nodes if isinstance(row, dict))
    if len(nodes) > MAX_NODES or arguments > MAX_ARGUMENTS:
        raise FormatError(
            f"the graph has {len(nodes)} nodes with {arguments} arguments, more than {MAX_NODES} and {MAX_ARGUMENTS}"
        )


def _decode_node(row: JSON, graph: fx.Graph, known: dict[str, fx.Node], targets: Mapping[str, Set[str]]) -> None:
    """Check one node and append it to the graph."""
    fields = {"name": str, "op": str, "target": str, "args": list, "kwargs": dict, "meta": dict}
    name = check_name(check_object(row, "a node", fields)["name"], "node")
    op, target = row["op"], row["target"]
    resolve = {"node": lambda other: _known(known, other, name)}
    args = tuple(decode(value, resolve) for value in row["args"])
    kwargs = {check_keyword(key, f"argument of {name}"): decode(value, resolve) for key, value in row["kwargs"].items()}
    if op not in _OPS or (op in targets and target not in targets[op]):
        raise FormatError(f"node {name!r}: there is no {op[:200]} {target[:200]!r}")
    if op in _MAX_ARGS and (len(args) > _MAX_ARGS[op] or kwargs):
        raise FormatError(f"node {name!r}: {op} takes at most {_MAX_ARGS[op]} argument")
    if op == "placeholder":
        check_name(target, "input")
    node = graph.create_node(op, _function(name, target) if op == "call_function" else target, args, kwargs, name)
    if node.name != name:
        raise FormatError(f"node {name!r} is there twice, or its name is one of Python's own")
    node.meta = _decode_meta(name, row["meta"])
    known[name] = node


def _known(known: dict[str, fx.Node], other: str, name: str) -> fx.Node:
    if other not in known:
        raise FormatError(f"node {name!r} reads {other[:200]!r}, which is no node before it")
    return known[other]


def _function(name: str, target: str) -> Callable[..., Any]:
    if target.startswith("torchvision."):
        importlib.import_module("torchvision")  # registers its ops
    try:
        return dialect.op_from_name(target)
    except GraphError as error:
        raise FormatError(f"node {name!r}: {error.what}") from None


def _decode_meta(name: str, meta: JSON) -> dict[str, Any]:
    check_object(meta, f"meta of node {name!r}", {}, {"spec": object, _BEFORE: int, **dict.fromkeys(_TEXTS, str)})
    found: dict[str, Any] = {
        key: check_text(meta[key], f"{key} of node {name!r}", _MAX_TEXT) for key in _TEXTS if key in meta
    }
    if _BEFORE in meta:
        if not 0 < meta[_BEFORE] < 2**31:
            raise FormatError(f"node {name!r}: {meta[_BEFORE]} is no number of channels")
        found[_BEFORE] = meta[_BEFORE]
    return found | ({"spec": _decode_spec(meta["spec"])} if "spec" in meta else {})


def _decode_spec(spec: JSON, depth: int = 0) -> Any:
    if isinstance(spec, list) and depth < 4:
        return tuple(_decode_spec(part, depth + 1) for part in spec)
    if isinstance(spec, dict) and "shape" in spec:
        check_object(spec, "the spec of a node", {"dtype": str, "shape": list})
        if not all(type(size) is int and size >= 0 for size in spec["shape"]):
            raise FormatError("the spec of a node has no valid shape")
        return TensorSpec(tuple(spec["shape"]), decode({"dtype": spec["dtype"]}, {}))
    if isinstance(spec, (list, str)):
        raise FormatError("the spec of a node is neither a tensor nor a number")
    return decode(spec, {})  # a size, or a number with a tag


def _check_ends(nodes: list[fx.Node]) -> None:
    """One output, at the end; inputs of distinct names."""
    inputs = [node.target for node in nodes if node.op == "placeholder"]
    outputs = [node for node in nodes if node.op == "output"]
    if len(outputs) != 1 or outputs[0] is not nodes[-1] or len(outputs[0].args) != 1:
        raise FormatError("the graph does not end in one output")
    if len(set(inputs)) != len(inputs):
        raise FormatError("two inputs have the same name")
