"""fxpress on one network: trace, label, cut to half of the MACs with the oracle on, save, reload."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...ir.errors import FxpressError
from ...ir.graph import Graph
from ...ir.groups import find_groups
from ...ir.trace import trace
from ...passes.base import Context
from ...passes.prune.prune_channels import PruneChannels
from ...runtime.artifact import load, save
from .peer import count_macs
from .zoo import Subject, distance, tensors

BUDGET, TOLERANCE = 0.5, 0.01  # half of the MACs, within 2 % of that
DOUBLE_FROM = 1e-4
PRUNE = PruneChannels.model_validate({"budget": {"macs": BUDGET}})


def measure(subject: Subject, deadline: Callable[[], Any], *, double: bool) -> dict[str, Any]:
    """Facts by the names of the columns of `coverage.py`; a refusal stands under `reason`."""
    facts: dict[str, Any] = {"exported": False, "labelled": False, "cut": False}
    try:
        with deadline():
            graph = _cut(subject.model, subject.image, facts)
        _check(subject, graph, facts)
        if double or facts["distance"] > DOUBLE_FROM:
            exact: dict[str, Any] = {}
            _cut(subject.model.double(), subject.image.double(), exact)
            facts["distance_double"] = exact["distance"]
    except (FxpressError, TimeoutError) as error:
        return facts | {"cut": False, "reason": f"{type(error).__name__}: {error}"}
    except Exception as error:  # a crash is a result as well, and it must not look like a refusal
        return facts | {"cut": False, "reason": f"crash, {type(error).__name__}: {str(error)[:300]}"}
    return facts


def _cut(model: nn.Module, image: Tensor, facts: dict[str, Any]) -> Graph:
    """Trace, label and cut; writes what it finds into `facts` as it goes."""
    start = time.perf_counter()
    graph = trace(model, image)
    traced = time.perf_counter()
    facts |= {"exported": True, "trace_seconds": traced - start}
    groups = graph.analyse(find_groups)
    labelled = time.perf_counter()
    facts |= {"labelled": True, "label_seconds": labelled - traced, "graph_seconds": labelled - start}
    facts["cuttable"] = float(groups.cuttable_macs)
    facts["groups"] = len(groups.groups)
    pinned = sorted({pin.reason for pin in groups.labels.pins if "output of the network" not in pin.reason})
    facts["pinned"] = "; ".join(pinned) or None
    result = PRUNE.run(graph, Context(original=graph.copy()))
    facts["cut_seconds"] = time.perf_counter() - labelled
    facts["distance"] = result.distance
    return graph


def _check(subject: Subject, graph: Graph, facts: dict[str, Any]) -> None:
    """Output shape, MACs by torch's own counter, and the saved file."""
    with torch.no_grad():
        before, after = subject.model(subject.image), graph.module.eval()(subject.image)
    if [t.shape for t in tensors(before)] != [t.shape for t in tensors(after)]:
        raise FxpressError("the output has another shape after the cut")
    facts["macs_left"] = count_macs(graph.module, subject.image) / count_macs(subject.model, subject.image)
    facts["cut"] = abs(facts["macs_left"] - BUDGET) <= TOLERANCE
    if not facts["cut"]:
        facts["reason"] = f"{facts['macs_left']:.3f} of the MACs are left, not {BUDGET} ± {TOLERANCE}"
    facts["reloaded"] = _reloads(graph, subject.image, after)


def _reloads(graph: Graph, image: Tensor, output: Any) -> bool:
    """Whether the network computes exactly the same after a round trip through a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "pruned.fxp")
        save(path, graph)
        twin = load(path).graph
        with torch.no_grad():
            return distance(output, twin.module.eval()(image)) == 0.0
