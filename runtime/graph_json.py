"""A whole graph as JSON and back: nodes, signature, example inputs, history; modules and tensors in `module_json.py`.

    "nodes": [{"name": "relu", "op": "call_function", "target": "aten.relu.default", "args": [{"node": "conv1"}],
               "kwargs": {}, "meta": {"spec": {"dtype": "float32", "shape": [..]}, "path": .., "source": ..}}, ..]
    "signature": null, or {"names": ["x"], "inputs": structure, "outputs": structure} with 0 for each tensor

Decoding names nothing but ops and layers of `ir/dialect.py`; all strings that reach generated code are checked.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx
from torch.fx.graph import CodeGen, _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from ..ir import dialect
from ..ir.errors import GraphError
from ..ir.graph import Graph, TensorSpec
from .module_json import Record, decode_modules, describe, encode_modules, read_record
from .value_json import (
    JSON,
    FormatError,
    check_keyword,
    check_name,
    check_object,
    check_text,
    clean,
    count,
    decode,
    encode,
)

MAX_NODES = 20_000
MAX_ARGUMENTS = 200_000  # values in the arguments of all nodes; Python's compiler takes some 700 bytes for each
_SECTIONS = {"nodes": list, "signature": object, "modules": list, "tensors": dict, "examples": dict,
             "dynamic_batch": bool, "dropped": list, "history": list}  # fmt: skip
INPUTS = "inputs/"  # names of example inputs; no path of a module has a slash
_MAX_ARGS = {"placeholder": 1, "get_attr": 0, "output": 1}
_TEXTS = ("path", "source", "author")
_BEFORE = "channels_before"  # how many channels a node had before it was cut
_OPS = ("placeholder", "get_attr", "call_module", "call_function", "output")


@dataclass
class Draft:
    """A decoded graph without its data: `records` says what is to be read and where it belongs."""

    module: fx.GraphModule
    document: dict[str, JSON]
    records: dict[str, Record]

    def finish(self, examples: dict[str, Tensor]) -> Graph:
        """The graph, once all tensors are in place; `examples` are the data of the example inputs."""
        values = self.document["examples"]
        args = decode(values["args"], {"tensor": examples.__getitem__})
        kwargs = decode(values["kwargs"], {"tensor": examples.__getitem__})
        graph = Graph(
            self.module,
            args,
            kwargs,
            dynamic_batch=self.document["dynamic_batch"],
            dropped=tuple(self.document["dropped"]),
        )
        graph.history = list(self.document["history"])
        return graph


# To JSON --------------------------------------------------------------------------------------------------------------


def encode_graph(graph: Graph) -> tuple[dict[str, JSON], dict[str, Tensor]]:
    """The graph as JSON and its tensors by name.

    Raises:
        FormatError, GraphError: what it holds has no form in the format.
    """
    modules, table, tensors = encode_modules(graph.module)
    examples, inputs = _encode_examples(graph)
    document = {
        "nodes": [_encode_node(node) for node in graph.nodes],
        "signature": _encode_signature(graph.module.graph._codegen),
        "modules": modules,
        "tensors": table,
        "examples": examples,
        "dynamic_batch": graph.dynamic_batch,
        "dropped": list(graph.dropped),
        "history": list(graph.history),
    }
    return document, tensors | inputs


def _encode_node(node: fx.Node) -> dict[str, JSON]:
    target = dialect.op_name(node.target) if node.op == "call_function" else str(node.target)
    meta = {key: clean(node.meta[key]) for key in _TEXTS if node.meta.get(key)}
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


def _encode_signature(codegen: CodeGen) -> JSON:
    if type(codegen) is CodeGen:
        return None
    if type(codegen) is not _PyTreeCodeGen:
        raise FormatError(f"the graph has a {type(codegen).__name__}, whose calling convention cannot be stored")
    info = codegen.pytree_info
    outputs = None if info.out_spec is None else _encode_structure("outputs", info.out_spec)
    return {"names": list(info.orig_args), "inputs": _encode_structure("inputs", info.in_spec), "outputs": outputs}


def _encode_structure(what: str, spec: pytree.TreeSpec) -> JSON:
    structure = pytree.tree_unflatten([0] * spec.num_leaves, spec)
    try:
        return encode(structure)
    except FormatError as error:
        raise FormatError(f"the {what} of the model are not made of tuples, lists and dicts: {error}") from None


def _encode_examples(graph: Graph) -> tuple[dict[str, JSON], dict[str, Tensor]]:
    inputs: dict[str, Tensor] = {}
    names: dict[int, str] = {}

    def leaf(value: Any) -> JSON:
        if not isinstance(value, Tensor):
            return None
        name = names.setdefault(id(value), f"{INPUTS}{len(names)}")
        inputs[name] = value.detach()
        return {"tensor": name}

    args, kwargs = encode(tuple(graph.example_args), leaf), encode(graph.example_kwargs, leaf)
    rows = {name: describe(name, tensor) for name, tensor in inputs.items()}
    return {"args": args, "kwargs": kwargs, "tensors": rows}, inputs


# From JSON ------------------------------------------------------------------------------------------------------------


def decode_graph(document: JSON) -> Draft:
    """Check the whole document and rebuild the graph on the `meta` device.

    Raises:
        FormatError: anything that `encode_graph` would not write.
    """
    check_object(document, "the graph", _SECTIONS)
    for name in ("dropped", "history"):
        for text in document[name]:
            check_text(text, f"an entry of {name}")
    _check_size(document["nodes"])
    tree = decode_modules(document["modules"], document["tensors"])
    records = tree.records | _decode_examples(document["examples"])
    graph = fx.Graph()
    known: dict[str, fx.Node] = {}
    targets = {"call_module": tree.layers.keys() | tree.tied.keys(), "get_attr": tree.tensor_names()}
    for row in document["nodes"]:
        _decode_node(row, graph, known, targets)
    _check_ends(list(graph.nodes))
    graph._codegen = _decode_signature(document["signature"], list(graph.nodes))
    try:
        tree.root.graph = graph  # generates the code of forward()
    except Exception as error:  # arguments of the right form, but a wrong number of them for an operator
        raise FormatError(f"the nodes do not make a program ({error})") from error
    return Draft(tree.root, document, records)


def _check_size(nodes: list[JSON]) -> None:
    arguments = sum(count(row.get("args")) + count(row.get("kwargs")) for row in nodes if isinstance(row, dict))
    if len(nodes) > MAX_NODES or arguments > MAX_ARGUMENTS:
        raise FormatError(
            f"the graph has {len(nodes)} nodes with {arguments} arguments, more than {MAX_NODES} and {MAX_ARGUMENTS}"
        )


def _decode_examples(examples: JSON) -> dict[str, Record]:
    check_object(examples, "the example inputs", {"args": dict, "kwargs": dict, "tensors": dict})
    records = {name: read_record(name, row) for name, row in examples["tensors"].items()}
    if not all(name.startswith(INPUTS) for name in records):
        raise FormatError(f"an example input is not named {INPUTS}N")
    used: set[str] = set()

    def find(name: str) -> Tensor:
        if name not in records:
            raise FormatError(f"example input {name[:200]!r} is missing")
        used.add(name)
        return records[name].meta()

    args, kwargs = decode(examples["args"], {"tensor": find}), decode(examples["kwargs"], {"tensor": find})
    if not isinstance(args, tuple) or not isinstance(kwargs, dict) or used != records.keys():
        raise FormatError("the example inputs are not a tuple and a dict of the tensors that are stored")
    return records


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
    found: dict[str, Any] = {key: check_text(meta[key], f"{key} of node {name!r}") for key in _TEXTS if key in meta}
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


def _decode_signature(signature: JSON, nodes: list[fx.Node]) -> CodeGen:
    if signature is None:
        return CodeGen()
    check_object(signature, "the signature", {"names": list, "inputs": dict, "outputs": object})
    names = [check_name(name, "input") for name in signature["names"]]
    inputs = decode(signature["inputs"], {})
    if not (type(inputs) is tuple and [type(part) for part in inputs] == [tuple, dict]):
        raise FormatError("the inputs are not a tuple and a dict")
    for key in inputs[1]:
        check_keyword(key, "keyword input")
    in_spec = _structure(inputs, sum(node.op == "placeholder" for node in nodes))
    if len(set(names)) != len(names) or len(names) != len(inputs[0]) + len(inputs[1]):
        raise FormatError("the names of the inputs do not fit their number")
    out_spec, returned = None, nodes[-1].args[0]
    if signature["outputs"] is not None:
        count = len(returned) if isinstance(returned, (list, tuple)) else -1
        out_spec = _structure(decode(signature["outputs"], {}), count)
    return _PyTreeCodeGen(_PyTreeInfo(names, in_spec, out_spec))


def _structure(value: Any, leaves: int) -> pytree.TreeSpec:
    found, spec = pytree.tree_flatten(value)
    if len(found) != leaves or any(leaf != 0 for leaf in found):
        raise FormatError(f"the signature has {len(found)} values where the graph has {leaves}")
    return spec
