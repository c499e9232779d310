"""Packed binary networks as modules: what they compute, files, export, compile, and that they do not train."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from fxpress.ir.cost import measure_cost
from fxpress.ir.errors import KernelError, ModelError
from fxpress.ir.graph import Graph, TensorSpec
from fxpress.ir.labels import find_labels
from fxpress.runtime import kernels
from fxpress.runtime.artifact import load, save
from fxpress.runtime.fxp.checks import FormatError
from fxpress.runtime.fxp.graph import decode_graph, encode_graph
from fxpress.runtime.kernels import network_ops
from fxpress.runtime.kernels.network_program import parse
from fxpress.runtime.layers import BinaryNetwork
from torch import Tensor, fx, nn

TEXT = """input channels=5
levels x=0 channels=5
conv_levels x=1 outputs=7 channels=5 kernel=3,3 padding=1,1
conv x=2 outputs=6 channels=7 kernel=3,3 stride=2,2 padding=1,1
mean x=3
output x=3
output x=4 dims=2"""


def network() -> BinaryNetwork:
    program = parse(TEXT)
    torch.manual_seed(0)
    tensors: list[tuple[Tensor, ...]] = [
        (torch.randn(3, 5).sort(0).values,),
        (torch.rand(7, 5, 3, 3) < 0.5, torch.randint(-9, 9, (3, 7)).sort(0).values),
        (torch.rand(6, 7, 3, 3) < 0.5, torch.randn(2, 6)),
        (),
    ]
    return BinaryNetwork.from_tensors(program, tensors)


def graph(layer: nn.Module, x: Tensor) -> Graph:
    root, nodes = nn.Module(), fx.Graph()
    root.stem, root.packed = nn.Conv2d(3, 5, 1), layer
    y = nodes.call_module("packed", (nodes.call_module("stem", (nodes.placeholder("x"),)),))
    nodes.output(y)
    made = fx.GraphModule(root, nodes).eval()
    specs = {"x": TensorSpec(tuple(x.shape), x.dtype), "stem": TensorSpec((2, 5, 9, 8), torch.float32)}
    for node in nodes.nodes:
        if node.op != "output":
            pair = (TensorSpec((2, 6, 5, 4), torch.float32), TensorSpec((2, 6), torch.float32))
            node.meta = {"spec": specs.get(node.name, pair)}
    return Graph(made, (x,))


def test_is_what_its_steps_say_on_every_machine() -> None:
    layer, x = network(), torch.randn(2, 5, 9, 8)
    with kernels.using("none"):
        expected = layer(x)
    for isa in kernels.isas():
        with kernels.using(isa):
            for y, wanted in zip(layer(x), expected, strict=True):
                torch.testing.assert_close(y, wanted)
    assert [tuple(y.shape) for y in expected] == [(2, 6, 5, 4), (2, 6)]
    assert "4 steps, 2 layers" in repr(layer)


def test_bytes_in_a_file(tmp_path: Path) -> None:
    layer, x = network(), torch.randn(2, 3, 9, 8)
    assert layer.stored_bytes == 60 + -(-7 * 5 * 9 // 8) + 3 * 7 * 2 + -(-6 * 7 * 9 // 8) + 2 * 6 * 4
    made = graph(layer, x)
    made.lint()
    save(tmp_path / "one.fxp", made)
    back = load(tmp_path / "one.fxp").graph
    for one, other in zip(made.module(x), back.module(x), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(back.module.packed.data, layer.data)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (2, "conv_levels x=1 outputs=9 channels=5"),
        (3, "conv x=9 outputs=6 channels=7"),
        (1, "system x=0"),
        (6, "output"),
    ],
)
def test_a_hostile_program_is_refused(line: int, text: str) -> None:
    document, _ = encode_graph(graph(network(), torch.randn(2, 3, 9, 8)))
    row = next(row for row in document["modules"] if row.get("type") == "BinaryNetwork")
    assert row["config"]["program"][line] == TEXT.split("\n")[line]
    decode_graph(document)
    row["config"]["program"][line] = text
    with pytest.raises(FormatError, match=r"binary network|does not fit its layer"):
        decode_graph(document)


def test_exports_and_compiles_with_its_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = network(), torch.randn(2, 5, 9, 8)
    expected = layer(x)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(layer, (x,), dynamic_shapes=(({0: batch},),)).module()
    for made in (exported, copy.deepcopy(layer)):
        assert all(torch.equal(a, b) for a, b in zip(made(x), expected, strict=True))
    assert [tuple(y.shape) for y in exported(x[:1])] == [(1, 6, 5, 4), (1, 6)]
    compiled: Any = torch.compile(layer, backend="aot_eager")
    with torch.no_grad():
        compiled(x)
        monkeypatch.setattr(network_ops, "prepare", lambda *_: pytest.fail("prepared once more"))
        assert all(torch.equal(a, b) for a, b in zip(compiled(x), expected, strict=True))


def test_training_it_is_one_clear_error() -> None:
    layer, x = network(), torch.randn(2, 5, 9, 8, requires_grad=True)
    y = layer(x)[1]
    with pytest.raises(ModelError, match="no gradients"):
        y.sum().backward()
    with pytest.raises(ModelError, match="cannot be trained"):
        layer.train()(x)


def test_costs_and_labels() -> None:
    made = graph(network(), torch.randn(2, 3, 9, 8))
    cost = measure_cost(made)
    images = 2 * (9 * 8 * 5 * 3 + 9 * 8 * 7 * 5 * 9 + 5 * 4 * 6 * 7 * 9)
    assert cost.macs in (images, images / 2)
    assert cost.bytes == made.module.packed.stored_bytes + 4 * (15 + 5)
    assert any("packed binary network" in pin.reason for pin in find_labels(made).pins)


def test_a_program_that_is_none() -> None:
    with pytest.raises(KernelError, match="no step"):
        BinaryNetwork(("input channels=3", "run x=0", "output x=1"))
