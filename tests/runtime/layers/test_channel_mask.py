"""ChannelMask: one factor per channel, in any dimension, and in the dialect of stored graphs."""

from __future__ import annotations

import pytest
import torch
from fxpress.ir import dialect
from fxpress.runtime.layers.channel_mask import ChannelMask


@pytest.mark.parametrize(("shape", "dim"), [((2, 3), 1), ((2, 3, 4, 5), 1), ((2, 7, 3), -1), ((2, 7, 3), 2)])
def test_multiplies_each_channel(shape: tuple[int, ...], dim: int) -> None:
    layer = ChannelMask(3, dim)
    x = torch.randn(shape)
    assert torch.equal(layer(x), x)
    with torch.no_grad():
        layer.mask.copy_(torch.tensor([0.0, 1.0, -2.0]))
    y = layer(x)
    assert torch.equal(y.select(dim, 0), torch.zeros_like(x.select(dim, 0)))
    assert torch.equal(y.select(dim, 2), -2 * x.select(dim, 2))


def test_the_factors_learn() -> None:
    layer = ChannelMask(3)
    layer(torch.ones(2, 3, 4)).sum().backward()
    assert torch.equal(layer.mask.grad, torch.full((3,), 8.0))


def test_wrong_number_of_channels() -> None:
    with pytest.raises(RuntimeError):
        ChannelMask(3)(torch.ones(2, 4, 5))


def test_is_rebuilt_from_its_configuration() -> None:
    layer = ChannelMask(5, dim=-1)
    twin = dialect.build("ChannelMask", dialect.config(layer))
    assert isinstance(twin, ChannelMask)
    assert (twin.channels, twin.dim, tuple(twin.mask.shape)) == (5, -1, (5,))
    assert repr(twin) == "ChannelMask(5, dim=-1)"
