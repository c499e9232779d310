"""The oracle of criteria: what the loss really becomes when one class of channels is removed.

One class at a time is masked to zero where it is read (`ir.verify.MaskedNetwork`), and the cross entropy is taken again
on the same images. Up to the first layer that reads the class nothing changes, so the network runs once from front to
back, and at every layer the rest of it once for each class that is first read there.

A criterion is good where it orders the classes as the oracle does: `rank_correlation` compares them by Spearman's ρ.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from scipy.stats import spearmanr
from torch import Tensor, fx

from ....ir.cut import Cut
from ....ir.graph import Graph
from ....ir.groups import Groups, find_groups
from ....ir.labels import IntArray
from ....ir.verify import MaskedNetwork, evaluating
from ....runtime.data import Data, Loader
from ....runtime.forward import device_of
from ...analyse.progress import counted
from ...analyse.streaming import limited_batches
from ...base import Context
from ...fuse.fold_batchnorm import FoldBatchnorm
from . import Criterion, Source, score_classes
from .combining import FloatArray
from .gates import flat_inputs, losses


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
        figures = [rho for true in (changes, np.abs(changes)) for rho in _correlate(groups, scores, true)]
        rows.append(RankCorrelation(criterion, *figures, int(np.isfinite(changes).sum())))
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
    total, seen = np.full(groups.count, np.nan), 0
    total[wanted] = 0
    found = np.zeros(quick.count)
    with counted(console, "oracle", None) as step, evaluating(quick.graph.module):
        for index, (inputs, targets) in enumerate(limited_batches(loader, "val", images)):
            sweep = _Sweep(quick, place[wanted], targets, f"batch {index} of val")
            for one, change in sweep.run(flat_inputs(graph, inputs)):
                found[one] += change * len(targets)
                step(len(targets))
            seen += len(targets)
    total[wanted] = found[place[wanted]] / seen
    return total


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


class _Sweep:
    """One run over a batch from front to back, which leaves at every layer for each class first read there."""

    def __init__(self, groups: Groups, wanted: IntArray, targets: Tensor, where: str) -> None:
        self.groups, self.nodes = groups, groups.graph.nodes
        self.targets, self.where = targets.to(device_of(groups.graph.module)), where
        self.first = _first_readers(groups, self.nodes, wanted)

    def run(self, leaves: list[Any]) -> Iterator[tuple[int, float]]:
        """Each wanted class with the change of the mean loss."""
        module = self.groups.graph.module
        whole = self._loss(fx.Interpreter(module).run(*leaves, enable_io_processing=False))
        plain = fx.Interpreter(module)
        plain.args_iter = iter(leaves)
        for place, node in enumerate(self.nodes):
            for one in self.first.get(node, ()):
                masked = MaskedNetwork(Cut(self.groups, np.array([one])))
                masked.env = dict(plain.env)
                yield one, self._loss(_advance(masked, self.nodes[place:])) - whole
            _advance(plain, [node])

    def _loss(self, flat: Any) -> float:
        output = self.groups.graph.module.graph.process_outputs(flat)
        return float(losses(output, self.targets, self.where).double().mean())


def _advance(network: fx.Interpreter, nodes: list[fx.Node]) -> Any:
    """Run some nodes, dropping values that no later one reads; returns the last value."""
    value = None
    for node in nodes:
        value = network.env[node] = network.run_node(node)
        for done in network.user_to_last_uses.get(node, ()):
            network.env.pop(done, None)
    return value


def _first_readers(groups: Groups, nodes: list[fx.Node], wanted: IntArray) -> dict[fx.Node, list[int]]:
    """For each node the wanted classes of which it is the first to mix the channels, or to normalise anew."""
    missing, found = set(wanted.tolist()), {}
    for node in nodes:
        sources = (*groups.labels.readers.get(node, ()), *((node,) if node in groups.labels.refitted else ()))
        axes = [axis for axis in map(groups.channels, sources) if axis is not None]
        here = missing.intersection(*[np.concatenate([axis[1] for axis in axes]).tolist()] if axes else [[]])
        found[node] = sorted(here)
        missing -= here
    return found


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
    return float(spearmanr(one, other).statistic)
