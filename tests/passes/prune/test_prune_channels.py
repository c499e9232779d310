"""prune-channels: ratios, budgets, widths, masks, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from fxpress.ir.cost import measure_cost
from fxpress.ir.errors import BudgetError, CutError, OptionError, VerifyError
from fxpress.ir.graph import Graph
from fxpress.ir.groups import find_groups
from fxpress.ir.trace import trace
from fxpress.ir.verify import distance, run
from fxpress.passes.base import Context
from fxpress.passes.budget import Budget
from fxpress.passes.prune import prune_channels
from fxpress.passes.prune.criteria import score_classes
from fxpress.passes.prune.insert_masks import InsertMasks
from fxpress.passes.prune.prune_channels import PruneChannels
from torch import Tensor, nn


class Block(nn.Module):
    """A residual stage with an inner width of its own."""

    def __init__(self, width: int = 32, inner: int = 24) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.inner, self.outer = nn.Conv2d(width, inner, 3, padding=1), nn.Conv2d(inner, width, 1)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.outer(torch.relu(self.inner(x))))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


@pytest.fixture
def graph() -> Graph:
    return trace(Block().eval(), torch.randn(2, 3, 8, 8))


@pytest.fixture
def wide() -> Graph:
    return trace(Block(128, 96).eval(), torch.randn(2, 3, 4, 4))


def prune(graph: Graph, **options: Any) -> Any:
    return PruneChannels(**options).run(graph, Context(original=graph.copy()))


def width(graph: Graph, name: str) -> int:
    return graph.module.get_submodule(name).weight.shape[0]  # type: ignore[union-attr, return-value]


@pytest.mark.parametrize("scope", ["uniform", "global"])
@pytest.mark.parametrize("metric", ["macs", "params"])
@pytest.mark.parametrize("remain", [0.8, 0.5, 0.25])
def test_a_budget_is_met_within_two_percent(wide: Graph, scope: str, metric: str, remain: float) -> None:
    before = measure_cost(wide)
    result = prune(wide, budget=Budget(**{metric: remain}), scope=scope)
    after = measure_cost(wide)
    reached = getattr(after, metric) / getattr(before, metric)
    assert remain * 0.98 <= reached <= remain
    assert result.metrics[metric] == getattr(after, metric)
    assert result.distance < 1e-5
    wide.lint()


def test_an_absolute_budget(wide: Graph) -> None:
    prune(wide, budget=Budget(macs="900k"))
    assert 882_000 <= measure_cost(wide).macs <= 900_000


def test_two_limits_are_both_met(wide: Graph) -> None:
    before = measure_cost(wide)
    prune(wide, budget=Budget(macs=0.6, params=0.3))
    after = measure_cost(wide)
    assert after.macs <= 0.6 * before.macs
    assert 0.29 * before.params <= after.params <= 0.3 * before.params


def test_coarse_widths_come_as_close_as_they_can(graph: Graph) -> None:
    before = measure_cost(graph)
    result = prune(graph, budget=Budget(macs=0.45), round_to=16)
    assert 0.2 < measure_cost(graph).macs / before.macs <= 0.45
    assert any("too coarse" in note for note in result.notes)


def test_a_budget_that_cannot_be_met_says_what_can(graph: Graph) -> None:
    expected = run(graph)
    with pytest.raises(BudgetError, match=r"macs: .* allowed, .* is the least that can be reached"):
        prune(graph, budget=Budget(macs=0.5), floor=30)
    assert torch.equal(run(graph), expected)


def test_a_budget_is_a_share_of_the_original_not_of_the_present(wide: Graph) -> None:
    original = wide.copy()
    context = Context(original=original)
    PruneChannels(budget=Budget(macs=0.7)).run(wide, context)
    PruneChannels(budget=Budget(macs=0.5)).run(wide, context)
    assert 0.49 <= measure_cost(wide).macs / measure_cost(original).macs <= 0.5


@pytest.mark.parametrize("round_to", [1, 4, 8])
def test_widths_are_multiples(graph: Graph, round_to: int) -> None:
    prune(graph, ratio=0.3, round_to=round_to)
    assert width(graph, "stem") == {1: 23, 4: 24, 8: 24}[round_to]
    assert width(graph, "inner") == {1: 17, 4: 20, 8: 24}[round_to]


def test_the_floor_is_kept(graph: Graph) -> None:
    prune(graph, ratio=0.9, floor=20)
    assert (width(graph, "stem"), width(graph, "inner")) == (20, 20)


def test_a_uniform_ratio_shrinks_every_group_alike(graph: Graph) -> None:
    prune(graph, ratio=0.5)
    assert (width(graph, "stem"), width(graph, "outer"), width(graph, "inner")) == (16, 16, 12)


def test_a_global_ratio_counts_all_channels(graph: Graph) -> None:
    prune(graph, ratio=0.5, scope="global")
    assert width(graph, "stem") + width(graph, "inner") == 28


@pytest.mark.parametrize("criterion", ["l1", "l2", "std", "statistics"])
def test_the_smallest_filters_go(graph: Graph, criterion: str) -> None:
    small = [1, 5, 7]
    with torch.no_grad():
        graph.tensor("inner.weight")[small] *= 1e-3
    kept = np.setdiff1d(np.arange(24), small)
    expected = graph.tensor("inner.weight").detach()[kept]
    prune(graph, ratio=0.125, criterion=criterion, ignore=("stem",))
    assert torch.equal(graph.tensor("inner.weight").detach(), expected)


def test_scores_are_means_over_the_layers_that_produce_a_channel(graph: Graph) -> None:
    groups = find_groups(graph)
    scores = score_classes(graph, groups, "l1")
    stem, outer = (graph.tensor(f"{n}.weight").detach().flatten(1).abs().sum(1).double() for n in ("stem", "outer"))
    expected = (stem / stem.mean() + outer / outer.mean()) / 2
    np.testing.assert_allclose(scores[groups.groups[0].classes], expected.numpy(), rtol=1e-5)


def test_ignored_layers_keep_their_channels(graph: Graph) -> None:
    result = prune(graph, ratio=0.5, ignore=("st*",))
    assert (width(graph, "stem"), width(graph, "inner")) == (32, 12)
    assert [skip.node for skip in result.skips] == ["stem"]


def test_given_masks_are_cut_and_folded(graph: Graph) -> None:
    factors = [0.0, 0.0] + [1.5] * 22
    InsertMasks(masks={"inner": factors}).run(graph, Context(original=graph))
    expected = run(graph)
    result = prune(graph, masks="given")
    assert width(graph, "inner") == 22
    assert distance(expected, run(graph)) < 1e-5
    assert not any("mask" in name for name, _ in graph.module.named_parameters())
    assert any("folded" in note for note in result.notes)


def test_masks_must_be_there(graph: Graph) -> None:
    with pytest.raises(CutError, match="has no masks"):
        prune(graph, masks="given")


def test_a_failed_proof_leaves_the_graph_as_it_was(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, epoch = run(graph), graph.epoch

    def refuse(*_: Any) -> float:
        raise VerifyError("the cut network differs")

    monkeypatch.setattr(prune_channels, "prove_cut", refuse)
    with pytest.raises(VerifyError):
        prune(graph, ratio=0.5)
    assert torch.equal(run(graph), expected)
    assert graph.epoch == epoch


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of"),
        ({"ratio": 0.5, "budget": Budget(macs=0.5)}, "exactly one of"),
        ({"ratio": 1.0}, "ratio"),
        ({"ratio": 0.5, "criterion": "l3"}, "'l3', allowed: 'l1' or 'l2' or 'std' or 'statistics'"),
        ({"ratio": 0.5, "scope": "local"}, "scope"),
        ({"ratio": 0.5, "round_to": 0}, "round_to"),
        ({"ratio": 0.5, "criterion": "taylor", "combine": "sum"}, "all layers, nothing to combine"),
        ({"ratio": 0.5, "history": ("a.pt",)}, "'history' is for"),
        ({"ratio": 0.5, "raio": 1}, "raio"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        PruneChannels(**options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    graph = trace(Block().eval().to(dtype), torch.randn(2, 3, 8, 8, dtype=dtype))
    prune(graph, ratio=0.5)
    assert run(graph).dtype is dtype


def test_a_network_whose_batch_norms_are_gone_entirely() -> None:
    graph = trace(nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).eval(), torch.randn(4, 6))
    prune(graph, budget=Budget(params=0.5))
    assert measure_cost(graph).params <= 0.5 * (6 * 16 + 16 + 16 * 3 + 3)


def test_a_network_that_has_nothing_to_cut() -> None:
    graph = trace(nn.Linear(6, 3).eval(), torch.randn(4, 6))
    with pytest.raises(BudgetError, match="is the least that can be reached"):
        prune(graph, budget=Budget(params=0.5))
