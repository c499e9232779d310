"""HalfWaveQuantizer: levels by Lloyd's iteration, the rule position by position, and the three slopes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fxpress.ir import dialect
from fxpress.runtime.artifact import load, save
from fxpress.runtime.layers import HalfWaveQuantizer
from fxpress.runtime.layers.half_wave_quantizer import LEVELS, STEPS
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm
from torch import nn

import fxpress
from fxpress import OptionError

KINDS: list[dict[str, Any]] = [
    {"bits": bits, **kind}
    for bits in (1, 2, 3, 4)
    for kind in ({}, {"zero_bin": "round"}, {"uniform": False}, {"step": 0.3})
]


def centroids(thresholds: np.ndarray) -> np.ndarray:
    """Mean of a standard normal variable between neighbouring thresholds."""
    low, high = thresholds[:-1], thresholds[1:]
    return (norm.pdf(low) - norm.pdf(high)) / (norm.cdf(high) - norm.cdf(low))


def between(levels: np.ndarray, first: float) -> np.ndarray:
    return np.concatenate([[first], (levels[1:] + levels[:-1]) / 2, [np.inf]])


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_levels_are_a_fixed_point_of_lloyds_iteration(bits: int) -> None:
    levels = np.array(LEVELS[bits])
    assert np.abs(centroids(between(levels, 0.0)) - levels).max() < 2e-6


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("rule", ["strict", "round"])
def test_steps_are_where_lloyds_iteration_ends(bits: int, rule: str) -> None:
    """Uniform levels have one free number: with the bins fixed, the step of least error is Σ i m_i / Σ i² P_i."""
    count, step = np.arange(1, 2**bits), 0.5
    for _ in range(5000):
        edges = between(count * step, step / 2 if rule == "round" else 0.0)
        mass, first = np.diff(norm.cdf(edges)), -np.diff(norm.pdf(edges))
        step = float((count * first).sum() / (count**2 * mass).sum())
    assert STEPS[rule][bits] == pytest.approx(step, abs=9e-4)  # type: ignore[index]


@given(st.sampled_from(KINDS), st.lists(st.floats(-9, 9, width=32), min_size=1, max_size=20))
def test_every_value_takes_the_nearest_level_of_its_rule(kind: dict[str, Any], values: list[float]) -> None:
    layer = HalfWaveQuantizer(**kind)
    levels = [0.0, *layer.levels] if kind.get("zero_bin") == "round" else list(layer.levels)
    result = layer(torch.tensor(values, dtype=torch.float64))
    for x, y in zip(values, result.tolist(), strict=True):
        least = min(abs(x - level) for level in levels)
        assert y == 0 if x <= 0 else abs(x - y) <= least + 1e-12


def test_ties_go_to_the_lower_level() -> None:
    assert HalfWaveQuantizer(2, step=1.0)(torch.tensor([0.0, 1.5, 2.5, 1e30])).tolist() == [0, 1, 2, 3]
    assert HalfWaveQuantizer(2, step=1.0, zero_bin="round")(torch.tensor([0.5, 0.51])).tolist() == [0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dtype_and_shape_stay_and_nan_stays(dtype: torch.dtype) -> None:
    x = torch.tensor([[math.nan, -math.inf], [math.inf, 0.1]], dtype=dtype)
    y = HalfWaveQuantizer()(x)
    assert y.dtype == dtype
    assert y.shape == x.shape
    assert y[0, 0].isnan()
    assert y[0, 1] == 0
    assert y[1].tolist() == pytest.approx([1.614, 0.538], rel=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_slopes(kind: dict[str, Any]) -> None:
    x = torch.linspace(-2, 6, 1001, dtype=torch.float64, requires_grad=True)
    top = HalfWaveQuantizer(**kind).levels[-1]
    value = x.detach()
    inside, above = (value > 0) & (value <= top), value > top
    expected = {
        "vanilla": (value > 0).double(),
        "clipped": inside.double(),
        "log-tailed": inside + torch.where(above, 1 / (value - top + 1), 0.0),
    }
    for slope, wanted in expected.items():
        (gradient,) = torch.autograd.grad(HalfWaveQuantizer(**kind, backward=slope)(x).sum(), x)  # type: ignore[arg-type]
        assert torch.allclose(gradient, wanted, rtol=1e-12), slope


@pytest.mark.parametrize("kind", KINDS)
def test_round_trips_as_layer_of_the_dialect(kind: dict[str, Any]) -> None:
    layer = HalfWaveQuantizer(**kind)
    twin = dialect.build("HalfWaveQuantizer", dialect.config(layer))
    assert repr(twin) == repr(layer)
    assert (twin.levels, twin.thresholds) == (layer.levels, layer.thresholds)


def test_exports_and_goes_through_a_file(tmp_path: Path) -> None:
    x, layer = torch.randn(2, 3, 8, 8), HalfWaveQuantizer(3)
    assert torch.equal(torch.export.export(layer, (x,)).module()(x), layer(x))
    graph = fxpress.trace(nn.Sequential(nn.Conv2d(3, 4, 3)), (x,))
    graph.module.add_module("quantizer", layer)
    with graph.edit("test") as nodes:
        (output,) = nodes.find_nodes(op="output")
        (last,) = output.all_input_nodes
        with nodes.inserting_before(output):
            quantized = nodes.call_module("quantizer", (last,))
        quantized.meta["spec"] = last.meta["spec"]
        output.replace_input_with(last, quantized)
    save(tmp_path / "m.fxp", graph)
    assert torch.equal(load(tmp_path / "m.fxp").graph(x), graph(x))
    assert torch.equal(graph(x), layer(graph.module.get_submodule("0")(x)))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"bits": 5}, "bits is 5"),
        ({"zero_bin": "up"}, "zero_bin is 'up'; allowed: strict, round"),
        ({"backward": "tanh"}, "vanilla, clipped, log-tailed"),
        ({"step": -1.0}, "step is -1.0"),
        ({"step": math.inf}, "step is inf"),
        ({"uniform": False, "step": 1.0}, "step has no meaning"),
        ({"uniform": False, "zero_bin": "round"}, "zero_bin has no meaning"),
    ],
)
def test_errors(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words.replace("(", r"\(")):
        HalfWaveQuantizer(**arguments)
