"""A whole graph as JSON and back.

    {"nodes": [..], "signature": .., "modules": [..], "tensors": {..}, "examples": {"args", "kwargs", "tensors"},
     "packed": {"bytes": .., "sha256": ".."},                        only where layers are packed, see `codecs.py`
     "dynamic_batch": true, "dropped": [..], "history": [..]}

Decoding names nothing but ops and layers of `ir/dialect.py`, and runs none of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ...ir.graph import Graph
from .checks import JSON, FormatError, check_object, check_text, clean
from .codecs import PACKED, Place, unpack_layers
from .container import digest
from .examples import INPUTS, Drawn, describe_example, read_drawn
from .modules import decode_modules, encode_modules
from .nodes import decode_nodes, encode_node
from .signature import decode_signature, encode_signature
from .tensors import Record, read_record
from .values import decode, encode

_SECTIONS = {"nodes": list, "signature": object, "modules": list, "tensors": dict, "examples": dict,
             "dynamic_batch": bool, "dropped": list, "history": list}  # fmt: skip


@dataclass
class Draft:
    """A decoded graph without its data: `records` says what is to be read and where it belongs."""

    module: fx.GraphModule
    document: dict[str, JSON]
    records: dict[str, Record]
    drawn: dict[str, Drawn]
    packed: list[Place]

    def finish(self, loose: dict[str, Tensor]) -> Graph:
        """The graph, once all tensors are in place; `loose` are those without one: example inputs, packed layers."""
        if self.packed:
            unpack_layers(self.packed, loose[PACKED].numpy().data)
        examples = loose | {name: one.make() for name, one in self.drawn.items()}
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


def encode_graph(graph: Graph, *, exact: bool = False) -> tuple[dict[str, JSON], dict[str, Tensor]]:
    """The graph as JSON and its tensors by name.

    Args:
        graph: what to store.
        exact: whether layers are stored by their state dicts and example inputs as they are, bit by bit.

    Raises:
        FormatError, GraphError: what it holds has no form in the format.
    """
    tree = encode_modules(graph.module, exact=exact)
    examples, inputs = _encode_examples(graph, exact)
    document = {
        "nodes": [encode_node(node) for node in graph.nodes],
        "signature": encode_signature(graph.module.graph._codegen),
        "modules": tree.modules,
        "tensors": tree.table,
        "examples": examples,
        "dynamic_batch": graph.dynamic_batch,
        "dropped": [clean(key) for key in graph.dropped],
        "history": [clean(name) for name in graph.history],
    }
    if tree.packed:
        blob = inputs[PACKED] = torch.frombuffer(bytearray(b"".join(tree.packed)), dtype=torch.uint8)
        document["packed"] = {"bytes": blob.numel(), "sha256": digest(blob)}
    return document, tree.tensors | inputs


def _encode_examples(graph: Graph, exact: bool) -> tuple[dict[str, JSON], dict[str, Tensor]]:
    inputs: dict[str, Tensor] = {}
    names: dict[int, str] = {}

    def leaf(value: Any) -> JSON:
        if not isinstance(value, Tensor):
            return None
        name = names.setdefault(id(value), f"{INPUTS}{len(names)}")
        inputs[name] = value.detach()
        return {"tensor": name}

    args, kwargs = encode(tuple(graph.example_args), leaf), encode(graph.example_kwargs, leaf)
    rows = {name: describe_example(name, tensor, exact=exact) for name, tensor in inputs.items()}
    kept = {name: inputs[name] for name, (_, stored) in rows.items() if stored}
    return {"args": args, "kwargs": kwargs, "tensors": {name: row for name, (row, _) in rows.items()}}, kept


def decode_graph(document: JSON) -> Draft:
    """Check the whole document and rebuild the graph on the `meta` device.

    Raises:
        FormatError: anything that `encode_graph` would not write.
    """
    check_object(document, "the graph", _SECTIONS, {"packed": dict})
    for name in ("dropped", "history"):
        for text in document[name]:
            check_text(text, f"an entry of {name}")
    tree = decode_modules(document["modules"], document["tensors"])
    examples = _decode_examples(document["examples"])
    records = tree.records | {name: one for name, one in examples.items() if isinstance(one, Record)}
    records |= _packed_record(document.get("packed"), tree.packed)
    targets = {"call_module": tree.layers.keys() | tree.tied.keys(), "get_attr": tree.tensor_names()}
    graph = decode_nodes(document["nodes"], targets)
    graph._codegen = decode_signature(document["signature"], list(graph.nodes))
    try:
        tree.root.graph = graph  # generates the code of forward()
    except Exception as error:  # arguments of the right form, but a wrong number of them for an operator
        raise FormatError(f"the nodes do not make a program ({error})") from error
    drawn = {name: one for name, one in examples.items() if isinstance(one, Drawn)}
    return Draft(tree.root, document, records, drawn, tree.packed)


def _packed_record(row: JSON, places: list[Place]) -> dict[str, Record]:
    """The tensor that holds all packed layers."""
    if row is None and not places:
        return {}
    check_object(row, "the row of packed layers", {"bytes": int, "sha256": str})
    if row["bytes"] != sum(place.row["bytes"] for place in places):
        raise FormatError(f"the packed layers do not take the {row['bytes']} bytes that are there")
    return {PACKED: Record(torch.uint8, (row["bytes"],), row["sha256"])}


def _decode_examples(examples: JSON) -> dict[str, Record | Drawn]:
    check_object(examples, "the example inputs", {"args": dict, "kwargs": dict, "tensors": dict})
    records = {
        name: read_drawn(name, row) if isinstance(row, dict) and "drawn" in row else read_record(name, row)
        for name, row in examples["tensors"].items()
    }
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
