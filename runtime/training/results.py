"""What a training run gave: numbers per epoch and of the whole."""

from __future__ import annotations

from dataclasses import dataclass

from .teacher_cache import CacheReport


@dataclass(frozen=True)
class EpochResult:
    """One epoch.

    Args:
        loss: mean objective over its steps.
        accuracy: top-1 on its training batches as they were learned from, 0-1.
        val_loss: cross entropy on `data.val` after it, None where that is not looked at.
        val_accuracy: top-1 there, 0-1.
    """

    loss: float
    accuracy: float
    val_loss: float | None = None
    val_accuracy: float | None = None


@dataclass(frozen=True)
class TrainResult:
    """A finished run.

    Args:
        epochs: what each epoch gave.
        kept: index of the epoch whose state the student has now.
        steps: optimiser steps in total.
        images_per_second: evaluation included, all processes together; of this call.
        seconds: wall time, that of an interrupted run before it included.
        teacher_cache: what `cache_teacher` did in this process, None without it.
    """

    epochs: list[EpochResult]
    kept: int
    steps: int
    images_per_second: float
    seconds: float
    teacher_cache: CacheReport | None = None
