"""Product-quantized layers in a file: sizes by the formula, every bit back, hostile files refused."""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fxpress.ir.errors import ArtifactError
from fxpress.ir.graph import Graph, TensorSpec
from fxpress.runtime.artifact import load, save
from fxpress.runtime.fxp import bits
from fxpress.runtime.fxp.checks import FormatError
from fxpress.runtime.fxp.examples import Drawn, describe_example, read_drawn
from fxpress.runtime.fxp.quantized import by_frequency, decode_layer, encode_layer
from fxpress.runtime.layers import Int8Conv2d, PQConv2d, PQLayer, PQLinear
from fxpress.runtime.layers.pq_codebook import decode
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn

JSON = Any


def graph_of(*layers: nn.Module, x: torch.Tensor | None = None) -> Graph:
    """Layers in a row, of which every second one is in another module."""
    root, nodes = nn.Module(), fx.Graph()
    root.block = nn.Module()
    y = nodes.placeholder("x")
    for index, layer in enumerate(layers):
        owner, path = (root, f"l{index}") if index % 2 else (root.block, f"block.l{index}")
        owner.add_module(f"l{index}", layer)
        y = nodes.call_module(path, (y,))
    nodes.output(y)
    for node in nodes.nodes:
        node.meta = {"spec": TensorSpec((2, 6), torch.float32)}
    return Graph(fx.GraphModule(root, nodes), (torch.randn(2, 6, 5, 5) if x is None else x,))


def skewed(layer: PQLayer) -> PQLayer:
    """Indices of which a few are frequent, each sub-space its own: entropy coding pays."""
    taps, count, outputs = layer.indices.shape
    rare = torch.distributions.Geometric(0.45).sample((taps, count, outputs)).clamp(max=layer.codewords - 1)
    shift = torch.randint(layer.codewords, (count, 1))
    layer.indices.copy_((rare + shift) % layer.codewords)
    return layer


def network(codebook: Any = "fp32", entropy: bool = False, **options: Any) -> Graph:
    conv = skewed(PQConv2d(6, 40, 3, padding=1, groups=2, subspace=2, codewords=32, codebook=codebook, entropy=entropy))
    head = skewed(PQLinear(5, 300, False, subspace=3, codewords=8, codebook=codebook, entropy=entropy, **options))
    return graph_of(conv.eval(), head.eval())


def outputs(graph: Graph, like: Graph) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = graph(*like.example_args)
        return result


def parts(data: bytes) -> tuple[dict[str, JSON], dict[str, bytes]]:
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    body = data[8 + length :]
    return header, {k: body[slice(*v["data_offsets"])] for k, v in header.items() if k != "__metadata__"}


def built(data: bytes, change: Callable[[dict[str, JSON]], object], layers: bytes | None = None) -> bytes:
    """The file with a changed graph and other packed layers, all checksums right."""
    header, bodies = parts(data)
    document = json.loads(zlib.decompress(bodies["fxpress/document"]))
    if layers is not None:
        bodies["fxpress/layers"] = layers
        document["graph"]["packed"] = {"bytes": len(layers), "sha256": hashlib.sha256(layers).hexdigest()}
    change(document["graph"])
    bodies["fxpress/document"] = zlib.compress(json.dumps(document).encode())
    header["__metadata__"]["sha256"] = hashlib.sha256(bodies["fxpress/document"]).hexdigest()
    end = 0
    for name, body in bodies.items():
        if header[name]["dtype"] == "U8":
            header[name]["shape"] = [len(body)]
        header[name]["data_offsets"] = [end, end := end + len(body)]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(bodies.values())


def rows(graph: dict[str, JSON]) -> list[dict[str, JSON]]:
    return [row for row in graph["modules"] if "packed" in row]


