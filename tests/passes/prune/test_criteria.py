"""Criteria against independent references, and that what is irrelevant scores lowest."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest
import torch
from fxpress.ir.errors import OptionError
from fxpress.ir.graph import Graph
from fxpress.ir.groups import Groups, find_groups
from fxpress.passes.prune.criteria import CRITERIA, Criterion, Source, score_classes
from fxpress.passes.prune.criteria.combining import combine
from fxpress.passes.prune.criteria.statistics import z_score
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats
from scipy.spatial.distance import cdist

REFERENCE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "l1": lambda rows: np.abs(rows).sum(1),
    "l2": lambda rows: np.sqrt((rows**2).sum(1)),
    "std": lambda rows: rows.std(1),
    "fpgm": lambda rows: cdist(rows, rows).sum(1),
}


@pytest.fixture
def graph(graph_of_all_layers: Graph) -> Graph:
    return graph_of_all_layers


def group_of(groups: Groups, layer: str) -> np.ndarray:
    """The classes of a layer's output channels, in their order."""
    slot = next(s for s in groups.labels.slots if s.name == f"{layer}.weight" and s.dim == (layer == "transposed"))
    return groups.vector(groups.labels.slots[slot])


def weight(graph: Graph, layer: str) -> np.ndarray:
    """Rows of a layer's weight, one per output channel, as numpy sees them."""
    array = graph.tensor(f"{layer}.weight").detach().double().numpy()
    array = np.moveaxis(array, 1, 0) if layer == "transposed" else array
    return array.reshape(len(array), -1)


def test_the_option_allows_what_the_table_holds() -> None:
    assert set(get_args(Criterion)) == set(CRITERIA)


@pytest.mark.parametrize("name", REFERENCE)
@pytest.mark.parametrize("shape", [(7, 12), (1, 5), (6, 1)])
def test_weights_against_numpy(name: str, shape: tuple[int, int]) -> None:
    rows = torch.randn(shape)
    np.testing.assert_allclose(CRITERIA[name].score(rows), REFERENCE[name](rows.double().numpy()), rtol=1e-5, atol=1e-7)


def test_statistics_against_scipy() -> None:
    mean, std, instability = np.random.default_rng(0).uniform(0.1, 1, (3, 20))
    single = CRITERIA["statistics"].score(torch.from_numpy(mean), torch.from_numpy(std)).numpy()
    np.testing.assert_allclose(single, stats.zscore(mean) + stats.zscore(std), rtol=1e-9)
    several = CRITERIA["statistics"].score(*map(torch.from_numpy, (mean, std, instability)))
    np.testing.assert_allclose(several, single - 0.25 * stats.zscore(instability), rtol=1e-9)


@settings(max_examples=40)
@given(arrays(np.float64, st.integers(2, 30), elements=st.floats(-1e3, 1e3, width=32)))
def test_z_scores_have_mean_0_and_deviation_1_or_are_0(values: np.ndarray) -> None:
    scores = z_score(torch.from_numpy(values)).numpy()
    assert abs(scores.mean()) < 1e-6
    assert abs(scores.std() - 1) < 1e-6 or not scores.any()


@pytest.mark.parametrize("name", ["l1", "l2", "std", "fpgm"])
@pytest.mark.parametrize("layer", ["inner", "grouped", "transposed", "hidden"])
def test_scores_of_a_layer_are_divided_by_their_mean(graph: Graph, name: str, layer: str) -> None:
    groups = find_groups(graph)
    scores = score_classes(graph, groups, name)  # type: ignore[arg-type]
    expected = REFERENCE[name](weight(graph, layer))
    expected = expected / expected.mean()
    classes = group_of(groups, layer)
    if layer == "grouped":  # channel j of both groups is one class, and depthwise filters are members as well
        other = REFERENCE[name](weight(graph, "depthwise"))
        other = other / other.mean()
        expected = (expected.reshape(2, 6).mean(0) + other.reshape(2, 6).mean(0)) / 2
        classes = classes[:6]
    np.testing.assert_allclose(scores[classes], expected, rtol=1e-5)


@pytest.mark.parametrize("how", ["mean", "sum", "max"])
def test_members_of_a_residual_add_combine(graph: Graph, how: str) -> None:
    groups = find_groups(graph)
    scores = score_classes(graph, groups, "l1", combining=how)  # type: ignore[arg-type]
    stem, outer = (REFERENCE["l1"](weight(graph, layer)) for layer in ("stem", "outer"))
    expected = getattr(np, how)([stem / stem.mean(), outer / outer.mean()], axis=0)
    np.testing.assert_allclose(scores[group_of(groups, "stem")], expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["l1", "l2", "std", "statistics"])
