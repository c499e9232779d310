"""Binary layers in a file: one bit for each weight once they hold their values, hostile bytes refused."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from fxpress.ir.graph import Graph, TensorSpec
from fxpress.passes.emit.binary import settle_latent
from fxpress.runtime.artifact import load, save
from fxpress.runtime.fxp.binary import CODING, decode_layer, encode_layer, fits, stored_bytes
from fxpress.runtime.fxp.checks import FormatError
from fxpress.runtime.fxp.codecs import codec_of
from fxpress.runtime.layers import BinaryConv2d, BinaryLayer, BinaryLinear
from torch import fx, nn


def graph_of(layer: nn.Module, x: torch.Tensor) -> Graph:
    root, nodes = nn.Module(), fx.Graph()
    root.layer = layer
    nodes.output(nodes.call_module("layer", (nodes.placeholder("x"),)))
    for node in nodes.nodes:
        node.meta = {"spec": TensorSpec(tuple(x.shape), x.dtype)}
    return Graph(fx.GraphModule(root, nodes).eval(), (x,))


LAYERS: list[tuple[Any, tuple[int, ...]]] = [
    (lambda **o: BinaryConv2d(5, 7, 3, padding=1, **o), (2, 5, 6, 6)),
    (lambda **o: BinaryLinear(13, 9, bias=False, **o), (2, 13)),
]


@pytest.mark.parametrize("scale", ["filter", "layer", "none"])
@pytest.mark.parametrize("weights", ["binary", "ternary"])
@pytest.mark.parametrize(("build", "shape"), LAYERS)
def test_every_bit_comes_back(tmp_path: Path, build: Any, shape: tuple[int, ...], weights: str, scale: str) -> None:
    torch.manual_seed(0)
    layer: BinaryLayer = build(weights=weights, scale=scale)
    x = torch.randn(shape)
    expected = layer(x).detach()
    assert not fits(layer)  # latent weights are stored as they are
    graph = graph_of(layer, x)
    large = save(tmp_path / "latent.fxp", graph)
    assert settle_latent(graph) == 1
    assert codec_of(graph.module.layer) is not None
    small = save(tmp_path / "bits.fxp", graph)
    count, outputs = layer.weight.numel(), len(layer.weight)
    planes = 2 if weights == "ternary" else 1
    assert stored_bytes(layer) == planes * math.ceil(count / 8) + 4 * outputs * (1 if layer.bias is None else 2)
    assert small < large
    back = load(tmp_path / "bits.fxp").graph.module
    assert torch.equal(back.layer.weight, graph.module.layer.weight)
    assert torch.equal(back(x), graph.module(x))
    torch.testing.assert_close(back(x), expected)


def test_what_a_file_cannot_say() -> None:
    layer = BinaryLinear(13, 9)
    with torch.no_grad():
        layer.weight.copy_(layer.binary_weight)
    data, coding = encode_layer(layer)
    assert decode_layer(layer, memoryview(data), coding)["weight"].equal(layer.weight)
    with pytest.raises(FormatError, match="coded as"):
        decode_layer(layer, memoryview(data), "words")
    with pytest.raises(FormatError, match=f"has {len(data) - 1}"):
        decode_layer(layer, memoryview(data[:-1]), CODING)
    start = math.ceil(13 * 9 / 8)
    for wrong in (float("nan"), -1.0, float("inf")):
        bad = data[:start] + struct.pack("<f", wrong) + data[start + 4 :]
        with pytest.raises(FormatError, match="negative or not finite"):
            decode_layer(layer, memoryview(bad), CODING)
    assert not fits(layer.double())
