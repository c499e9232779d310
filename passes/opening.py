"""From whatever the user has to a graph that computes the same."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from ..ir.errors import ModelError
from ..ir.graph import Graph
from ..ir.trace import trace
from ..ir.verify import distance, evaluating, run, tolerance
from ..runtime.layers import Int8Layer, PQLayer
from .clone import clone_graph
from .compiled import Compiled
from .runner import check_finite


def open_model(model: Any, example_inputs: Any, *, verify: bool = True) -> tuple[Graph, float | None]:
    """A graph of the model that shares no tensor with it, and the relative distance of their outputs.

    Args:
        model: an `nn.Module`, `fx.GraphModule`, `ExportedProgram`, `Graph` or `Compiled`.
        example_inputs: as in `compile`; None for a `Graph` or `Compiled`, which know their own.
        verify: whether to run both and compare; the distance is None otherwise, and for a `Graph` or `Compiled`.

    Raises:
        ModelError: weights that are not finite, inputs that the model does not take, outputs that differ.
        TraceError: the model cannot be traced.
    """
    if isinstance(model, Compiled):
        model = model.graph
    if isinstance(model, Graph):
        return _open_graph(model, example_inputs), None
    if example_inputs is None:
        raise ModelError("a model that is not traced yet needs example inputs", hint="Give a batch as it takes them.")
    _warn_of_quantised_layers(model)
    graph = trace(model, example_inputs)
    graph.module.eval()
    check_finite(graph.module)
    gap = _gap(model, graph) if verify and isinstance(model, nn.Module) else None
    return graph, gap


def _warn_of_quantised_layers(model: Any) -> None:
    """Tracing looks inside of layers, and finds the decoded weights there."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    layers = [layer for layer in modules if isinstance(layer, (PQLayer, Int8Layer))]
    if layers:
        kind = "product-quantized" if isinstance(layers[0], PQLayer) else "8-bit"
        text = (
            f"the model holds {len(layers)} {kind} layers, which tracing turns into layers with the decoded "
            "weights. To keep them, give the Compiled or the Graph itself and not its module."
        )
        warnings.warn(text, RuntimeWarning, stacklevel=4)


def _open_graph(graph: Graph, example_inputs: Any) -> Graph:
    twin = clone_graph(graph)
    twin.module.eval()
    check_finite(twin.module)
    if example_inputs is not None:
        positional, keywords = _as_call(example_inputs)
        try:
            with torch.no_grad():
                twin(*positional, **keywords)
        except (RuntimeError, TypeError, ValueError, IndexError, AssertionError) as error:
            shapes = _shapes((*positional, *keywords.values()))
            expected = _shapes((*graph.example_args, *graph.example_kwargs.values()))
            raise ModelError(
                f"the network does not take example inputs of shape {shapes}; it was traced with {expected}",
                hint=f"Give inputs of that shape. ({' '.join(str(error).split())})",
            ) from error
    return twin


def _gap(model: nn.Module, graph: Graph) -> float:
    """Relative distance of the traced graph's outputs to the model's."""
    with evaluating(model):
        expected = model(*graph.example_args, **graph.example_kwargs)
    gap = distance(expected, run(graph))
    limit = tolerance(graph)
    if not gap <= limit:
        raise ModelError(
            f"the traced graph's outputs differ from the model's by {gap:.1e} (relative; allowed {limit:.0e})",
            hint="Does the model draw random numbers in evaluation mode, or keep state between calls?",
        )
    return gap


def _as_call(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_inputs, dict):
        return (), example_inputs
    return (tuple(example_inputs), {}) if isinstance(example_inputs, (tuple, list)) else ((example_inputs,), {})


def _shapes(inputs: tuple[Any, ...]) -> str:
    return ", ".join(str(tuple(one.shape)) if isinstance(one, torch.Tensor) else repr(one) for one in inputs)