@pytest.mark.parametrize("layer", ["inner", "hidden", "transposed", "grouped"])
def test_a_filter_of_zeros_scores_lowest(graph: Graph, name: str, layer: str) -> None:
    with torch.no_grad():
        tensor = graph.tensor(f"{layer}.weight")
        tensor.movedim(1 if layer == "transposed" else 0, 0)[[3] if layer != "grouped" else [3, 9]] = 0
        graph.tensor("depthwise.weight")[[3, 9]] = 0
    groups = find_groups(graph)
    classes = np.unique(group_of(groups, layer))
    scores = score_classes(graph, groups, name)  # type: ignore[arg-type]
    assert classes[scores[classes].argmin()] == group_of(groups, layer)[3]


def test_duplicates_score_lowest_by_fpgm(graph: Graph) -> None:
    with torch.no_grad():
        graph.tensor("hidden.weight")[:3] = graph.tensor("hidden.weight").mean(0)
    groups = find_groups(graph)
    classes = group_of(groups, "hidden")
    scores = score_classes(graph, groups, "fpgm")
    assert set(np.argsort(scores[classes])[:3]) == {0, 1, 2}


def test_a_residual_channel_without_weights_scores_lowest(graph: Graph) -> None:
    with torch.no_grad():
        for layer in ("stem", "outer"):
            graph.tensor(f"{layer}.weight")[5] = 0
    groups = find_groups(graph)
    for name in ("l1", "l2", "std", "statistics"):
        assert score_classes(graph, groups, name)[group_of(groups, "stem")].argmin() == 5  # type: ignore[arg-type]


def test_slimming_reads_the_factors_as_they_are(graph: Graph) -> None:
    groups = find_groups(graph)
    stem = [group for group in groups.groups if group.name == "stem"]
    with torch.no_grad():
        graph.tensor("norm.weight")[2] = 0
        graph.tensor("norm.weight")[4] *= -1
    scores = score_classes(graph, groups, "slimming", among=stem)[group_of(groups, "stem")]
    np.testing.assert_array_equal(scores, graph.tensor("norm.weight").detach().abs().double())
    assert scores.argmin() == 2


def test_slimming_needs_batch_norms(graph: Graph) -> None:
    groups = find_groups(graph)
    with pytest.raises(OptionError, match=r"'slimming' needs a batch norm.*4 of 6 groups have none: wide, grouped"):
        score_classes(graph, groups, "slimming")


def test_layers_without_norms_are_no_obstacle_to_others(mixed: Callable[..., Graph]) -> None:
    graph = mixed(norm=False)
    groups = find_groups(graph)
    for name in ("l1", "l2", "std", "statistics", "fpgm", "random"):
        assert np.isfinite(score_classes(graph, groups, name)).all()  # type: ignore[arg-type]


def test_random_scores_depend_on_the_seed_alone(graph: Graph) -> None:
    groups = find_groups(graph)
    one, again, other = (score_classes(graph, groups, "random", source=Source(seed=seed)) for seed in (1, 1, 2))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)
    assert len(np.unique(one[~groups.locked])) == (~groups.locked).sum()


@pytest.mark.parametrize("name", ["l1", "l2", "std", "fpgm", "statistics"])
def test_the_scale_of_a_layer_does_not_matter(graph: Graph, name: str) -> None:
    before = score_classes(graph, find_groups(graph), name)  # type: ignore[arg-type]
    with torch.no_grad():
        graph.tensor("hidden.weight").mul_(100)
    after = score_classes(graph, find_groups(graph), name)  # type: ignore[arg-type]
    np.testing.assert_allclose(before, after, rtol=1e-4, atol=1e-6)


def test_statistics_are_standardised_within_each_group(graph: Graph) -> None:
    groups = find_groups(graph)
    scores = score_classes(graph, groups, "statistics")
    for group in groups.groups:
        own = scores[group.classes]
        assert abs(own.mean()) < 1e-9
        assert abs(own.std() - 1) < 1e-9


def test_a_class_with_several_channels_of_a_member_counts_as_their_mean(graph: Graph) -> None:
    groups = find_groups(graph)
    one, other = groups.groups[0].classes[:2]
    scored = [(np.array([one, one, other]), torch.tensor([1.0, 3.0, 2.0]))]
    scores = combine(groups, scored, "none", "sum")
    assert (scores[one], scores[other]) == (2.0, 2.0)
    assert np.isnan(scores).sum() == groups.count - 2
