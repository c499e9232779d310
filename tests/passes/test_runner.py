"""Running one pass: proof, rollback, seeds, errors that name the pass."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from fxpress.passes.base import EXACT, LOSSY, TRAINING, Context, Pass, PassResult, Semantics
from fxpress.passes.clone import clone_graph
from fxpress.passes.runner import check_finite, run_pass
from torch import nn

from fxpress import BudgetError, FxpressError, Graph, GraphError, ModelError, VerifyError, trace


class Does(Pass):
    """Runs what the test gives it."""

    name: ClassVar[str] = "does"
    semantics: ClassVar[Semantics] = EXACT
    body: ClassVar[Callable[[Graph, Context], Any]]

    def run(self, graph: Graph, context: Context) -> PassResult:
        result = type(self).body(graph, context)
        return result if isinstance(result, PassResult) else PassResult()


def a_pass(body: Callable[[Graph, Context], Any], what: Semantics = EXACT, **others: Any) -> Pass:
    return type("Does", (Does,), {"semantics": what, "body": staticmethod(body), "__module__": __name__, **others})()


@pytest.fixture
def graph() -> Graph:
    return trace(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval(), torch.randn(5, 3))


def state(graph: Graph) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in graph.module.state_dict().items()}


def scale_first(graph: Graph, context: Context) -> None:
    with graph.edit("does"):
        graph.set_tensor("0.weight", graph.tensor("0.weight") * 2)


def train_in_place(graph: Graph, context: Context) -> None:
    with torch.no_grad():
        for parameter in graph.module.parameters():
            parameter.mul_(3)


def run(one: Pass, graph: Graph, **options: Any) -> PassResult:
    return run_pass(one, graph, Context(original=graph.copy(), **options))[0]


def test_an_exact_pass_that_changes_the_outputs_is_rolled_back(graph: Graph) -> None:
    before = state(graph)
    with pytest.raises(VerifyError, match=r"pass 'does' failed: the outputs differ by \d"):
        run(a_pass(scale_first), graph)
    assert all(torch.equal(value, before[name]) for name, value in state(graph).items())


def test_what_is_trained_in_place_is_rolled_back_too(graph: Graph) -> None:
    before = state(graph)

    def diverges(graph: Graph, context: Context) -> None:
        train_in_place(graph, context)
        raise BudgetError("too small", hint="Give more.")

    with pytest.raises(BudgetError, match=r"^pass 'does' failed: too small\. Give more\.$"):
        run(a_pass(diverges, TRAINING), graph)
    assert all(torch.equal(value, before[name]) for name, value in state(graph).items())


def test_a_lossy_pass_reports_its_distance(graph: Graph) -> None:
    result = run(a_pass(scale_first, LOSSY), graph)
    assert result.distance is not None
    assert 0.01 < result.distance < 10
    assert result.metrics["output_distance"] == result.distance
    proven = run(a_pass(lambda g, c: PassResult(distance=0.25), LOSSY), graph)
    assert (proven.distance, proven.metrics["output_distance"]) == (0.25, 0)


def test_training_has_no_distance(graph: Graph) -> None:
    assert run(a_pass(train_in_place, TRAINING), graph).distance is None


def test_without_verification_nothing_is_compared(graph: Graph) -> None:
    assert run(a_pass(scale_first), graph, verify=False).distance is None


def test_an_exact_pass_says_how_equal_it_is(graph: Graph) -> None:
    assert run(a_pass(lambda g, c: None), graph).distance == 0


def test_any_exception_names_the_pass(graph: Graph) -> None:
    def breaks(graph: Graph, context: Context) -> None:
        train_in_place(graph, context)
        raise ZeroDivisionError("by\nzero")

    before = state(graph)
    with pytest.raises(GraphError, match=r"pass 'does' failed: ZeroDivisionError: by zero\."):
        run(a_pass(breaks), graph)
    assert all(torch.equal(value, before[name]) for name, value in state(graph).items())


def test_an_interrupt_rolls_back_and_passes_through(graph: Graph) -> None:
    def interrupted(graph: Graph, context: Context) -> None:
        train_in_place(graph, context)
        raise KeyboardInterrupt

    before = state(graph)
    with pytest.raises(KeyboardInterrupt):
        run(a_pass(interrupted, TRAINING), graph)
    assert all(torch.equal(value, before[name]) for name, value in state(graph).items())


def test_weights_that_become_nan_are_an_error(graph: Graph) -> None:
    def diverges(graph: Graph, context: Context) -> None:
        with torch.no_grad():
            graph.tensor("2.bias").fill_(float("nan"))

    with pytest.raises(ModelError, match=r"pass 'does' failed: parameter '2\.bias' of shape \(2,\) holds 2 NaN"):
        run(a_pass(diverges, TRAINING), graph)


def test_the_lint_runs_behind_a_pass_that_goes_around_the_door(graph: Graph) -> None:
    def dangling(graph: Graph, context: Context) -> None:
        graph.module.register_buffer("unused", torch.zeros(3))

    with pytest.raises(GraphError, match=r"pass 'does' failed: .*'unused'"):
        run(a_pass(dangling), graph)


def test_an_error_that_names_the_pass_is_not_wrapped_twice(graph: Graph) -> None:
    def refuses(graph: Graph, context: Context) -> None:
        raise FxpressError("pass 'does' cannot do that")

    with pytest.raises(FxpressError, match=r"^pass 'does' cannot do that$"):
        run(a_pass(refuses), graph)


def test_seeds_are_those_of_the_pass_and_the_streams_outside_go_on(graph: Graph) -> None:
    drawn: list[tuple[float, float, float]] = []

    def draws(graph: Graph, context: Context) -> None:
        drawn.append((random.random(), float(np.random.rand()), float(torch.rand(()))))

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), float(np.random.rand()), float(torch.rand(()))
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    for seed in (7, 7, 8):
        run(a_pass(draws), graph, seed=seed)
    assert drawn[0] == drawn[1] != drawn[2]
    assert (random.random(), float(np.random.rand()), float(torch.rand(()))) == expected


def test_preserved_analyses_are_not_computed_again(graph: Graph) -> None:
    def count(graph: Graph) -> int:
        return len(graph.nodes)

    def touch(graph: Graph, context: Context) -> None:
        with graph.edit("does"):
            pass

    value = graph.analyse(count)
    run(a_pass(touch, preserves=(count,)), graph)
    assert graph._analyses[count] == (graph.epoch, value)
    run(a_pass(touch), graph)
    assert graph._analyses[count][0] < graph.epoch


def test_infinite_masks_are_fine_and_infinite_statistics_are_not() -> None:
    module = nn.Module()
    module.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
    check_finite(module)
    module.register_buffer("running_var", torch.tensor([1.0, float("inf")]))
    with pytest.raises(ModelError, match=r"buffer 'running_var' .* 0 NaN and 1 infinite"):
        check_finite(module)


def test_a_clone_shares_nothing_and_keeps_ties() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3)).eval()
    model[1].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    graph = trace(model, torch.randn(4, 3))
    twin = clone_graph(graph)
    ours = dict(graph.module.named_parameters(remove_duplicate=False)) | dict(graph.module.named_buffers())
    theirs = dict(twin.module.named_parameters(remove_duplicate=False)) | dict(twin.module.named_buffers())
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name])
        assert tensor.data_ptr() != theirs[name].data_ptr()
        assert tensor.requires_grad == theirs[name].requires_grad
    assert theirs["0.weight"] is theirs["1.weight"]