def refused(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    with pytest.raises(ArtifactError) as caught:
        load(path)
    assert caught.value.hint
    return str(caught.value)


# Round trips ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["decode", "dense", "table"])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("codebook", ["fp32", "fp16", "int8"])
def test_outputs_come_back_bit_by_bit(codebook: Any, entropy: bool, kernel: Any, tmp_path: Path) -> None:
    graph = network(codebook, entropy, kernel=kernel)
    graph.module.get_submodule("l1").requires_grad_(False)
    save(tmp_path / "m.fxp", graph)
    back = load(tmp_path / "m.fxp").graph
    assert torch.equal(outputs(back, graph), outputs(graph, graph))
    for name, layer in graph.module.named_modules():
        if isinstance(layer, PQLayer):
            twin: Any = back.module.get_submodule(name)
            assert torch.equal(twin.decoded(), layer.decoded())
            if codebook == "fp32" and not entropy:
                assert all(
                    torch.equal(a, b)
                    for a, b in zip(layer.state_dict().values(), twin.state_dict().values(), strict=True)
                )
            assert {n: p.requires_grad for n, p in twin.named_parameters()} == {
                n: p.requires_grad for n, p in layer.named_parameters()
            }
    save(tmp_path / "again.fxp", back)
    assert (tmp_path / "again.fxp").read_bytes() == (tmp_path / "m.fxp").read_bytes()


def test_a_loaded_layer_learns(tmp_path: Path) -> None:
    save(tmp_path / "m.fxp", network("int8", entropy=True))
    back = load(tmp_path / "m.fxp").graph
    back(*back.example_args).square().sum().backward()
    layer: Any = back.module.get_submodule("block.l0")
    assert bool((layer.codebook.grad != 0).any())


def test_an_exact_file_keeps_the_state_dict(tmp_path: Path) -> None:
    graph = network("int8", entropy=True)
    save(tmp_path / "m.fxp", graph, exact=True)
    back = load(tmp_path / "m.fxp").graph
    for (name, old), new in zip(graph.module.state_dict().items(), back.module.state_dict().values(), strict=True):
        assert torch.equal(old, new), name
    assert torch.equal(back.example_args[0], graph.example_args[0])


def test_what_has_no_packed_form_is_stored_by_its_state_dict(tmp_path: Path) -> None:
    """A model in double, and a layer that shares its bias with another."""
    double = network().copy()
    double.module.double()
    shared = network()
    plain = nn.Linear(2, 40)
    plain.bias = shared.module.get_submodule("block.l0").bias
    tied = graph_of(shared.module.get_submodule("block.l0"), shared.module.get_submodule("l1"))
    tied.module.add_module("plain", plain)
    for graph in (double, tied):
        save(tmp_path / "m.fxp", graph)
        back = load(tmp_path / "m.fxp").graph
        assert {n: t.dtype for n, t in back.module.state_dict().items()} == {
            n: t.dtype for n, t in graph.module.state_dict().items()
        }
    assert back.module.get_submodule("plain").bias is back.module.get_submodule("block.l0").bias


def test_a_layer_that_is_called_twice(tmp_path: Path) -> None:
    layer = PQLinear(6, 6, subspace=2, codewords=4)
    graph = graph_of(layer, layer, x=torch.randn(3, 6))
    save(tmp_path / "m.fxp", graph)
    back = load(tmp_path / "m.fxp").graph
    assert back.module.get_submodule("l1") is back.module.get_submodule("block.l0")
    assert torch.equal(outputs(back, graph), outputs(graph, graph))


# Sizes ----------------------------------------------------------------------------------------------------------------


def formula(outputs: int, taps: int, inputs: int, d: int, words: int, size: int, scales: bool, bias: bool) -> int:
    """METHODS: size K M d + taps M out log2(K) / 8 + 4 out, in whole bytes."""
    count = -(-inputs // d)
    indices = -(-taps * count * outputs * int(np.log2(words)) // 8)
    return size * words * count * d + scales * 4 * count + indices + bias * 4 * outputs


@pytest.mark.parametrize(("codebook", "size"), [("fp32", 4), ("fp16", 2), ("int8", 1)])
def test_bytes_on_disk_are_the_formula(codebook: Any, size: int, tmp_path: Path) -> None:
    conv = PQConv2d(48, 96, 3, groups=2, subspace=8, codewords=128, codebook=codebook)
    head = PQLinear(970, 1000, subspace=4, codewords=32, codebook=codebook)
    last = PQLinear(1000, 33, False, subspace=1, codewords=16, codebook=codebook)
    expected = [
        formula(96, 9, 24, 8, 128, size, codebook == "int8", True),
        formula(1000, 1, 970, 4, 32, size, codebook == "int8", True),
        formula(33, 1, 1000, 1, 16, size, codebook == "int8", False),
    ]
    assert [layer.stored_bytes for layer in (conv, head, last)] == expected
    graph = graph_of(conv, head, last, x=torch.randn(1, 48, 224, 224))
    total = save(tmp_path / "m.fxp", graph)
    _, bodies = parts((tmp_path / "m.fxp").read_bytes())
    assert set(bodies) == {"fxpress/document", "fxpress/layers"}
    assert len(bodies["fxpress/layers"]) == sum(expected)
    assert total - sum(expected) < 1500  # header, graph, and the description of a 10 MB input


def test_entropy_coding_makes_it_smaller_or_stays_away(tmp_path: Path) -> None:
    sizes = {entropy: save(tmp_path / "m.fxp", network("int8", entropy)) for entropy in (False, True)}
    assert sizes[True] < sizes[False]
    even = PQConv2d(6, 40, 3, subspace=2, codewords=32, entropy=True)
    data, coding = encode_layer(even)
    assert (len(data), coding) == (even.stored_bytes, "bits")


def test_entropy_coding_comes_near_the_entropy() -> None:
    layer = skewed(PQLinear(512, 500, False, subspace=4, codewords=32, codebook="int8", entropy=True))
    entropies = []
    for part in layer.indices.unbind(1):
        share = torch.bincount(part.flatten().long(), minlength=32).double() / part.numel()
        entropies.append(float(torch.special.entr(share).sum() / np.log(2)))
    bits_each = (len(encode_layer(layer)[0]) - 32 * 128 * 4 - 4 * 128) * 8 / layer.indices.numel()
    assert np.mean(entropies) < bits_each < np.mean(entropies) + 0.15


# The parts ------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 8), st.lists(st.integers(0, 255), max_size=70))
def test_bits(width: int, numbers: list[int]) -> None:
    values = torch.tensor([n % 2**width for n in numbers], dtype=torch.uint8)
    data = bits.pack(values, width)
    assert len(data) == bits.packed_bytes(len(numbers), width)
    text = "".join(f"{int(v):0{width}b}" for v in values)
    expected = bytes(int(text[i : i + 8].ljust(8, "0"), 2) for i in range(0, len(text), 8))
    assert data == expected
    assert torch.equal(bits.unpack(memoryview(data), len(numbers), width), values)
    assert torch.equal(bits.decode(memoryview(bits.encode(values)), len(numbers)), values)


def test_many_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """More numbers than are unpacked at a time."""
    monkeypatch.setattr(bits, "_CHUNK", 64)
    values = torch.randint(32, (1001,), dtype=torch.uint8)
    assert torch.equal(bits.unpack(memoryview(bits.pack(values, 5)), 1001, 5), values)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 20), st.integers(0, 99))
def test_renumbering_changes_no_weight(taps: int, count: int, columns: int, seed: int) -> None:
    numbers = torch.Generator().manual_seed(seed)
    codebook = torch.randn(count, 8, 3, generator=numbers)
    indices = torch.randint(8, (taps, count, columns), generator=numbers, dtype=torch.uint8)
    book, ranks = by_frequency(codebook, indices)
    assert torch.equal(decode(book, ranks, 3 * count), decode(codebook, indices, 3 * count))
    used = torch.stack([torch.bincount(part.flatten().long(), minlength=8) for part in ranks.unbind(1)])
    assert bool((used.diff(dim=1) <= 0).all())
    again = by_frequency(book, ranks)
    assert torch.equal(again[0], book)
    assert torch.equal(again[1], ranks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-3.0, 0.01), (-1e-3, 1e-3), (-5.0, 0.0), (70.0, 400.0)])
