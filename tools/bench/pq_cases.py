"""The single layers of the benchmark: shapes, what fxpress makes of them, what is wanted of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from ...runtime.layers.pq_conv2d import PQConv2d
from ...runtime.layers.pq_linear import PQLinear
from .layer_case import LayerCase

Tables = Literal["fp32", "int16", "int8"]
PQ = PQLinear | PQConv2d


@dataclass(frozen=True)
class Setting:
    """How a layer is quantised and computed.

    Args:
        codewords: K.
        subspace: d.
        tables: numbers in the tables.
        goals: `(batch, cache)` → how many times faster than the better int8 engine is wanted, on one thread.
    """

    codewords: int
    subspace: int
    tables: Tables
    goals: dict[tuple[int, str], float] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return f"K={self.codewords} d={self.subspace} {self.tables}"


@dataclass(frozen=True)
class Case(LayerCase):
    """A layer, its input and its settings.

    Args:
        settings: what fxpress makes of it.
    """

    settings: tuple[Setting, ...]

    def images(self, batch: int) -> Tensor:
        """An input as it lies behind a ReLU, `(batch, ...)`."""
        torch.manual_seed(batch)
        return torch.randn(batch, *self.shape).relu()


FC_SETTINGS = (Setting(16, 4, "int8", {(8, "warm"): 3.0}), Setting(32, 8, "fp32"), Setting(64, 8, "int8"))
FC_GOALS = (
    Setting(16, 4, "int8", {(1, "warm"): 15.0, (1, "cold"): 5.0, (8, "warm"): 3.0}),
    Setting(32, 8, "fp32", {(1, "warm"): 10.0}),
    Setting(64, 8, "int8"),
)
CONV_SETTINGS = (
    Setting(64, 8, "int8", {(1, "warm"): 4.0}),
    Setting(16, 8, "int8"),
    Setting(16, 4, "int8"),
    Setting(128, 8, "int8"),
)


def cases(*, quick: bool = False) -> tuple[Case, ...]:
    """FC 9216×4096, 4096×4096, 4096×1000 and a convolution 3×3 256→384 on 13×13; `quick`: the smallest FC, and it."""
    convolution = Case("conv 3x3 256-384, 13x13", nn.Conv2d(256, 384, 3, padding=1), (256, 13, 13), CONV_SETTINGS)
    small = Case("FC 4096x1000", nn.Linear(4096, 1000), (4096,), FC_SETTINGS)
    if quick:
        return small, convolution
    large = Case("FC 9216x4096", nn.Linear(9216, 4096), (9216,), FC_GOALS)
    middle = Case("FC 4096x4096", nn.Linear(4096, 4096), (4096,), FC_SETTINGS)
    return large, middle, small, convolution


def random_layer(layer: nn.Linear | nn.Conv2d, setting: Setting, seed: int = 0) -> PQ:
    """A product-quantized layer of that shape with random codewords and indices; the speed does not depend on them."""
    torch.manual_seed(seed)
    out, inputs, *kernel = layer.weight.shape
    taps, count = layer.weight[0, 0].numel() if kernel else 1, -(-inputs // setting.subspace)
    codebook = torch.randn(count, setting.codewords, setting.subspace) / (inputs * taps) ** 0.5
    indices = torch.randint(setting.codewords, (taps, count, out), dtype=torch.uint8)
    options = {"kernel": "table", "tables": setting.tables}
    if isinstance(layer, nn.Conv2d):
        return PQConv2d.from_weights(layer, codebook, indices, **options).eval()
    return PQLinear.from_weights(layer, codebook, indices, **options).eval()


def dense_layer(layer: PQ) -> nn.Linear | nn.Conv2d:
    """The dense layer that computes the same: what the other engines get."""
    bias = layer.bias is not None
    dense: nn.Linear | nn.Conv2d
    if isinstance(layer, PQLinear):
        dense = nn.Linear(layer.in_features, layer.out_features, bias)
    else:
        sizes = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups, bias)
        dense = nn.Conv2d(layer.in_channels, layer.out_channels, *sizes)
    with torch.no_grad():
        dense.weight.copy_(layer.decoded())
        if dense.bias is not None and layer.bias is not None:
            dense.bias.copy_(layer.bias)
    return dense.eval()
