"""Rows and weights: `layer(x) = X Wᵀ + b` for every kind of layer."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fxpress.passes.layerwise import patches
from fxpress.passes.layerwise.patches import choose_positions, rows, weight_of_rows, weight_rows
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

KINDS: dict[str, tuple[type[nn.Module], int]] = {
    "conv1d": (nn.Conv1d, 1),
    "conv2d": (nn.Conv2d, 2),
    "conv3d": (nn.Conv3d, 3),
    "transposed1d": (nn.ConvTranspose1d, 1),
    "transposed2d": (nn.ConvTranspose2d, 2),
}


def respond(layer: Any, x: Tensor, positions: int = 10**6) -> tuple[Tensor, Tensor]:
    """What rows and weights say the layer gives, and what it gives, both (rows, groups, out/groups)."""
    y = layer(x)
    parts = list(rows(layer, x, y, positions))
    taken, given_ = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
    groups = taken.shape[1]
    said = torch.einsum("mgf,gof->mgo", taken, weight_rows(layer)) + layer.bias.view(groups, -1)
    return said.detach(), given_.detach()


@st.composite
def layers(draw: Any) -> tuple[Any, Tensor]:
    kind, rank = KINDS[draw(st.sampled_from(sorted(KINDS)))]
    groups = draw(st.integers(1, 3))
    sizes = st.integers(1, 3)
    per_dim = lambda s: draw(st.tuples(*[s] * rank))  # noqa: E731
    kernel, stride, dilation = per_dim(sizes), per_dim(sizes), per_dim(st.integers(1, 2))
    padding = per_dim(st.integers(0, 3))
    options: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    if kind in (nn.ConvTranspose1d, nn.ConvTranspose2d):
        options["output_padding"] = tuple(
            draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)
        )
    layer = kind(groups * draw(sizes), groups * draw(sizes), kernel, **options).double()
    x = torch.randn(draw(sizes), layer.in_channels, *per_dim(st.integers(3, 6)), dtype=torch.float64)
    return layer, x


@settings(max_examples=50)
@given(layers())
def test_rows_and_weights_give_what_the_layer_gives(case: tuple[Any, Tensor]) -> None:
    layer, x = case
    try:
        layer(x)
    except RuntimeError:  # the kernel does not fit into the image, or an output would be empty
        assume(False)
    said, really = respond(layer, x)
    assert really.numel() == layer(x).numel()
    torch.testing.assert_close(said, really, rtol=1e-10, atol=1e-10)
    assert torch.equal(weight_of_rows(layer, weight_rows(layer)), layer.weight.detach())


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", ["same", "valid", 2])
def test_every_padding(mode: str, padding: Any) -> None:
    layer = nn.Conv2d(3, 4, (5, 3), padding=padding, padding_mode=mode, dilation=(1, 2)).double()
    torch.testing.assert_close(*respond(layer, torch.randn(2, 3, 7, 8, dtype=torch.float64)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 6), (2, 3, 4, 6)])
def test_linear_layers(shape: tuple[int, ...]) -> None:
    layer = nn.Linear(6, 4).double()
    said, really = respond(layer, torch.randn(shape, dtype=torch.float64))
    torch.testing.assert_close(said, really, rtol=1e-10, atol=1e-10)
    assert len(said) == int(np.prod(shape[:-1]))


def test_rows_are_those_of_unfold() -> None:
    layer = nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, bias=False)
    x = torch.randn(3, 4, 9, 8)
    ((taken, _),) = rows(layer, x, layer(x), 10**6)
    columns = F.unfold(x, 3, dilation=2, padding=1, stride=2)  # (N, C·9, positions)
    assert torch.equal(taken[:, 0], columns.transpose(1, 2).reshape(-1, 36))


def test_a_channel_less_is_a_column_less() -> None:
    layer = nn.Conv2d(4, 6, 3)
    x = torch.randn(2, 4, 5, 5)
    less = copy.copy(layer)
    ((whole, _),) = rows(layer, x, layer(x), 99)
    ((part, _),) = rows(less, x[:, [0, 2, 3]], layer(x), 99)
    assert torch.equal(part.view(-1, 3, 9), whole.view(-1, 4, 9)[:, [0, 2, 3]])


def test_chosen_positions_are_the_same_of_input_and_output(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = nn.Conv2d(3, 4, 3, padding=1).double(), torch.randn(5, 3, 8, 8, dtype=torch.float64)
    said, really = respond(layer, x, positions=10)
    assert len(said) == 5 * 10
    torch.testing.assert_close(said, really)
    monkeypatch.setattr(patches, "CHUNK", 1)
    in_parts, _ = respond(layer, x, positions=10)
    assert torch.equal(in_parts, said)


def test_positions_are_fixed_distinct_and_in_range() -> None:
    chosen = choose_positions(1000, 64)
    assert torch.equal(chosen, choose_positions(1000, 64))
    assert len(chosen.unique()) == 64
    assert 0 <= int(chosen.min()) <= int(chosen.max()) < 1000
    assert torch.equal(choose_positions(7, 64), torch.arange(7))
