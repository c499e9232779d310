"""Criteria: what says how much a channel matters.

A criterion is a pure function from statistics to a score per channel, higher means keep. `CRITERIA` says, as data, what
it reads, how the scores of different layers compare, and how the several layers that hold a channel combine.

How to add one: a small file with the function (formula and source in the docstring), a row in `CRITERIA` and its name
in `Criterion`. New evidence is a function that gathers it for all layers at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from ....ir.errors import OptionError
from ....ir.graph import Graph
from ....ir.groups import Group, Groups
from .activations import apoz, entropy, variance
from .chance import random
from .combining import Combine, FloatArray, Scale, combine, fill_unseen
from .geometric_median import fpgm
from .gradients import batch_slopes, fisher, slopes
from .magnitude import l1, l2, std
from .members import Member, Source, describes, draws, filters, moments, norms
from .observing import loader_of, pooled, responses, zero_shares
from .second_order import obd, obs
from .slimming import slimming
from .statistics import statistics
from .taylor import taylor, taylor_abs

__all__ = ["CRITERIA", "Combine", "Criterion", "Source", "check_criterion", "describes", "loader_of", "score_classes"]

Criterion = Literal[
    "l1", "l2", "std", "statistics", "slimming", "fpgm", "apoz", "variance", "entropy", "taylor", "taylor-abs", "obd",
    "obs", "random",
]  # fmt: skip
Gather = Callable[[Graph, Groups, Source], list[Member]]


@dataclass(frozen=True)
class Recipe:
    """What a criterion is made of.

    Args:
        score: from the evidence of one member, tensors (n, ...), to a score per channel (n,).
        evidence: gathers what it reads, for all members at once.
        scale: how scores of different layers are made comparable.
        combine: what becomes of the several members of a class, where the user does not say; None where a class has
            one member by construction.
        lacking: what a group lacks that has no member; empty if every group has one.
        data: whether the evidence needs data.
    """

    score: Callable[..., Tensor]
    evidence: Gather
    scale: Scale = "mean"
    combine: Combine | None = "mean"
    lacking: str = ""
    data: bool = False


CRITERIA: dict[str, Recipe] = {
    "l1": Recipe(l1, filters),
    "l2": Recipe(l2, filters),
    "std": Recipe(std, filters),
    "statistics": Recipe(statistics, moments, scale="standard"),
    "slimming": Recipe(slimming, norms, scale="none", lacking="a batch norm"),
    "fpgm": Recipe(fpgm, filters),
    "apoz": Recipe(apoz, zero_shares, scale="standard", data=True),
    "variance": Recipe(variance, responses, data=True),
    "entropy": Recipe(entropy, pooled, data=True),
    "taylor": Recipe(taylor, batch_slopes, scale="none", combine=None, data=True),
    "taylor-abs": Recipe(taylor_abs, slopes, scale="norm", combine=None, data=True),
    "obd": Recipe(obd, fisher, scale="none", combine="sum", data=True),
    "obs": Recipe(obs, slopes, scale="none", combine=None, data=True),
    "random": Recipe(random, draws, scale="none", combine=None),
}


def check_criterion(criterion: Criterion, combining: Combine | None, source: Source) -> None:
    """Refuse before any work what cannot be scored.

    Raises:
        DataError: the criterion needs data and there is none.
        OptionError: members shall be combined where a class has one by construction.
    """
    recipe = CRITERIA[criterion]
    if combining and recipe.combine is None:
        raise OptionError(
            f"{source.who}: {criterion!r} sees a channel as one through all layers and has nothing to combine",
            hint="Leave option 'combine' out.",
        )
    if recipe.data:
        loader_of(replace(source, who=f"{source.who}: {criterion!r}"))


def score_classes(
    graph: Graph,
    groups: Groups,
    criterion: Criterion,
    *,
    source: Source | None = None,
    combining: Combine | None = None,
    among: Sequence[Group] | None = None,
) -> FloatArray:
    """Score of every class, shape (groups.count,), higher means keep, comparable through all groups.

    Args:
        graph: the network.
        groups: its dependency groups.
        criterion: what says how much a channel matters.
        source: data and seed, for the criteria that need them.
        combining: what becomes of a class that several layers hold; None leaves it to the criterion.
        among: the groups that may be cut; all where None. Classes of the others may get any score.

    Raises:
        OptionError: one of these groups has nothing that the criterion could look at.
        DataError: the criterion needs data that is not there.
    """
    recipe, source = CRITERIA[criterion], source or Source()
    check_criterion(criterion, combining, source)
    members = recipe.evidence(graph, groups, replace(source, who=f"{source.who}: {criterion!r}"))
    scored = [(member.classes, recipe.score(*member.evidence)) for member in members]
    scores = combine(groups, scored, recipe.scale, combining or recipe.combine or "mean")
    if recipe.lacking:
        _check_seen(groups.groups if among is None else among, scores, criterion, source.who)
    return fill_unseen(groups, scores)


def _check_seen(groups: Sequence[Group], scores: FloatArray, criterion: Criterion, who: str) -> None:
    blind = [group.name for group in groups if not (scores[group.classes] == scores[group.classes]).any()]
    if blind:
        names = ", ".join(blind[:5]) + (", ..." if len(blind) > 5 else "")
        raise OptionError(
            f"{who}: {criterion!r} needs {CRITERIA[criterion].lacking} on every channel that may be cut, and "
            f"{len(blind)} of {len(groups)} groups have none: {names}",
            hint="Run it before fold-batchnorm, name these layers in 'ignore', or take another criterion.",
        )
