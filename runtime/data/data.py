"""`Data`: what a compilation trains, validates and calibrates on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ...ir.errors import DataError

Loader = Iterable[Any]
"""An iterable of `(inputs, targets)` that starts anew on each `iter()`: a `DataLoader`, a list of pairs, …"""

_USES = {"train": "train on", "val": "measure accuracy with", "calibration": "calibrate with"}


@dataclass(frozen=True)
class Data:
    """Iterables of `(inputs, targets)`.

    `inputs` is a tensor `(N, ...)`, a tuple or list of them (positional inputs) or a dict (keyword inputs). `targets`
    are class indices `(N,)`, or `(N, *space)` for outputs `(N, classes, *space)`. Each iterable is read once per epoch
    and must start anew each time; a generator is used up after its first epoch and gets a `DataError` on the second.

    Args:
        train: batches to learn from.
        val: batches that accuracy is measured with.
        calibration: batches without augmentation for statistics of activations.
    """

    train: Loader | None = None
    val: Loader | None = None
    calibration: Loader | None = None

    def __post_init__(self) -> None:
        for part in _USES:
            loader = getattr(self, part)
            if loader is not None and not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
                raise DataError(
                    f"Data({part}=...) is a {type(loader).__name__}, which cannot be iterated",
                    hint="Give an iterable of (inputs, targets) batches such as a torch DataLoader or a list.",
                )

    def need(self, part: str, *, who: str) -> Loader:
        """The loader `train`, `val` or `calibration`.

        Args:
            part: which one.
            who: who needs it, e.g. `pass 'distill'`; the error begins with it.

        Raises:
            DataError: it was not given.
        """
        loader: Loader | None = getattr(self, part)
        if loader is None:
            raise DataError(f"{who} needs data to {_USES[part]}, and none was given", hint=f"Pass Data({part}=...).")
        return loader
