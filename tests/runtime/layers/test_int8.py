"""Int8Conv2d, Int8Linear: the grids, the gradients that pass, whole numbers against float32, and layers like others."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from fxpress.ir import dialect
from fxpress.ir.graph import Graph
from fxpress.ir.trace import trace
from fxpress.passes.quantize.int8 import int8_layer
from fxpress.runtime import kernels
from fxpress.runtime.fxp.checks import FormatError
from fxpress.runtime.fxp.int8 import decode_layer, encode_layer
from fxpress.runtime.layers import Int8Conv2d, Int8Layer, Int8Linear
from fxpress.runtime.layers.int8_rounding import input_grid, input_values, weight_steps, weight_values
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fxpress
from fxpress import OptionError


@given(st.floats(-10, 10), st.floats(-10, 10))
def test_zero_is_on_the_grid_of_the_inputs(low: float, high: float) -> None:
    step, zero = input_grid(torch.tensor([min(low, high), max(low, high)]))
    assert 0 <= float(zero) <= 255
    assert float(zero) == round(float(zero))
    ends = torch.tensor([min(low, high, 0.0), 0.0, max(low, high, 0.0)])
    found = input_values(ends, step, zero)
    assert float(found[1]) == 0
    assert torch.allclose(found, ends, atol=float(step))


def test_values_against_numpy() -> None:
    x, weight = torch.randn(100), torch.randn(5, 40)
    step = np.float32(4 / 255)
    steps = np.clip(np.rint(x.numpy() / step), -64, 191)
    assert np.allclose(input_values(x, *input_grid(torch.tensor([-1.0, 3.0]))), steps * step, atol=1e-6)
    largest = np.abs(weight.numpy()).max(1, keepdims=True) / 127
    wanted = np.rint(weight.numpy() / largest) * largest
    assert np.allclose(weight_values(weight, weight_steps(weight)), wanted, atol=1e-6)
    assert weight_steps(torch.zeros(2, 3)).tolist() == [1, 1]


def test_nan_counts_as_zero_and_infinity_as_the_end() -> None:
    grid = input_grid(torch.tensor([-1.0, 1.0]))
    found = input_values(torch.tensor([float("nan"), float("inf"), -float("inf")]), *grid)
    assert found[0] == 0
    assert found[1] == pytest.approx(1, abs=0.01)
    assert found[2] == pytest.approx(-1, abs=0.01)


def test_gradients_pass_within_the_span() -> None:
    x = torch.tensor([-3.0, -0.5, 0.2, 2.0], requires_grad=True)
    input_values(x, *input_grid(torch.tensor([-1.0, 1.0]))).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, torch.tensor([0.0, 1.0, 1.0, 0.0]))
    layer = Int8Linear(4, 3)
    layer(torch.randn(8, 4)).square().sum().backward()
    assert layer.weight.grad is not None
    assert bool(layer.weight.grad.any())


def seen(layer: Int8Layer, x: Tensor) -> Int8Layer:
    layer.observe(x)
    return layer.eval()


LAYERS = [
    (Int8Linear(12, 5), (3, 12)),
    (Int8Linear(12, 5, bias=False), (2, 3, 12)),
    (Int8Conv2d(3, 20, 3, stride=2, padding=1), (2, 3, 9, 8)),
    (Int8Conv2d(4, 6, (3, 2), dilation=2, bias=False), (1, 4, 9, 9)),
    (Int8Conv2d(4, 6, 3, groups=2), (1, 4, 9, 9)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS)
@torch.no_grad()
def test_whole_numbers_give_what_rounded_weights_give(layer: Int8Layer, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    layer = seen(copy.deepcopy(layer), x)
    expected = layer._weighted(
        input_values(x, *input_grid(layer.input_range)), weight_values(layer.weight, layer.weight_scale)
    )
    for isa in kernels.isas():
        with kernels.using(isa):
            assert torch.allclose(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert (layer._weighted(x, layer.weight) - expected).abs().max() < 0.05


def test_what_was_prepared_follows_the_weights() -> None:
    x = torch.randn(2, 6)
    layer = seen(Int8Linear(6, 4), x)
    with torch.no_grad():
        before = layer(x)
        layer.weight.mul_(0.5)
        layer.weight_scale.mul_(0.5)
        bias = layer.bias
        assert bias is not None
        assert torch.allclose(layer(x) - bias, (before - bias) / 2, atol=1e-6)


def test_training_moves_both_grids() -> None:
    layer = Int8Linear(6, 4)
    assert layer.input_range[0] > layer.input_range[1]
    layer(torch.linspace(-1, 1, 12).view(2, 6))
    assert torch.allclose(layer.input_range, torch.tensor([-1.0, 1.0]))
    with torch.no_grad():
        layer.weight.mul_(3)
    layer(torch.linspace(-2, 2, 12).view(2, 6))
    assert layer.input_range[1] == pytest.approx(1.01)
    assert torch.allclose(layer.weight_scale, weight_steps(layer.weight))


def test_an_unseen_layer_rounds_by_the_batch() -> None:
    layer, x = Int8Linear(6, 4).eval(), 5 * torch.randn(3, 6)
    assert (layer(x) - nn.functional.linear(x, layer.weight, layer.bias)).abs().max() < 0.3


def test_layers_of_the_dialect() -> None:
    for layer, _ in LAYERS:
        again = dialect.build(type(layer).__name__, dialect.config(layer))
        assert repr(again) == repr(layer)
    with pytest.raises(OptionError, match="padding"):
        Int8Conv2d(3, 4, 3, padding="same")  # type: ignore[arg-type]


def network(*, norm: nn.Module | None = None) -> tuple[Graph, Tensor]:
    """A traced network in which the plain layers have become 8-bit ones, and what it reads."""
    torch.manual_seed(0)
    parts = [nn.Conv2d(3, 12, 3, bias=False), norm or nn.Identity(), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    x = torch.randn(4, 3, 8, 8)
    graph = trace(nn.Sequential(*parts, nn.Linear(12, 4)).eval(), x)
    for path in ("0", "5"):
        graph.module.set_submodule(path, int8_layer(graph.module.get_submodule(path)))
    graph.module.get_submodule("0").observe(x)
    graph.module.get_submodule("5").observe(torch.rand(4, 12))
    return graph, x


def test_export_compile_and_file(tmp_path: Path) -> None:
    graph, x = network()
    module = graph.module.eval()
    with torch.no_grad():
        expected = module(x)
        assert torch.equal(torch.export.export(module, (x,)).module()(x), expected)
        assert torch.allclose(torch.compile(module, backend="aot_eager")(x), expected, atol=1e-6)
        fxpress.compile(graph, [], x).save(tmp_path / "n.fxp")
        assert torch.equal(fxpress.load(tmp_path / "n.fxp")(x), expected)


def test_bytes_are_the_formula_and_decoding_gives_the_same_layer() -> None:
    layer = seen(Int8Conv2d(3, 7, 3), torch.randn(1, 3, 5, 5))
    data, coding = encode_layer(layer)
    assert len(data) == layer.stored_bytes == 7 * 27 + 4 * (7 + 2 + 7)
    with torch.device("meta"):
        fresh = Int8Conv2d(3, 7, 3)
    found = decode_layer(fresh, memoryview(data), coding)
    with torch.no_grad():
        again = Int8Conv2d(3, 7, 3).eval()
        again.load_state_dict(found)
        x = torch.randn(2, 3, 5, 5)
        assert torch.equal(again(x), layer(x))
    for broken, name in ((data[:-1], coding), (data, "huffman"), (b"\x80" + data[1:], coding)):
        with pytest.raises(FormatError):
            decode_layer(fresh, memoryview(broken), name)


def test_cuts_are_exact() -> None:
    graph, x = network()
    compiled = fxpress.compile(graph, [{"prune-channels": {"ratio": 0.4}}], x)
    distance = compiled.report["prune-channels"].distance
    assert distance is not None
    assert distance < 1e-5
    layer = compiled.module.get_submodule("0")
    assert isinstance(layer, Int8Conv2d)
    assert layer.out_channels < 12
    assert len(layer.weight_scale) == layer.out_channels


def test_a_batch_norm_goes_into_the_steps() -> None:
    norm = nn.BatchNorm2d(12)
    nn.init.normal_(norm.weight)  # some of the factors are negative
    nn.init.normal_(norm.bias)
    graph, x = network(norm=norm)
    numbers = graph.module.get_submodule("0").int8_weight
    compiled = fxpress.compile(graph, ["fold-batchnorm"], x)
    layer = compiled.module.get_submodule("0")
    assert isinstance(layer, Int8Conv2d)
    assert torch.equal(layer.int8_weight, numbers * norm.weight.sign().view(-1, 1, 1, 1).to(torch.int8))
    with torch.no_grad():
        assert torch.allclose(compiled(x), graph(x), atol=1e-5)


def test_tracing_looks_inside_and_says_so() -> None:
    graph, x = network()
    with pytest.warns(RuntimeWarning, match="2 8-bit layers"):
        compiled = fxpress.compile(graph.module, [], x)
    assert torch.allclose(compiled(x), graph(x), atol=1e-5)
