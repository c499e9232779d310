"""Checks of what a file says before anything is done with it: JSON text, objects, names, paths, free text.

`torch.fx` generates Python source from names, targets and arguments. Every string of a stored graph that could reach it
goes through `check_name`, `check_keyword`, `check_path`, or as a value through `values.py`.
"""

from __future__ import annotations

import json
import keyword
import math
import re
from collections.abc import Mapping
from typing import Any

JSON = Any

MAX_VALUES = 1_000_000  # values in one JSON text: bounds the memory that parsing can take
_INT64 = range(-(2**63), 2**63)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,511}")
_ATOM = re.compile(r"[A-Za-z0-9_-]{1,255}")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_RESERVED = frozenset({"self", "torch", "device", "inf", "nan", "NoneType", "fx_pytree", "pytree", "getattr", "slice"})
_SPECS = frozenset({"_in_spec", "_out_spec"})  # attributes that a graph module gets when its code is generated


class FormatError(ValueError):
    """Something in a file, or in a graph to be stored, that the format does not allow; `artifact.py` adds the file."""

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(what)
        self.hint = hint


def short(value: object) -> str:
    """`repr` of a value, at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def parse(text: str, what: str) -> JSON:
    """JSON text to values, with a bound on their number taken before any memory is, and no duplicate keys."""
    if sum(map(text.count, ",[{")) > MAX_VALUES:
        raise FormatError(f"{what} holds more than {MAX_VALUES} values")
    try:
        return json.loads(
            text, object_pairs_hook=_unique, parse_int=_integer, parse_float=_float, parse_constant=_float
        )
    except RecursionError:
        raise FormatError(f"{what} is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise FormatError(f"{what} is not valid JSON ({error})") from None


def count(value: JSON) -> int:
    """Number of values in a value."""
    if isinstance(value, (list, dict)):
        return 1 + sum(map(count, value.values() if isinstance(value, dict) else value))
    return 1


def _unique(pairs: list[tuple[str, JSON]]) -> dict[str, JSON]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise FormatError("an object has the same key twice")
    return found


def _integer(digits: str) -> int:
    if len(digits) > 20 or int(digits) not in _INT64:
        raise FormatError(f"{digits[:24]}... is not a 64-bit integer")
    return int(digits)


def _float(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise FormatError(f"{digits[:24]} is not a finite number")
    return number


def dump(value: JSON) -> str:
    """Values to compact JSON text, the same bytes for the same value."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


# Names ----------------------------------------------------------------------------------------------------------------


def check_keyword(name: JSON, what: str) -> str:
    """An ASCII identifier that may name an argument in a call of generated code."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or keyword.iskeyword(name):
        raise FormatError(f"{what} {short(name)} is not a plain identifier")
    return str(name)


def check_name(name: JSON, what: str) -> str:
    """An ASCII identifier that may become a variable of generated code."""
    check_keyword(name, what)
    if name in _RESERVED or (name.startswith("__") and name.endswith("__")):
        raise FormatError(f"{what} {name!r} is reserved in Python or in generated code")
    return str(name)


def check_path(path: JSON) -> str:
    """A dotted path of a layer or tensor, such as `layer1.0.conv1`, whose atoms cannot break generated code."""
    if not isinstance(path, str) or not 0 < len(path) <= 1024:
        raise FormatError(f"path {short(path)} is not a dotted name")
    for atom in path.split("."):
        if not _ATOM.fullmatch(atom) or keyword.iskeyword(atom) or atom.startswith("__") or atom in _SPECS:
            raise FormatError(f"path {path!r}: {atom!r} cannot be the name of a layer or tensor")
    return path


def clean(text: str) -> str:
    """Text without control characters (a terminal would obey them) and lone surrogates."""
    return _CONTROL.sub("\ufffd", text)


def check_text(text: JSON, what: str, limit: int = 4096) -> str:
    """Free text that is only ever shown: no control characters, bounded."""
    if not isinstance(text, str) or len(text) > limit or _CONTROL.search(text):
        raise FormatError(f"{what} {short(text)} is not plain text of at most {limit} characters")
    return text


# Objects --------------------------------------------------------------------------------------------------------------


def check_object(
    value: JSON, what: str, required: Mapping[str, type], optional: Mapping[str, type] | None = None
) -> dict[str, JSON]:
    """An object with exactly these keys and types; bool is no int here."""
    if not isinstance(value, dict):
        raise FormatError(f"{what} is {short(value)}, not an object")
    for key in (*required, *value):
        kind = required.get(key) or (optional or {}).get(key)
        if key not in value or kind is None:
            raise FormatError(f"{what} {'has no' if kind else 'has an unknown'} field {short(key)}")
        if not isinstance(value[key], kind) or (kind is int and isinstance(value[key], bool)):
            raise FormatError(f"{what}: {key} is {short(value[key])}, not of type {kind.__name__}")
    return value