def test_drawn_inputs(dtype: torch.dtype, mean: float, std: float) -> None:
    """Mean and deviation to two digits; drawn inputs are described as they were drawn."""
    tensor = (torch.randn(4, 3, 8, 8) * std + mean).to(dtype).contiguous(memory_format=torch.channels_last)
    row, stored = describe_example("inputs/0", tensor, exact=False)
    made = read_drawn("inputs/0", row).make()
    assert not stored
    assert (made.shape, made.dtype, made.stride()) == (tensor.shape, dtype, tensor.stride())
    found, wanted = made.double(), tensor.double()
    rough = max(abs(mean), std) * (0.06 if dtype in (torch.float32, torch.float64) else 0.08)
    assert abs(float(found.mean() - wanted.mean())) <= rough
    assert abs(float(found.std() - wanted.std())) <= rough
    if dtype in (torch.float32, torch.float64):
        assert describe_example("inputs/0", made, exact=False)[0] == row


def test_what_is_not_negative_stays_so() -> None:
    tensor = torch.rand(3, 3, 9, 9)
    row, _ = describe_example("inputs/0", tensor, exact=False)
    made = read_drawn("inputs/0", row).make()
    assert float(made.min()) >= 0
    assert float(made.mean()) == pytest.approx(0.5, rel=0.05)
    assert describe_example("inputs/0", made, exact=False)[0] == row


