"""Is product quantization really smaller and really faster? Layers and whole networks against int8 engines.

    python -m fxpress.tools.bench.pq [--quick] [--only GLOB ...] [--work DIR] [--json FILE]

Layers: FC 9216×4096, 4096×4096, 4096×1000 and a 3×3 convolution 256→384 on 13×13, batch 1 and 8, one and two threads,
warm and cold cache, against torch, ONNX Runtime and OpenVINO in fp32 and int8. All engines of a case are timed in turns
in one process (`pq_timing`), and the better int8 engine of each case is what fxpress is compared with.

Networks: torchvision's AlexNet and VGG-16 with every layer quantised, in the published settings and in faster ones
(`pq_networks`): bytes of the file, time of an image, peak memory of a fresh process that loads the file and runs one
image, and where the time goes.

Weights, codewords and indices are random, which changes neither time nor size; with one exception, the size behind
entropy coding, which is that of k-means codes of random weights. With `--json` the file's rows of other cases are kept,
so that a run can be made in parts by `--only`; `--work` keeps the files of all engines from part to part.
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

from rich.console import Console
from rich.progress import Progress

from ...runtime import kernels
from .common import Row, header, read_rows, screen, show, write_rows
from .pq_cases import cases
from .pq_layers import CACHES, LOADS, measure_layer
from .pq_networks import NETWORKS, STORAGES, measure_memory, measure_network, measure_nodes, measure_size
from .pq_rows import MEASURES, merged, table
from .pq_timing import Advance

ROUNDS, QUICK_ROUNDS = 21, 5
TABLES = {
    "Times; ratios: times faster": MEASURES,
    "Peak memory of a process": ("peak MB", "of it before loading MB"),
}


@dataclass(frozen=True)
class Job:
    """A part of the benchmark that `--only` can name."""

    name: str
    run: Callable[[Advance], list[Row]]
    turns: int


def main() -> None:
    """Run the parts asked for; print the tables; write the rows after each part."""
    options = _arguments()
    with tempfile.TemporaryDirectory(prefix="fxpress-") as scratch:
        folder = options.work or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
        every = list(jobs(folder, rounds, options.seed, quick=options.quick))
        chosen = [job for job in every if wanted(job, options.only)]
        if not chosen:
            names = "; ".join(job.name for job in every)
            raise SystemExit(f"--only {' '.join(options.only)}: no such part; there are {names}")
        rows = run_jobs(chosen, [header(options.seed), Row("header", "settings", settings(rounds))], options.json)
    show_tables(rows)


def run_jobs(chosen: Sequence[Job], rows: list[Row], file: Path | None) -> list[Row]:
    """Rows of these parts behind the given ones; the file's rows of other cases stay."""
    with _bar() as bar:
        for job in chosen:
            task = bar.add_task(job.name, total=job.turns)
            rows += job.run(partial(bar.advance, task))
            if file:
                write_rows(file, merged(read_rows(file) if file.exists() else [], rows))
    return rows


def jobs(folder: Path, rounds: int, seed: int, *, quick: bool) -> Iterator[Job]:
    """All parts in order; `quick`: a small FC, the convolution and AlexNet, batch 1, one thread.

    Args:
        folder: keeps exported and quantised files from part to part.
        rounds: of a warm measurement.
        seed: of weights, codes and images.
        quick: whether the short form is wanted.
    """
    turns = rounds + -(-rounds // 2)
    loads = LOADS[:1] if quick else LOADS
    for case in cases(quick=quick):
        for load in loads:
            yield Job(f"{case.name}, {load}", partial(measure_layer, case, load, folder, rounds), turns)
    for network in NETWORKS[:1] if quick else NETWORKS:
        yield Job(f"{network.name}, file", partial(measure_size, network, folder, seed), 3 * len(STORAGES))
        for load in loads:
            if load.batch == 1:
                run = partial(measure_network, network, load, folder, seed, rounds)
                yield Job(f"{network.name}, {load}", run, turns)
        yield Job(f"{network.name}, memory", partial(measure_memory, network, folder, seed), 8)
        if not quick:
            yield Job(f"{network.name}, nodes", partial(measure_nodes, network, folder, seed, rounds), 4 * (rounds + 2))


def wanted(job: Job, globs: Sequence[str]) -> bool:
    """Whether one of the globs matches the name or a part of it; all are wanted where there are none."""
    return not globs or any(fnmatch.fnmatchcase(job.name, f"*{glob}*") for glob in globs)


def settings(rounds: int) -> dict[str, Any]:
    """What the numbers depend on besides the machine."""
    prefixes = ("OMP_", "GOMP_", "KMP_", "MALLOC_")
    return {
        "kernels": kernels.isa() if kernels.available() else kernels.why_not(),
        "rounds": rounds,
        "caches": list(CACHES),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(prefixes)},
    }


def show_tables(rows: Sequence[Row]) -> None:
    """Times, bytes and memory, each as a table where there are any."""
    console = screen()
    for title, measures in TABLES.items():
        drawn = table(rows, title, measures)
        if drawn.row_count:
            console.print(drawn)
    rest = [row for row in rows if " | " not in row.metric and row.case != "header"]
    if rest:
        show(rest, "Files, and what emit chose", console)


@contextmanager
def _bar() -> Iterator[Progress]:
    with Progress(console=Console(stderr=True), transient=True) as bar:
        yield bar


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two layers and AlexNet, batch 1, one thread, few rounds")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="GLOB", help="parts by name: 'FC 9216', 'alexnet, file'"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keeps exported and quantised networks between runs")
    parser.add_argument("--rounds", type=int, metavar="N", help="of a warm measurement; a cold one takes half as many")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.rounds is not None and options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: at least 1")
    return options


if __name__ == "__main__":
    main()
