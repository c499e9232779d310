"""The network of the demo: a small residual CNN for small images."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional


class ResidualBlock(nn.Module):
    """y = relu(f(x) + shortcut(x)), f two 3x3 convolutions with batch norm (He et al. 2016).

    The shortcut is x itself, or a 1x1 convolution with batch norm where channels or stride change.

    Args:
        inputs: channels of x.
        outputs: channels of y.
        stride: of the first convolution and of the shortcut.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """`(N, inputs, H, W)` → `(N, outputs, H / stride, W / stride)`."""
        y = functional.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return functional.relu(y + self.shortcut(x))


class ResidualNet(nn.Module):
    """A stem, one or more residual blocks per width (the first of each further width halves the image), a linear layer.

    Args:
        channels: of the images.
        classes: how many class scores it gives.
        widths: channels per stage.
        blocks: residual blocks per stage.
    """

    def __init__(
        self, channels: int = 1, classes: int = 10, widths: Sequence[int] = (32, 64, 128), blocks: int = 1
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        stages: list[nn.Module] = []
        before = widths[0]
        for stage, width in enumerate(widths):
            for block in range(blocks):
                stages.append(ResidualBlock(before, width, stride=2 if stage and not block else 1))
                before = width
        self.blocks = nn.Sequential(*stages)
        self.head = nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images `(N, channels, H, W)` → class scores `(N, classes)`."""
        y = functional.relu(self.bn(self.stem(x)))
        return self.head(self.blocks(y).mean((2, 3)))  # type: ignore[no-any-return]
