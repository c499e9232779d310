"""A whole graph as JSON and back.

    {"nodes": [..], "signature": .., "modules": [..], "tensors": {..}, "examples": {"args", "kwargs", "tensors"},
     "dynamic_batch": true, "dropped": [..], "history": [..]}

Decoding names nothing but ops and layers of `ir/dialect.py`, and runs none of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from ...ir.graph import Graph
from .checks import JSON, FormatError, check_object, check_text, clean
from .modules import decode_modules, encode_modules
from .nodes import decode_nodes, encode_node
from .signature import decode_signature, encode_signature
from .tensors import Record, describe, read_record
from .values import decode, encode

INPUTS = "inputs/"  # names of example inputs; no path of a module has a slash
_SECTIONS = {"nodes": list, "signature": object, "modules": list, "tensors": dict, "examples": dict,
             "dynamic_batch": bool, "dropped": list, "history": list}  # fmt: skip


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


def encode_graph(graph: Graph) -> tuple[dict[str, JSON], dict[str, Tensor]]:
    """The graph as JSON and its tensors by name.

    Raises:
        FormatError, GraphError: what it holds has no form in the format.
    """
    modules, table, tensors = encode_modules(graph.module)
    examples, inputs = _encode_examples(graph)
    document = {
        "nodes": [encode_node(node) for node in graph.nodes],
        "signature": encode_signature(graph.module.graph._codegen),
        "modules": modules,
        "tensors": table,
        "examples": examples,
        "dynamic_batch": graph.dynamic_batch,
        "dropped": [clean(key) for key in graph.dropped],
        "history": [clean(name) for name in graph.history],
    }
    return document, tensors | inputs


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


def decode_graph(document: JSON) -> Draft:
    """Check the whole document and rebuild the graph on the `meta` device.

    Raises:
        FormatError: anything that `encode_graph` would not write.
    """
    check_object(document, "the graph", _SECTIONS)
    for name in ("dropped", "history"):
        for text in document[name]:
            check_text(text, f"an entry of {name}")
    tree = decode_modules(document["modules"], document["tensors"])
    records = tree.records | _decode_examples(document["examples"])
    targets = {"call_module": tree.layers.keys() | tree.tied.keys(), "get_attr": tree.tensor_names()}
    graph = decode_nodes(document["nodes"], targets)
    graph._codegen = decode_signature(document["signature"], list(graph.nodes))
    try:
        tree.root.graph = graph  # generates the code of forward()
    except Exception as error:  # arguments of the right form, but a wrong number of them for an operator
        raise FormatError(f"the nodes do not make a program ({error})") from error
    return Draft(tree.root, document, records)


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
