"""Slopes: where latent weights begin behind a quantizer."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from fxpress.ir.graph import Graph
from fxpress.ir.trace import trace
from fxpress.passes.binarize.slopes import FLOOR, slopes
from fxpress.runtime.layers import HalfWaveQuantizer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

Z = torch.special.ndtri((torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000)  # equally likely values


@functools.cache
def rectified() -> tuple[Graph, list[Any]]:
    return activations(nn.ReLU())


def activations(*layers: nn.Module) -> tuple[Graph, list[Any]]:
    graph = trace(nn.Sequential(nn.Conv2d(2, 3, 1), *layers, nn.Conv2d(3, 1, 1)).eval(), torch.randn(2, 2, 4, 4))
    return graph, graph.nodes[2:-2]


def line_through(x: Tensor, y: Tensor) -> Tensor:
    """Slopes of least squares through points (N,) and (N, C), from the normal equations."""
    wide = torch.stack([x, torch.ones_like(x)], 1)
    return torch.linalg.solve(wide.T @ wide, wide.T @ y)[0]


@settings(max_examples=10)
@given(st.floats(-2, 2).filter(lambda s: abs(s) > 0.2), st.floats(-1, 1), st.integers(1, 4))
def test_the_best_line_through_samples(scale: float, shift: float, bits: int) -> None:
    graph, nodes = rectified()
    quantizer = HalfWaveQuantizer(bits)
    found = slopes(graph, nodes, quantizer, torch.tensor([scale] * 3), torch.tensor([shift] * 3))
    wanted = torch.relu(scale * Z + shift)
    levels = quantizer(Z)
    line = line_through(levels, wanted[:, None])
    assert torch.allclose(found, line.expand(3), atol=0.02)
    assert bool((found.sign() == torch.tensor(scale).sign()).all())


@pytest.mark.parametrize("layer", [nn.PReLU(), nn.PReLU(3), nn.Hardswish(), nn.ReLU6(), nn.GELU(), nn.LeakyReLU(0.2)])
def test_other_activations(layer: nn.Module) -> None:
    graph, nodes = activations(layer)
    scale, shift = torch.tensor([0.5, 1.0, 2.0]), torch.tensor([0.1, -0.3, 0.2])
    with torch.no_grad():
        wanted = layer(((Z[:, None] * scale + shift)[:, :, None, None]).float())[:, :, 0, 0].double()
    levels = HalfWaveQuantizer()(Z)
    line = line_through(levels, wanted)
    assert torch.allclose(slopes(graph, nodes, HalfWaveQuantizer(), scale, shift), line, atol=0.02)


def test_a_dead_channel_keeps_a_sign() -> None:
    graph, nodes = activations(nn.ReLU())
    found = slopes(graph, nodes, HalfWaveQuantizer(), torch.tensor([1.0, 1.0, 0.01]), torch.tensor([0.0, 0.0, -50.0]))
    assert float(found[2]) == pytest.approx(FLOOR * float(found.sum() / 3), rel=0.1)
