"""Values of a graph as JSON and back: arguments of nodes, structures of inputs and outputs, names.

`torch.fx` generates Python source from names, targets and arguments, so this file is the gate through which every
string of a stored graph must go. Values that JSON has no word for are objects with one key, the tag:

    {"node": "conv1"}  {"tuple": [..]}  {"dict": [[key, value], ..]}  {"ordered": ..}  {"slice": [start, stop, step]}
    {"float": "inf"}  {"dtype": "float32"}  {"layout": "strided"}  {"memory_format": "preserve_format"}
    {"device": "cpu"}  {"tensor": "inputs/0"}

None, bool, int (64 bit), finite float, str (a plain charset: modes, einsum equations) and lists stand for themselves.
"""

from __future__ import annotations

import json
import keyword
import math
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch

JSON = Any
Resolve = Mapping[str, Callable[[str], Any]]

MAX_VALUES = 1_000_000  # values in one JSON text: bounds the memory that parsing can take
MAX_DEPTH = 32  # nesting of one value
_INT64 = range(-(2**63), 2**63)
_TEXT = re.compile(r"[A-Za-z0-9_.,:;/+*=<>()\[\] -]{0,256}")  # no quote, backslash, brace, percent or line end
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,511}")
_ATOM = re.compile(r"[A-Za-z0-9_-]{1,255}")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_RESERVED = frozenset({"self", "torch", "device", "inf", "nan", "NoneType", "fx_pytree", "pytree", "getattr", "slice"})
_SPECS = frozenset({"_in_spec", "_out_spec"})  # attributes that a graph module gets when its code is generated
_FLOATS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
_TORCH: dict[str, dict[str, Any]] = {
    "dtype": {n: v for n, v in vars(torch).items() if isinstance(v, torch.dtype)},
    "layout": {n: v for n, v in vars(torch).items() if isinstance(v, torch.layout)},
    "memory_format": {n: v for n, v in vars(torch).items() if isinstance(v, torch.memory_format)},
    "device": {"cpu": torch.device("cpu")},
}


class FormatError(ValueError):
    """Something in a file, or in a graph to be stored, that the format does not allow; `artifact.py` adds the file."""

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(what)
        self.hint = hint


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
        raise FormatError(f"{what} {_short(name)} is not a plain identifier")
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
        raise FormatError(f"path {_short(path)} is not a dotted name")
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
        raise FormatError(f"{what} {_short(text)} is not plain text of at most {limit} characters")
    return text


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# Objects --------------------------------------------------------------------------------------------------------------


def check_object(
    value: JSON, what: str, required: Mapping[str, type], optional: Mapping[str, type] | None = None
) -> dict[str, JSON]:
    """An object with exactly these keys and types; bool is no int here."""
    if not isinstance(value, dict):
        raise FormatError(f"{what} is {_short(value)}, not an object")
    for key in (*required, *value):
        kind = required.get(key) or (optional or {}).get(key)
        if key not in value or kind is None:
            raise FormatError(f"{what} {'has no' if kind else 'has an unknown'} field {_short(key)}")
        if not isinstance(value[key], kind) or (kind is int and isinstance(value[key], bool)):
            raise FormatError(f"{what}: {key} is {_short(value[key])}, not of type {kind.__name__}")
    return value


# Values ---------------------------------------------------------------------------------------------------------------


def encode(value: Any, leaf: Callable[[Any], JSON] = lambda _: None, depth: int = 0) -> JSON:
    """A value as JSON; `leaf` may give the JSON of nodes or tensors, None for any other value.

    Raises:
        FormatError: a value the format has no form for.
    """
    special = leaf(value)
    if special is not None:
        return special
    if depth > MAX_DEPTH:
        raise FormatError(f"a value is nested more than {MAX_DEPTH} deep")
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, torch.device):
        return {"device": value.type}
    for tag in ("dtype", "layout", "memory_format"):
        if isinstance(value, getattr(torch, tag)):
            return {tag: str(value).removeprefix("torch.")}
    return _encode_container(value, lambda item: encode(item, leaf, depth + 1))


