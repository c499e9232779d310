"""A small network with every kind of layer that criteria meet."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fxpress.ir.graph import Graph
from fxpress.ir.trace import trace
from fxpress.passes.clone import clone_graph
from torch import Tensor, nn


class Mixed(nn.Module):
    """A stem and a residual block; a grouped, a depthwise and a transposed convolution; two linear layers."""

    def __init__(self, *, norm: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.inner, self.outer = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 8, 1)
        self.inner_norm = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.wide = nn.Conv2d(8, 8, 1)
        self.grouped = nn.Conv2d(8, 12, 3, groups=2)
        self.depthwise = nn.Conv2d(12, 12, 3, groups=12)
        self.transposed = nn.ConvTranspose2d(12, 10, 2)
        self.hidden, self.head = nn.Linear(10, 9), nn.Linear(9, 5)
        for layer in (self.norm, self.inner_norm):
            if isinstance(layer, nn.BatchNorm2d):
                nn.init.uniform_(layer.weight, 0.5, 1.5)
                nn.init.uniform_(layer.bias, -0.2, 0.4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.outer(torch.relu(self.inner_norm(self.inner(x)))))
        x = torch.relu(self.depthwise(torch.relu(self.grouped(self.wide(x)))))
        x = torch.relu(self.transposed(x)).mean((2, 3))
        return self.head(torch.relu(self.hidden(x)))  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def mixed() -> Callable[..., Graph]:
    """Gives a graph of it that may be changed: `mixed()`, `mixed(norm=False)`."""
    torch.manual_seed(0)
    traced = {norm: trace(Mixed(norm=norm).eval(), torch.randn(2, 3, 10, 10)) for norm in (True, False)}
    return lambda norm=True: clone_graph(traced[norm])


@pytest.fixture
def graph_of_all_layers(mixed: Callable[..., Graph]) -> Graph:
    """The graph with batch norms."""
    return mixed()
