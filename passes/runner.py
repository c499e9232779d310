"""Running one pass: seeded, checked, proven, and rolled back where it fails."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..ir.errors import FxpressError, GraphError, ModelError
from ..ir.graph import Graph
from ..ir.verify import distance, prove_equal, run
from ..runtime.training.seeds import seeded
from .base import EXACT, LOSSY, Context, Pass, PassResult
from .clone import clone_graph


def run_pass(one: Pass, graph: Graph, context: Context) -> tuple[PassResult, float]:
    """Run a pass on `graph` and prove what it claims; return its result and its seconds.

    Raises:
        FxpressError: of the kind that the pass or the proof raised, naming the pass; the graph is as it was before.
    """
    before = clone_graph(graph)
    kept = {analysis: value for analysis, (_, value) in graph._analyses.items() if analysis in one.preserves}
    with _rolled_back_on_error(one, graph, before):
        started = time.perf_counter()
        with seeded(context.seed):
            result = one.run(graph, context)
        seconds = time.perf_counter() - started
        graph.module.eval()
        graph.lint()
        check_finite(graph.module)
        if context.verify:
            _verify(one, before, graph, result)
    graph._analyses.update({analysis: (graph.epoch, value) for analysis, value in kept.items()})
    return result, seconds


def check_finite(module: nn.Module) -> None:
    """Refuse weights that are not numbers.

    Infinite buffers are allowed (attention masks), except in normalisation statistics.

    Raises:
        ModelError: names the first such tensor and how many of its values are NaN or infinite.
    """
    for name, parameter in module.named_parameters():
        _check_tensor(name, parameter, "parameter", allow_inf=False)
    for name, buffer in module.named_buffers():
        _check_tensor(name, buffer, "buffer", allow_inf="running_" not in name)


def _verify(one: Pass, before: Graph, graph: Graph, result: PassResult) -> None:
    if one.meaning() is EXACT and not result.proven:
        result.distance = prove_equal(before, graph)
    elif one.meaning() is LOSSY or result.proven:
        moved = distance(run(before), run(graph))
        result.metrics["output_distance"] = moved
        result.distance = moved if result.distance is None else result.distance


@contextmanager
def _rolled_back_on_error(one: Pass, graph: Graph, before: Graph) -> Iterator[None]:
    try:
        yield
    except FxpressError as error:
        graph.adopt(before)
        what = error.what if one.title() in error.what else f"{one.title()} failed: {error.what}"
        raise type(error)(what, hint=error.hint) from error
    except Exception as error:
        graph.adopt(before)
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise GraphError(f"{one.title()} failed: {text}", hint="The graph is as it was before the pass.") from error
    except BaseException:
        graph.adopt(before)
        raise


def _check_tensor(name: str, tensor: Tensor, kind: str, *, allow_inf: bool) -> None:
    if not tensor.is_floating_point():
        return
    nans = int(torch.isnan(tensor).sum())
    infinite = 0 if allow_inf else int(torch.isinf(tensor).sum())
    if nans or infinite:
        raise ModelError(
            f"{kind} {name!r} of shape {tuple(tensor.shape)} holds {nans} NaN and {infinite} infinite values",
            hint="Restore it from a sound checkpoint, or find where training diverged.",
        )
