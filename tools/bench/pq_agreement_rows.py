"""How far a network agrees with the original, and the rows that say so."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...passes.compile import Compiled
from ...runtime.data import Batch
from .common import Row


@dataclass(frozen=True)
class Agreement:
    """Of a network with the original: same first class; the original's first among the five; KL(original ‖ it)."""

    top_1: float
    top_5: float
    kl: float


@torch.no_grad()
def outputs(network: nn.Module, crops: Iterable[Batch]) -> Tensor:
    """Outputs on all crops, (n, classes); targets are not looked at."""
    return torch.cat([network(images) for images, _ in crops])


def agreement(wanted: Tensor, found: Tensor) -> Agreement:
    """How far outputs (n, classes) agree with those of the original."""
    first = wanted.argmax(1)
    own, original = functional.log_softmax(found.double(), 1), functional.log_softmax(wanted.double(), 1)
    kl = functional.kl_div(own, original, log_target=True, reduction="batchmean")
    among = (found.topk(5, 1).indices == first[:, None]).any(1)
    return Agreement(float((found.argmax(1) == first).double().mean()), float(among.double().mean()), float(kl))


def number_rows(case: str, found: Agreement) -> Iterator[Row]:
    """What is measured of one network."""
    yield Row(case, "top-1 agreement", 100 * found.top_1, "% of the crops")
    yield Row(case, "top-5 agreement", 100 * found.top_5, "% of the crops, the original's first class")
    yield Row(case, "KL", found.kl, "nats")


def size_rows(case: str, compiled: Compiled, whole: int, rest: int) -> Iterator[Row]:
    """How much smaller than the original it is, whose file has `whole` bytes, `rest` of which stay as they are."""
    size = rest + (compiled.report.rows[-1].size_bytes)
    taken = [row.metrics["weight_bytes"] for row in compiled.report.rows if "weight_bytes" in row.metrics]
    for sizes in taken:
        yield Row(
            case, "quantised weights", sizes["before"] / sizes["after"], f"times smaller, {sizes['after']:,} bytes"
        )
    yield Row(case, "whole file", whole / size, f"times smaller, {size:,} bytes")


def goal_rows(ratio: int, found: dict[str, Agreement], tuned: str) -> Iterator[Row]:
    """Whether error correction is better than k-means, by kind; at 16x, whether fine-tuning leaves a point lost."""
    plain, case, metric = found["k-means"].top_1, f"goal, {ratio}x", "top-1 agreement, "
    better = f"more than k-means, {100 * plain:.2f}"
    for kind in ("error correction", "accumulated error"):
        own = found[kind].top_1
        yield Row(case, metric + kind, 100 * own, "%", None, better, own > plain)
    if ratio == 16:
        own = found[tuned].top_1
        yield Row(case, metric + tuned, 100 * own, "%", None, "at least 99", own >= 0.99)
