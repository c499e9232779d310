"""Programs of binarized networks: their text, their shapes, and their numbers for the library.

A program is lines of text, so that it can be read in a stored file and passed to an operator as one string:

    input channels=64
    levels x=0 channels=64
    conv_levels x=1 outputs=64 channels=64 kernel=3,3 padding=1,1
    conv x=2 outputs=64 channels=64 kernel=3,3 padding=1,1 added=0 relu=1
    output x=3 dims=4

Inputs and steps make one value each, numbered from 0 in the order of the lines. Values are float32 or levels, of shape
(N, C, H, W), or (N, C) where a line says so; what has two dimensions counts as (N, C, 1, 1). `parts` says which tensors
belong to a step; `csrc/binary_network.h` has the same table of steps.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from ...ir.errors import KernelError

WINDOW = {"kernel": (1, 1), "stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}
_CONV = {"x": None, "outputs": None, "channels": None, **WINDOW, "groups": 1, "linear": 0}
FIELDS: dict[str, dict[str, Any]] = {
    "levels": {"x": None, "channels": None},
    "conv_levels": _CONV,
    "conv": {**_CONV, "added": -1, "added_relu": 0, "relu": 0},
    "affine": {"x": None, "channels": None, "relu": 0},
    "add": {"x": None, "y": None, "y_relu": 0, "relu": 0},
    "relu": {"x": None},
    "max_pool": {"x": None, **WINDOW, "ceil": 0},
    "average_pool": {"x": None, "kernel": (1, 1), "stride": (1, 1), "padding": (0, 0), "count_padding": 1},
    "mean": {"x": None},
    "shortcut": {"x": None, "stride": (1, 1), "before": 0, "after": 0},
    "cat": {"x": ()},
    "flatten": {"x": None},
    "decode": {"x": None},
    "input": {"channels": None},
    "output": {"x": None, "dims": 4},
}
"""Steps in the order of their numbers in csrc/binary_network.h: field → default (None: must be given).

