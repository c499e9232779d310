"""Budgets that must be measured: bytes of the saved file, and time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from fxpress.ir.cost import measure_cost
from fxpress.ir.errors import BudgetError, OptionError
from fxpress.ir.graph import Graph
from fxpress.ir.trace import trace
from fxpress.passes.base import Context
from fxpress.passes.budget import Budget
from fxpress.passes.clone import clone_graph
from fxpress.passes.prune import measured
from fxpress.passes.prune.prune_channels import PruneChannels
from fxpress.runtime.measure import Latency, bytes_on_disk, latency_ratio
from torch import Tensor, nn


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 48, 3, padding=1), nn.BatchNorm2d(48), nn.ReLU(), nn.Conv2d(48, 64, 3, padding=1), nn.ReLU(),
            nn.Conv2d(64, 48, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 5),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def original() -> Graph:
    torch.manual_seed(0)
    return trace(Plain().eval(), torch.randn(1, 3, 12, 12))


def prune(original: Graph, **options: Any) -> tuple[Graph, Any]:
    graph = clone_graph(original)
    return graph, PruneChannels(**options).run(graph, Context(original=original))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Time as a fixed part and one that goes with the MACs, 10 ms for the whole; its errors are taken from the list."""
    errors: list[float] = []

    def timed(candidate: Graph, reference: Graph, inputs: Any, *, rounds: int) -> Latency:
        share = measure_cost(candidate).macs / measure_cost(reference).macs
        ratio = (0.2 + 0.8 * share) * (1 + (errors.pop(0) if errors else 0))
        return Latency(ratio, 0.98 * ratio, 1.02 * ratio, 10 * ratio, 0.1, 10, 0.1, 1, rounds, 1, "cpu")

    monkeypatch.setattr(measured, "latency_ratio", timed)
    return errors


@pytest.mark.parametrize("scope", ["uniform", "global"])
@pytest.mark.parametrize("remain", [0.7, 0.4])
def test_the_saved_file_is_as_small_as_asked_for(original: Graph, scope: str, remain: float) -> None:
    graph, result = prune(original, budget=Budget(size=remain), scope=scope)
    before, after = bytes_on_disk(original), bytes_on_disk(graph)
    assert remain * 0.97 <= after / before <= remain
    assert result.metrics["size"]["value"] == after
    assert len(result.metrics["size"]["measured"]) <= 8
    assert any(note.startswith(f"size {after:,} bytes, allowed") for note in result.notes)


def test_an_absolute_size(original: Graph) -> None:
    limit = int(bytes_on_disk(original) * 0.6)
    graph, _ = prune(original, budget=Budget(size=f"{limit}B"))
    assert 0.95 * limit <= bytes_on_disk(graph) <= limit


def test_a_size_below_what_can_be_reached(original: Graph) -> None:
    with pytest.raises(BudgetError, match=r"size: [\d,]+ bytes allowed, [\d,]+ bytes is the least that can be reached"):
        prune(original, budget=Budget(size="2KB"), floor=30)


@pytest.mark.parametrize("remain", [0.8, 0.5])
def test_time_is_met_in_few_measurements(original: Graph, clock: list[float], remain: float) -> None:
    graph, result = prune(original, budget=Budget(latency=remain), scope="global")
    share = measure_cost(graph).macs / measure_cost(original).macs
    assert remain * 0.95 <= 0.2 + 0.8 * share <= remain
    assert len(result.metrics["latency"]["measured"]) <= 5


def test_milliseconds(original: Graph, clock: list[float]) -> None:
    graph, result = prune(original, budget=Budget(latency="6ms"))
    assert 5.6 <= 2 + 8 * measure_cost(graph).macs / measure_cost(original).macs <= 6
    assert any("latency 5." in note and "allowed 6.000 ms" in note for note in result.notes)


def test_a_lucky_measurement_is_not_believed(original: Graph, clock: list[float]) -> None:
    """The search sees times 12 % too short; the careful measurement finds out, and more goes."""
    clock += [0.0, -0.12]
    graph, result = prune(original, budget=Budget(latency=0.6), scope="global")
    assert 0.2 + 0.8 * measure_cost(graph).macs / measure_cost(original).macs <= 0.6
    points = result.metrics["latency"]["measured"]
    assert points[1]["value"] <= 0.6 < points[2]["value"]
    assert points[1]["blocks"] == points[2]["blocks"] < points[-1]["blocks"]


@pytest.mark.parametrize("seed", range(5))
def test_noise_does_not_break_the_search(original: Graph, clock: list[float], seed: int) -> None:
    clock += list(np.random.default_rng(seed).normal(scale=0.05, size=100))
    _, result = prune(original, budget=Budget(latency=0.5), scope="global")
    found = result.metrics["latency"]
    assert found["value"] <= 0.5
    assert len(found["measured"]) <= 20


def test_a_time_below_what_can_be_reached(original: Graph, clock: list[float]) -> None:
    with pytest.raises(BudgetError, match=r"latency: 0\.150 of the original's time allowed, 0\.2.. of .* is the least"):
        prune(original, budget=Budget(latency=0.15))


def test_all_limits_of_a_budget_are_met(original: Graph, clock: list[float]) -> None:
    graph, result = prune(original, budget=Budget(macs=0.8, size=0.7, latency=0.6), scope="global")
    cost, whole = measure_cost(graph), measure_cost(original)
    assert 0.2 + 0.8 * cost.macs / whole.macs <= 0.6
    assert bytes_on_disk(graph) <= 0.7 * bytes_on_disk(original)
    assert result.metrics["size"]["value"] == bytes_on_disk(graph)


def test_what_is_met_already_takes_one_measurement(original: Graph, clock: list[float]) -> None:
    graph, result = prune(original, budget=Budget(macs=0.4, latency=0.9))
    assert 0.39 <= measure_cost(graph).macs / measure_cost(original).macs <= 0.4
    assert len(result.metrics["latency"]["measured"]) == 1


def test_a_real_clock(original: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "ROUNDS", 5)
    monkeypatch.setattr(measured, "CAREFUL", 11)
    graph, result = prune(original, budget=Budget(latency=0.7), round_to=8)
    assert result.metrics["latency"]["value"] <= 0.7
    again = latency_ratio(graph, original, original.example_args, rounds=11)
    assert again.ratio < 0.9


def test_inputs_of_both_kinds_cannot_be_timed() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 12), nn.Linear(12, 3)

        def forward(self, x: Tensor, *, y: Tensor) -> Tensor:
            return self.two(torch.relu(self.one(x + y)))  # type: ignore[no-any-return]

    graph = trace(Two().eval(), torch.randn(2, 6), example_kwargs={"y": torch.randn(2, 6)})
    with pytest.raises(OptionError, match="latency cannot be timed with positional and keyword inputs"):
        prune(graph, budget=Budget(latency=0.5))
