"""Budgets: fractions and amounts with units."""

from __future__ import annotations

from typing import Any

import pytest

from fxpress import Budget, OptionError


@pytest.mark.parametrize(
    ("metric", "value", "original", "limit"),
    [
        ("macs", 0.5, 2e9, 1e9),
        ("macs", 1, 2e9, 2e9),
        ("macs", "900M", 2e9, 900e6),
        ("params", "1.5k", 1e6, 1500),
        ("params", "250000", 1e6, 250000),
        ("size", "12MB", 1, 12e6),
        ("size", "12 MiB", 1, 12 * 2**20),
        ("latency", "3.5ms", 1, 3.5),
        ("latency", "250us", 1, 0.25),
        ("latency", 0.25, 8.0, 2.0),
    ],
)
def test_limit(metric: str, value: Any, original: float, limit: float) -> None:
    budget = Budget(**{metric: value})
    assert budget.metrics == [metric]
    assert budget.limit(metric, original) == pytest.approx(limit)


@pytest.mark.parametrize("metric", ["macs", "params", "size", "latency"])
@pytest.mark.parametrize(
    "value", [0, -0.5, 1.01, True, "", "MB", "-3MB", "0MB", "12 parsecs", "half", [1], float("nan")]
)
def test_out_of_range(metric: str, value: Any) -> None:
    with pytest.raises(OptionError, match=f"Budget, option '{metric}': given"):
        Budget(**{metric: value})


def test_wrong_unit_says_an_example() -> None:
    with pytest.raises(OptionError, match=r"given '3ms'.*such as '12MB'"):
        Budget(size="3ms")


def test_empty_and_unknown() -> None:
    with pytest.raises(OptionError, match="at least one of macs, params, size, latency"):
        Budget()
    with pytest.raises(OptionError, match="no option 'flops'"):
        Budget(flops=0.5)  # type: ignore[call-arg]


def test_limit_of_what_is_not_limited() -> None:
    with pytest.raises(OptionError, match="does not limit 'size'; it limits macs"):
        Budget(macs=0.5).limit("size", 1.0)
