"""Damaged and hostile files: an `ArtifactError` that names the file, nothing executed, no memory taken, no hang."""

from __future__ import annotations

import copy
import hashlib
import json
import operator
import os
import resource
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fxpress.ir.errors import ArtifactError
from fxpress.ir.graph import Graph, TensorSpec
from fxpress.runtime.artifact import load, save
from fxpress.runtime.layers import PQConv2d
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

JSON = Any
Document = dict[str, JSON]
SECONDS = 10.0  # a load of these few kilobytes takes some milliseconds


def small_graph() -> Graph:
    """A convolution, a batch norm, a quantized convolution, a scale, a slice and a sum; two inputs, one a keyword."""
    root = nn.Module()
    root.block = nn.Module()
    root.block.conv, root.block.bn = nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)
    root.block.pq = PQConv2d(3, 3, 1, subspace=2, codewords=4, codebook="int8")
    root.block.register_parameter("scale", nn.Parameter(torch.ones(3, 1, 1)))
    nodes = fx.Graph()
    x, shift = nodes.placeholder("x"), nodes.placeholder("shift")

    def call(op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return nodes.create_node("call_function", op, args, kwargs, getattr(op, "_opname", op.__name__))

    y = nodes.call_module("block.bn", (nodes.call_module("block.conv", (x,)),))
    y = nodes.call_module("block.pq", (y,))
    y = call(torch.ops.aten.mul.Tensor, y, nodes.get_attr("block.scale"))
    y = call(torch.ops.aten.gelu.default, y, approximate="tanh")
    y = call(torch.ops.aten.reshape.default, y, [call(torch.ops.aten.sym_size.int, y, 0), -1])
    y = call(operator.getitem, y, (slice(None), slice(0, 3, 2)))
    y = call(torch.ops.aten.add.Tensor, y, shift)
    nodes.output((y,))
    for node in nodes.nodes:
        node.meta = {"spec": TensorSpec((2, 3), torch.float32), "path": "block", "source": "model.py:3 y = x"}
    in_spec, out_spec = pytree.tree_structure(((0,), {"shift": 0})), pytree.tree_structure({"out": 0})
    nodes._codegen = _PyTreeCodeGen(_PyTreeInfo(["x", "shift"], in_spec, out_spec))
    graph = Graph(fx.GraphModule(root, nodes), (torch.randn(2, 2, 6, 6),), {"shift": torch.ones(1)})
    graph(*graph.example_args, **graph.example_kwargs)
    return graph


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "good.fxp"
    save(path, small_graph(), pipeline={"seed": 1}, report={"rows": [1.5]})
    return path.read_bytes()


def unpack(data: bytes) -> tuple[dict[str, JSON], bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def assemble(header: dict[str, JSON] | bytes, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def document_of(data: bytes) -> Document:
    """The description: graph, pipeline and report."""
    header, body = unpack(data)
    start, end = header["fxpress/document"]["data_offsets"]
    return json.loads(zlib.decompress(body[start:end]))


def with_bytes(data: bytes, described: bytes) -> bytes:
    """The file with other bytes as its description, correctly signed: a hostile writer can."""
    header, body = unpack(data)
    start, end = header["fxpress/document"]["data_offsets"]
    grown = len(described) - (end - start)
    for entry in (header[name] for name in header if name != "__metadata__"):
        entry["data_offsets"] = [at + grown if at >= end else at for at in entry["data_offsets"]]
    header["fxpress/document"].update(shape=[len(described)], data_offsets=[start, start + len(described)])
    header["__metadata__"]["sha256"] = hashlib.sha256(described).hexdigest()
    return assemble(header, body[:start] + described + body[end:])


def with_text(data: bytes, text: str) -> bytes:
    return with_bytes(data, zlib.compress(text.encode("utf-8", "surrogatepass")))


def with_graph(data: bytes, change: Callable[[Document], object]) -> bytes:
    """The file with another, correctly signed graph."""
    document = document_of(data)
    change(document["graph"])
    return with_text(data, json.dumps(document))


def refused(path: Path, data: bytes) -> str:
    """Message of the error that loading must raise."""
    path.write_bytes(data)
    started = time.perf_counter()
    with pytest.raises(ArtifactError) as caught:
        load(path)
    assert time.perf_counter() - started < SECONDS
    message = str(caught.value)
    assert path.name in message
    assert caught.value.hint
    assert len(message) < 1000
    return message


def put(*path: str | int, value: JSON) -> Callable[[Document], None]:
    """A change that sets one place of the document."""

    def change(document: Document) -> None:
        at: Any = document
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value

    return change


def node(name: str, **fields: JSON) -> Callable[[Document], None]:
    """A change of fields of one node."""

    def change(document: Document) -> None:
        next(row for row in document["nodes"] if row["name"] == name).update(fields)

    return change


def rename(old: str, new: str) -> Callable[[Document], None]:
    """A change of a node's name everywhere."""

    def change(document: Document) -> None:
        text = json.dumps(document["nodes"])
        text = text.replace(f'"name": "{old}"', f'"name": {json.dumps(new)}')
        document["nodes"] = json.loads(text.replace(f'{{"node": "{old}"}}', f'{{"node": {json.dumps(new)}}}'))

    return change


def module(index: int, **fields: JSON) -> Callable[[Document], None]:
    return lambda document: document["modules"][index].update(fields)


def test_the_good_file_loads(good: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.fxp").write_bytes(with_graph(good, lambda document: None))
    assert [n.name for n in load(tmp_path / "m.fxp").graph.nodes] == [n.name for n in small_graph().nodes]


@pytest.fixture(scope="module")
def memory() -> Iterator[None]:
    """What follows takes no more memory than a few loads do."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < 200 << 10  # KiB


# Code that a file would like to run -----------------------------------------------------------------------------------

# what `torch.fx` would paste into the source of forward()
PAYLOAD = "open('executed','w')"
NAMES = [f"x={PAYLOAD};y", f"a\n{PAYLOAD}", "self", "torch", "pytree", "getattr", "print", "class", "__debug__",
         "__import__", "\uff53elf", "", "1x", "x" * 10_000, "a.b", "a-b", "mul", "lambda", "None", "x ",
         "output"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_node_names(good: bytes, tmp_path: Path, name: str) -> None:
    refused(tmp_path / "m.fxp", with_graph(good, rename("gelu", name)))


@pytest.mark.parametrize("name", [*NAMES[:4], "class", "*args", "x: int", f"x={PAYLOAD}", "shift"])
def test_input_names(good: bytes, tmp_path: Path, name: str) -> None:
    refused(tmp_path / "m.fxp", with_graph(good, node("x", target=name)))
    if name != "shift":
        refused(tmp_path / "m.fxp", with_graph(good, put("signature", "names", 0, value=name)))


@pytest.mark.parametrize("key", ["shift", f"',{PAYLOAD},'", "a b", "\\", "lambda"])
def test_keyword_names(good: bytes, tmp_path: Path, key: str) -> None:
    pairs = {"dict": [["shift", 0], [key, 0]]}
    refused(tmp_path / "m.fxp", with_graph(good, put("signature", "inputs", "tuple", 1, value=pairs)))
    refused(tmp_path / "m.fxp", with_graph(good, node("gelu", kwargs={f"{key} ": "tanh"})))


OPS = ["os.system", "builtins.eval", "builtins.getattr", "operator.setitem", "operator.attrgetter", "torch.hub.load",
       "torch.load", "aten.relu_.default",
       "aten.copy_.default", "aten.from_file.default", "aten.save.default",
       "aten.__class__.default", "aten.add.__globals__", "aten.add.out", "prims.add.default",
       "aten.add", "", "aten.nothing.default", "a" * 100_000, "call_method"]  # fmt: skip


@pytest.mark.parametrize("target", OPS)
def test_functions(good: bytes, tmp_path: Path, target: str) -> None:
    message = refused(tmp_path / "m.fxp", with_graph(good, node("gelu", target=target)))
    assert "'gelu'" in message


@pytest.mark.parametrize("op", ["call_method", "root", "exec", ""])
def test_kinds_of_nodes(good: bytes, tmp_path: Path, op: str) -> None:
    refused(tmp_path / "m.fxp", with_graph(good, node("gelu", op=op)))


VALUES: list[JSON] = [
    "it's", 'say "', "back\\slash", "line\nend", f"{{{PAYLOAD}}}", "%s", "é", "x" * 300,
    {"eval": "1"}, {"float": "1e5"}, {"dtype": "nn"}, {"dtype": ["float32"]}, {"device": "cuda:0"}, {"layout": "os"},
    {"node": "add"}, {"node": "nowhere"}, {"node": ["x"]}, {"tensor": "inputs/0"}, {}, {"tuple": [], "slice": []},
    {"slice": [1]}, {"tuple": 3}, {"dict": [["a"]]}, {"dict": [["a", 1], ["a", 2]]}, {"dict": [[{"node": "x"}, 1]]},
    2**63, [[[]]] * 2 + [json.loads("[" * 40 + "]" * 40)],
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_values(good: bytes, tmp_path: Path, value: JSON) -> None:
    refused(tmp_path / "m.fxp", with_graph(good, node("gelu", kwargs={"approximate": value})))


PATHS = ["forward", "block.forward", "block.register_buffer", "training", "graph", "code", "_in_spec", "_out_spec",
         "__class__", "block.__class__.x", "block.__dict__", "..", "../../etc/passwd", "/etc", "block.", ".block",
         f"block.x;{PAYLOAD}", "block.a b", "block.'", "block.class", "block.conv", "block.conv.deeper", "nobody.conv",
         "block.\uff46orward", "x" * 2000, "block." * 200 + "x"]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_module_paths(good: bytes, tmp_path: Path, path: str) -> None:
    for row in ({"path": path, "training": True}, {"path": path, "same": "block.conv"}):
        refused(tmp_path / "m.fxp", with_graph(good, lambda document, row=row: document["modules"].append(row)))


@pytest.mark.parametrize("path", [*PATHS, "block.bn", "block.bn.other", ""])
def test_tensor_paths(good: bytes, tmp_path: Path, path: str) -> None:
    row = {"kind": "buffer", "persistent": True, "dtype": "F32", "shape": [], "sha256": ""}
    refused(tmp_path / "m.fxp", with_graph(good, lambda document: document["tensors"].update({path: row})))


LAYERS: dict[str, dict[str, JSON]] = {
    "no class": {"type": "os.system"},
    "another module": {"type": "torch.nn.Conv2d"},
    "not listed": {"type": "Sequential"},
    "option": {"config": {"in_channels": 2, "hook": "x"}},
    "huge": {"config": {"in_channels": 10**12, "out_channels": 10**6, "kernel_size": [1, 1]}},
    "overflow": {"config": {"in_channels": 2**62, "out_channels": 2**62, "kernel_size": [2**62, 9]}},
    "negative": {"config": {"in_channels": -2, "out_channels": 3, "kernel_size": [1, 1]}},
    "text": {"config": {"in_channels": "2", "out_channels": 3, "kernel_size": [1, 1]}},
    "dimensions": {"config": {"in_channels": 2, "out_channels": 3, "kernel_size": [1] * 10_000}},
    "groups": {"config": {"in_channels": 2, "out_channels": 3, "kernel_size": [1, 1], "groups": 0}},
    "absent": {"config": {"in_channels": 2, "out_channels": 3, "kernel_size": [1, 1], "absent": 5}},
    "absent method": {"config": {"in_channels": 2, "out_channels": 3, "kernel_size": [1, 1], "absent": ["forward"]}},
    "tensor": {"config": {"in_channels": {"tensor": "block.scale"}}},
}


@pytest.mark.parametrize("fields", LAYERS.values(), ids=LAYERS)
def test_layers(good: bytes, tmp_path: Path, fields: dict[str, JSON]) -> None:
    rows = document_of(good)["graph"]["modules"]
    index = next(i for i, row in enumerate(rows) if row.get("type") == "Conv2d")
    assert "block.conv" in refused(tmp_path / "m.fxp", with_graph(good, module(index, **fields)))


def drop_output(document: Document) -> None:
    document["nodes"].pop()


def move_output(document: Document) -> None:
    document["nodes"].insert(-2, document["nodes"].pop())


STRUCTURES: dict[str, Callable[[Document], object]] = {
    "reads itself": node("gelu", args=[{"node": "gelu"}]),
    "no output": drop_output,
    "output within": move_output,
    "two outputs": lambda d: d["nodes"].append({**d["nodes"][-1], "name": "output_1"}),
    "no nodes": put("nodes", value=[]),
    "node is text": put("nodes", 0, value="x"),
    "calls a container": node("block_conv", target="block"),
    "calls nothing": node("block_conv", target="block.other"),
    "reads a layer": node("block_scale", target="block.conv"),
    "reads a method": node("block_scale", target="block.forward"),
    "operator without arguments": node("getitem", args=[]),
    "operator of three": lambda d: d["nodes"][-2].update(target="operator.add", args=[1]),
    "input with a default that is a node": lambda d: d["nodes"][1].update(args=[{"node": "x"}, 1]),
    "control character": node("gelu", meta={"source": "\x1b[2J"}),
    "channels": node("gelu", meta={"channels_before": -1}),
    "unknown meta": node("gelu", meta={"stack_trace": "x"}),
    "spec": node("gelu", meta={"spec": {"dtype": "float32", "shape": [-1]}}),
    "spec depth": node("gelu", meta={"spec": [[[[[[1]]]]]]}),
    "fewer inputs": put("signature", "inputs", value={"tuple": [{"tuple": []}, {"dict": [["shift", 0]]}]}),
    "inputs no tuple": put("signature", "inputs", value={"dict": []}),
    "more outputs": put("signature", "outputs", value={"tuple": [0, 0]}),
    "unknown leaf": put("signature", "outputs", value=[5]),
    "examples missing": put("examples", "args", value={"tuple": []}),
    "examples unknown": put("examples", "args", value={"tuple": [{"tensor": "block.scale"}]}),
    "examples no tuple": put("examples", "args", value={"dict": []}),
    "examples name": lambda d: d["examples"]["tensors"].update(x=d["examples"]["tensors"].pop("inputs/0")),
    "history": put("history", value=[3]),
    "dynamic": put("dynamic_batch", value=1),
    "unknown section": put("extra", value=1),
    "no section": lambda d: d.pop("tensors"),
    "modules is a dict": put("modules", value={}),
    "no root": lambda d: d["modules"].pop(0),
    "root is a layer": module(0, type="Dropout", config={}),
    "root is tied": put("modules", 0, value={"path": "", "same": "block.conv"}),
    "mode": module(1, training="yes"),
    "tied to itself": lambda d: d["modules"].append({"path": "again", "same": "again"}),
    "tied to a container": lambda d: d["modules"].append({"path": "block.again", "same": "block"}),
}


@pytest.mark.parametrize("change", STRUCTURES.values(), ids=STRUCTURES)
def test_structures(good: bytes, tmp_path: Path, change: Callable[[Document], object]) -> None:
    refused(tmp_path / "m.fxp", with_graph(good, change))


WEIGHT = ("tensors", "block.conv.weight")
SCALE = ("tensors", "block.scale")
PARAMETER = {"kind": "parameter", "requires_grad": True}
BUFFER = {"kind": "buffer", "persistent": True, "dtype": "F32", "sha256": ""}
TENSORS: dict[str, Callable[[Document], object]] = {
    "missing": lambda d: d["tensors"].pop("block.conv.weight"),
    "dtype": put(*WEIGHT, "dtype", value="F64"),
    "no dtype": put(*WEIGHT, "dtype", value="object"),
    "shape": put(*WEIGHT, "shape", value=[2, 3, 1, 1]),
    "huge": put(*WEIGHT, "shape", value=[2**40, 2**40]),
    "overflow": put(*SCALE, "shape", value=[2**62, 2**62, 2**62, 0]),
    "dimensions": put(*SCALE, "shape", value=[1] * 1000),
    "negative": put(*SCALE, "shape", value=[-3, -1, 1]),
    "bool": put(*SCALE, "shape", value=[3, True, True]),
    "checksum": put(*WEIGHT, "sha256", value="0" * 64),
    "kind": lambda d: d["tensors"].update({"block.bn.running_mean": d["tensors"]["block.scale"]}),
    "buffer": put(*WEIGHT, value={**BUFFER, "shape": [3, 2, 1, 1]}),
    "integer that learns": put(*SCALE, value={**PARAMETER, "dtype": "I64", "shape": [3, 1, 1], "sha256": ""}),
    "channels last": put(*SCALE, "channels_last", value=True),
    "tied to nothing": put(*SCALE, value={**PARAMETER, "same": "no"}),
    "tied to a buffer": put(*SCALE, value={**PARAMETER, "same": "block.bn.running_mean"}),
    "tied to itself": put(*SCALE, value={**PARAMETER, "same": "block.scale"}),
    "tied shape": put("tensors", "block.bn.weight", value={**PARAMETER, "same": "block.conv.weight"}),
    "unknown kind": put(*SCALE, "kind", value="code"),
}


@pytest.mark.parametrize("change", TENSORS.values(), ids=TENSORS)
def test_tensor_tables(good: bytes, tmp_path: Path, change: Callable[[Document], object]) -> None:
    refused(tmp_path / "m.fxp", with_graph(good, change))


def test_nothing_of_the_above_was_executed() -> None:
    """The payload of this file would have left its mark in the working directory."""
    assert not Path("executed").exists()


@pytest.mark.usefixtures("memory")
def test_much_code(good: bytes, tmp_path: Path) -> None:
    """Python's compiler takes a hundred times the memory of a list in a file."""
    message = refused(tmp_path / "m.fxp", with_graph(good, node("gelu", args=[[0] * 900_000])))
    assert "900" in message
    row = {"op": "call_function", "target": "aten.relu.default", "args": [{"node": "x"}], "kwargs": {}, "meta": {}}
    chain = [{**row, "name": f"relu_{index}"} for index in range(40_000)]
    refused(tmp_path / "m.fxp", with_graph(good, lambda document: document["nodes"].extend(chain)))


# The container --------------------------------------------------------------------------------------------------------


def edited(data: bytes, change: Callable[[dict[str, JSON]], object]) -> bytes:
    header, body = unpack(data)
    change(header)
    return assemble(header, body)


HEADERS: dict[str, Callable[[dict[str, JSON]], object]] = {
    "no metadata": lambda h: h.pop("__metadata__"),
    "metadata is text": lambda h: h.update(__metadata__="x"),
    "metadata is not text": lambda h: h["__metadata__"].update(format=3),
    "another format": lambda h: h["__metadata__"].update(format="pt"),
    "no checksum": lambda h: h["__metadata__"].pop("sha256"),
    "an extra text": lambda h: h["__metadata__"].update(code="print()"),
    "checksum": lambda h: h["__metadata__"].update(sha256="0" * 64),
    "no description": lambda h: h["fxpress/document"].update(shape=[0], data_offsets=[0, 0]),
    "description of words": lambda h: h["fxpress/document"].update(dtype="I8"),
    "description in rows": lambda h: h["fxpress/document"].update(shape=[1, *h["fxpress/document"]["shape"]]),
    "description beyond the end": lambda h: h["fxpress/document"].update(data_offsets=[2**40, 2**40 + 12]),
    "no tensor": lambda h: h.pop("block.scale"),
    "an extra tensor": lambda h: h.update(more={"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}),
    "dtype": lambda h: h["block.scale"].update(dtype="I32"),
    "unknown dtype": lambda h: h["block.scale"].update(dtype="PICKLE"),
    "shape": lambda h: h["block.scale"].update(shape=[1, 3, 1]),
    "huge shape": lambda h: h["block.scale"].update(shape=[2**60, 2**60]),
    "many dimensions": lambda h: h["block.scale"].update(shape=[1] * 100 + [3]),
    "text shape": lambda h: h["block.scale"].update(shape=["3"]),
    "beyond the end": lambda h: h["block.scale"].update(data_offsets=[2**40, 2**40 + 12]),
    "overlap": lambda h: h["block.scale"].update(data_offsets=[0, 12]),
    "backwards": lambda h: h["block.scale"].update(data_offsets=[12, 0]),
    "one offset": lambda h: h["block.scale"].update(data_offsets=[12]),
    "extra field": lambda h: h["block.scale"].update(code="print()"),
}


@pytest.mark.parametrize("change", HEADERS.values(), ids=HEADERS)
def test_headers(good: bytes, tmp_path: Path, change: Callable[[dict[str, JSON]], object]) -> None:
    refused(tmp_path / "m.fxp", edited(good, change))


def test_a_newer_version_says_so(good: bytes, tmp_path: Path) -> None:
    data = edited(good, lambda h: h["__metadata__"].update(version="3"))
    assert "Update fxpress" in refused(tmp_path / "m.fxp", data)


@pytest.mark.parametrize("text", [
    b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"a":1,"a":2}', b'{"a":NaN}', b'{"__metadata__":{"format":"\\ud800"}}',
    b"[" * 1_000_000, b'{"a":' * 100_000, b'{"a":' + b"9" * 1_000_000 + b"}", b"[" + b"0," * 3_000_000 + b"0]",
], ids=lambda text: repr(text[:40]))  # fmt: skip
def test_header_texts(good: bytes, tmp_path: Path, text: bytes) -> None:
    refused(tmp_path / "m.fxp", assemble(text, unpack(good)[1]))


@pytest.mark.parametrize("name", ["graph", "pipeline", "report"])
@pytest.mark.parametrize("text", ["", "[", "[" * 100_000, '{"a":' * 5000 + "1" + "}" * 5000, "[1]", '"x"', "{\ud800}",
                                  '{"a":1e999}', '{"a":"\\ud800"}', '{"a":"\\u001b"}'])  # fmt: skip
def test_texts(good: bytes, tmp_path: Path, name: str, text: str) -> None:
    parts = {key: json.dumps(value) for key, value in document_of(good).items()} | {name: text}
    whole = ",".join(f'"{key}":{value}' for key, value in parts.items())
    refused(tmp_path / "m.fxp", with_text(good, f"{{{whole}}}"))


DEFLATED: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda d: b"",
    "no stream": lambda d: b"{}" * 40,
    "truncated": lambda d: d[:-1],
    "cut short": lambda d: d[: len(d) // 2],
    "more behind it": lambda d: d + b"\0",
    "two streams": lambda d: d + d,
    "damaged": lambda d: d[:60] + b"\xff\xff\xff" + d[63:],
    "checksum": lambda d: d[:-4] + b"abcd",
    "raw": lambda d: d[2:-4],
    "dictionary": lambda d: zlib.compressobj(zdict=b"graph").compress(b"{}") + zlib.compressobj().flush(),
}


@pytest.mark.parametrize("change", DEFLATED.values(), ids=DEFLATED)
def test_deflated_descriptions(good: bytes, tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    header, body = unpack(good)
    start, end = header["fxpress/document"]["data_offsets"]
    refused(tmp_path / "m.fxp", with_bytes(good, change(body[start:end])))


@pytest.mark.usefixtures("memory")
def test_a_bomb(good: bytes, tmp_path: Path) -> None:
    """A quarter of a megabyte that inflates to a quarter of a gigabyte."""
    coder = zlib.compressobj(9)
    bomb = b"".join([*(coder.compress(b" " * (1 << 20)) for _ in range(256)), coder.flush()])
    assert len(bomb) < 1 << 18
    assert "33554432 bytes" in refused(tmp_path / "m.fxp", with_bytes(good, bomb))


@pytest.mark.parametrize("length", [0, 1, 2**20, 2**31, 2**40, 2**63, 2**64 - 1])
def test_header_lengths(good: bytes, tmp_path: Path, length: int) -> None:
    refused(tmp_path / "m.fxp", struct.pack("<Q", length) + good[8:])


def test_bool_tensors_hold_bools(tmp_path: Path) -> None:
    graph = small_graph()
    graph.module.block.register_buffer("flag", torch.tensor([True]))
    save(tmp_path / "m.fxp", graph)
    data = (tmp_path / "m.fxp").read_bytes()
    header, body = unpack(data)
    start, end = header["block.flag"]["data_offsets"]
    data = assemble(header, body[:start] + b"\x02" + body[end:])
    digest = hashlib.sha256(b"\x02").hexdigest()
    data = with_graph(data, put("tensors", "block.flag", "sha256", value=digest))
    assert "bool" in refused(tmp_path / "m.fxp", data)


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").touch()
    for path in (tmp_path, tmp_path / "missing.fxp", tmp_path / "pipe", tmp_path / "empty", Path("/dev/zero")):
        with pytest.raises(ArtifactError, match=path.name):
            load(path)


# Random damage --------------------------------------------------------------------------------------------------------


def survives(folder: Path, good: bytes, data: bytes) -> None:
    """The damaged file is refused, or it still is the same graph."""
    path, again = folder / "damaged.fxp", folder / "again.fxp"
    path.write_bytes(data)
    started = time.perf_counter()
    try:
        loaded = load(path)
    except ArtifactError:
        pass
    else:
        save(again, loaded.graph, pipeline=loaded.pipeline, report=loaded.report)
        assert again.read_bytes() == good
    assert time.perf_counter() - started < SECONDS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damage")


@pytest.mark.usefixtures("memory")
def test_truncation_at_every_boundary(good: bytes, folder: Path) -> None:
    header, body = unpack(good)
    data_start = len(good) - len(body)
    ends = {data_start + offset for v in header.values() for offset in v.get("data_offsets", ())}
    near = {end + step for end in (*ends, 0, 8, data_start) for step in (-2, -1, 0, 1, 2)}
    for length in sorted(n for n in near | set(range(40)) if 0 <= n < len(good)):
        refused(folder / "short.fxp", good[:length])
    refused(folder / "long.fxp", good + b"\0")


@pytest.mark.usefixtures("memory")
@settings(max_examples=300)
@given(data=st.data())
def test_flipped_bytes(good: bytes, folder: Path, data: st.DataObject) -> None:
    header_end = len(good) - len(unpack(good)[1])
    positions = st.integers(0, len(good) - 1) | st.integers(0, 15) | st.integers(header_end, len(good) - 1)
    damaged = bytearray(good)
    for position in data.draw(st.lists(positions, min_size=1, max_size=4)):
        damaged[position] ^= data.draw(st.integers(1, 255))
    survives(folder, good, bytes(damaged))


@pytest.mark.usefixtures("memory")
@settings(max_examples=150)
@given(data=st.data())
def test_moved_bytes(good: bytes, folder: Path, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(good)))
    end = data.draw(st.integers(start, len(good)))
    filling = data.draw(st.binary(max_size=20) | st.just(good[start:end] * 2))
    survives(folder, good, good[:start] + filling + good[end:])


SCALARS = [None, True, False, -1, 0, 1, 3, 2**40, 2**62, 1.5, "", "x", "F32", "block", "inputs/0", "aten.relu.default"]
ODD = st.sampled_from([*SCALARS, [], {}, [[]], {"tuple": []}, {"node": "x"}, {"dict": []}, {"float": "nan"}, [1, 2, 3]])


def places(value: JSON, at: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    yield at
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(item, (*at, key))


@pytest.mark.filterwarnings("ignore::SyntaxWarning")  # Python's word on generated code such as `1[2]`
@pytest.mark.usefixtures("memory")
@settings(max_examples=400)
@given(data=st.data())
def test_signed_nonsense(good: bytes, folder: Path, data: st.DataObject) -> None:
    """A graph with random places replaced, its checksums right: refused, or loaded as a graph that saves again."""
    document = document_of(good)["graph"]
    for _ in range(data.draw(st.integers(1, 2))):
        place = data.draw(st.sampled_from([p for p in places(document) if p]))
        put(*place, value=copy.deepcopy(data.draw(ODD)))(document)
    path = folder / "nonsense.fxp"
    path.write_bytes(with_graph(good, lambda d: (d.clear(), d.update(document))))
    started = time.perf_counter()
    try:
        loaded = load(path)
    except ArtifactError:
        pass
    else:
        save(folder / "again.fxp", loaded.graph)
    assert time.perf_counter() - started < SECONDS
