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


def size_rows(case: str, compiled: Compiled, whole: int) -> Iterator[Row]:
    """How much smaller than the original it is, whose file has `whole` bytes."""
    last = compiled.report.rows[-1]
    taken = [row.metrics["weight_bytes"] for row in compiled.report.rows if "weight_bytes" in row.metrics]
    for sizes in taken:
        yield Row(
            case, "quantised weights", sizes["before"] / sizes["after"], f"times smaller, {sizes['after']:,} bytes"
        )
    yield Row(case, "whole file", whole / last.size_bytes, f"times smaller, {last.size_bytes:,} bytes")


def goal_rows(ratio: int, found: dict[str, Agreement]) -> Iterator[Row]:
    """Whether error correction is better than k-means, by kind."""
    plain, layer, accumulated = (found[kind] for kind in ("k-means", "error correction", "accumulated error"))
    better = f"more than k-means, {100 * plain.top_1:.2f}"
    for kind, one in (("error correction", layer), ("accumulated error", accumulated)):
        yield Row(
            f"goal, {ratio}x", f"top-1 agreement, {kind}", 100 * one.top_1, "%", None, better, one.top_1 > plain.top_1
        )
