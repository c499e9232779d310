"""When self-selection does what: free, ramp, exchange, settled."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """The phases of a run, as shares of it.

    free: nothing is cut. ramp: the limits fall from the present cost to the budget, `B(s) = b + (1 − b)(1 − s)³` with
    s from 0 to 1 (Zhu and Gupta 2017, https://arxiv.org/abs/1710.01878). exchange: at the budget, channels may still
    change places. settled: what is on stays on and the rest of the run is fine-tuning.

    Args:
        epochs: length of the run.
        free: share of the run before the first cut, 0-1.
        ramp: share at which the budget is reached, above `free`.
        settle: share at the end in which nothing changes any more.
        interval: epochs between two evaluations of the threshold.
    """

    epochs: int
    free: float
    ramp: float
    settle: float
    interval: float

    def progress(self, epoch: float) -> float:
        """Share of the run, 0-1."""
        return epoch / self.epochs

    def tightness(self, progress: float) -> float:
        """How far the limits have fallen, 0-1."""
        if progress <= self.free:
            return 0.0
        rest = 1 - min(1.0, (progress - self.free) / (self.ramp - self.free))
        return float(1 - rest**3)

    def tick(self, epoch: float) -> int:
        """Number of evaluations that were due until now."""
        return int(epoch / self.interval + 1e-9)
