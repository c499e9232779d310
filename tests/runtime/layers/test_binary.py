"""BinaryConv2d, BinaryLinear: closed forms against brute force, the gradient that passes, and layers like others."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fxpress.ir import dialect
from fxpress.runtime.artifact import load, save
from fxpress.runtime.layers import BinaryConv2d, BinaryLinear
from fxpress.runtime.layers.binary import binarize
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fxpress
from fxpress import OptionError

SEEDS = st.integers(0, 2**31)


def weight_of(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@given(SEEDS, st.integers(1, 6))
def test_sign_and_mean_are_the_best_binary_weights(seed: int, n: int) -> None:
    weight = weight_of(seed, 1, n)
    error = float((weight - binarize(weight)).square().sum())
    for signs in product((-1.0, 1.0), repeat=n):
        b = torch.tensor([signs], dtype=torch.float64)
        alpha = (weight * b).mean().clamp(min=0)  # least squares for these signs
        assert error <= float((weight - alpha * b).square().sum()) + 1e-12


@given(SEEDS)
def test_ternary_weights_are_better_than_binary_ones(seed: int) -> None:
    weight = weight_of(seed, 1, 64)
    kept = weight.abs() > 0.7 * weight.abs().mean()
    expected = weight.sign() * kept * weight.abs()[kept].mean()
    assert torch.allclose(binarize(weight, "ternary"), expected, rtol=1e-12)
    assert (weight - expected).square().sum() < (weight - binarize(weight)).square().sum()


def test_scales() -> None:
    weight = torch.tensor([[1.0, -3.0], [0.0, -4.0]])
    assert binarize(weight).tolist() == [[2, -2], [2, -2]]  # the sign of 0 is +1
    assert binarize(weight, scale="layer").tolist() == [[2, -2], [2, -2]]
    assert binarize(weight[:1], scale="layer").tolist() == [[2, -2]]
    assert binarize(weight, scale="none").tolist() == [[1, -1], [1, -1]]
    assert binarize(weight, "ternary").tolist() == [[0, -3], [0, -4]]
    assert binarize(torch.zeros(1, 2), "ternary").tolist() == [[0, 0]]
    assert not binarize(torch.zeros(1, 2)).any()


@pytest.mark.parametrize("weights", ["binary", "ternary"])
def test_the_gradient_of_the_quantized_weights_goes_to_the_latent_ones_unchanged(weights: Any) -> None:
    layer = BinaryConv2d(3, 4, 3, stride=2, padding=1, weights=weights).double()
    x = weight_of(0, 2, 3, 8, 8)
    layer(x).square().sum().backward()
    plain = layer.binary_weight.detach().requires_grad_()
    F.conv2d(x, plain, layer.bias, 2, 1).square().sum().backward()
    assert torch.allclose(layer.weight.grad, plain.grad, rtol=1e-12)


LAYERS = [
    (BinaryConv2d(4, 6, (3, 1), stride=(1, 2), padding=(1, 0), dilation=2, groups=2), nn.Conv2d, (2, 4, 9, 9)),
    (BinaryConv2d(4, 6, 3, bias=False, weights="ternary", scale="layer"), nn.Conv2d, (2, 4, 9, 9)),
    (BinaryLinear(5, 7, scale="none"), nn.Linear, (2, 3, 5)),
    (BinaryLinear(5, 7, bias=False), nn.Linear, (2, 5)),
]


@pytest.mark.parametrize(("layer", "plain", "shape"), LAYERS)
def test_is_the_plain_layer_with_the_quantized_weights(
    layer: Any, plain: type[nn.Module], shape: tuple[int, ...], tmp_path: Path
) -> None:
    names = set(dialect.LAYERS[plain.__name__].fields) - {"bias"}
    twin: Any = plain(**{name: getattr(layer, name) for name in names}, bias=layer.bias is not None)
    twin.load_state_dict({**layer.state_dict(), "weight": layer.binary_weight.detach()})
    x = torch.randn(shape)
    assert torch.equal(layer(x), twin(x))
    exported = torch.export.export(layer.eval(), (x,)).module()
    assert torch.equal(exported(x), twin(x))
    graph = fxpress.trace(nn.Sequential(twin), (x,))
    graph.module.set_submodule("0", layer)
    save(tmp_path / "m.fxp", graph)
    assert torch.equal(load(tmp_path / "m.fxp").graph(x), twin(x))
    rebuilt = dialect.build(type(layer).__name__, dialect.config(layer))
    assert repr(rebuilt) == repr(layer)


def test_latent_weights_learn_through_the_signs() -> None:
    torch.manual_seed(0)
    layer, target = BinaryLinear(8, 1, scale="none"), torch.tensor([1.0, -1, 1, 1, -1, -1, 1, -1])
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    for _ in range(200):
        x = torch.randn(32, 8)
        optimizer.zero_grad()
        (layer(x)[:, 0] - x @ target).square().mean().backward()
        optimizer.step()
    assert torch.equal(layer.binary_weight[0].detach(), target)


@pytest.mark.parametrize("cls", [BinaryConv2d, BinaryLinear])
def test_errors(cls: Any) -> None:
    with pytest.raises(OptionError, match="weights is 'int'; allowed: binary, ternary"):
        cls(4, 4, 1, weights="int")
    with pytest.raises(OptionError, match="scale is 'tap'; allowed: filter, layer, none"):
        cls(4, 4, 1, scale="tap")
    with pytest.raises(ValueError, match="divisible by groups"):
        BinaryConv2d(4, 6, 1, groups=3)
