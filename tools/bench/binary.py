"""How fast are one-bit weights and two-bit activations? Layers and whole networks against int8 engines.

    python -m fxpress.tools.bench.binary [--quick] [--only GLOB ...] [--larq PYTHON] [--work DIR] [--json FILE]

Layers: 3×3 convolutions of 64 channels on 56×56, 128 on 28×28, 256 on 14×14, 512 on 7×7, and a fully connected layer
4096×4096: batch 1 and 8, one and two threads, warm and cold cache, fp32 in and out,
quantising and packing of the activations included.
Against torch, ONNX Runtime and OpenVINO in fp32 and int8 on the same layer; all are timed in turns in one process
(`timing`). With `--larq`, the convolutions also against Larq Compute Engine, whose weights and activations have one bit
each; PYTHON is that of an environment of its own (`larq_engine` says how to make it). The last row is the geometric
mean of the convolutions' speed-up over the better int8 engine.

Networks: VGG-small, ResNet-18 and ResNet-56 (CIFAR), binarized and emitted, against the same float network in these
engines (`binary_networks`): time, distance, and bytes of the file.

With `--json` the file's rows of other cases are kept, so that a run can be made in parts by `--only`; `--work` keeps
the files of all engines from part to part.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from ...ir.errors import FxpressError
from .binary_layers import OURS, cases, measure_layer
from .binary_networks import NETWORKS, RECIPES, measure_memory, measure_network, measure_size
from .common import Row, header, read_rows, screen, write_rows
from .larq_engine import Larq, running
from .loads import LOADS
from .parts import Job, choose, parsed, parser, run_jobs, settings, work_folder
from .timed_rows import INT8, merged, print_tables

MEAN_GOAL = 4.0
MEAN_CASE = "conv 3x3, geometric mean, batch 1, 1 thread, warm"


def main() -> None:
    """Parse the command line; run the parts asked for, each written when it is done; print the tables."""
    quick = "two layers and VGG-small, batch 1, one thread, few rounds"
    arguments = parser(__doc__, quick, "'FC', 'conv*batch 8', 'resnet18, batch 1, 1'")
    arguments.add_argument("--larq", type=Path, metavar="PYTHON", help="of an environment with larq-compute-engine")
    options = parsed(arguments)
    try:
        run(options)
    except FxpressError as error:
        raise SystemExit(f"error: {error}") from None


def run(options: argparse.Namespace) -> None:
    """Measure, write and print.

    Raises:
        FxpressError: what `--larq` names cannot run.
    """
    with work_folder(options.work) as folder, running(options.larq) as larq:
        every = jobs(folder, options.rounds, options.seed, larq, quick=options.quick)
        chosen = choose(every, options.only)
        rows = [header(options.seed), Row("header", "settings", settings(options.rounds))]
        if larq is not None:
            rows.append(Row("header", "larq", larq.versions()))
        rows = run_jobs(chosen, rows, options.json)
    kept = read_rows(options.json) if options.json else rows
    if options.json:
        write_rows(options.json, merged(kept, mean_row(kept)))
    show_tables([*rows, *mean_row(kept)])


def jobs(folder: Path, rounds: int, seed: int, larq: Larq | None, *, quick: bool) -> Iterator[Job]:
    """All parts in order; `quick`: two layers and VGG-small, batch 1, one thread.

    Args:
        folder: keeps the files of all engines from part to part.
        rounds: of a warm measurement.
        seed: of the networks' weights and images.
        larq: runs the convolutions as well, if it is there.
        quick: whether the short form is wanted.
    """
    turns = rounds + -(-rounds // 2)
    loads = LOADS[:1] if quick else LOADS
    for case in cases(quick=quick):
        for load in loads:
            yield Job(f"{case.name}, {load}", partial(measure_layer, case, load, folder, rounds, larq), turns)
    for network in NETWORKS[:1] if quick else NETWORKS:
        yield Job(f"{network.name}, file", partial(measure_size, network, folder, seed), len(RECIPES))
        for load in loads:
            yield Job(f"{network.name}, {load}", partial(measure_network, network, load, folder, seed, rounds), rounds)
        if not quick:
            yield Job(f"{network.name}, memory", partial(measure_memory, network, folder, seed), 6)


def show_tables(rows: Sequence[Row]) -> None:
    """Times, memory and bytes, each as a table where there are any."""
    title = "Binary layers and networks against other engines; ratios: times faster"
    print_tables(rows, title, "Files; peer: the float network's", screen())


def mean_row(rows: Iterable[Row]) -> list[Row]:
    """The geometric mean over the four convolutions at batch 1, one thread, warm; nothing while one is missing."""
    metric = f"{OURS} | times {INT8}"
    names = {f"{case.name}, batch 1, 1 thread, warm" for case in cases() if case.name.startswith("conv")}
    found = [float(row.value) for row in rows if row.case in names and row.metric == metric and row.value is not None]
    if len(found) < len(names):
        return []
    mean = math.prod(found) ** (1 / len(found))
    return [Row(MEAN_CASE, metric, mean, "", None, f"≥ {MEAN_GOAL:g}", mean >= MEAN_GOAL)]


if __name__ == "__main__":
    main()
