"""Honest measurements: accuracy and loss on a loader, latency as a ratio in one run, bytes on disk."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..ir.errors import OptionError
from ..ir.graph import Graph
from .artifact import save
from .data import Inputs, images_in
from .evaluate import Evaluation, accuracy, evaluate
from .forward import call, modes_restored

__all__ = ["Evaluation", "Latency", "accuracy", "bytes_on_disk", "evaluate", "latency_ratio"]


Clock = Literal["cpu", "wall"]


@dataclass(frozen=True)
class Latency:
    """Time of a candidate against a reference, measured in turns in one run.

    Args:
        ratio: median over rounds of candidate time / reference time; below 1 the candidate is faster.
        ratio_low: first quartile of the rounds' ratios.
        ratio_high: third quartile.
        candidate_ms: median time of one call.
        candidate_spread_ms: distance of its first and third quartile.
        reference_ms: the reference's median.
        reference_spread_ms: its spread.
        batch: images per call.
        rounds: how many rounds.
        threads: threads that torch used.
        clock: `cpu` time of the process, or `wall` time.
    """

    ratio: float
    ratio_low: float
    ratio_high: float
    candidate_ms: float
    candidate_spread_ms: float
    reference_ms: float
    reference_spread_ms: float
    batch: int
    rounds: int
    threads: int
    clock: Clock

    def __str__(self) -> str:
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return (
            f"{self.ratio:.3f} [{self.ratio_low:.3f}, {self.ratio_high:.3f}] of the time: {self.candidate_ms:.2f} "
            f"against {self.reference_ms:.2f} ms, batch {self.batch}, {threads}, {self.clock} time"
        )


def latency_ratio(
    candidate: nn.Module | Graph,
    reference: nn.Module | Graph,
    inputs: Inputs,
    *,
    rounds: int = 21,
    threads: int = 1,
    clock: Clock | None = None,
    round_ms: float = 5.0,
) -> Latency:
    """Time two networks in turns, so that what else the machine does falls on both alike.

    A round calls each network for about `round_ms` and takes its mean; who goes first changes from round to round.
    The ratio is taken inside each round, and the median over the rounds is the result.

    Args:
        candidate: the network to judge, put in eval mode while it is timed.
        reference: the network to compare with, likewise.
        inputs: one batch.
        rounds: how many; a few before them warm up and are not counted.
        threads: threads that torch may use meanwhile.
        clock: `cpu` counts what the process computes, on all its threads: with one thread that is the latency
            without the time in which other programs had the core. `wall` is what more threads need. None picks `cpu`
            for one thread and `wall` for more.
        round_ms: least time to spend on each network in a round.

    Raises:
        OptionError: rounds or threads below 1.
    """
    if rounds < 1 or threads < 1:
        raise OptionError(f"latency needs at least 1 round and 1 thread, not {rounds} and {threads}")
    modules = [network.module if isinstance(network, Graph) else network for network in (candidate, reference)]
    clock = clock or ("cpu" if threads == 1 else "wall")
    with _threads(threads), modes_restored(*modules), torch.inference_mode():
        for module in modules:
            module.eval()
        calls = [max(1, int(np.ceil(round_ms / _warm_up(module, inputs, clock)))) for module in modules]
        times = np.empty((rounds, 2))
        for index in range(rounds):
            for which in (0, 1) if index % 2 else (1, 0):
                times[index, which] = _time_ms(modules[which], inputs, calls[which], clock)
    low, ratio, high = _quartiles(times[:, 0] / times[:, 1])
    one, other = _quartiles(times[:, 0]), _quartiles(times[:, 1])
    return Latency(
        ratio=ratio,
        ratio_low=low,
        ratio_high=high,
        candidate_ms=one[1],
        candidate_spread_ms=one[2] - one[0],
        reference_ms=other[1],
        reference_spread_ms=other[2] - other[0],
        batch=images_in(inputs),
        rounds=rounds,
        threads=threads,
        clock=clock,
    )


def _quartiles(values: NDArray[np.float64]) -> tuple[float, float, float]:
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
    return float(low), float(median), float(high)


def _warm_up(module: nn.Module, inputs: Inputs, clock: Clock) -> float:
    """Fastest of a few calls in ms."""
    return max(1e-3, min(_time_ms(module, inputs, 1, clock) for _ in range(4)))


def _time_ms(module: nn.Module, inputs: Inputs, calls: int, clock: Clock) -> float:
    now = time.process_time if clock == "cpu" else time.perf_counter
    start = now()
    for _ in range(calls):
        call(module, inputs)
    return (now() - start) * 1e3 / calls


def bytes_on_disk(graph: Graph) -> int:
    """Size of the `.fxp` file that holds this graph alone: it is written to a temporary folder and removed.

    Raises:
        ArtifactError: the graph holds something that has no form in the file, or there is no space.
    """
    with tempfile.TemporaryDirectory() as folder:
        return save(Path(folder) / "size.fxp", graph)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