Layers with `linear` read (N, C) and get the layout of linear layers, nothing else.
"""
CODES = {name: code for code, name in enumerate(FIELDS)}
_UNSEEN = {"levels": ("channels",), "affine": ("channels",), "conv": ("linear",), "conv_levels": ("linear",)}
_VALUES = ("x", "y", "added")
_LIMIT = 2**24
_LINES, _LINE = 2**16, re.compile(r"([a-z_]+)((?: [a-z_]+=-?\d{1,8}(?:,\d{1,8})*)*)")

Number = Any
"""int, or a symbol while torch.compile and torch.export look on."""


@dataclass(frozen=True)
class Step:
    """One line: its kind, and its fields by name, numbers or pairs of them."""

    kind: str
    fields: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.fields[name]

    def __str__(self) -> str:
        shown = {k: v for k, v in self.fields.items() if v != FIELDS[self.kind][k]}
        texts = (f"{k}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in shown.items())
        return " ".join((self.kind, *texts))

    def operands(self) -> tuple[int, ...]:
        """Numbers of the values that it reads."""
        if self.kind == "cat":
            return tuple(self["x"])
        return tuple(self[name] for name in _VALUES if self.fields.get(name, -1) >= 0)

    def numbers(self) -> list[int]:
        """All fields behind each other, as the library reads them."""
        values = [value for name, value in self.fields.items() if name not in _UNSEEN.get(self.kind, ())]
        return [n for value in values for n in (value if isinstance(value, tuple) else (value,))]


@dataclass(frozen=True)
class Part:
    """A tensor that belongs to a step; dtype bool is one bit for each element in a file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def stored_bytes(self) -> int:
        """Bytes in a file."""
        count = math.prod(self.shape)
        return -(-count // 8) if self.dtype is torch.bool else count * self.dtype.itemsize


@dataclass(frozen=True)
class Size:
    """Shape and kind of a value."""

    n: Number
    c: Number
    h: Number
    w: Number
    levels: bool = False


@dataclass(frozen=True)
class Program:
    """Inputs, steps and outputs of a network, in the order of their lines."""

    inputs: tuple[Step, ...]
    steps: tuple[Step, ...]
    outputs: tuple[Step, ...]

    def parts(self) -> list[tuple[Part, ...]]:
        """The tensors of each step."""
        return [_parts(step) for step in self.steps]

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors in a file."""
        return sum(part.stored_bytes for parts in self.parts() for part in parts)

    def sizes(self, inputs: Sequence[Sequence[Number]]) -> list[Size]:
        """Sizes of all values for inputs of given shapes.

        Raises:
            KernelError: names the step that cannot take what it reads.
        """
        if len(inputs) != len(self.inputs):
            raise KernelError(f"A binary network with {len(self.inputs)} inputs was given {len(inputs)}")
        values = []
        for shape, step in zip(inputs, self.inputs, strict=True):
            if len(shape) not in (2, 4) or shape[1] != step["channels"]:
                raise KernelError(
                    f"x {tuple(shape)} does not fit a binary network that reads {step['channels']} channels"
                )
            values.append(Size(*shape, *(1,) * (4 - len(shape))))
        for index, step in enumerate(self.steps):
            values.append(_size(index, step, [values[at] for at in step.operands()]))
        return values

    def macs(self, inputs: Sequence[Sequence[int]]) -> int:
        """Multiply-accumulates of all layers for inputs of given shapes."""
        sizes = self.sizes(inputs)[len(inputs) :]
        layers = [(step, size) for step, size in zip(self.steps, sizes, strict=True) if step.kind.startswith("conv")]
        return sum(
            size.n * size.c * size.h * size.w * step["channels"] * math.prod(step["kernel"]) for step, size in layers
        )

    def numbers(self) -> list[int]:
        """The program as the library reads it."""
        found = [len(self.steps), len(self.outputs), *(step["x"] for step in self.outputs)]
        for step in self.steps:
            numbers = step.numbers()
            found += [CODES[step.kind], len(numbers), *numbers]
        return found

    def __str__(self) -> str:
        return "\n".join(map(str, (*self.inputs, *self.steps, *self.outputs)))


# Text -----------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def parse(text: str) -> Program:
    """The program of a text.

    Raises:
        KernelError: names the line that is not one, or that reads a value which is not there.
    """
    lines = text.split("\n")
    if len(lines) > _LINES:
        raise KernelError(f"A program of {len(lines)} lines; at most {_LINES} are allowed")
    found = [_parse_line(number, line) for number, line in enumerate(lines)]
    kinds = [0 if step.kind == "input" else 2 if step.kind == "output" else 1 for step in found]
    if kinds != sorted(kinds) or {0, 2} - set(kinds):
        raise KernelError("A program of a binary network has inputs first, then steps, outputs at the end")
    inputs, made = kinds.count(0), len(kinds) - kinds.count(2)
    for number, step in enumerate(found):
        first = inputs if step.kind == "output" else 0
        if not all(first <= value < min(number, made) for value in step.operands()):
            raise KernelError(f"Line {number} of a binary network reads a value that is not there: {step}")
    outputs = [step["x"] for step in found[made:]]
    if len(set(outputs)) != len(outputs):
        raise KernelError("A binary network gives the same value twice")
    return Program(tuple(found[:inputs]), tuple(found[inputs:made]), tuple(found[made:]))


def _parse_line(number: int, line: str) -> Step:
    match = _LINE.fullmatch(line)
    known = FIELDS.get(match[1]) if match else None
    if match is None or known is None:
        raise KernelError(f"Line {number} of a binary network is no step: {line[:60]!r}")
    given = dict(word.split("=") for word in match[2].split())
    fields = {name: _parse_field(given.pop(name, None), default) for name, default in known.items()}
    wrong = [name for name, value in fields.items() if value is None or not _in_range(name, value)]
    if given or wrong or (match[1] == "output" and fields["dims"] not in (2, 4)):
        raise KernelError(
            f"Line {number} of a binary network: {[*given, *wrong, 'dims'][0]} is not right: {line[:100]!r}"
        )
    return Step(match[1], fields)


def _parse_field(text: str | None, default: Any) -> Any:
    """A number, or as many as the default has; None where that cannot be."""
    if text is None:
        return default if default != () else None
    numbers = tuple(map(int, text.split(",")))
    if isinstance(default, tuple):
        return numbers if len(numbers) == len(default) or not default else None
    return numbers[0] if len(numbers) == 1 else None


def _in_range(name: str, value: Any) -> bool:
    least = {"added": -1, "channels": 1, "outputs": 1, "groups": 1, "kernel": 1, "stride": 1, "dilation": 1}.get(
        name, 0
    )
    return all(least <= number < _LIMIT for number in (value if isinstance(value, tuple) else (value,)))


# Tensors --------------------------------------------------------------------------------------------------------------


def _parts(step: Step) -> tuple[Part, ...]:
    if step.kind in ("conv", "conv_levels"):
        shape = (step["outputs"], step["channels"], *step["kernel"])
        weights = Part("weights", torch.bool, shape)
        if step.kind == "conv":
            return weights, Part("scale_bias", torch.float32, (2, step["outputs"]))
        return weights, Part("cuts", cuts_dtype(math.prod(shape[1:])), (3, step["outputs"]))
    if step.kind in ("levels", "affine"):
        return (Part("thresholds" if step.kind == "levels" else "factor_term", torch.float32, (
            3 if step.kind == "levels" else 2, step["channels"])),)  # fmt: skip
    return (Part("step", torch.float32, (1,)),) if step.kind == "decode" else ()


def cuts_dtype(terms: int) -> torch.dtype:
    """What holds any sum of so many products with levels up to 3, and the next number."""
    return torch.int16 if 3 * terms + 1 <= 32767 else torch.int32


# Shapes ---------------------------------------------------------------------------------------------------------------


def _size(index: int, step: Step, read: list[Size]) -> Size:
    x = read[0]
    wanted = {"conv": True, "conv_levels": True, "decode": True, "max_pool": x.levels, "shortcut": x.levels,
              "cat": x.levels, "flatten": x.levels}.get(step.kind, False)  # fmt: skip
    others = read[1:] if step.kind in ("cat", "add") else []
    fits = x.levels == wanted and all(y.levels == x.levels for y in others)
    size = _SIZES.get(step.kind, lambda step, x, others: x)(step, x, others) if fits else None  # noqa: ARG005
    if size is None or not (size.c < _LIMIT and size.h >= 1 and size.w >= 1):
        raise KernelError(f"Step {index} of a binary network cannot take {read}: {step}")
    size = Size(size.n, size.c, size.h, size.w, step.kind in ("levels", "conv_levels") or (
        size.levels and step.kind not in ("conv", "decode")))  # fmt: skip
    if step.kind == "conv" and len(read) == 2 and read[1] != size:
        raise KernelError(f"Step {index} of a binary network adds {read[1]} to {size}: {step}")
    return size


def _same(step: Step, x: Size, others: list[Size]) -> Size | None:
    return x if x.c == step.fields.get("channels", x.c) and all(y == x for y in others) else None


def _conv_size(step: Step, x: Size, others: list[Size]) -> Size | None:
    if x.c != step["channels"] * step["groups"] or step["outputs"] % step["groups"]:
        return None
    size = _pool_size(step, x, others)
    return Size(size.n, step["outputs"], size.h, size.w) if size else None


def _pool_size(step: Step, x: Size, others: list[Size]) -> Size | None:  # noqa: ARG001
    dilation, found = step.fields.get("dilation", (1, 1)), []
    for axis, size in enumerate((x.h, x.w)):
        kernel, stride, padding = (step[name][axis] for name in ("kernel", "stride", "padding"))
        room = size + 2 * padding - dilation[axis] * (kernel - 1) - 1
        if room < 0 or ("pool" in step.kind and 2 * padding > kernel):
            return None
        count = (-(-room // stride) if step.fields.get("ceil") else room // stride) + 1
        found.append(count - 1 if step.fields.get("ceil") and (count - 1) * stride >= size + padding else count)
    return Size(x.n, x.c, found[0], found[1], x.levels)


def _shortcut_size(step: Step, x: Size, others: list[Size]) -> Size:  # noqa: ARG001
    (down, right), channels = step["stride"], step["before"] + x.c + step["after"]
    return Size(x.n, channels, (x.h - 1) // down + 1, (x.w - 1) // right + 1, x.levels)


def _cat_size(step: Step, x: Size, others: list[Size]) -> Size | None:  # noqa: ARG001
    if any((y.n, y.h, y.w) != (x.n, x.h, x.w) for y in others):
        return None
    return Size(x.n, x.c + sum(y.c for y in others), x.h, x.w, x.levels)


_SIZES: dict[str, Any] = {
    **dict.fromkeys(("levels", "affine", "add"), _same),
    **dict.fromkeys(("conv", "conv_levels"), _conv_size),
    **dict.fromkeys(("max_pool", "average_pool"), _pool_size),
    "mean": lambda step, x, others: Size(x.n, x.c, 1, 1),  # noqa: ARG005
    "flatten": lambda step, x, others: Size(x.n, x.c * x.h * x.w, 1, 1, x.levels),  # noqa: ARG005
    "shortcut": _shortcut_size,
    "cat": _cat_size,
}
