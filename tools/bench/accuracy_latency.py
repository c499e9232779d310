"""Time of the finished rows' networks against the base's: a step of its own, for a moment when the machine is quiet."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from ...passes.compile import compile as compile_network
from ...passes.compile import load
from ...runtime.atomic import write_atomically
from ...runtime.measure import latency_ratio
from .accuracy_protocol import BASE

if TYPE_CHECKING:
    from .accuracy_run import Bench

Times = dict[str, dict[str, float]]
"""Name of a row → `latency_1`: share of the base's time, batch 1."""


def measure_latency(bench: Bench) -> None:
    """Time the network of each finished row, first seed, in turns with the base, both emitted, on one thread."""
    times: Times = {}
    base = compile_network(bench.network(BASE, 0), ["emit"], bench.image, verify=False).graph
    for case in bench.protocol.rows:
        seed = bench.protocol.seeds[0]
        if bench.facts(case, seed) is None:
            continue
        graph = compile_network(load(bench.result(case, seed)), ["emit"], bench.image, verify=False).graph
        times[case.name] = {"latency_1": latency_ratio(graph, base, bench.image).ratio}
        bench.console.print(f"{case.name}: {times[case.name]}")
    write_atomically(bench.folder / "latency.json", [json.dumps(times, indent=1).encode()])


def read_latency(bench: Bench) -> Times:
    """What `measure_latency` found; nothing where it has not run."""
    place = bench.folder / "latency.json"
    times: Times = json.loads(place.read_text()) if place.is_file() else {}
    return times
