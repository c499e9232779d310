"""Which networks can be cut to half of their MACs, how exactly, and what the peer makes of the same ones.

    python -m fxpress.tools.bench.coverage                          torchvision and one network per family of timm
    python -m fxpress.tools.bench.coverage 'timm:res*' --jobs 2     by name
    python -m fxpress.tools.bench.coverage --only torch-pruning     one side; the JSON file keeps the other
    python -m fxpress.tools.bench.coverage --quick                  five small networks

Every network runs in a process of its own on one thread; limits and seconds are CPU time. A file given by `--json` is
the memory: what it holds is not measured again unless `--again` or `--retry` is given, so that a run can be stopped
and continued.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from .common import header, screen, show
from .coverage_report import Records, load_records, markdown, put_record, summary, table
from .coverage_worker import SIDES, measure_task, warm_up
from .processes import run_forked
from .zoo import DEFAULT_PATTERNS, names

QUICK = ("torchvision:squeezenet1_1", "torchvision:shufflenet_v2_x0_5", "torchvision:mobilenet_v3_small",
         "timm:resnet18", "timm:convnext_atto")  # fmt: skip
PATIENCE = (
    10  # a process is killed when it takes this many times the limit by the wall clock, building and checks included
)


def main() -> None:
    """Parse the command line, measure what is missing, print table and goals."""
    options = _parser().parse_args()
    console = screen()
    wanted = names(tuple(options.patterns or (QUICK if options.quick else DEFAULT_PATTERNS)))
    sides = [options.only] if options.only else list(SIDES)
    records = load_records(options.json) if options.json else {}
    tasks = [(name, side) for name in wanted for side in sides if _missing(records.get(name, {}).get(side), options)]
    console.print(f"{len(wanted)} networks, {len(tasks)} runs to do")
    for (name, side), facts in run(tasks, options):
        records.setdefault(name, {})[side] = facts
        if options.json:
            put_record(options.json, header(options.seed), name, side, facts)
        console.print(f"{name} · {side}: {_outcome(facts)}", markup=False, soft_wrap=True)
    chosen: Records = {name: records[name] for name in wanted if name in records}
    console.print(table(chosen))
    if options.markdown:
        options.markdown.write_text(markdown(chosen, header(options.seed)))
    show(summary(chosen), "Goals", console)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="*", help="torchvision:GLOB or timm:GLOB (default: the whole sample)")
    parser.add_argument("--quick", action="store_true", help="five small networks")
    parser.add_argument("--json", type=Path, metavar="FILE", help="read and write the rows here")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables as a page")
    parser.add_argument("--only", choices=SIDES, help="measure one side")
    parser.add_argument("--again", action="store_true", help="measure what the file holds already")
    parser.add_argument("--report", action="store_true", help="measure nothing, tell what the file holds")
    parser.add_argument("--retry", action="store_true", help="measure again what was not cut")
    parser.add_argument("--size", type=int, help="side of the image in pixels (default: the network's own)")
    parser.add_argument("--double", action="store_true", help="oracle in double precision for every network")
    parser.add_argument("--jobs", type=int, default=1, help="networks at a time")
    parser.add_argument("--limit", type=int, default=120, help="seconds of CPU time for each side")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def run(
    tasks: Sequence[tuple[str, str]], options: argparse.Namespace
) -> Iterator[tuple[tuple[str, str], dict[str, Any]]]:
    """Measure (network, side) pairs, each in its own process on one thread."""
    torch.set_num_threads(1)
    for side in {side for _, side in tasks}:
        warm_up(side)
    settings = {"size": options.size, "seed": options.seed, "limit": options.limit, "double": options.double}
    work = functools.partial(measure_task, **settings)
    yield from run_forked(work, tasks, jobs=options.jobs, patience=options.limit * PATIENCE)


def _missing(facts: dict[str, Any] | None, options: argparse.Namespace) -> bool:
    if options.report:
        return False
    return facts is None or options.again or (options.retry and not facts.get("cut"))


def _outcome(facts: dict[str, Any]) -> str:
    if not facts.get("cut"):
        return f"not cut: {facts.get('reason')}"
    return f"cut to {facts['macs_left']:.1%} of the MACs, distance {facts['distance']:.0e}"


if __name__ == "__main__":
    main()
