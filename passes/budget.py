"""A budget: how much of the original may remain."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from ..ir.errors import OptionError
from .options import InvalidOptionError, Options

UNITS: dict[str, dict[str, float]] = {
    "macs": {"": 1, "K": 1e3, "M": 1e6, "G": 1e9},
    "params": {"": 1, "K": 1e3, "M": 1e6, "G": 1e9},
    "size": {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30},
    "latency": {"US": 1e-3, "MS": 1, "S": 1e3},
}
"""Metric → suffix (upper case) → factor to MACs per image, parameters, bytes and milliseconds."""

_QUANTITY = re.compile(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)\s*")


def quantity(metric: str, text: str) -> float:
    """An absolute amount: `quantity("size", "12MB")` is 12e6 bytes, `quantity("latency", "3.5ms")` is 3.5.

    Raises:
        OptionError: the text is not a positive number with one of the metric's units.
    """
    match, units = _QUANTITY.fullmatch(text), UNITS[metric]
    if match is None or match[2].upper() not in units or float(match[1]) <= 0:
        example = {"macs": "900M", "params": "5M", "size": "12MB", "latency": "3.5ms"}[metric]
        raise InvalidOptionError(f"allowed: a fraction above 0 up to 1, or an amount such as {example!r}")
    return float(match[1]) * units[match[2].upper()]


def _limit(metric: str) -> Any:
    def check(value: Any) -> Any:
        if isinstance(value, str):
            quantity(metric, value)
        elif isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
            raise InvalidOptionError(
                "allowed: the fraction that may remain, above 0 up to 1, or an amount with its unit as text"
            )
        return value

    return BeforeValidator(check)


_Fraction = Annotated[float, Field(gt=0, le=1)]


class Budget(Options):
    """What may remain of the original: a fraction above 0 up to 1, or an amount such as `"12MB"` or `"3.5ms"`."""

    macs: Annotated[_Fraction | str | None, _limit("macs")] = None
    """Multiply-accumulates of one image: a fraction, or an amount such as `"900M"`."""
    params: Annotated[_Fraction | str | None, _limit("params")] = None
    """Parameters: a fraction, or an amount such as `"5M"`."""
    size: Annotated[_Fraction | str | None, _limit("size")] = None
    """Bytes of the saved file: a fraction, or an amount such as `"12MB"` (10^6) or `"12MiB"` (2^20)."""
    latency: Annotated[_Fraction | str | None, _limit("latency")] = None
    """Time of one forward pass of the example inputs: a fraction, or an amount such as `"3.5ms"`."""

    @model_validator(mode="after")
    def _not_empty(self) -> Budget:
        if not self.metrics:
            raise InvalidOptionError(f"a budget needs at least one of {', '.join(UNITS)}")
        return self

    @property
    def metrics(self) -> list[str]:
        """The metrics that are limited."""
        return [metric for metric in UNITS if getattr(self, metric) is not None]

    def limit(self, metric: str, original: float) -> float:
        """The absolute amount that may remain of `metric`, in MACs, parameters, bytes or milliseconds.

        Args:
            metric: one of `metrics`.
            original: the amount before compilation, in the same unit.

        Raises:
            OptionError: the metric is not limited by this budget.
        """
        value = getattr(self, metric, None)
        if value is None:
            raise OptionError(f"this budget does not limit {metric!r}; it limits {', '.join(self.metrics)}")
        return quantity(metric, value) if isinstance(value, str) else float(value) * original
