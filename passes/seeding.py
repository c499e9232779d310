"""Random numbers that do not depend on what ran before."""

from __future__ import annotations

import contextlib
import random
import zlib
from collections.abc import Iterator

import numpy as np
import torch


def pass_seed(seed: int, index: int, name: str) -> int:
    """The seed of one pass: independent of all other passes, so that a resumed run draws the same numbers."""
    return zlib.crc32(f"{seed}/{index}/{name}".encode())


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed python, numpy and torch inside the block; afterwards the caller's streams go on as if nothing happened."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