def test_which_inputs_are_stored(tmp_path: Path) -> None:
    long, short = torch.randn(500), torch.randn(8)
    stays = [short, long.long(), long > 0, long / 0, long.to(torch.cfloat)]
    for tensor, stored in ((long, False), *((tensor, True) for tensor in stays)):
        assert describe_example("inputs/0", tensor, exact=False)[1] == stored
        assert describe_example("inputs/0", tensor, exact=True)[1]
    image = torch.rand(1, 6, 224, 224)
    graph = graph_of(PQConv2d(6, 2, 1, subspace=2, codewords=4), x=image)
    assert save(tmp_path / "m.fxp", graph) < 2000
    assert load(tmp_path / "m.fxp").graph.example_args[0].shape == image.shape


# Damaged and hostile --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[False, True], ids=["bits", "huffman"])
def good(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "good.fxp"
    torch.manual_seed(0)
    save(path, network("int8", request.param))
    assert ("huffman" in str(rows(document(path.read_bytes())))) == request.param
    return path.read_bytes()


def document(data: bytes) -> dict[str, JSON]:
    graph: dict[str, JSON] = json.loads(zlib.decompress(parts(data)[1]["fxpress/document"]))["graph"]
    return graph


def put(**fields: JSON) -> Callable[[dict[str, JSON]], object]:
    return lambda graph: rows(graph)[0]["packed"].update(fields)


def configured(**fields: JSON) -> Callable[[dict[str, JSON]], object]:
    return lambda graph: rows(graph)[0]["config"].update(fields)


def doubled(graph: dict[str, JSON]) -> None:
    """A state-dict row for a tensor of a layer that is packed."""
    row = {"kind": "parameter", "requires_grad": True, "dtype": "F32", "shape": [40], "sha256": ""}
    graph["tensors"]["block.l0.bias"] = row


CHANGES: dict[str, Callable[[dict[str, JSON]], object]] = {
    "too few bytes": put(bytes=3),
    "negative": put(bytes=-1),
    "too many": put(bytes=2**50),
    "text": put(bytes="9"),
    "coding": put(coding="pickle"),
    "other coding": lambda g: rows(g)[0]["packed"].update(
        coding={"bits": "huffman", "huffman": "bits"}[rows(g)[0]["packed"]["coding"]]
    ),
    "extra field": put(code="x"),
    "frozen": put(frozen=["weight"]),
    "frozen numbers": put(frozen=[1]),
    "frozen text": put(frozen="bias"),
    "frozen lists": put(frozen=[[]]),
    "more outputs": configured(out_channels=48),
    "huge": configured(out_channels=2**40, in_channels=2**40),
    "overflow": configured(out_channels=2**62, in_channels=2**62),
    "huge sub-space": configured(subspace=2**50),
    "codewords": configured(codewords=31),
    "more codewords": configured(codewords=64),
    "precision": configured(codebook="fp8"),
    "another precision": configured(codebook="fp16"),
    "kernel": configured(kernel="exec"),
    "depthwise": configured(groups=6),
    "a layer without a codec": lambda g: rows(g)[0].update(
        type="Conv2d", config={"in_channels": 6, "out_channels": 40, "kernel_size": [3, 3]}
    ),
    "stored twice": doubled,
    "no row": lambda g: rows(g)[0].pop("packed"),
    "no sum": lambda g: g.pop("packed"),
    "sum": lambda g: g["packed"].update(bytes=g["packed"]["bytes"] + 1),
    "checksum": lambda g: g["packed"].update(sha256="0" * 64),
    "a container": lambda g: g["modules"][1].update(packed=rows(g)[0]["packed"]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_descriptions(good: bytes, tmp_path: Path, change: Callable[[dict[str, JSON]], object]) -> None:
    refused(tmp_path / "m.fxp", built(good, change))


def test_the_unchanged_file_loads(good: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.fxp").write_bytes(built(good, lambda g: None))
    load(tmp_path / "m.fxp")


def test_truncated_layers(good: bytes, tmp_path: Path) -> None:
    """Shorter by bytes at the end or in the middle, the sums corrected: the second layer's sizes tell."""
    layers = parts(good)[1]["fxpress/layers"]
    first = rows(document(good))[0]["packed"]["bytes"]
    for cut in (layers[:-1], layers[1:], layers[:first] + layers[first + 1 :], b""):

        def shorter(graph: dict[str, JSON], by: int = len(layers) - len(cut)) -> None:
            rows(graph)[1]["packed"]["bytes"] -= min(by, rows(graph)[1]["packed"]["bytes"])
            if by == len(layers):
                rows(graph)[0]["packed"]["bytes"] = 0

        refused(tmp_path / "m.fxp", built(good, shorter, cut))


def huffman_layer() -> PQLinear:
    return PQLinear(64, 64, False, subspace=1, codewords=4, codebook="int8", entropy=True)


def coded(layer: PQLinear, stream: bytes) -> memoryview:
    return memoryview(bytes(layer.codebook.numel() + 4 * 64) + stream)


def test_coded_indices_are_bounded() -> None:
    """4,096 indices of one byte each: what inflates to more or less, or names no codeword, is refused."""
    layer = huffman_layer()

    def deflated(data: bytes) -> bytes:
        coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
        return coder.compress(data) + coder.flush()

    right = deflated(bytes(4096))
    assert int(decode_layer(layer, coded(layer, right), "huffman")["indices"].max()) == 0
    for stream, message in (
        (deflated(bytes(4095)), "4096 bytes"), (deflated(bytes(4097)), "4096 bytes"), (right + b"x", "do not end"),
        (right[:-1], "."), (deflated(bytes([0, 4]) * 2048), "codeword 4 of 4"), (b"", "cannot hold"),
        (bytes(600), "."),
    ):  # fmt: skip
        with pytest.raises(FormatError, match=message):
            decode_layer(layer, coded(layer, stream), "huffman")


def test_few_bytes_give_few_numbers() -> None:
    """Matches of deflate could make a thousand numbers of each byte; Huffman codes alone make eight."""
    bomb = zlib.compressobj(9, zlib.DEFLATED, -15)
    data = bomb.compress(bytes(1 << 20)) + bomb.flush()
    with pytest.raises(FormatError, match="cannot hold 1048576"):
        bits.decode(memoryview(data), 1 << 20)


def test_padding_bits_are_zero() -> None:
    with pytest.raises(FormatError, match="not zero"):
        bits.unpack(memoryview(b"\xa1"), 1, 3)


def test_what_cannot_be_packed_is_refused(tmp_path: Path) -> None:
    outside = network("fp32")
    outside.module.get_submodule("block.l0").indices.fill_(200)
    endless = network("int8")
    with torch.no_grad():
        endless.module.get_submodule("l1").codebook[0, 0, 0] = float("nan")
    with pytest.raises(ArtifactError, match=r"'block\.l0': an index names codeword 200 of 32"):
        save(tmp_path / "m.fxp", outside)
    with pytest.raises(ArtifactError, match="'l1': a codebook that is not finite"):
        save(tmp_path / "m.fxp", endless)
    assert not list(tmp_path.iterdir())


ROW = {"dtype": "F32", "shape": [3, 100], "drawn": {"mean": 0.0, "std": 1.0}}
DRAWN: dict[str, dict[str, JSON]] = {
    "huge": {**ROW, "shape": [2**20, 2**20]},
    "long": {**ROW, "shape": [2**13, 2**12]},
    "empty": {**ROW, "shape": [0, 3]},
    "integers": {**ROW, "dtype": "I64"},
    "text": {**ROW, "drawn": {"mean": "0"}},
    "no mean": {**ROW, "drawn": {"std": 1.0}},
    "more": {**ROW, "drawn": {"mean": 0.0, "seed": 3}},
    "negative": {**ROW, "shape": [-3, -100]},
    "and stored": {**ROW, "sha256": "0"},
}


@pytest.mark.parametrize("row", DRAWN.values(), ids=DRAWN)
def test_descriptions_of_inputs(row: dict[str, JSON]) -> None:
    assert isinstance(read_drawn("inputs/0", ROW), Drawn)
    with pytest.raises(FormatError):
        read_drawn("inputs/0", row)


@pytest.mark.parametrize("name", ["inputs/", "inputs/x", "inputs/-1", "inputs/12345678901", "inputs/٣"])
def test_names_of_inputs(name: str) -> None:
    with pytest.raises(FormatError):
        read_drawn(name, ROW)


# Version 1 ------------------------------------------------------------------------------------------------------------


def test_files_of_version_1_are_read(tmp_path: Path) -> None:
    """Three texts in the metadata, and everything by its state dict."""
    graph = graph_of(nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4).eval())
    save(tmp_path / "m.fxp", graph, pipeline={"seed": 1}, exact=True)
    header, bodies = parts((tmp_path / "m.fxp").read_bytes())
    described = json.loads(zlib.decompress(bodies.pop("fxpress/document")))
    del header["fxpress/document"]
    texts = {name: json.dumps(value) for name, value in described.items()}
    total = hashlib.sha256()
    for text in texts.values():
        total.update(len(text).to_bytes(8, "little") + text.encode())
    header["__metadata__"] = {"format": "fxpress", "version": "1", **texts, "sha256": total.hexdigest()}

    def write(header: dict[str, JSON]) -> None:
        text = json.dumps(header).encode()
        (tmp_path / "old.fxp").write_bytes(struct.pack("<Q", len(text)) + text + b"".join(bodies.values()))

    write(header)
    old = load(tmp_path / "old.fxp")
    assert old.pipeline == {"seed": 1}
    assert torch.equal(outputs(old.graph, graph), outputs(graph, graph))
    write({**header, "__metadata__": {**header["__metadata__"], "report": "{}"}})
    with pytest.raises(ArtifactError, match="checksum"):
        load(tmp_path / "old.fxp")


FRESH = """
import sys, fxpress
network = fxpress.load(sys.argv[1])
slow = ("torch._dynamo", "torch._inductor", "sympy", "scipy.stats", "sklearn")
loaded = [name for name in slow if name in sys.modules]
print(loaded, *network.graph.module.state_dict())
"""


def test_loading_in_a_fresh_process_imports_no_compiler_of_torch(tmp_path: Path) -> None:
    """It would take seconds, and 200 MB more than the network."""
    conv = Int8Conv2d(6, 4, 3)
    conv.observe(torch.randn(2, 6, 5, 5))
    save(tmp_path / "m.fxp", graph_of(PQConv2d(6, 6, 1, subspace=2, codewords=8).eval(), conv.eval()))
    command = [sys.executable, "-c", FRESH, str(tmp_path / "m.fxp")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("[] ")
