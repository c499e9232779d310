"""Criteria that look at data: each against what numpy or plain autograd finds on the same network."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from fxpress.ir.cut import Cut
from fxpress.ir.errors import DataError, GraphError, OptionError
from fxpress.ir.graph import Graph
from fxpress.ir.groups import Groups, find_groups
from fxpress.ir.trace import trace
from fxpress.ir.verify import MaskedNetwork, evaluating
from fxpress.passes.prune.criteria import CRITERIA, Source, score_classes
from fxpress.passes.prune.criteria.gates import GatedNetwork, losses, slopes_of
from fxpress.passes.prune.criteria.gradients import batch_slopes, fisher, slopes
from fxpress.passes.prune.criteria.members import Member
from fxpress.passes.prune.criteria.observing import activations, outputs
from fxpress.passes.prune.criteria.second_order import DAMPING
from fxpress.runtime.data import Data
from torch import Tensor, nn
from torch.nn import functional

DATA_CRITERIA = [name for name, recipe in CRITERIA.items() if recipe.data]
DEAD = {"apoz", "entropy", "taylor", "taylor-abs", "obd", "obs"}  # those that must see a channel that is always 0


@pytest.fixture
def graph(graph_of_all_layers: Graph) -> Graph:
    return graph_of_all_layers


@pytest.fixture
def batches() -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(n, 3, 10, 10), torch.randint(5, (n,))) for n in (6, 5)]


def source(batches: Any, **options: Any) -> Source:
    return Source(Data(calibration=batches), **options)


def classes_of(groups: Groups, layer: str) -> np.ndarray:
    slot = next(s for s in groups.labels.slots if s.name == f"{layer}.weight" and s.dim == (layer == "transposed"))
    return groups.vector(groups.labels.slots[slot])


def seen_at(graph: Graph, path: str, batches: Any) -> np.ndarray:
    """Outputs of a layer by a forward hook, (images, channels, positions)."""
    found = []
    handle = graph.module.get_submodule(path).register_forward_hook(lambda _, __, y: found.append(y.detach().double()))
    with evaluating(graph.module):
        for inputs, _ in batches:
            graph.module(inputs)
    handle.remove()
    whole = torch.cat(found)
    return whole.reshape(*whole.shape[:2], -1).numpy()


def score(name: str, values: np.ndarray) -> np.ndarray:
    return CRITERIA[name].score(torch.from_numpy(values)).numpy()


def test_places_of_activations_are_behind_activations_and_before_pooling(graph: Graph) -> None:
    groups = find_groups(graph)
    names = [node.name for node in activations(graph, groups)]
    assert all(name.startswith("relu") or name == "wide" for name in names), names
    assert len(names) == 8
    assert [str(node.target) for node in outputs(graph, groups)] == [
        "stem", "inner", "outer", "wide", "grouped", "depthwise", "transposed", "hidden",
    ]  # fmt: skip


def test_apoz_and_entropy_against_numpy(graph: Graph, batches: Any) -> None:
    groups = find_groups(graph)
    maps = np.maximum(seen_at(graph, "inner_norm", batches), 0)
    zeros = (maps == 0).mean((0, 2))
    raw = 1 - zeros
    found = score_classes(graph, groups, "apoz", source=source(batches))[classes_of(groups, "inner")]
    np.testing.assert_allclose(found, (raw - raw.mean()) / raw.std(), rtol=1e-4)
    entropies = []
    for values in maps.mean(2).T:
        share = np.histogram(values, bins=100)[0] / len(values)
        entropies.append(-sum(p * np.log(p) for p in share if p))
    found = score_classes(graph, groups, "entropy", source=source(batches))[classes_of(groups, "inner")]
    np.testing.assert_allclose(found, np.array(entropies) / np.mean(entropies), rtol=1e-4)


@pytest.mark.parametrize("layer", ["inner", "hidden", "transposed"])
def test_variance_against_numpy(graph: Graph, batches: Any, layer: str) -> None:
    groups = find_groups(graph)
    bias = graph.tensor(f"{layer}.bias").detach().double().numpy()
    expected = np.linalg.norm(seen_at(graph, layer, batches) - bias[:, None], axis=2).var(0)
    found = score_classes(graph, groups, "variance", source=source(batches))[classes_of(groups, layer)]
    np.testing.assert_allclose(found, expected / expected.mean(), rtol=1e-4)


def test_gates_of_0_are_the_oracles_mask(graph: Graph, batches: Any) -> None:
    groups = find_groups(graph)
    network = GatedNetwork(graph, groups)
    inputs, _ = batches[0]
    for group in groups.groups:
        gates = torch.ones(len(inputs), groups.count)
        gates[:, group.classes[1]] = 0
        masked = MaskedNetwork(Cut(groups, group.classes[1:2]))
        with evaluating(graph.module):
            found = network.run_gated([inputs], gates)
            expected = masked.run(inputs, enable_io_processing=False)
        torch.testing.assert_close(found, expected[0] if isinstance(expected, (tuple, list)) else expected)


def test_slopes_against_finite_differences(graph: Graph, batches: Any) -> None:
    graph.module.double()
    groups = find_groups(graph)
    network = GatedNetwork(graph, groups)
    inputs, targets = batches[0][0].double(), batches[0][1]
    graph.example_args = (graph.example_args[0].double(),)
    found = slopes_of(network, graph, inputs, targets, "here")
    step = 1e-5
    for one in (groups.groups[0].classes[0], groups.groups[1].classes[2], groups.groups[-1].classes[-1]):
        sides = []
        for sign in (1, -1):
            gates = torch.ones(len(inputs), groups.count, dtype=torch.float64)
            gates[:, one] += sign * step
            with evaluating(graph.module):
                scores = network.run_gated([inputs], gates)
                sides.append(functional.cross_entropy(scores, targets, reduction="none"))
        # the loss is taken in single precision where gates are not
        np.testing.assert_allclose(found[:, one], (sides[0] - sides[1]) / (2 * step), atol=1e-6)


def test_taylor_is_the_authors_formula_on_batch_norms(graph: Graph, batches: Any) -> None:
    """(g_γ γ + g_β β)² by autograd, averaged over batches."""
    groups = find_groups(graph)
    module = copy.deepcopy(graph.module).eval()
    norm = module.get_submodule("inner_norm")
    squares = []
    for inputs, targets in batches:
        loss = functional.cross_entropy(module(inputs), targets)
        gamma, beta = torch.autograd.grad(loss, (norm.weight, norm.bias))
        squares.append((gamma * norm.weight + beta * norm.bias).detach().square())
    found = score_classes(graph, groups, "taylor", source=source(batches))[classes_of(groups, "inner")]
    np.testing.assert_allclose(found, torch.stack(squares).mean(0), rtol=1e-3, atol=1e-9)


def test_taylor_abs_is_normalised_in_each_group(graph: Graph, batches: Any) -> None:
    groups = find_groups(graph)
    members = slopes(graph, groups, source(batches))
    found = score_classes(graph, groups, "taylor-abs", source=source(batches))
    for member, group in zip(members, groups.groups, strict=True):
        expected = np.abs(member.evidence[0].double().numpy()).mean(1)
        np.testing.assert_allclose(found[group.classes], expected / np.linalg.norm(expected), rtol=1e-6)


def test_batch_slopes_are_means_of_slopes(graph: Graph, batches: Any) -> None:
    groups = find_groups(graph)
    whole = slopes(graph, groups, source(batches))[0].evidence[0]
    means = batch_slopes(graph, groups, source(batches))[0].evidence[0]
    expected = torch.stack([whole[:, :6].mean(1), whole[:, 6:].mean(1)], 1)
    torch.testing.assert_close(means, expected)


def test_obd_against_one_backward_pass_per_image(graph: Graph, batches: Any) -> None:
    groups = find_groups(graph)
    module = copy.deepcopy(graph.module).eval()
    weight = module.get_submodule("transposed").weight
    squares = torch.zeros_like(weight)
    for inputs, targets in batches:
        for image, target in zip(inputs, targets, strict=True):
            module.zero_grad()
            functional.cross_entropy(module(image[None]), target[None]).backward()
            squares += weight.grad.square()
    expected = (0.5 * squares / 11 * weight.square()).sum((0, 2, 3)).detach()
    found = score_classes(graph, groups, "obd", source=source(batches))[classes_of(groups, "transposed")]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_obd_sums_over_the_layers_of_a_residual_stream(graph: Graph, batches: Any) -> None:
    groups = find_groups(graph)
    members = {m.name: CRITERIA["obd"].score(*m.evidence) for m in fisher(graph, groups, source(batches))}
    found = score_classes(graph, groups, "obd", source=source(batches))[classes_of(groups, "stem")]
    np.testing.assert_allclose(found, members["stem.weight"] + members["outer.weight"], rtol=1e-6)


def test_obs_is_the_least_cost_when_the_others_make_up_for_it() -> None:
    """min over dz with dz_c = −1 of ½ dzᵀ H dz, solved as the linear system of its optimality conditions."""
    evidence = np.random.default_rng(0).normal(size=(6, 40))
    hessian = evidence @ evidence.T / 40
    damping = DAMPING * np.diag(hessian).mean()
    hessian += damping * np.eye(6)
    expected = []
    for c in range(6):
        others = [i for i in range(6) if i != c]
        change = -np.eye(6)[c]
        change[others] = np.linalg.solve(hessian[np.ix_(others, others)], hessian[others, c])
        expected.append(0.5 * (change @ hessian @ change - damping))
    np.testing.assert_allclose(score("obs", evidence), expected, rtol=1e-9)


def test_obs_knows_that_duplicates_replace_each_other() -> None:
    slope = np.random.default_rng(0).normal(size=(4, 100))
    slope[1] = slope[0]
    found = score("obs", slope)
    assert max(found[:2]) < 0.5 * min(found[2:])


@pytest.mark.parametrize("name", sorted(DEAD))
@pytest.mark.parametrize("layer", ["inner", "hidden", "transposed", "stem"])
def test_a_channel_that_is_always_0_scores_lowest(graph: Graph, batches: Any, name: str, layer: str) -> None:
    with torch.no_grad():
        if layer == "inner":
            graph.tensor("inner_norm.bias")[3] = -1e3
        elif layer == "stem":
            graph.tensor("norm.bias")[3] = graph.tensor("outer.bias")[3] = -1e3
        else:
            graph.tensor(f"{layer}.bias")[3] = -1e3
    groups = find_groups(graph)
    scores = score_classes(graph, groups, name, source=source(batches))[classes_of(groups, layer)]  # type: ignore[arg-type]
    assert scores.argmin() == 3
    if name in ("taylor", "taylor-abs", "obd", "obs"):
        assert scores[3] <= 1e-12


@pytest.mark.parametrize("layer", ["inner", "hidden", "transposed"])
def test_a_filter_of_zeros_has_no_variance(graph: Graph, batches: Any, layer: str) -> None:
    with torch.no_grad():
        graph.tensor(f"{layer}.weight").movedim(1 if layer == "transposed" else 0, 0)[4] = 0
    groups = find_groups(graph)
    scores = score_classes(graph, groups, "variance", source=source(batches))[classes_of(groups, layer)]
    assert scores.argmin() == 4
    assert scores[4] < 1e-9


@pytest.mark.parametrize("name", DATA_CRITERIA)
def test_grouped_depthwise_and_normless_layers(mixed: Callable[..., Graph], batches: Any, name: str) -> None:
    graph = mixed(norm=False)
    groups = find_groups(graph)
    scores = score_classes(graph, groups, name, source=source(batches))  # type: ignore[arg-type]
    assert np.isfinite(scores).all()
    for group in groups.groups:  # channels that no activation follows are never zero
        assert np.ptp(scores[group.classes]) > 0 or (name, group.name) == ("apoz", "wide")


@pytest.mark.parametrize("name", DATA_CRITERIA)
def test_data_is_needed_and_said_to_be(graph: Graph, name: str) -> None:
    with pytest.raises(DataError, match=rf"the option: '{name}' needs data to calibrate with.*calibration="):
        score_classes(graph, find_groups(graph), name, source=Source(who="the option"))  # type: ignore[arg-type]


def test_training_data_do_where_there_are_no_others(graph: Graph, batches: Any) -> None:
    groups = find_groups(graph)
    found = score_classes(graph, groups, "apoz", source=Source(Data(train=batches)))
    np.testing.assert_array_equal(found, score_classes(graph, groups, "apoz", source=source(batches)))


def test_no_more_images_are_looked_at_than_asked_for(graph: Graph, batches: Any) -> None:
    groups = find_groups(graph)
    member: Member = slopes(graph, groups, source(batches, images=7))[0]
    assert member.evidence[0].shape == (8, 7)


@pytest.mark.parametrize("name", ["taylor", "taylor-abs", "obs", "random"])
def test_nothing_to_combine(graph: Graph, batches: Any, name: str) -> None:
    with pytest.raises(OptionError, match=f"'{name}' sees a channel as one.*Leave option 'combine' out"):
        score_classes(graph, find_groups(graph), name, source=source(batches), combining="max")  # type: ignore[arg-type]


def test_images_that_cannot_be_told_apart(batches: Any) -> None:
    class Merged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(10, 8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.one(x.reshape(-1, 10)))
            return self.two(y).reshape(x.shape[0], -1, 5).mean(1)

    graph = trace(Merged().eval(), torch.randn(2, 3, 10, 10))
    with pytest.raises(GraphError, match="cannot be told apart at node"):
        score_classes(graph, find_groups(graph), "taylor", source=source(batches))


def test_a_fixed_batch_has_no_gradients_of_single_images(graph: Graph, batches: Any) -> None:
    graph.dynamic_batch = False
    with pytest.raises(OptionError, match="'obd' needs gradients of single images"):
        score_classes(graph, find_groups(graph), "obd", source=source(batches))


def test_losses_of_maps_are_means_over_positions() -> None:
    scores, targets = torch.randn(3, 4, 5, 5), torch.randint(4, (3, 5, 5))
    found = losses(scores, targets, "here")
    assert found.shape == (3,)
    torch.testing.assert_close(found.mean(), functional.cross_entropy(scores, targets))
