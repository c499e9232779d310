"""What compression costs in accuracy: one table per protocol.

    python -m fxpress.tools.bench.accuracy resnet56-pruning --images DIR --weights DIR --work DIR
    python -m fxpress.tools.bench.accuracy my-protocol.yaml --only 'magnitude*' --work DIR
    python -m fxpress.tools.bench.accuracy resnet56-pruning --work DIR --report --results tools/bench/results

A protocol (`protocols/*.yaml`) names images, networks and rows; every row is a pipeline. `--work` keeps trained
networks, finished rows and the state of the row that runs, so that a run can be stopped at any moment and continued
with the same command. `--images` are image folders `train/CLASS/*.jpg` and `test/CLASS/*.jpg` (for Fashion-MNIST the
folder of its IDX files, if it is not where Debian puts it), `--weights` holds the state dicts that a protocol names.
`--quick` shrinks every table to a few images, to see whether it runs.
"""

from __future__ import annotations

import argparse
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from ...ir.errors import FxpressError
from .accuracy_latency import measure_latency
from .accuracy_protocol import PROTOCOLS, Protocol, load_protocol
from .accuracy_report import correlation_page, correlation_rows, page, rows_of
from .accuracy_run import Bench, records_of
from .common import Row, header, screen, show, write_rows


def main() -> None:
    """Parse the command line, measure what is missing, print the table."""
    options = _parser().parse_args()
    torch.set_num_threads(options.threads)
    try:
        run(options)
    except FxpressError as error:
        raise SystemExit(f"error: {error}") from None


def run(options: argparse.Namespace) -> None:
    """Measure the rows that are missing, and write the results."""
    path = Path(options.protocol)
    path = path if path.suffix in (".yaml", ".yml") else PROTOCOLS / f"{path}.yaml"
    protocol = load_protocol(path)
    if options.quick:
        protocol = shrunk(protocol)
    console = screen()
    bench = Bench(protocol, path.stem, options.work, options.images, options.weights, console)
    head = header(protocol.seeds[0], f"python -m fxpress.tools.bench.accuracy {options.protocol}")
    rows, text = _correlation(bench, head) if protocol.correlation else _table(bench, head, options)
    show(rows, protocol.heading, console)
    if options.results:
        options.results.mkdir(parents=True, exist_ok=True)
        write_rows(options.results / f"{path.stem}.json", [head, *rows])
        (options.results / f"{path.stem}.md").write_text(text, encoding="utf-8")


def _table(bench: Bench, head: Row, options: argparse.Namespace) -> tuple[list[Row], str]:
    if options.latency:
        measure_latency(bench)
    elif not options.report:
        bench.measure([row for row in bench.protocol.rows if fnmatchcase(row.name, options.only)])
    records = records_of(bench)
    rows = rows_of(bench.protocol, records)
    return rows, page(bench.protocol, records, head, [row for row in rows if row.case == "goal"])


def _correlation(bench: Bench, head: Row) -> tuple[list[Row], str]:
    found = bench.correlate()
    return correlation_rows(found), correlation_page(bench.protocol, found, head)


def shrunk(protocol: Protocol) -> Protocol:
    """The same table on so few images that only its form can be judged."""
    few = {"train": 256, "test": 200, "calibration": 64, "batch": 32}
    images = protocol.images.model_copy(update=few)
    return protocol.model_copy(update={"images": images, "seeds": protocol.seeds[:1]})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("protocol", help="a name in protocols/, or a .yaml file")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="keeps what is finished")
    parser.add_argument("--images", type=Path, metavar="DIR", help="image folders, or IDX files")
    parser.add_argument("--weights", type=Path, metavar="DIR", help="state dicts")
    parser.add_argument("--results", type=Path, metavar="DIR", help="write NAME.json and NAME.md here")
    parser.add_argument("--only", default="*", metavar="GLOB", help="rows to measure")
    parser.add_argument("--report", action="store_true", help="measure nothing, tell what is there")
    parser.add_argument("--latency", action="store_true", help="measure nothing but the time of what is finished")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a few images, one seed")
    return parser


if __name__ == "__main__":
    main()
