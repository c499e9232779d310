"""fxpress on one network: trace, label, cut to half of the MACs with the oracle on, save, reload.

Two checks stand beside the oracle of the pass, because a benchmark should not believe what it measures:

- `trace_distance`: the traced graph against the network itself;
- `original_distance`: the pruned graph against the network's *own code*, with every slice of a parameter that the cut
  removed set to zero, and layer norms over what is left. It has no part in common with the oracle but the list of what
  was cut. Networks in which a weight is computed from parameters (weight standardisation), or in which another function
  of channel statistics was refitted, are left out: there zeros change what stays.

The cut is tried as `prune-channels` does it by default, with the channels that a layer norm normalises left whole, and,
where the budget cannot be met so, with `norms: refit`. `cuttable` is the share of MACs that the default can reach,
`cuttable_refit` the share that `norms: refit` can.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ...ir.cut import Cut
from ...ir.errors import BudgetError, FxpressError
from ...ir.graph import Graph
from ...ir.groups import Groups, find_groups
from ...ir.trace import trace
from ...passes.base import Context
from ...passes.prune.prune_channels import PruneChannels
from ...runtime.artifact import load, save
from .peer import count_macs
from .zoo import Subject, distance, tensors

BUDGET, TOLERANCE = 0.5, 0.01  # half of the MACs, within 2 % of that
DOUBLE_FROM = 1e-4
NORMS = ("keep", "refit")


def measure(subject: Subject, deadline: Callable[[], Any], *, double: bool) -> dict[str, Any]:
    """Facts by the names of the columns of `coverage.py`; a refusal stands under `reason`."""
    facts: dict[str, Any] = {"exported": False, "labelled": False, "cut": False}
    try:
        with deadline():
            pruned = _cut(subject.model, subject.image, facts)
        _check(subject, pruned.graph, facts)
        if double or facts["distance"] > DOUBLE_FROM:
            exact: dict[str, Any] = {}
            _cut(copy.deepcopy(subject.model).double(), subject.image.double(), exact)
            facts["distance_double"] = exact["distance"]
        _check_original(subject, pruned, facts)
    except (FxpressError, TimeoutError) as error:
        return facts | {"cut": False, "reason": f"{type(error).__name__}: {error}"}
    except Exception as error:  # a crash is a result as well, and it must not look like a refusal
        return facts | {"cut": False, "reason": f"crash, {type(error).__name__}: {str(error)[:300]}"}
    return facts


@dataclass
class Pruned:
    """The pruned graph, the traced one, and the cut that led from one to the other."""

    graph: Graph
    traced: Graph
    cut: Cut


def _cut(model: nn.Module, image: Tensor, facts: dict[str, Any]) -> Pruned:
    """Trace, label and cut; writes what it finds into `facts` as it goes."""
    start = time.process_time()
    traced = trace(model, image)
    after_trace = time.process_time()
    facts |= {"exported": True, "trace_seconds": after_trace - start}
    groups = traced.analyse(find_groups)
    labelled = time.process_time()
    facts |= {"labelled": True, "label_seconds": labelled - after_trace, "graph_seconds": labelled - start}
    facts |= {"cuttable": float(groups.cuttable_macs), "groups": len(groups.groups), "pinned": _pinned(groups)}
    facts["cuttable_refit"] = float(find_groups(traced, norms="refit").cuttable_macs)
    begin = time.process_time()
    for norms in NORMS:
        try:
            pruned = _prune(traced, norms, facts)
        except BudgetError:
            if norms == NORMS[-1]:
                raise
            continue
        break
    facts["cut_seconds"] = time.process_time() - begin
    return pruned


def _pinned(groups: Groups) -> str | None:
    reasons = {pin.reason for pin in groups.labels.pins if "output of the network" not in pin.reason}
    return "; ".join(sorted(reasons)) or None


def _prune(traced: Graph, norms: str, facts: dict[str, Any]) -> Pruned:
    prune = PruneChannels.model_validate({"budget": {"macs": BUDGET}, "norms": norms})
    context = Context(original=traced)
    graph = traced.copy()
    result = prune.run(graph, context)
    facts |= {"distance": result.distance, "norms": norms}
    groups = find_groups(traced, norms=norms)
    kept = prune._choose(traced, groups, groups.groups, context).kept
    return Pruned(graph, traced, Cut(groups, np.flatnonzero(~kept)))


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


def _check_original(subject: Subject, pruned: Pruned, facts: dict[str, Any]) -> None:
    """Both distances to the network's own code; the second in double precision where single is not enough."""
    model, graph = subject.model, pruned.graph.module
    with torch.no_grad():
        facts["trace_distance"] = distance(model(subject.image), pruned.traced.module.eval()(subject.image))
        if not (_zero_what_was_cut(model, pruned.cut) and _refit_norms(model, pruned)):
            return
        gap = distance(model(subject.image), graph(subject.image))
        if gap > DOUBLE_FROM:
            image = subject.image.double()
            gap = distance(model.double()(image), copy.deepcopy(graph).double()(image))
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


def _refit_norms(model: nn.Module, pruned: Pruned) -> bool:
    """Let layer norms of the model run over the kept channels alone; False where something else was refitted."""
    cut, layers = pruned.cut, dict(model.named_modules())
    for node, value in cut.labels.refitted.items():
        axis = cut.groups.axis(value)
        if axis is None or cut.kept[axis[1]].all():
            continue
        layer = layers.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(layer, nn.LayerNorm):
            return False
        layer.register_forward_hook(_norm_of(torch.from_numpy(np.flatnonzero(cut.kept[axis[1]]))))
    return True


def _norm_of(kept: Tensor) -> Callable[..., Any]:
    """Forward hook: a layer norm over the kept channels, zeros elsewhere."""

    def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        assert isinstance(layer, nn.LayerNorm)
        dim = 1 if type(layer).__name__.endswith("2d") else -1
        x = inputs[0].movedim(dim, -1)
        weight, bias = (None if p is None else p[kept] for p in (layer.weight, layer.bias))
        fresh = functional.layer_norm(x[..., kept], (len(kept),), weight, bias, layer.eps)
        scattered = torch.zeros_like(output.movedim(dim, -1))
        scattered[..., kept] = fresh
        return scattered.movedim(-1, dim)

    return hook


def _reloads(graph: Graph, image: Tensor, output: Any) -> bool:
    """Whether the network computes exactly the same after a round trip through a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "pruned.fxp")
        save(path, graph)
        twin = load(path).graph
        with torch.no_grad():
            return distance(output, twin.module.eval()(image)) == 0.0
