"""The names that other programs rely on."""

from __future__ import annotations

import inspect

import pytest

import fxpress

ERRORS = {
    "ArtifactError",
    "BudgetError",
    "CutError",
    "DataError",
    "GraphError",
    "ModelError",
    "OptionError",
    "TraceError",
    "TrainingError",
    "VerifyError",
}
FUNCTIONS = {"compile", "distill", "explain", "load", "trace"}
CLASSES = {"Budget", "Compiled", "Data", "FxpressError", "Graph", "Pipeline"} | ERRORS


def test_exactly_the_contract() -> None:
    assert set(fxpress.__all__) == FUNCTIONS | CLASSES | {"__version__"}
    assert sorted(fxpress.__all__) == sorted(dir(fxpress))
    assert fxpress.__version__.count(".") == 2


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_classes(name: str) -> None:
    value = getattr(fxpress, name)
    assert inspect.isclass(value)
    assert value.__name__ == name
    assert value.__doc__


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_functions(name: str) -> None:
    value = getattr(fxpress, name)
    assert inspect.isfunction(value)
    assert value.__doc__


@pytest.mark.parametrize("name", sorted(ERRORS))
def test_every_error_is_an_fxpress_error(name: str) -> None:
    error = getattr(fxpress, name)("the value 3 is wrong", hint="Give 4.")
    assert isinstance(error, fxpress.FxpressError)
    assert str(error) == "the value 3 is wrong. Give 4."


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'complie'"):
        getattr(fxpress, "complie")  # noqa: B009


def test_compile_signature() -> None:
    parameters = inspect.signature(fxpress.compile).parameters
    positional = [n for n, p in parameters.items() if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    keywords = {n: p.default for n, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
    assert positional == ["model", "passes", "example_inputs"]
    contract = {"data": None, "teacher": None, "workdir": None, "resume": False, "verify": True, "seed": 0}
    assert contract.items() <= keywords.items()


@pytest.mark.parametrize("name", ["trace", "explain"])
def test_trace_and_explain_take_model_and_inputs(name: str) -> None:
    assert list(inspect.signature(getattr(fxpress, name)).parameters)[:2] == ["model", "example_inputs"]


def test_compiled_offers_what_the_contract_says() -> None:
    for name in ("__call__", "save", "module", "report"):
        annotations = inspect.get_annotations(fxpress.Compiled)
        assert hasattr(fxpress.Compiled, name) or name in annotations, name
    assert callable(fxpress.Pipeline.load)
    assert {"macs", "params", "size", "latency"} <= set(inspect.signature(fxpress.Budget).parameters)
    assert {"train", "val", "calibration"} <= set(inspect.signature(fxpress.Data).parameters)
