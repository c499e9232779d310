"""The oracle of criteria against the network that really was cut, and rank correlations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from fxpress.ir.cut import apply_cut
from fxpress.ir.errors import DataError
from fxpress.ir.graph import Graph
from fxpress.ir.groups import find_groups
from fxpress.passes.prune.criteria import Source, score_classes
from fxpress.passes.prune.criteria.oracle import rank_correlation, removal_losses
from fxpress.runtime.data import Data
from fxpress.runtime.evaluate import evaluate
from scipy.stats import spearmanr


@pytest.fixture
def graph(graph_of_all_layers: Graph) -> Graph:
    return graph_of_all_layers


@pytest.fixture
def batches() -> list[Any]:
    return [(torch.randn(n, 3, 10, 10), torch.randint(5, (n,))) for n in (6, 4)]


def test_the_oracle_is_the_loss_of_the_network_that_was_cut(graph: Graph, batches: Any) -> None:
    groups = find_groups(graph)
    changes = removal_losses(graph, batches)
    whole = evaluate(graph, batches).loss
    assert np.isfinite(changes).sum() == sum(group.channels for group in groups.groups)
    for group in groups.groups:
        for one in group.classes[:3]:
            cut = apply_cut(groups, np.array([one]))
            assert changes[one] == pytest.approx(evaluate(cut, batches).loss - whole, abs=2e-6)


def test_a_sample_of_the_classes_on_a_part_of_the_images(graph: Graph, batches: Any) -> None:
    groups = find_groups(graph)
    some = removal_losses(graph, batches, images=6, per_group=2, seed=3)
    first = removal_losses(graph, batches[:1])
    measured = np.isfinite(some)
    assert [int(measured[group.classes].sum()) for group in groups.groups] == [2] * len(groups.groups)
    np.testing.assert_allclose(some[measured], first[measured])
    assert not np.array_equal(measured, np.isfinite(removal_losses(graph, batches, images=6, per_group=2, seed=4)))


def test_rank_correlations_against_scipy(graph: Graph, batches: Any) -> None:
    data = Data(val=batches, calibration=batches)
    names = ["l1", "taylor", "random"]
    rows = rank_correlation(graph, data, names, seed=1)  # type: ignore[arg-type]
    changes, groups = removal_losses(graph, batches), find_groups(graph)
    free = np.concatenate([group.classes for group in groups.groups])
    assert [row.criterion for row in rows] == names
    for row in rows:
        scores = score_classes(graph, groups, row.criterion, source=Source(data, seed=1))  # type: ignore[arg-type]
        assert row.overall == pytest.approx(spearmanr(scores[free], changes[free]).statistic)
        assert row.overall_abs == pytest.approx(spearmanr(scores[free], np.abs(changes[free])).statistic)
        rhos = [spearmanr(scores[g.classes], changes[g.classes]).statistic for g in groups.groups]
        assert row.within == pytest.approx(np.average(rhos, weights=[g.channels for g in groups.groups]))
        assert row.classes == len(free)


def test_what_the_loss_says_agrees_best_with_the_loss(graph: Graph, batches: Any) -> None:
    rows = rank_correlation(graph, Data(val=batches, train=batches), ["l1", "l2", "std", "taylor-abs", "random"])
    best = max(rows, key=lambda row: row.overall_abs)
    assert best.criterion == "taylor-abs"
    assert best.overall_abs > 0.5


def test_measured_changes_can_be_given(graph: Graph, batches: Any) -> None:
    groups = find_groups(graph)
    scores = score_classes(graph, groups, "l1")
    changes = np.where(groups.locked, np.nan, scores)
    (row,) = rank_correlation(graph, Data(), ["l1"], changes=changes)
    assert (row.overall, row.within) == (pytest.approx(1), pytest.approx(1))


def test_the_oracle_needs_validation_data(graph: Graph) -> None:
    with pytest.raises(DataError, match="the oracle of criteria needs data to measure accuracy with"):
        rank_correlation(graph, Data(), ["l1"])
