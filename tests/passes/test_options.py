"""Mistakes in options: one line that names pass, option, what was given and what is allowed."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import pytest
from fxpress.ir.errors import OptionError
from fxpress.ir.graph import Graph
from fxpress.passes.base import LOSSY, Context, Pass, PassResult, Semantics
from fxpress.passes.budget import Budget
from pydantic import Field, ValidationError


class Shrink(Pass):
    """A pass with every kind of option."""

    name: ClassVar[str] = "shrink"
    semantics: ClassVar[Semantics] = LOSSY

    ratio: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Share to remove."""
    scope: Literal["global", "uniform"] = "global"
    budget: Budget | None = None
    ignore: tuple[str, ...] = ()
    masks: dict[str, list[float]] = {}  # noqa: RUF012 - pydantic copies it

    def run(self, graph: Graph, context: Context) -> PassResult:
        return PassResult()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ratoi": 0.5}, ["pass 'shrink' has no option 'ratoi'", "did you mean 'ratio'?", "scope, budget, ignore"]),
        ({"zzz": 0.5}, ["pass 'shrink' has no option 'zzz': options: ratio, scope"]),
        ({"ratio": 3}, ["pass 'shrink', option 'ratio': given 3, allowed: number >= 0 and < 1"]),
        ({"ratio": "much"}, ["option 'ratio': given 'much'", "number >= 0 and < 1"]),
        ({"ratio": float("nan")}, ["option 'ratio': given nan"]),
        ({"scope": "locl"}, ["option 'scope': given 'locl', allowed: 'global' or 'uniform'"]),
        ({"ignore": 3}, ["option 'ignore': given 3, allowed: list of string"]),
        ({"masks": 3}, ["option 'masks': given 3, allowed: mapping of names to list of number"]),
        ({"budget": 3}, ["option 'budget': given 3, allowed: Budget"]),
        ({"budget": {}}, ["option 'budget'", "at least one of macs, params, size, latency"]),
        ({"budget": {"macs": 1.5}}, ["pass 'shrink', option 'budget'", "'macs': given 1.5", "above 0 up to 1"]),
        ({"budget": {"mac": 0.5}}, ["pass 'shrink', option 'budget'", "no option 'mac': did you mean 'macs'?"]),
        ({"ratio": 3, "scope": 4}, ["option 'ratio': given 3", "; pass 'shrink', option 'scope': given 4"]),
    ],
)
def test_mistakes(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(OptionError) as caught:
        Shrink(**options)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_options_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Shrink().ratio = 0.5  # type: ignore[misc]


def test_settings_are_what_differs_from_the_defaults() -> None:
    assert Shrink().settings() == {}
    settings = Shrink(budget={"macs": 0.5}, ignore=["fc"]).settings()  # type: ignore[arg-type]
    assert settings == {"budget": {"macs": 0.5}, "ignore": ["fc"]}
    assert Shrink(**settings) == Shrink(budget=Budget(macs=0.5), ignore=("fc",))


def test_summary_is_the_first_line() -> None:
    assert Shrink.summary() == "A pass with every kind of option."
    assert Shrink.title() == "pass 'shrink'"