def _encode_container(value: Any, item: Callable[[Any], JSON]) -> JSON:
    if isinstance(value, slice):
        return {"slice": [item(value.start), item(value.stop), item(value.step)]}
    if isinstance(value, list):
        return [item(v) for v in value]
    if type(value) is tuple or isinstance(value, torch.Size):
        return {"tuple": [item(v) for v in value]}
    if isinstance(value, dict) and (type(value) is OrderedDict or _is_plain_dict(value)):
        tag = "ordered" if type(value) is OrderedDict else "dict"
        return {tag: [[item(k), item(v)] for k, v in value.items()]}
    raise FormatError(f"a value of type {type(value).__module__}.{type(value).__qualname__} cannot be stored")


def _is_plain_dict(value: dict[Any, Any]) -> bool:
    return type(value) in (dict, torch.fx.immutable_collections.immutable_dict)


def decode(value: JSON, resolve: Resolve, depth: int = 0) -> Any:
    """The inverse of `encode`; `resolve` maps the tags "node" and "tensor" to look-ups by name.

    Raises:
        FormatError: an unknown tag, a string or key that is not allowed, too deep a nesting.
    """
    if depth > MAX_DEPTH:
        raise FormatError(f"a value is nested more than {MAX_DEPTH} deep")
    if isinstance(value, list):
        return [decode(v, resolve, depth + 1) for v in value]
    if isinstance(value, dict):
        if len(value) != 1:
            raise FormatError(f"{_short(value)} is not a tagged value")
        ((tag, inner),) = value.items()
        return _decode_tag(tag, inner, resolve, depth)
    if isinstance(value, str) and not _TEXT.fullmatch(value):
        raise FormatError(f"string {_short(value)} is not allowed as a value")
    return value


def _decode_tag(tag: str, inner: JSON, resolve: Resolve, depth: int) -> Any:
    table = _FLOATS if tag == "float" else _TORCH.get(tag)
    if isinstance(inner, str) and table is not None and inner in table:
        return table[inner]
    if isinstance(inner, str) and tag in resolve:
        return resolve[tag](inner)
    if isinstance(inner, list) and tag in ("tuple", "slice", "dict", "ordered"):
        if tag in ("dict", "ordered"):
            return _decode_dict(tag, inner, resolve, depth)
        items = [decode(v, resolve, depth + 1) for v in inner]
        if tag == "tuple":
            return tuple(items)
        if len(items) == 3:
            return slice(*items)
    raise FormatError(f"{_short({tag: inner})} is not a value of the format")


def _decode_dict(tag: str, pairs: list[JSON], resolve: Resolve, depth: int) -> dict[Any, Any]:
    found: dict[Any, Any] = OrderedDict() if tag == "ordered" else {}
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or type(pair[0]) not in (str, int):
            raise FormatError(f"{_short(pair)} is not a key and a value")
        key = decode(pair[0], resolve, depth + 1)
        if key in found:
            raise FormatError(f"key {_short(key)} is there twice")
        found[key] = decode(pair[1], resolve, depth + 1)
    return found


# Documents ------------------------------------------------------------------------------------------------------------


def pack_document(what: str, value: Any) -> JSON:
    """A pipeline or report as JSON: infinite and NaN numbers become {"float": ..}, control characters U+FFFD.

    Raises:
        FormatError: a value that is not JSON.
    """
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise FormatError(f"the {what} has a key that is not text: {_short(list(value))}")
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
    raise FormatError(f"the {what} holds {_short(value)}, which is not JSON")


def unpack_document(what: str, value: JSON) -> dict[str, Any] | None:
    """The inverse of `pack_document`; None where there is none."""
    if value is not None and not isinstance(value, dict):
        raise FormatError(f"the {what} is {_short(value)}, not an object")
    found: dict[str, Any] | None = _unpack(what, value)
    return found


def _unpack(what: str, value: JSON) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"float"} and isinstance(value["float"], str) and value["float"] in _FLOATS:
            return _FLOATS[value["float"]]
        return {check_text(key, f"a key of the {what}"): _unpack(what, item) for key, item in value.items()}
    if isinstance(value, list):
        return [_unpack(what, item) for item in value]
    if isinstance(value, str):
        return check_text(value, f"a text of the {what}", limit=1 << 20)
    return value
