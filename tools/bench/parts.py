"""A benchmark in parts: chosen by `--only`, run one by one, each written as soon as it is measured."""

from __future__ import annotations

import argparse
import fnmatch
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from ...runtime import kernels
from .common import Row, read_rows, write_rows
from .timed_rows import merged
from .timing import CACHES, Advance

ROUNDS, QUICK_ROUNDS = 21, 5


@dataclass(frozen=True)
class Job:
    """A part of the benchmark that `--only` can name."""

    name: str
    run: Callable[[Advance], list[Row]]
    turns: int


def choose(jobs: Iterable[Job], globs: Sequence[str]) -> list[Job]:
    """The parts that are wanted, all where there are no globs; ends the program where none is."""
    every = list(jobs)
    chosen = [job for job in every if wanted(job, globs)]
    if not chosen:
        names = "; ".join(job.name for job in every)
        raise SystemExit(f"--only {' '.join(globs)}: no such part; there are {names}")
    return chosen


def wanted(job: Job, globs: Sequence[str]) -> bool:
    """Whether one of the globs matches the name or a part of it; all are wanted where there are none."""
    return not globs or any(fnmatch.fnmatchcase(job.name, f"*{glob}*") for glob in globs)


def run_jobs(chosen: Sequence[Job], rows: list[Row], file: Path | None) -> list[Row]:
    """Rows of these parts behind the given ones; the file's rows of other cases stay."""
    with Progress(console=Console(stderr=True), transient=True) as bar:
        for job in chosen:
            task = bar.add_task(job.name, total=job.turns)
            rows += job.run(partial(bar.advance, task))
            if file:
                write_rows(file, merged(read_rows(file) if file.exists() else [], rows))
    return rows


@contextmanager
def work_folder(asked: Path | None) -> Iterator[Path]:
    """The folder of `--work`, or one that is removed in the end."""
    with tempfile.TemporaryDirectory(prefix="fxpress-") as scratch:
        folder = asked or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        yield folder


def settings(rounds: int) -> dict[str, Any]:
    """What the numbers depend on besides the machine."""
    prefixes = ("OMP_", "GOMP_", "KMP_", "MALLOC_")
    return {
        "kernels": kernels.isa() if kernels.available() else kernels.why_not(),
        "rounds": rounds,
        "caches": list(CACHES),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(prefixes)},
    }


def parser(description: str | None, quick: str, example: str) -> argparse.ArgumentParser:
    """The options that such benchmarks have in common.

    Args:
        description: of the benchmark.
        quick: what `--quick` runs.
        example: names for `--only`.
    """
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help=quick)
    made.add_argument("--only", nargs="+", default=[], metavar="GLOB", help=f"parts by name: {example}")
    made.add_argument("--work", type=Path, metavar="DIR", help="keeps the files of all engines from run to run")
    made.add_argument("--json", type=Path, metavar="FILE")
    made.add_argument("--rounds", type=int, metavar="N", help="of a warm measurement; a cold one takes half as many")
    made.add_argument("--seed", type=int, default=0)
    return made


def parsed(arguments: argparse.ArgumentParser) -> argparse.Namespace:
    """The options given, with the number of rounds that they mean; ends the program on a wrong one."""
    options = arguments.parse_args()
    if options.rounds is not None and options.rounds < 1:
        arguments.error(f"--rounds {options.rounds}: at least 1")
    options.rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    return options
