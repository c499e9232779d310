"""The example inputs as one batch."""

from __future__ import annotations

from ..ir.graph import Graph
from ..runtime.data import Inputs


def example_batch(graph: Graph) -> Inputs | None:
    """The example inputs in the form that timing takes; None where they mix positional and keyword inputs."""
    if graph.example_kwargs:
        return None if graph.example_args else graph.example_kwargs
    return graph.example_args
