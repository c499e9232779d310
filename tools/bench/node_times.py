"""Where the time of an emitted network goes: every node of its graph timed, in order, several times."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor, fx, nn

from .common import Row
from .timing import Advance


def profile(case: str, module: nn.Module, images: Tensor, rounds: int, advance: Advance) -> list[Row]:
    """A row per node: median CPU time of one call and its share of them all.

    Args:
        case: the rows' case.
        module: an emitted network.
        images: one batch.
        rounds: runs; two before them are not counted.
        advance: called after each run.
    """
    assert isinstance(module, fx.GraphModule)
    watch = _Watch(module)
    with torch.inference_mode():
        for number in range(rounds + 2):
            if number == 2:
                watch.seconds.clear()
            watch.run(images)
            advance()
    medians = {name: statistics.median(times) * 1e3 for name, times in watch.seconds.items()}
    whole = sum(medians.values())
    return [Row(case, f"{name} | CPU ms", ms, f"ms, {ms / whole:.1%} of the whole") for name, ms in medians.items()]


class _Watch(fx.Interpreter):
    """Runs a graph node by node and keeps what each took."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seconds: dict[str, list[float]] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run and time one node; inputs and outputs of the graph take no time."""
        start = time.process_time()
        result = super().run_node(n)
        if n.op.startswith("call_"):
            self.seconds.setdefault(f"{n.name} ({n.target})", []).append(time.process_time() - start)
        return result
