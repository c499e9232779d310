"""Values of a graph as JSON and back: arguments of nodes, structures of inputs and outputs.

Values that JSON has no word for are objects with one key, the tag:

    {"node": "conv1"}  {"tuple": [..]}  {"dict": [[key, value], ..]}  {"ordered": ..}  {"slice": [start, stop, step]}
    {"float": "inf"}  {"dtype": "float32"}  {"layout": "strided"}  {"memory_format": "preserve_format"}
    {"device": "cpu"}  {"tensor": "inputs/0"}

None, bool, int (64 bit), finite float, str (a plain charset: modes, einsum equations) and lists stand for themselves.
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .checks import JSON, FormatError, short

Resolve = Mapping[str, Callable[[str], Any]]

MAX_DEPTH = 32  # nesting of one value
FLOATS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
_TEXT = re.compile(r"[A-Za-z0-9_.,:;/+*=<>()\[\] -]{0,256}")  # no quote, backslash, brace, percent or line end
_TORCH: dict[str, dict[str, Any]] = {
    "dtype": {n: v for n, v in vars(torch).items() if isinstance(v, torch.dtype)},
    "layout": {n: v for n, v in vars(torch).items() if isinstance(v, torch.layout)},
    "memory_format": {n: v for n, v in vars(torch).items() if isinstance(v, torch.memory_format)},
    "device": {"cpu": torch.device("cpu")},
}


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
            raise FormatError(f"{short(value)} is not a tagged value")
        ((tag, inner),) = value.items()
        return _decode_tag(tag, inner, resolve, depth)
    if isinstance(value, str) and not _TEXT.fullmatch(value):
        raise FormatError(f"string {short(value)} is not allowed as a value")
    return value


def _decode_tag(tag: str, inner: JSON, resolve: Resolve, depth: int) -> Any:
    table = FLOATS if tag == "float" else _TORCH.get(tag)
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
    raise FormatError(f"{short({tag: inner})} is not a value of the format")


def _decode_dict(tag: str, pairs: list[JSON], resolve: Resolve, depth: int) -> dict[Any, Any]:
    found: dict[Any, Any] = OrderedDict() if tag == "ordered" else {}
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or type(pair[0]) not in (str, int):
            raise FormatError(f"{short(pair)} is not a key and a value")
        key = decode(pair[0], resolve, depth + 1)
        if key in found:
            raise FormatError(f"key {short(key)} is there twice")
        found[key] = decode(pair[1], resolve, depth + 1)
    return found
