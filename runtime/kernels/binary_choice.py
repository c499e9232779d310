"""Which kernel computes a binary convolution faster: measured, not guessed (`binary_choice.json`)."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("binary_choice.json")
USUAL_PIXELS = 196
# equal within the noise: bit planes are the smaller layout
LEAST_SPEEDUP = 1.05


def table_speedup(channels: int, outputs: int, kernel: int, stride: int, pixels: int | None = None) -> float:
    """How many times faster than counting bits the tables are on the measured layer that is nearest.

    Args:
        channels: of the input.
        outputs: channels of the output.
        kernel: its width; only 1 is told from wider ones.
        stride: along the width; only 1 is told from longer ones.
        pixels: of the output, where they are known.
    """
    measured = _measured()
    name = "1x1" if kernel == 1 else "3x3" if stride == 1 else "3x3, stride 2"
    rows = measured["speedup"][name][str(_nearest(measured["pixels"], pixels or USUAL_PIXELS))]
    row = rows[measured["channels"].index(_nearest(measured["channels"], channels))]
    speedup: float = row[measured["outputs"].index(_nearest(measured["outputs"], outputs))]
    return speedup


@cache
def _measured() -> dict[str, Any]:
    measured: dict[str, Any] = json.loads(FILE.read_text())
    return measured


def _nearest(values: Sequence[int], wanted: int) -> int:
    return min(values, key=lambda value: abs(math.log(value / wanted)))
