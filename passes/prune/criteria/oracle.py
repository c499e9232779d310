"""The oracle of criteria: what the loss really becomes when one class of channels is removed.

One class at a time is masked to zero where it is read (`ir.verify.MaskedNetwork`), and the cross entropy is taken again
on the same images; what lies before the first layer that reads the class runs once for all (`analyse.branching`).

A criterion is good where it orders the classes as the oracle does: `rank_correlation` compares them by Spearman's ρ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from torch import Tensor

from ....ir.cut import Cut
from ....ir.graph import Graph
from ....ir.groups import Groups, find_groups
from ....ir.labels import IntArray
from ....ir.verify import evaluating
from ....runtime.data import Data, Loader
from ....runtime.forward import device_of
from ...analyse.branching import branches, flat_inputs
from ...analyse.progress import Step, counted
from ...analyse.streaming import batches_within, limited_batches
from ...base import Context
from ...fuse.fold_batchnorm import FoldBatchnorm
from . import Criterion, Source, score_classes
from .combining import FloatArray
from .gates import losses


@dataclass(frozen=True)
class RankCorrelation:
    """How well a criterion orders channels.

    Args:
        criterion: its name.
        overall: Spearman's ρ of score and loss change over all measured classes: what `scope: global` builds on.
        within: ρ within each group, mean over the groups weighted by their classes: what `scope: uniform` builds on.
        overall_abs: as `overall`, with the size of the change without its sign.
        within_abs: as `within`, likewise.
        classes: how many classes were measured.
    """

    criterion: str
    overall: float
    within: float
    overall_abs: float
    within_abs: float
    classes: int


def rank_correlation(
    graph: Graph,
    data: Data,
    criteria: Sequence[Criterion],
    *,
    images: int = 256,
    per_group: int | None = None,
    seed: int = 0,
    changes: FloatArray | None = None,
    console: Console | None = None,
) -> list[RankCorrelation]:
    """Spearman's ρ of every criterion's scores with the true loss changes, one row per criterion.

    Args:
        graph: a trained network.
        data: criteria draw on its calibration batches, the oracle on the first `images` of its validation batches.
        criteria: which ones.
        images: how many the oracle looks at.
        per_group: at most so many classes of each group, drawn at random; None takes all.
        seed: of the draw and of random scores.
        changes: what `removal_losses` gave for this graph, if it has run before.
        console: where progress is shown.
    """
    groups = graph.analyse(find_groups)
    if changes is None:
        loader = data.need("val", who="the oracle of criteria")
        changes = removal_losses(graph, loader, images=images, per_group=per_group, seed=seed, console=console)
    source = Source(data, seed=seed, console=console or Console(quiet=True))
    rows = []
    for criterion in criteria:
        scores = score_classes(graph, groups, criterion, source=source)
        signed, absolute = (_correlate(groups, scores, true) for true in (changes, np.abs(changes)))
        rows.append(RankCorrelation(criterion, *signed, *absolute, int(np.isfinite(changes).sum())))
    return rows


def removal_losses(
    graph: Graph,
    loader: Loader,
    *,
    images: int = 256,
    per_group: int | None = None,
    seed: int = 0,
    console: Console | None = None,
) -> FloatArray:
    """Change of the mean cross entropy (nats) when each class alone is removed, shape (classes,); NaN if not measured.

    Args:
        graph: the network, in eval mode meanwhile.
        loader: iterable of `(inputs, targets)`.
        images: how many of its first images to look at.
        per_group: at most so many classes of each group, drawn at random; None takes all.
        seed: of the draw.
        console: where progress is shown.

    Raises:
        DataError: an empty loader, or a bad batch.
    """
    groups = graph.analyse(find_groups)
    wanted = _drawn(groups, per_group, seed)
    quick, place = _without_norms(graph, groups, wanted)
    cuts = [Cut(quick, np.array([one])) for one in place[wanted]]
    changes, seen = np.zeros(len(cuts)), 0
    batches = batches_within(loader, images)
    steps = None if batches is None else batches * (len(cuts) + 1)
    with counted(console, "oracle", steps) as step, evaluating(quick.graph.module):
        for index, (inputs, targets) in enumerate(limited_batches(loader, "val", images)):
            where = f"batch {index} of val"
            changes += _changes(quick.graph, cuts, flat_inputs(graph, inputs, where), targets, where, step)
            seen += len(targets)
    result = np.full(groups.count, np.nan)
    result[wanted] = changes / seen
    return result


def _changes(graph: Graph, cuts: list[Cut], leaves: list[Any], targets: Tensor, where: str, step: Step) -> FloatArray:
    """Change of the loss with each cut, (cuts,), summed over the images of a batch."""
    changes, whole = np.zeros(len(cuts)), 0.0
    for number, output in branches(cuts, graph, leaves):
        loss = float(losses(output, targets.to(device_of(graph.module)), where).double().sum())
        if number < 0:
            whole = loss
        else:
            changes[number] = loss - whole
        step(len(targets))
    return changes


def _without_norms(graph: Graph, groups: Groups, wanted: IntArray) -> tuple[Groups, IntArray]:
    """Groups of the same network with its batch norms folded, which takes half the time, and each class's number there.

    Where a wanted class has no number of its own there, the network stays as it is.
    """
    twin = graph.copy()
    FoldBatchnorm().run(twin, Context(original=graph))
    folded = twin.analyse(find_groups)
    place = np.zeros(groups.count, dtype=np.int64)
    for slot, vector in groups.labels.slots.items():
        if slot in folded.labels.slots:
            place[groups.vector(vector)] = folded.vector(folded.labels.slots[slot])
    whole = not folded.locked[place[wanted]].any() and len(np.unique(place[wanted])) == len(wanted)
    return (folded, place) if whole else (groups, np.arange(groups.count))


def _drawn(groups: Groups, per_group: int | None, seed: int) -> IntArray:
    rng = np.random.default_rng(seed)
    picked = [
        group.classes
        if per_group is None or per_group >= group.channels
        else rng.choice(group.classes, per_group, False)
        for group in groups.groups
    ]
    return np.concatenate([np.zeros(0, np.int64), *picked])


def _correlate(groups: Groups, scores: FloatArray, true: FloatArray) -> tuple[float, float]:
    """Spearman's ρ over all measured classes, and its mean within groups; 0 where scores or changes are all one."""
    measured = [group.classes[np.isfinite(true[group.classes])] for group in groups.groups]
    everything = np.concatenate(measured)
    weights = np.array([len(own) if len(own) > 2 else 0 for own in measured])
    within = [
        _spearman(scores[own], true[own]) if weight else 0.0 for own, weight in zip(measured, weights, strict=True)
    ]
    return _spearman(scores[everything], true[everything]), float(np.average(within, weights=weights))


def _spearman(one: FloatArray, other: FloatArray) -> float:
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return 0.0
    from scipy.stats import spearmanr  # slow to load, and every pass is loaded with its neighbours

    return float(spearmanr(one, other).statistic)
