"""Pipelines and reports as JSON: plain values, with a form for the numbers that JSON has not."""

from __future__ import annotations

import math
from typing import Any

from .checks import JSON, FormatError, check_text, clean, short
from .values import FLOATS

_MAX_TEXT = 1 << 20


def pack_document(what: str, value: Any) -> JSON:
    """A pipeline or report as JSON: infinite and NaN numbers become {"float": ..}, control characters U+FFFD.

    Raises:
        FormatError: a value that is not JSON.
    """
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise FormatError(f"the {what} has a key that is not text: {short(list(value))}")
        if value.keys() == {"float"}:
            raise FormatError(f"the {what} has an object with the only key 'float', which stands for special numbers")
        return {clean(key): pack_document(what, item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [pack_document(what, item) for item in value]
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(float(value))}
    if value is None or isinstance(value, (bool, int, float)):
        return value
    raise FormatError(f"the {what} holds {short(value)}, which is not JSON")


def unpack_document(what: str, value: JSON) -> dict[str, Any] | None:
    """The inverse of `pack_document`; None where there is none."""
    if value is not None and not isinstance(value, dict):
        raise FormatError(f"the {what} is {short(value)}, not an object")
    found: dict[str, Any] | None = _unpack(what, value)
    return found


def _unpack(what: str, value: JSON) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"float"} and isinstance(value["float"], str) and value["float"] in FLOATS:
            return FLOATS[value["float"]]
        return {check_text(key, f"a key of the {what}"): _unpack(what, item) for key, item in value.items()}
    if isinstance(value, list):
        return [_unpack(what, item) for item in value]
    if isinstance(value, str):
        return check_text(value, f"a text of the {what}", limit=_MAX_TEXT)
    return value
