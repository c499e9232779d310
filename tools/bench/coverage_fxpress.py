"""fxpress on one network: trace, label, cut to half of the MACs with the oracle on, save, reload.

Two checks stand beside the oracle of the pass, because a benchmark should not believe what it measures:

- `trace_distance`: the traced graph against the network itself;
- `original_distance`: the pruned graph against the network's *own code*, with every slice of a parameter that the cut
  removed set to zero. It has no part in common with the oracle but the list of what was cut. Networks in which a weight
  is computed from parameters (weight standardisation) are left out, for there zeros change the weights that stay.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...ir.cut import Cut
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
            graph, traced, cut = _cut(subject.model, subject.image, facts)
        _check(subject, graph, facts)
        if double or facts["distance"] > DOUBLE_FROM:
            exact: dict[str, Any] = {}
            _cut(copy.deepcopy(subject.model).double(), subject.image.double(), exact)
            facts["distance_double"] = exact["distance"]
        _check_original(subject, graph, traced, cut, facts)
    except (FxpressError, TimeoutError) as error:
        return facts | {"cut": False, "reason": f"{type(error).__name__}: {error}"}
    except Exception as error:  # a crash is a result as well, and it must not look like a refusal
        return facts | {"cut": False, "reason": f"crash, {type(error).__name__}: {str(error)[:300]}"}
    return facts


def _cut(model: nn.Module, image: Tensor, facts: dict[str, Any]) -> tuple[Graph, Graph, Cut]:
    """Trace, label and cut; writes what it finds into `facts` as it goes."""
    start = time.process_time()
    graph = trace(model, image)
    traced = time.process_time()
    facts |= {"exported": True, "trace_seconds": traced - start}
    groups = graph.analyse(find_groups)
    labelled = time.process_time()
    facts |= {"labelled": True, "label_seconds": labelled - traced, "graph_seconds": labelled - start}
    facts["cuttable"] = float(groups.cuttable_macs)
    facts["groups"] = len(groups.groups)
    pinned = sorted({pin.reason for pin in groups.labels.pins if "output of the network" not in pin.reason})
    facts["pinned"] = "; ".join(pinned) or None
    original = graph.copy()
    result = PRUNE.run(graph, Context(original=original))
    facts["cut_seconds"] = time.process_time() - labelled
    facts["distance"] = result.distance
    kept, _ = PRUNE._choose(original, groups, groups.groups, Context(original=original))
    return graph, original, Cut(groups, np.flatnonzero(~kept))


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


def _check_original(subject: Subject, graph: Graph, traced: Graph, cut: Cut, facts: dict[str, Any]) -> None:
    """Both distances to the network's own code; the second in double precision where single is not enough."""
    with torch.no_grad():
        facts["trace_distance"] = distance(subject.model(subject.image), traced.module.eval()(subject.image))
        if not _zero_what_was_cut(subject.model, cut):
            return
        gap = distance(subject.model(subject.image), graph.module(subject.image))
        if gap > DOUBLE_FROM:
            image = subject.image.double()
            gap = distance(copy.deepcopy(subject.model).double()(image), copy.deepcopy(graph.module).double()(image))
    facts["original_distance"] = gap


def _zero_what_was_cut(model: nn.Module, cut: Cut) -> bool:
    """Set the removed slices of the parameters to zero; False where a cut weight is computed from parameters."""
    groups, parameters = cut.groups, dict(model.named_parameters(remove_duplicate=False))
    slices = [(slot.name, slot.dim, cut.kept[groups.vector(v)]) for slot, v in groups.labels.slots.items()]
    for node, value in groups.labels.constants.items():
        axis = groups.axis(value) if isinstance(value, Tensor) else None
        if axis is None or cut.kept[axis[1]].all():
            continue
        if node.op != "get_attr":
            return False
        slices.append((str(node.target), axis[0], cut.kept[axis[1]]))
    if any(name.startswith("%") and not kept.all() for name, _, kept in slices):
        return False  # a slot of a computed weight
    for name, dim, kept in slices:
        if name in parameters:
            parameters[name].index_fill_(dim, torch.from_numpy(np.flatnonzero(~kept)), 0)
    return True


def _reloads(graph: Graph, image: Tensor, output: Any) -> bool:
    """Whether the network computes exactly the same after a round trip through a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "pruned.fxp")
        save(path, graph)
        twin = load(path).graph
        with torch.no_grad():
            return distance(output, twin.module.eval()(image)) == 0.0
