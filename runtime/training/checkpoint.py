"""Checkpoints of a training run: the last two, each a whole file, and to which run they belong."""

from __future__ import annotations

import re
import warnings
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...ir.errors import ArtifactError, OptionError
from .tree import read_tree, write_tree

KEEP = 2
FORMAT = 1
_CACHE = "teacher-cache.safetensors"
_NAME = re.compile(r"checkpoint-(\d{9})\.safetensors")


class Checkpoints:
    """Files `checkpoint-STEP.safetensors` in a folder.

    Each is written beside its place, flushed and renamed: after a kill at any moment there is the new one or there is
    not, and the one before it is whole.

    Args:
        folder: made where it does not exist.
        identity: what a run must have in common with another to go on from its checkpoints (JSON values).
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder, self.identity, self._cached = folder, dict(identity), 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OptionError(f"the folder of checkpoints {folder} cannot be made: {error.strerror}") from None

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Keep a state, and remove all but the last two."""
        path = self.folder / f"checkpoint-{step:09d}.safetensors"
        write_tree(path, {"format": FORMAT, "identity": self.identity, "state": state})
        for old in self.files()[:-KEEP]:
            old.unlink(missing_ok=True)
        return path

    def load(self) -> dict[str, Any] | None:
        """The last state that can be read, None where there is none; damaged files are passed over with a warning.

        Raises:
            OptionError: the folder holds checkpoints of another run.
        """
        for path in reversed(self.files()):
            try:
                tree = read_tree(path)
                same = tree["format"] == FORMAT
            except (ArtifactError, KeyError, TypeError) as error:
                warnings.warn(f"checkpoint {path} is passed over: {error}", RuntimeWarning, stacklevel=2)
                continue
            if same:
                self._refuse_other(path, tree["identity"])
                state: dict[str, Any] = tree["state"]
                return state
        return None

    def save_cache(self, count: int, content: Callable[[], dict[str, Any]]) -> None:
        """Keep the teacher's outputs, in a file of their own: it only grows, and is written only when it has."""
        if count > self._cached:
            write_tree(self.folder / _CACHE, content())
            self._cached = count

    def load_cache(self, count: int) -> dict[str, Any]:
        """What `save_cache` kept, of which `count` entries belong to the checkpoint.

        Raises:
            ArtifactError: the file is missing or damaged.
        """
        if not count:
            return {}
        self._cached = count
        content: dict[str, Any] = read_tree(self.folder / _CACHE)
        return content

    def last(self) -> Path | None:
        """The newest file."""
        return next(reversed(self.files()), None)

    def clear(self) -> None:
        """Remove the checkpoints, and nothing else."""
        clear_checkpoints(self.folder)

    def files(self) -> list[Path]:
        """All of them, oldest first."""
        return checkpoint_files(self.folder)

    def _refuse_other(self, path: Path, other: Mapping[str, Any]) -> None:
        changed = [key for key, value in self.identity.items() if other.get(key) != value]
        if changed:
            words = "; ".join(f"{key}: {_unlike(other.get(key), self.identity[key])}" for key in changed)
            raise OptionError(
                f"cannot resume: {path} belongs to another run ({words})",
                hint="Give the same options and data, or another folder, or resume=False to start over.",
            )


def checkpoint_files(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted(path for path in folder.glob("checkpoint-*.safetensors") if _NAME.fullmatch(path.name))


def clear_checkpoints(folder: Path) -> None:
    """Remove the checkpoints of a folder and what goes with them."""
    for path in [*checkpoint_files(folder), folder / _CACHE]:
        path.unlink(missing_ok=True)


def describe(module: nn.Module, *, values: bool = False) -> str:
    """Check sum over names, shapes and dtypes of a network's tensors, and with `values` over what is in them."""
    total = 0
    for name, tensor in sorted(module.state_dict().items()):
        total = zlib.crc32(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode(), total)
        if values:
            total = zlib.crc32(_bytes(tensor), total)
    return f"{total:08x}"


def options_of(module: nn.Module) -> str:
    """A module's classes and the plain numbers and texts in them, such as a temperature or the weights of a sum."""
    parts = []
    for part in module.modules():
        plain = {k: v for k, v in vars(part).items() if _is_plain(v) and k[0] != "_"}
        plain.pop("training", None)
        parts.append(f"{type(part).__name__}({', '.join(f'{key}={value}' for key, value in sorted(plain.items()))})")
    return " ".join(parts)


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return isinstance(value, (bool, int, float, str))


def _bytes(tensor: Tensor) -> bytes:
    content: bytes = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return content


def _unlike(theirs: Any, mine: Any) -> str:
    """Two values, from where they begin to differ."""
    one, two = str(theirs), str(mine)
    start = next((place for place, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), 0)
    start = 0 if max(len(one), len(two)) <= 40 else one.rfind(" ", 0, start + 1) + 1
    return f"{one[start : start + 40]}, not {two[start : start + 40]}"
