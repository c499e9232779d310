"""The seed of each pass."""

from __future__ import annotations

import zlib


def pass_seed(seed: int, index: int, name: str) -> int:
    """A seed that does not depend on what the other passes drew, so that a resumed run draws the same numbers.

    Args:
        seed: of the whole compilation.
        index: number of the pass, from 1.
        name: name of the pass.
    """
    return zlib.crc32(f"{seed}/{index}/{name}".encode())
