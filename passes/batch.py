"""The example inputs as one batch."""

from __future__ import annotations

from typing import Any

from ..ir.graph import Graph
from ..runtime.data import Inputs


def example_batch(graph: Graph, given: Any = None) -> Inputs | None:
    """Example inputs in the form that timing takes; None where they mix positional and keyword inputs.

    Args:
        graph: the network, whose own example inputs hold at least two images where the batch is dynamic.
        given: the inputs as the caller of `compile` gave them, perhaps one image; they go first.
    """
    if given is not None:
        return tuple(given) if isinstance(given, list) else given
    if graph.example_kwargs:
        return None if graph.example_args else graph.example_kwargs
    return graph.example_args
