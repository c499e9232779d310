"""Tables or bit counting: which kernel is faster for which binary convolution?

    python -m fxpress.tools.bench.binary_choice [--json FILE]

Levels in, levels out, batch 1, one thread, both kernels in turns on the same layer, least of the rounds (a busy machine
only adds). The tables on the screen hold how many times faster the 64-entry tables are. `--json` writes them in a form
that `runtime/kernels/binary_choice.json` gives to `prepare_binary_conv2d`: run it on the machine that matters.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from ...ir.errors import KernelError
from ...runtime import kernels
from ...runtime.kernels import binary_layout as layouts
from .common import cpu_name, default_command, screen

CHANNELS = (8, 16, 32, 64, 128, 256)
OUTPUTS = (4, 8, 16, 32, 64, 128)
SIDES = (1, 4, 7, 14, 28)
KERNELS = {"1x1": (1, 1), "3x3": (3, 1), "3x3, stride 2": (3, 2)}
ROUNDS, CALLS = 7, 4


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    if kernels.isas()[0] != "avx512":
        raise KernelError("Only AVX-512 has two kernels to choose from", hint=f"This machine has {kernels.isas()[0]}")
    torch.set_num_threads(1)
    speedup: dict[str, dict[str, list[list[float]]]] = {name: {} for name in KERNELS}
    for name, (kernel, stride) in KERNELS.items():
        for side in SIDES:
            found = [[_speedup(c, o, kernel, stride, side) for o in OUTPUTS] for c in CHANNELS]
            speedup[name][str(side * side)] = found
            screen().print(_table(f"{name}, {side}x{side} pixels: times faster by table", found))
    if options.json:
        options.json.write_text(_text(speedup))


def _speedup(channels: int, outputs: int, kernel: int, stride: int, side: int) -> float:
    plus = torch.rand(outputs, channels, kernel, kernel) < 0.5
    size = side if stride == 1 else 2 * side
    x = torch.randint(0, 4, (1, channels, size, size), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    six, planes = (
        _run(layouts.pack(layout, plus), x, outputs, kernel, stride) for layout in (layouts.SIX, layouts.PLANES)
    )
    rounds = [(_seconds(planes), _seconds(six)) for _ in range(ROUNDS)]
    return round(min(a for a, _ in rounds) / min(b for _, b in rounds), 2)


def _run(layout: Tensor, x: Tensor, outputs: int, kernel: int, stride: int) -> Callable[[], Any]:
    cuts = torch.zeros(3, outputs, dtype=torch.int32)
    rest = (outputs, [kernel] * 2, [stride] * 2, [kernel // 2] * 2, [1, 1], 1)
    return lambda: torch.ops.fxpress.binary_conv2d_levels(x, layout, cuts, None, *rest)


def _seconds(run: Callable[[], Any]) -> float:
    run()
    begin = time.thread_time()
    for _ in range(CALLS):
        run()
    return (time.thread_time() - begin) / CALLS


def _table(title: str, found: list[list[float]]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in ("channels \\ outputs", *map(str, OUTPUTS)):
        table.add_column(column, justify="right")
    for channels, row in zip(CHANNELS, found, strict=True):
        table.add_row(str(channels), *(f"{value:.2f}" for value in row))
    return table


def _text(speedup: dict[str, dict[str, list[list[float]]]]) -> str:
    """JSON with a line per measured row of channels."""
    head = {"machine": cpu_name(), "command": default_command()}
    axes = {"channels": CHANNELS, "outputs": OUTPUTS, "pixels": [side * side for side in SIDES]}
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in (head | axes).items()]
    blocks = []
    for name, by_pixels in speedup.items():
        parts = [
            f"   {json.dumps(pixels)}: [\n" + ",\n".join(f"    {json.dumps(row)}" for row in rows) + "\n   ]"
            for pixels, rows in by_pixels.items()
        ]
        blocks.append(f"  {json.dumps(name)}: {{\n" + ",\n".join(parts) + "\n  }")
    return "{\n" + ",\n".join([*lines, ' "speedup": {\n' + ",\n".join(blocks) + "\n }"]) + "\n}\n"


if __name__ == "__main__":
    main()
