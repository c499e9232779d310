"""Which networks can be cut to half of their MACs, how exactly, and what the peer makes of the same ones.

    python -m fxpress.tools.bench.coverage                          torchvision and one network per family of timm
    python -m fxpress.tools.bench.coverage 'timm:res*' --jobs 2     by name
    python -m fxpress.tools.bench.coverage --only torch-pruning     one side; the JSON file keeps the other
    python -m fxpress.tools.bench.coverage --quick                  five small networks

Every network runs in a process of its own on one thread; limits and seconds are CPU time. A file given by `--json` is
the memory: what it holds is not measured again unless `--again` is given, so that a run can be stopped and continued.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .common import header, screen, show
from .coverage_report import Records, load_records, put_record, summary, table
from .coverage_worker import MARK, SIDES
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
    tasks = [(name, side) for name in wanted for side in sides if options.again or side not in records.get(name, {})]
    console.print(f"{len(wanted)} networks, {len(tasks)} runs to do")
    with ThreadPoolExecutor(options.jobs) as pool:
        for (name, side), facts in zip(tasks, pool.map(lambda task: run(*task, options), tasks), strict=True):
            records.setdefault(name, {})[side] = facts
            if options.json:
                put_record(options.json, header(options.seed), name, side, facts)
            console.print(f"{name} · {side}: {_outcome(facts)}", markup=False, soft_wrap=True)
    chosen: Records = {name: records[name] for name in wanted if name in records}
    console.print(table(chosen))
    show(summary(chosen), "Goals", console)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="*", help="torchvision:GLOB or timm:GLOB (default: the whole sample)")
    parser.add_argument("--quick", action="store_true", help="five small networks")
    parser.add_argument("--json", type=Path, metavar="FILE", help="read and write the rows here")
    parser.add_argument("--only", choices=SIDES, help="measure one side")
    parser.add_argument("--again", action="store_true", help="measure what the file holds already")
    parser.add_argument("--size", type=int, help="side of the image in pixels (default: the network's own)")
    parser.add_argument("--double", action="store_true", help="oracle in double precision for every network")
    parser.add_argument("--jobs", type=int, default=1, help="networks at a time")
    parser.add_argument("--limit", type=int, default=120, help="seconds of CPU time for each side")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def run(name: str, side: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one side of one network in a new process with one thread."""
    command = [sys.executable, "-m", "fxpress.tools.bench.coverage_worker", side, name]
    command += ["--limit", str(options.limit), "--seed", str(options.seed)]
    command += ["--size", str(options.size)] if options.size else []
    command += ["--double"] if options.double else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=options.limit * PATIENCE, check=False
        )
    except subprocess.TimeoutExpired:
        return {"cut": False, "reason": f"stopped after {options.limit * PATIENCE} s by the wall clock"}
    return _facts(done)


def _facts(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    import json

    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if lines:
        facts: dict[str, Any] = json.loads(lines[-1].removeprefix(MARK))
        return facts
    last = (done.stderr.strip().splitlines() or [f"process ended with status {done.returncode}"])[-1]
    return {"cut": False, "reason": last[:300]}


def _outcome(facts: dict[str, Any]) -> str:
    if not facts.get("cut"):
        return f"not cut: {facts.get('reason')}"
    return f"cut to {facts['macs_left']:.1%} of the MACs, distance {facts['distance']:.0e}"


if __name__ == "__main__":
    main()
