"""The numbers of a report row."""

from __future__ import annotations

import platform
import tempfile
from pathlib import Path
from typing import Any

import torch

from ..ir.cost import measure_cost
from ..ir.graph import Graph
from ..runtime import artifact
from ..runtime.data import images_in
from ..runtime.measure import accuracy, latency_ratio
from .base import Context, Pass, PassResult
from .batch import example_batch
from .report import Row

ROUGH, CAREFUL = 3, 21
"""Rounds of a latency measurement: behind each pass, and for the final network."""


class Measurements:
    """Measures a network on its way against the original.

    Args:
        context: with the original, with which latency is measured in turns; accuracy is measured where there are
            validation data.
    """

    def __init__(self, context: Context) -> None:
        self.original = context.original
        self.validation = context.data.val
        self.inputs = example_batch(context.original, context.inputs)

    def first_row(self, distance: float | None, seconds: float) -> Row:
        """The network as traced."""
        dropped = ", ".join(self.original.dropped)
        notes = [f"not part of the network in evaluation mode: {dropped}"] if dropped else []
        row = Row("trace", "exact", distance=distance, seconds=seconds, notes=notes)
        self._fill(row, self.original)
        return row

    def row(self, one: Pass, graph: Graph, result: PassResult, seconds: float) -> Row:
        """The network behind one pass."""
        row = Row(
            one.name,
            one.meaning().value,
            one.settings(),
            distance=result.distance,
            seconds=seconds,
            notes=list(result.notes),
            skips=list(result.skips),
            metrics=dict(result.metrics),
        )
        self._fill(row, graph)
        return row

    def environment(self, seed: int) -> dict[str, Any]:
        """What the numbers were measured on."""
        images = "not measured" if self.inputs is None else images_in(self.inputs)
        return {
            "torch": torch.__version__,
            "machine": platform.machine(),
            "latency": f"batch {images}, 1 thread",
            "seed": seed,
        }

    def time(self, row: Row, first: Row, graph: Graph, *, careful: bool) -> None:
        """Time the network of a row in turns with the original, whose row `first` gets its part of the result."""
        if self.inputs is None:
            return
        first.latency_ratio = 1.0
        latency = latency_ratio(graph, self.original, self.inputs, rounds=CAREFUL if careful else ROUGH)
        first.latency_ms = latency.reference_ms
        if row is not first:
            row.latency_ms, row.latency_ratio = latency.candidate_ms, latency.ratio

    def _fill(self, row: Row, graph: Graph) -> None:
        cost = measure_cost(graph)
        row.parameters, row.macs, row.size_bytes = cost.params, round(cost.macs), saved_bytes(graph)
        if self.validation is not None:
            row.accuracy = accuracy(graph, self.validation)


def saved_bytes(graph: Graph) -> int:
    """Bytes of the network as an .fxp file, example inputs included: one is written and removed."""
    with tempfile.TemporaryDirectory(prefix="fxpress-") as folder:
        return artifact.save(Path(folder) / "size.fxp", graph)
