"""Many engines timed in turns: round by round, warm or cold, CPU time and wall time.

A round runs every engine once: warm, that is a call that is not counted and then enough calls to fill a few
milliseconds; cold, a few calls, each after a buffer several times the size of the last-level cache was read. What else
the machine does falls on all of them alike, so ratios are taken inside each round and their median is the result. The
order turns by one place from round to round.

CPU time is that of the whole process, in kernel and user mode: with one thread it is the latency without the time in
which other programs had the core, and work that an engine hands to a thread of its own is counted as well. An engine in
a process of its own clocks itself; it is measured warm alone, as nobody but itself could empty its core's caches.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from .engines import Engine

Cache = Literal["warm", "cold"]
CACHES: tuple[Cache, ...] = ("warm", "cold")
Clock = Literal["cpu", "wall"]
Advance = Callable[[], Any]

TURN_MS = 4.0
"""Least time of one engine in a warm round."""
COLD_CALLS = 3
LEAST_BUFFER = 128 << 20


@dataclass(frozen=True)
class Times:
    """Milliseconds of one call, by engine and round.

    Args:
        names: the engines.
        cpu: `(engines, rounds)` CPU time of the process.
        wall: `(engines, rounds)` wall time.
    """

    names: tuple[str, ...]
    cpu: NDArray[np.float64]
    wall: NDArray[np.float64]

    def ms(self, name: str, clock: Clock) -> float:
        """Median time of one engine."""
        return float(np.median(self._of(name, clock)))

    def speedup(self, name: str, over: str, clock: Clock) -> float:
        """Median over the rounds of the time of `over` divided by that of `name`: above 1, `name` is faster."""
        return float(np.median(self._of(over, clock) / self._of(name, clock)))

    def _of(self, name: str, clock: Clock) -> NDArray[np.float64]:
        times: NDArray[np.float64] = getattr(self, clock)[self.names.index(name)]
        return times


def take_turns(engines: Sequence[Engine], rounds: int, cache: Cache, advance: Advance = lambda: None) -> Times:
    """Time all engines in turns.

    Args:
        engines: each warmed up here before the first round.
        rounds: how many.
        cache: `warm` or `cold`.
        advance: called after each round (a progress bar).
    """
    calls = [_calls(engine) for engine in engines]
    flush = CacheFlush() if cache == "cold" else None
    cpu, wall = np.empty((len(engines), rounds)), np.empty((len(engines), rounds))
    for number in range(rounds):
        for place in range(len(engines)):
            index = (place + number) % len(engines)
            one = engines[index]
            timed = _cold(one, flush) if flush else _warm(one, calls[index])
            cpu[index, number], wall[index, number] = timed
        advance()
    return Times(tuple(engine.name for engine in engines), cpu, wall)


def _calls(engine: Engine) -> int:
    """Calls that fill a turn, by the fastest of a few."""
    fastest = min(_clocked(engine, 1)[1] for _ in range(4))
    return max(1, min(1000, math.ceil(TURN_MS / max(fastest, 1e-3))))


def _warm(engine: Engine, calls: int) -> tuple[float, float]:
    _clocked(engine, 1 + calls // 4)  # the engine before has pushed weights and tables out of the caches
    return _clocked(engine, calls)


def _cold(engine: Engine, flush: CacheFlush) -> tuple[float, float]:
    times = []
    for _ in range(COLD_CALLS):
        flush()
        times.append(_clocked(engine, 1))
    cpu, wall = np.median(np.array(times), axis=0)
    return float(cpu), float(wall)


def _clocked(engine: Engine, calls: int) -> tuple[float, float]:
    """Milliseconds of one call: (CPU, wall)."""
    if engine.clocked is not None:
        return engine.clocked(calls)
    run = engine.run
    with torch.inference_mode():  # entered once: with cold caches that alone takes 20 microseconds
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(calls):
            run()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return cpu * 1e3 / calls, wall * 1e3 / calls


class CacheFlush:
    """Reads a buffer of four times the last-level cache, on all threads of torch: nothing else stays in the caches."""

    def __init__(self) -> None:
        size = max(4 * last_level_cache(), LEAST_BUFFER)
        self._buffer = torch.ones(size // 4)

    def __call__(self) -> None:
        """Push everything else out."""
        assert float(self._buffer.sum()) > 0


def last_level_cache() -> int:
    """Bytes of the largest cache of the first core as Linux gives them; 0 where it does not."""
    sizes = [0]
    for place in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = place.read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}[text[-1]])
    return max(sizes)
