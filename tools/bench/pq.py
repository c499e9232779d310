"""Is product quantization really smaller and really faster? Layers and whole networks against int8 engines.

    python -m fxpress.tools.bench.pq [--quick] [--only GLOB ...] [--json FILE]

`layers`: FC 9216×4096, 4096×4096, 4096×1000 and a 3×3 convolution 256→384 on 13×13, batch 1 and 8, one and two threads, warm
and cold cache, against torch, ONNX Runtime and OpenVINO in fp32 and int8. All engines of a case are timed in turns in one
process (`pq_timing`), and the better int8 engine of each case is what fxpress is compared with.

`networks`: AlexNet and VGG-16 of torchvision with every layer quantised, in the published settings and in faster ones: bytes of
the file, time of an image, peak memory of a fresh process that loads the file and runs one image.

Weights, codewords and indices are random, which changes neither time nor size; with one exception, the size behind entropy
coding, which is that of k-means codes of random weights.
With `--json` the file's rows of other cases are kept, so that a run can be made in parts by `--only`.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from ...runtime import kernels
from .common import Row, header, read_rows, screen, write_rows
from .pq_cases import cases
from .pq_layers import CACHES, LOADS, Load, measure_layer
from .pq_rows import merged, table
from .pq_timing import Advance

ROUNDS, QUICK_ROUNDS = 21, 5


@dataclass(frozen=True)
class Job:
    """A part of the benchmark that `--only` can name."""

    name: str
    run: Callable[[Path, int, Advance], list[Row]]
    turns: Callable[[int], int]


def main() -> None:
    """Run the jobs asked for; print the table; write the rows after each job."""
    options = _arguments()
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    chosen = [job for job in jobs(quick=options.quick) if wanted(job.name, options.only)]
    if not chosen:
        names = ", ".join(repr(job.name) for job in jobs(quick=options.quick))
        raise SystemExit(f"--only {' '.join(options.only)}: no such part; there are {names}")
    rows = [header(options.seed), Row("header", "settings", settings(rounds))]
    with tempfile.TemporaryDirectory(prefix="fxpress-") as folder, _bar() as bar:
        for job in chosen:
            task = bar.add_task(job.name, total=job.turns(rounds))
            rows += job.run(Path(folder), rounds, partial(bar.advance, task))
            if options.json:
                write_rows(options.json, merged(read_rows(options.json) if options.json.exists() else [], rows))
    screen().print(table(rows, "Product quantization against other engines; ratios: times faster"))


def jobs(*, quick: bool) -> Iterator[Job]:
    """All parts in order; `quick`: a small FC and the convolution, batch 1, one thread."""
    for case in cases(quick=quick):
        for load in LOADS[:1] if quick else LOADS:
            run = partial(_layer, case, load)
            yield Job(f"{case.name}, {load}", run, lambda rounds: rounds + -(-rounds // 2))


def wanted(name: str, globs: Sequence[str]) -> bool:
    """Whether one of the globs matches the whole name or a part of it; all are wanted where there are none."""
    return not globs or any(fnmatch.fnmatchcase(name, f"*{glob}*") for glob in globs)


def settings(rounds: int) -> dict[str, Any]:
    """What the numbers depend on besides the machine."""
    names = ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_")
    return {
        "kernels": kernels.isa() if kernels.available() else kernels.why_not(),
        "rounds": rounds,
        "caches": list(CACHES),
        "environment": {name: os.environ[name] for name in names if name in os.environ},
    }


def _layer(case: Any, load: Load, folder: Path, rounds: int, advance: Advance) -> list[Row]:
    return measure_layer(case, load, folder, rounds, advance)


@contextmanager
def _bar() -> Iterator[Progress]:
    with Progress(console=Console(stderr=True), transient=True) as bar:
        yield bar


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two layers and AlexNet, batch 1, one thread, few rounds")
    parser.add_argument("--only", nargs="+", default=[], metavar="GLOB", help="parts by name, e.g. 'FC 9216' or 'AlexNet'")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--rounds", type=int, metavar="N", help="of a warm measurement; a cold one takes half as many")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.rounds is not None and options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: at least 1")
    return options


if __name__ == "__main__":
    main()
