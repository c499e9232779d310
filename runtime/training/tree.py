"""Nested values of tensors and plain data as one safetensors file, without pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ...ir.errors import ArtifactError
from ..atomic import write_atomically

_KEY = "fxpress"
_MARK = "$"


def write_tree(path: Path, tree: Any) -> int:
    """Write nested dicts, lists, tuples, tensors, texts, numbers, booleans and None, as a whole or not at all.

    Returns:
        The number of bytes.

    Raises:
        ArtifactError: it cannot be written, or the tree holds something else.
    """
    tensors: dict[str, Tensor] = {}
    places: dict[int, str] = {}
    skeleton = json.dumps(_encode(tree, tensors, places, ""))
    return write_atomically(path, [save(tensors, {_KEY: skeleton})])


def read_tree(path: Path) -> Any:
    """What `write_tree` wrote, tensors on the CPU.

    Raises:
        ArtifactError: the file cannot be read, or is no such file.
    """
    try:
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        skeleton = json.loads(json.loads(content[8 : 8 + length])["__metadata__"][_KEY])
        return _decode(skeleton, load(content))
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}") from error
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise ArtifactError(f"{path} is damaged or no checkpoint ({text})") from error


def _encode(value: Any, tensors: dict[str, Tensor], places: dict[int, str], place: str) -> Any:
    """JSON in which a tensor is `{"$": "tensor", ...}`; a tensor that occurs twice is stored once."""
    if isinstance(value, Tensor):
        name = places.setdefault(id(value), place)
        if name == place:
            tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {_MARK: "tensor", "name": name}
    if isinstance(value, dict):
        # pairs, as JSON keys are texts and the keys of an optimiser's state are numbers
        return {_MARK: "dict", "items": [[k, _encode(v, tensors, places, f"{place}/{k}")] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [_encode(item, tensors, places, f"{place}/{index}") for index, item in enumerate(value)]
        return {_MARK: type(value).__name__, "items": items} if isinstance(value, tuple) else items
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    raise ArtifactError(
        f"a checkpoint cannot hold {place or 'this'}: a {type(value).__name__}",
        hint="A state_dict may hold tensors, numbers, texts, and lists, tuples and dicts of them.",
    )


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if value[_MARK] == "tensor":
        return tensors[value["name"]]
    if value[_MARK] == "dict":
        return {key: _decode(item, tensors) for key, item in value["items"]}
    return tuple(_decode(item, tensors) for item in value["items"])
