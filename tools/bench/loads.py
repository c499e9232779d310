"""What is asked of a layer or network: images at once, and threads."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Load:
    """`batch` images on `threads` threads."""

    batch: int
    threads: int

    def __str__(self) -> str:
        return f"batch {self.batch}, {self.threads} thread{'s' if self.threads > 1 else ''}"


LOADS = tuple(Load(batch, threads) for batch in (1, 8) for threads in (1, 2))
