"""Memory in large pages: the same bytes, aligned, and given back."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from fxpress.runtime.kernels import pages

HALF = pages.LARGE // 2


@pytest.mark.parametrize("count", [0, 1, HALF, HALF + 1, 3 * HALF, 3 * HALF + 1])
def test_the_same_bytes(count: int) -> None:
    whole = torch.randint(0, 256, (count,), dtype=torch.uint8)
    made = pages.cat([whole[: count // 3], whole[count // 3 :]])
    assert torch.equal(made, whole)
    if count > HALF and sys.platform == "linux":
        assert made.data_ptr() % pages.LARGE == 0


def is_mapped(address: int) -> bool:
    """Whether the process has memory there."""
    ranges = (line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
    return any(int(begin, 16) <= address < int(end, 16) for begin, end in ranges)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_goes_with_the_tensor() -> None:
    made = pages.cat([torch.ones(64 << 20, dtype=torch.uint8)])
    view, middle = made[64:], made.data_ptr() + (32 << 20)
    del made
    assert int(view.sum(dtype=torch.int64)) == (64 << 20) - 64
    assert is_mapped(middle)
    del view
    assert not is_mapped(middle)
