"""Which of several processes this is, under `torchrun` or alone; without importing torch."""

from __future__ import annotations

import os


def is_main() -> bool:
    """Whether this process is the one that writes files and speaks: the first, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0
