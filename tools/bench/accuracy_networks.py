"""The networks of the accuracy tables: CIFAR ResNets and a small VGG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...ir.errors import OptionError
from .accuracy_protocol import Network


class PaddedShortcut(nn.Module):
    """Option A of He et al. 2016: every second pixel, and zeros for the channels that come in new.

    Args:
        padding: zero channels on either side.
    """

    def __init__(self, padding: int) -> None:
        super().__init__()
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, H, W)` → `(N, C + 2 padding, H / 2, W / 2)`."""
        return functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm around a shortcut without parameters."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity() if stride == 1 else PaddedShortcut((outputs - inputs) // 2)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, inputs, H, W)` → `(N, outputs, H / stride, W / stride)`."""
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """ResNet-(6 n + 2) for images of 32 x 32 (He et al. 2016, section 4.2): stages of 16, 32 and 64 channels.

    The names are those of the published state dicts (akamaster/pytorch_resnet_cifar10).

    Args:
        blocks: n, per stage: 3 for ResNet-20, 9 for ResNet-56.
    """

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = _stage(16, 16, blocks), _stage(16, 32, blocks), _stage(32, 64, blocks)
        self.linear = nn.Linear(64, 10)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, 3, 32, 32)` → `(N, 10)`."""
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        scores: Tensor = self.linear(x.mean((2, 3)))
        return scores


def vgg_small(channels: int, width: float) -> nn.Sequential:
    """VGG-small (Cai et al. 2017): 128, 128, pool, 256, 256, pool, 512, 512, pool, each times `width`; one linear."""
    layers: list[nn.Module] = []
    for index, full in enumerate((128, 128, 256, 256, 512, 512)):
        outputs = max(1, round(full * width))
        layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if index % 2 else []
        channels = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def build_network(plan: Network, channels: int, seed: int, folder: Path | None) -> nn.Module:
    """A network as a protocol asks for it, before its own passes.

    Args:
        plan: which one.
        channels: of the images.
        seed: of random weights.
        folder: where state dicts lie.

    Raises:
        OptionError: its weights are missing.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if plan.network == "vgg-small":
            network: nn.Module = vgg_small(channels, plan.width)
        else:
            network = CifarResNet({"resnet20": 3, "resnet56": 9}[plan.network])
    if plan.weights is not None:
        if folder is None or not (folder / plan.weights).is_file():
            raise OptionError(f"no weights {plan.weights} in {folder}", hint="Give their folder with --weights DIR.")
        content = torch.load(folder / plan.weights, map_location="cpu", weights_only=True)
        state = content.get("state_dict", content)
        network.load_state_dict({name.removeprefix("module."): tensor for name, tensor in state.items()})
    return network.to(memory_format=torch.channels_last)


def _stage(inputs: int, outputs: int, blocks: int) -> nn.Sequential:
    first = BasicBlock(inputs, outputs, 1 if inputs == outputs else 2)
    rest: Sequence[nn.Module] = [BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)]
    return nn.Sequential(first, *rest)
