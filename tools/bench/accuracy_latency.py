"""Time and file of the finished rows' networks, emitted, against the base's: a step of its own, for a quiet moment."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from ...passes.compile import compile as compile_network
from ...passes.compile import load
from ...passes.measuring import saved_bytes
from ...runtime.atomic import write_atomically
from ...runtime.measure import latency_ratio
from .accuracy_protocol import BASE

if TYPE_CHECKING:
    from .accuracy_run import Bench

Times = dict[str, dict[str, float]]
"""Name of a row → `latency_1`: share of the base's time, batch 1; `emitted_size`: bytes of its file, `emitted_bytes`:
the same as a share of the base's."""


def measure_latency(bench: Bench) -> None:
    """Time and weigh the emitted network of each finished row, first seed, in turns with the base's, on one thread."""
    times: Times = {}
    base = compile_network(bench.network(BASE, 0), ["emit"], bench.image, verify=False).graph
    for case in bench.protocol.rows:
        seed = bench.protocol.seeds[0]
        if bench.facts(case, seed) is None:
            continue
        graph = compile_network(load(bench.result(case, seed)), ["emit"], bench.image, verify=False).graph
        size, whole = saved_bytes(graph), saved_bytes(base)
        times[case.name] = {
            "latency_1": latency_ratio(graph, base, bench.image).ratio,
            "emitted_size": size,
            "emitted_bytes": size / whole,
        }
        bench.console.print(f"{case.name}: {times[case.name]}")
    write_atomically(bench.folder / "latency.json", [json.dumps(times, indent=1).encode()])


def read_latency(bench: Bench) -> Times:
    """What `measure_latency` found; nothing where it has not run."""
    place = bench.folder / "latency.json"
    times: Times = json.loads(place.read_text()) if place.is_file() else {}
    return times
