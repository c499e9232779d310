"""Bias folding: exact for constant channels inside, measured at borders, and never more than it says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from fxpress.ir.cut import Cut
from fxpress.ir.graph import Graph
from fxpress.ir.groups import find_groups
from fxpress.ir.trace import trace
from fxpress.passes.prune.reconstruct import Compensation, compensate
from torch import Tensor, nn

DEAD = [1, 4, 5]


class Constant(nn.Module):
    """A first layer three of whose eight channels are constant, a reader of them, and a head that is not cut."""

    def __init__(self, reader: nn.Module, between: nn.Module | None = None, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        with torch.no_grad():
            self.first.weight[DEAD] = 0
        self.between = between or nn.Identity()
        self.reader = reader

    def forward(self, x: Tensor) -> Tensor:
        return self.reader(self.between(torch.relu(self.first(x) + 0.3)))  # type: ignore[no-any-return]


def cut_and_fold(net: nn.Module, x: Tensor, batches: Any = None, dead: Any = DEAD) -> tuple[Graph, Graph, Compensation]:
    """The network before, the folded one, and what was done."""
    graph = trace(net.double().eval(), x)
    groups = find_groups(graph)
    first = next(group for group in groups.groups if group.name == "first")
    axis = groups.channels(next(node for node in graph.nodes if str(node.target) == "first"))
    assert axis is not None
    classes = np.unique(axis[1][dead])
    assert set(classes) <= set(first.classes)
    cut = Cut(groups, classes)
    after = cut.apply("cut")
    data = batches or [(x, torch.zeros(len(x), dtype=torch.int64))]
    return graph, after, compensate(cut, after, data, method="bias")


READERS: dict[str, Callable[[], nn.Module]] = {
    "bias": lambda: nn.Conv2d(8, 4, 3),
    "no bias": lambda: nn.Conv2d(8, 4, 3, bias=False),
    "batch norm": lambda: nn.Sequential(nn.Conv2d(8, 4, 3, bias=False), nn.BatchNorm2d(4)),
    "strides and dilation": lambda: nn.Conv2d(8, 4, (3, 2), stride=2, dilation=(1, 2)),
    "kernel 1": lambda: nn.Conv2d(8, 4, 1, bias=False),
    "circular padding": lambda: nn.Conv2d(8, 4, 3, padding=1, padding_mode="circular"),
    "reflected padding": lambda: nn.Conv2d(8, 4, 3, padding=1, padding_mode="reflect"),
    "linear behind flatten": lambda: nn.Sequential(nn.Flatten(), nn.Linear(8 * 49, 5)),
    "linear, no bias": lambda: nn.Sequential(nn.Flatten(), nn.Linear(8 * 49, 5, bias=False)),
    "linear, batch norm": lambda: nn.Sequential(nn.Flatten(), nn.Linear(8 * 49, 5, bias=False), nn.BatchNorm1d(5)),
    "pool between": lambda: nn.Sequential(nn.MaxPool2d(2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 2)),
    "depthwise between": lambda: nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 2)),
    "mean between": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
    "transposed": lambda: nn.ConvTranspose2d(8, 4, 1, bias=False),
    "transposed, every output sees every tap": lambda: nn.ConvTranspose2d(8, 4, 3, padding=2),
}


@pytest.mark.parametrize("name", READERS)
def test_constant_channels_are_folded_exactly(name: str) -> None:
    net = Constant(READERS[name]())
    for module in net.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.running_mean.normal_()  # type: ignore[union-attr, operator]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr, operator]
    before, after, result = cut_and_fold(net, torch.randn(4, 3, 7, 7, dtype=torch.float64))
    other = torch.randn(3, 3, 7, 7, dtype=torch.float64)  # not what the means were taken of
    torch.testing.assert_close(after(other), before(other), rtol=1e-10, atol=1e-10)
    (change,) = result.changes
    assert change.before > 1e-3
    assert change.after < 1e-7
    assert change.border < 1e-7
    assert not result.skips


@pytest.mark.parametrize(
    ("name", "place"),
    [("bias", "bias"), ("no bias", "new bias"), ("batch norm", "running mean"), ("linear, batch norm", "running mean")],
)
def test_where_the_constant_goes(name: str, place: str) -> None:
    x = torch.randn(4, 3, 7, 7, dtype=torch.float64)
    before, after, result = cut_and_fold(Constant(READERS[name]()), x)
    assert [change.place for change in result.changes] == [place]
    names = {name for name, _ in after.module.named_parameters()}
    assert names - {name for name, _ in before.module.named_parameters()} == (
        {"reader.bias"} if place == "new bias" else set()
    )


def test_grouped_convolutions() -> None:
    net = Constant(nn.Conv2d(8, 6, 3, groups=2, bias=False))
    dead = [1, 5]  # the same place in both groups
    with torch.no_grad():
        net.first.weight[dead] = 0
    x = torch.randn(4, 3, 7, 7, dtype=torch.float64)
    before, after, _ = cut_and_fold(net, x, dead=dead)
    assert after.module.get_submodule("reader").weight.shape == (6, 3, 3, 3)  # type: ignore[union-attr]
    torch.testing.assert_close(after(x), before(x), rtol=1e-10, atol=1e-10)


def test_zero_padding_is_exact_inside_and_its_border_is_reported() -> None:
    x = torch.randn(4, 3, 7, 7, dtype=torch.float64)
    before, after, result = cut_and_fold(Constant(nn.Conv2d(8, 4, 3, padding=1)), x)
    wanted, found = before(x).detach(), after(x).detach()
    torch.testing.assert_close(found[..., 1:-1, 1:-1], wanted[..., 1:-1, 1:-1], rtol=1e-10, atol=1e-10)
    gap = float((found - wanted).norm() / wanted.norm())
    assert gap > 1e-3
    assert result.changes[0].border == pytest.approx(gap, rel=1e-6)
    assert result.changes[0].after == pytest.approx(gap, rel=1e-6)
    assert any("zero-padded borders are off" in note for note in result.notes)


def test_a_position_of_its_own_for_each_mean_behind_a_flatten() -> None:
    """Channels that are constant over images but not over space."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.reader = nn.Conv2d(3, 8, 1), nn.Linear(8 * 25, 5)
            self.register_buffer("gate", (torch.arange(8) != 4).double().view(8, 1, 1))
            self.register_buffer(
                "pattern", torch.randn(8, 5, 5, dtype=torch.float64) * (torch.arange(8) == 4).view(8, 1, 1)
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.reader((self.first(x) * self.gate + self.pattern).flatten(1))  # type: ignore[no-any-return]

    x = torch.randn(6, 3, 5, 5, dtype=torch.float64)
    before, after, _ = cut_and_fold(Positions(), x, dead=[4])
    torch.testing.assert_close(after(x), before(x), rtol=1e-10, atol=1e-10)


def test_errors_are_those_of_the_responses() -> None:
    """Channels that are not constant: the numbers of the report against the layers' own outputs."""
    x = torch.randn(8, 3, 7, 7, dtype=torch.float64)
    before, after, result = cut_and_fold(Constant(nn.Conv2d(8, 4, 3)), x, dead=[0, 2, 7])
    (change,) = result.changes
    wanted = before(x).detach()
    constant = after.tensor("reader.bias") - before.tensor("reader.bias")
    plain = (after(x) - constant.view(1, -1, 1, 1)).detach()
    assert change.before == pytest.approx(float((plain - wanted).norm() / wanted.norm()), rel=1e-6)
    assert change.after == pytest.approx(float((after(x) - wanted).detach().norm() / wanted.norm()), rel=1e-6)
    assert change.after < change.before
    torch.testing.assert_close(after(x).mean((0, 2, 3)), wanted.mean((0, 2, 3)), rtol=0.05, atol=0.02)


def test_on_maps_without_an_inside_the_mean_response_is_folded() -> None:
    """3x3 kernels on single pixels: eight of nine taps never see anything."""
    x = torch.randn(16, 3, 1, 1, dtype=torch.float64)
    before, after, result = cut_and_fold(Constant(nn.Conv2d(8, 4, 3, padding=1)), x)
    assert result.changes[0].after <= result.changes[0].before
    torch.testing.assert_close(after(x), before(x), rtol=1e-9, atol=1e-9)


def test_a_strided_transposed_convolution_gets_the_mean_over_its_outputs() -> None:
    x = torch.randn(4, 3, 9, 9, dtype=torch.float64)
    before, after, result = cut_and_fold(Constant(nn.ConvTranspose2d(8, 4, 4, stride=2, padding=1)), x)
    gap = (after(x) - before(x)).detach()[..., 2:-2, 2:-2]
    assert float(gap.mean((0, 2, 3)).abs().max()) < 1e-9
    assert 0 < result.changes[0].after < result.changes[0].before
    assert result.changes[0].border == pytest.approx(result.changes[0].after, rel=1e-6)


def test_ragged_batches_are_one() -> None:
    x = torch.randn(7, 3, 7, 7, dtype=torch.float64)
    net = Constant(nn.Conv2d(8, 4, 3))
    targets = torch.zeros(7, dtype=torch.int64)
    whole = cut_and_fold(net, x, dead=[0, 2])[1].tensor("reader.bias")
    ragged = [(x[:1], targets[:1]), (x[1:4], targets[1:4]), (x[4:], targets[4:])]
    parts = cut_and_fold(net, x, ragged, dead=[0, 2])[1].tensor("reader.bias")
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)
