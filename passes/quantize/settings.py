"""How finely each layer is quantised: defaults per kind of layer, and a table of exceptions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from ...ir.errors import OptionError
from ...runtime.layers.pq_codebook import MAX_CODEWORDS, MIN_CODEWORDS
from ..options import InvalidOptionError, Options, nearest


def _power_of_two(value: object) -> object:
    if isinstance(value, int) and value > 0 and value & (value - 1):
        raise InvalidOptionError("the number of codewords must be a power of two: an index has whole bits")
    return value


Width = Annotated[int, Field(ge=1)]
Words = Annotated[int, Field(ge=MIN_CODEWORDS, le=MAX_CODEWORDS), BeforeValidator(_power_of_two)]
Precision = Literal["fp32", "fp16", "int8"]


class LinearSetting(Options):
    """Sub-spaces and codewords of linear layers."""

    subspace: Width = 4
    """Inputs per sub-space, d."""
    codewords: Words = 32
    """Codewords per sub-space, K: a power of two up to 256."""


class LayerSetting(Options):
    """What is different for some layers; what is not named stays."""

    subspace: Width | None = None
    """Inputs per sub-space, d."""
    codewords: Words | None = None
    """Codewords per sub-space, K: a power of two up to 256."""
    codebook: Precision | None = None
    """What a file keeps of the codewords."""
    skip: bool | None = None
    """Leave the layer as it is; `false` takes it back in."""


@dataclass(frozen=True)
class Setting:
    """How one layer is quantised: width d, codewords K, what a file keeps of them, and whether it is left alone."""

    subspace: int
    codewords: int
    codebook: Precision = "fp32"
    skip: bool = False

    def but(self, changes: LayerSetting) -> Setting:
        """The same with the changes."""
        given = changes.model_dump(exclude_none=True)
        return Setting(**{**self.__dict__, **given})


def with_exceptions(
    base: Mapping[str, Setting], table: Mapping[str, LayerSetting], ignore: Sequence[str], who: str
) -> dict[str, Setting]:
    """The setting of each layer: every pattern that fits changes it, in the order of the table, `ignore` last.

    Args:
        base: settings by the layers' paths.
        table: changes by patterns of paths (`*` stands for anything).
        ignore: patterns of layers to leave alone.
        who: the pass, for errors.

    Raises:
        OptionError: a pattern that fits no layer.
    """
    result = dict(base)
    changes = [("layers", pattern, change) for pattern, change in table.items()]
    changes += [("ignore", pattern, LayerSetting(skip=True)) for pattern in ignore]
    for option, pattern, change in changes:
        for path in matching(pattern, result, f"{who}, option {option!r}"):
            result[path] = result[path].but(change)
    return result


def matching(pattern: str, paths: Iterable[str], who: str) -> list[str]:
    """Paths that a pattern fits.

    Raises:
        OptionError: there is none; names those that there are.
    """
    known = list(paths)
    found = [path for path in known if fnmatchcase(path, pattern)]
    if not found:
        listed = f"{', '.join(known[:8])}{', ...' if len(known) > 8 else ''}" or "none"
        raise OptionError(
            f"{who}: no convolution or linear layer {pattern!r}: {nearest(pattern, known)}layers: {listed}"
        )
    return found
