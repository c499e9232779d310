"""Randomness that is fixed inside a block and untouched outside, and seeds that name their place in a run."""

from __future__ import annotations

import contextlib
import random
import zlib
from collections.abc import Iterator

import numpy as np
import torch


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed python, numpy and torch; their states come back on leaving."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        seed_all(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def seed_all(seed: int) -> None:
    """Seed python, numpy and torch for good."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_of(*place: int | str) -> int:
    """A seed of 32 bits for a place in a run, e.g. `seed_of(seed, "batch", epoch, index)`.

    What is drawn there then depends on the place alone: whoever comes from elsewhere (a resumed run) draws the same.
    """
    return zlib.crc32("/".join(map(str, place)).encode())
