"""fold-batchnorm: what is folded, how often, and the same numbers; and what is left alone, with its reason."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from fxpress.ir.verify import distance, run
from fxpress.passes.base import Context
from fxpress.passes.fuse.fold_batchnorm import FoldBatchnorm
from fxpress.passes.runner import run_pass
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxpress import Graph, trace

DOUBLE = 1e-12


def randomised(model: nn.Module) -> nn.Module:
    """Statistics and affine parameters that make every term of the formula count."""
    for norm in model.modules():
        if isinstance(norm, _BatchNorm):
            if norm.running_mean is not None and norm.running_var is not None:
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.2, 3.0)
            if norm.affine:
                nn.init.normal_(norm.weight)
                nn.init.normal_(norm.bias)
    return model.eval()


def norms(graph: Graph) -> int:
    return sum(isinstance(graph.layer(node), _BatchNorm) for node in graph.nodes)


def fold(graph: Graph) -> tuple[int, list[str], float]:
    """Fold; how many norms went, the reasons of the others, and the distance of the outputs."""
    before, outputs = norms(graph), run(graph)
    result, _ = run_pass(FoldBatchnorm(), graph, Context(original=graph.copy()))
    return before - norms(graph), [skip.reason for skip in result.skips], distance(outputs, run(graph))


FOLDABLE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8)), (2, 3, 9)),
    "conv2d": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()), (2, 3, 9, 9)),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(3, 8, 3), nn.BatchNorm3d(8)), (2, 3, 5, 5, 5)),
    "without bias": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)), (2, 3, 9, 9)),
    "not affine": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False)), (2, 3, 9, 9)),
    "large eps": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, eps=0.1)), (2, 3, 9, 9)),
    "padded": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=2), nn.BatchNorm2d(8)), (2, 3, 9, 9)),
    "grouped": (lambda: nn.Sequential(nn.Conv2d(6, 9, 3, groups=3), nn.BatchNorm2d(9)), (2, 6, 9, 9)),
    "depthwise": (lambda: nn.Sequential(nn.Conv2d(6, 12, 3, groups=6), nn.BatchNorm2d(12)), (2, 6, 9, 9)),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, stride=2), nn.BatchNorm2d(6)), (2, 4, 5, 5)),
    "transposed, grouped": (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)),
        (2, 4, 5, 5),
    ),
    "transposed 1d": (lambda: nn.Sequential(nn.ConvTranspose1d(4, 6, 3, groups=2), nn.BatchNorm1d(6)), (2, 4, 5)),
    "linear": (lambda: nn.Sequential(nn.Linear(5, 7, bias=False), nn.BatchNorm1d(7)), (4, 5)),
    "two in a row": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8)), (2, 3, 9, 9)),
}


class Joined(nn.Module):
    """A norm behind a concatenation of two layers; or of one twice, of one and its input."""

    def __init__(self, what: str = "two") -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.Conv2d(4, 2, 1)
        self.norm = nn.BatchNorm2d({"two": 6, "twice": 8, "input": 8, "read": 6}[what])
        self.what = what

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.one(x), self.two(x)
        parts = {"two": [one, two], "twice": [one, one], "input": [one, x], "read": [one, two]}[self.what]
        joined = torch.cat(parts, 1)
        return self.norm(joined) + (joined if self.what == "read" else 0)  # type: ignore[no-any-return]


FOLDABLE["behind a concatenation"] = (Joined, (2, 4, 6, 6))


@pytest.mark.parametrize("case", FOLDABLE)
def test_folds(case: str) -> None:
    make, shape = FOLDABLE[case]
    model = randomised(make()).double()
    graph = trace(model, torch.randn(shape, dtype=torch.float64))
    count = norms(graph)
    folded, reasons, gap = fold(graph)
    assert (folded, reasons) == (count, [])
    assert norms(graph) == 0
    assert gap < DOUBLE
    assert not any("running" in name for name in graph.module.state_dict())


class TwoReaders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y + self.norm(y)  # type: ignore[no-any-return]


class CalledTwice(TwoReaders):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(self.conv(x)))  # type: ignore[no-any-return]


class TiedWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.two(self.one(x)))  # type: ignore[no-any-return]


class BehindAdd(TwoReaders):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x) + x)  # type: ignore[no-any-return]


class LinearOverTokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(5, 7), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x))  # type: ignore[no-any-return]


def by_the_batch() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU())


@pytest.mark.parametrize(
    ("make", "shape", "reason"),
    [
        (TwoReaders, (2, 3, 6, 6), "the output of conv is also read by add"),
        (CalledTwice, (2, 3, 6, 6), "layer conv is called 2 times"),
        (TiedWeight, (2, 3, 6, 6), "the weight of two is shared with another layer"),
        (BehindAdd, (2, 3, 6, 6), "its input add is no convolution or linear layer"),
        (lambda: Joined("twice"), (2, 4, 6, 6), "cat holds the same channels twice"),
        (lambda: Joined("input"), (2, 4, 6, 6), "its input x is no convolution or linear layer"),
        (lambda: Joined("read"), (2, 4, 6, 6), "the output of cat is also read by add"),
        (LinearOverTokens, (2, 4, 5), "the channels of linear.* are dimension 2 of 3, not dimension 1"),
    ],
)
def test_skips_with_a_reason(make: Callable[[], nn.Module], shape: tuple[int, ...], reason: str) -> None:
    graph = trace(randomised(make()), torch.randn(shape))
    folded, reasons, gap = fold(graph)
    assert folded == 0
    assert len(reasons) == 1
    assert re.fullmatch(reason, reasons[0])
    assert gap == 0


def test_a_norm_by_the_batch_stays() -> None:
    graph = trace(by_the_batch().eval(), torch.randn(2, 3, 6, 6))
    layers = len(graph.nodes)
    folded, _, gap = fold(graph)
    assert (folded, gap, len(graph.nodes)) == (0, 0, layers)


def test_one_norm_behind_two_layers_folds_into_both() -> None:
    class SharedNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 3, padding=1)
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.one(x)) - self.norm(self.two(x))  # type: ignore[no-any-return]

    graph = trace(randomised(SharedNorm()).double(), torch.randn(2, 3, 6, 6, dtype=torch.float64))
    folded, reasons, gap = fold(graph)
    assert (folded, reasons) == (2, [])
    assert gap < DOUBLE


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_half_precision_is_rounded_once(dtype: torch.dtype, limit: float) -> None:
    exact = randomised(nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))).double()
    model = nn.Sequential(*exact).to(dtype)
    x = torch.randn(2, 8, 6, 6, dtype=dtype)
    graph = trace(model, x)
    folded, _, gap = fold(graph)
    assert folded == 1
    assert gap < limit
    assert graph.tensor("0.weight").dtype == dtype
    model = model.double()  # the statistics that were folded are those after rounding
    scale = model[1].weight / torch.sqrt(model[1].running_var + model[1].eps)
    expected = (model[0].weight * scale[:, None, None, None]).to(dtype)
    assert torch.equal(graph.tensor("0.weight"), expected)


def test_the_model_and_a_copy_keep_their_weights() -> None:
    model = randomised(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    graph = trace(model, torch.randn(2, 3, 9, 9))
    copy = graph.copy()
    fold(graph)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert copy.module.state_dict().keys() == state.keys()
    assert torch.equal(copy.tensor("0.weight"), state["0.weight"])


def test_frozen_weights_stay_frozen() -> None:
    model = randomised(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))).requires_grad_(False)
    graph = trace(model, torch.randn(2, 3, 9, 9))
    fold(graph)
    assert {name: p.requires_grad for name, p in graph.module.named_parameters()} == {
        "0.weight": False,
        "0.bias": False,
    }


@settings(max_examples=20)
@given(
    rank=st.integers(1, 3),
    transposed=st.booleans(),
    groups=st.integers(1, 3),
    inputs=st.integers(1, 2),
    outputs=st.integers(1, 3),
    bias=st.booleans(),
    affine=st.booleans(),
    eps=st.sampled_from((1e-5, 1e-3, 0.5)),
    branches=st.integers(1, 3),
)
def test_any_convolution_folds(
    rank: int,
    transposed: bool,
    groups: int,
    inputs: int,
    outputs: int,
    bias: bool,
    affine: bool,
    eps: float,
    branches: int,
) -> None:
    kind = getattr(nn, f"Conv{'Transpose' if transposed else ''}{rank}d")

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            shape = (groups * inputs, groups * outputs, 2)
            self.parts = nn.ModuleList(kind(*shape, groups=groups, bias=bias) for _ in range(branches))
            self.norm = getattr(nn, f"BatchNorm{rank}d")(groups * outputs * branches, eps=eps, affine=affine)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(torch.cat([part(x) for part in self.parts], 1))  # type: ignore[no-any-return]

    x = torch.randn(2, groups * inputs, *[4] * rank, dtype=torch.float64)
    folded, reasons, gap = fold(trace(randomised(Branches().double()), x))
    assert (folded, reasons) == (1, [])
    assert gap < DOUBLE
