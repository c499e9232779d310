"""How much the whole network suffers when one group of channels is cut, and no other.

For each group g and each ratio r, the share r of the group's channels that a criterion values least is masked to zero
where it is read (the network is not cut), and the outputs are compared with the original's on the same images:

    kl         D_g(r) = mean over images of KL(p ‖ q) in nats, p the original's and q the masked network's softmax;
    accuracy   D_g(r) = top-1 accuracy of the original − that of the masked network, 0-1.

The sensitivity of a group is the mean of D_g over the ratios. It weighs a criterion's scores through `factors`:

    w_g = sqrt(D_g) / geometric mean of sqrt(D) over the groups, within [1/10, 10].

Near the original KL is a quadratic form of what was removed (½ δᵀFδ, F the Fisher information), so its square root
grows with δ as a filter's norm does; for the accuracy the same root damps a measure that is noisy on few images.

Source of the scan: H. Li et al., "Pruning filters for efficient ConvNets", 2017, figure 2 (accuracy against ratio,
layer by layer). The weight is this project's reading of system 1's "influence on the whole model".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import FiniteFloat, TypeAdapter
from rich.console import Console
from torch import Tensor
from torch.utils import _pytree as pytree

from ...ir.cut import Cut
from ...ir.errors import ModelError, OptionError
from ...ir.graph import Graph
from ...ir.groups import Group, Groups, find_groups
from ...ir.verify import evaluating
from ...runtime.data import Loader, check_targets, images_in
from ...runtime.forward import class_scores, device_of
from .branching import branches, flat_inputs
from .progress import counted
from .sharing import processes, share, shared_sum
from .streaming import batches_within, limited_batches

FloatArray = npt.NDArray[np.float64]
Measure = Literal["kl", "accuracy"]
RATIOS = (0.25, 0.5, 0.75)
IMAGES = 256
_WIDEST = 10.0


@dataclass(frozen=True)
class GroupSensitivity:
    """What masking parts of one group did.

    Args:
        name: of the group: the layer that produces its channels.
        channels: how many classes of channels it has.
        masked: how many of them were masked at each ratio.
        values: D at each ratio.
    """

    name: str
    channels: int
    masked: tuple[int, ...]
    values: tuple[FiniteFloat, ...]

    @property
    def mean(self) -> float:
        """Mean of D over the ratios."""
        return sum(self.values) / len(self.values)


@dataclass(frozen=True)
class Sensitivity:
    """The result of a scan.

    Args:
        measure: `kl` (nats per image) or `accuracy` (0-1).
        images: how many were looked at.
        accuracy: top-1 of the original on them, None where that was not measured.
        ratios: shares of a group's channels that were masked, rounded to whole channels, rising.
        groups: one entry for each group that can be cut, in the order of the network.
    """

    measure: Measure
    images: int
    accuracy: FiniteFloat | None
    ratios: tuple[FiniteFloat, ...]
    groups: tuple[GroupSensitivity, ...]

    def factors(self, groups: Groups) -> FloatArray:
        """Weight w_g of every class, shape (groups.count,); 1 for classes of no measured group."""
        known = {one.name: one.mean for one in self.groups}
        least = 1e-9 if self.measure == "kl" else 0.5 / max(self.images, 1)
        found = [group for group in groups.groups if group.name in known]
        logs = np.array([0.5 * np.log(max(known[group.name], least)) for group in found])
        factors = np.ones(groups.count)
        if len(found):
            weights = np.exp(logs - logs.mean()).clip(1 / _WIDEST, _WIDEST)
            for group, weight in zip(found, weights, strict=True):
                factors[group.classes] = weight
        return factors

    def weigh(self, scores: FloatArray, groups: Groups, *, standard: bool = False) -> FloatArray:
        """Scores of a criterion with the influence on the whole network in them, shape (groups.count,).

        The order within a group stays as it is; one threshold through all groups takes more from those that matter
        less.

        Args:
            scores: comparable through all groups, shape (groups.count,), higher means keep.
            groups: of the network.
            standard: whether scores are z-scores, which have no zero to multiply: log w_g is added to them, which
                multiplies exp(score); others are multiplied by w_g.
        """
        factors = self.factors(groups)
        return scores + np.log(factors) if standard else scores * factors

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, for `PassResult.metrics["sensitivity"]`."""
        content: dict[str, Any] = TypeAdapter(Sensitivity).dump_python(self, mode="json")
        return content

    @classmethod
    def from_dict(cls, content: Any) -> Sensitivity:
        """The inverse of `to_dict`.

        Raises:
            ValueError: content of another form.
        """
        return TypeAdapter(cls).validate_python(content)


def layer_sensitivity(
    graph: Graph,
    loader: Loader,
    scores: FloatArray,
    *,
    groups: Groups | None = None,
    among: Sequence[Group] | None = None,
    ratios: Sequence[float] = RATIOS,
    measure: Measure = "kl",
    limit: int | None = IMAGES,
    console: Console | None = None,
) -> Sensitivity:
    """Mask each group alone at each ratio and compare with the original.

    Costs about `len(ratios) / 2` forward passes per group: of each masked network only what lies behind the first
    masked channel runs. Under `torchrun` the images of each batch are dealt out to the processes.

    Args:
        graph: the network, in eval mode meanwhile.
        loader: iterable of `(inputs, targets)`; targets matter for `accuracy` alone.
        scores: of each class, shape (groups.count,), higher means keep: the lowest are masked.
        groups: of the graph; its ordinary ones where None.
        among: the groups to look at; all where None.
        ratios: shares of a group's channels, 0 to 1, both excluded; at least one channel goes and one stays.
        measure: what the outputs are compared by.
        limit: look at no more than so many images.
        console: where a progress bar is shown, if it is a terminal.

    Raises:
        OptionError: a ratio that is not between 0 and 1, or none.
        DataError: an empty loader or a bad batch.
        ModelError: outputs that are no class scores, or not finite.
    """
    _check_ratios(ratios)
    groups = graph.analyse(find_groups) if groups is None else groups
    chosen = groups.groups if among is None else among
    plan = {(group.index, count): group for group in chosen for count in _counts(group, ratios)}
    cuts = [Cut(groups, _least(group, scores, count)) for (_, count), group in plan.items()]
    sums, images, targets, right = _scan(graph, cuts, loader, measure, limit, console)
    values = dict(zip(plan, (sums / max(targets, 1)).tolist(), strict=True))
    entries = []
    for group in chosen:
        counts = _counts(group, ratios)
        if counts:
            found = tuple(values[group.index, count] for count in counts)
            entries.append(GroupSensitivity(group.name, group.channels, counts, found))
    accuracy = right / targets if measure == "accuracy" else None
    return Sensitivity(measure, images, accuracy, tuple(sorted(ratios)), tuple(entries))


def _scan(
    graph: Graph, cuts: list[Cut], loader: Loader, measure: Measure, limit: int | None, console: Console | None
) -> tuple[Tensor, int, int, float]:
    """Sum of D over all predictions for each cut, (cuts,); images, predictions, right ones of the original."""
    accelerator = processes()
    rank, world = accelerator.process_index, accelerator.num_processes
    main = console if accelerator.is_main_process else None
    sums, images = torch.zeros(len(cuts) + 2, dtype=torch.float64), 0
    batches = batches_within(loader, limit)
    steps = None if batches is None else batches * (len(cuts) + 1)
    with counted(main, "sensitivity", steps) as step, evaluating(graph.module):
        for index, (inputs, targets) in enumerate(limited_batches(loader, "calibration", limit)):
            where = f"batch {index} of calibration"
            if len(targets) > rank:
                own = pytree.tree_map(lambda t: share(t, rank, world), inputs)
                sums += _compare(graph, cuts, own, share(targets, rank, world), measure, where, step)
            images += images_in(inputs)
    (sums,) = shared_sum([sums])
    return sums[:-2], images, int(sums[-2]), float(sums[-1])


def _compare(
    graph: Graph, cuts: list[Cut], inputs: Any, targets: Tensor, measure: Measure, where: str, step: Any
) -> Tensor:
    """Of one batch: D summed over predictions for each cut, the predictions, and the original's right ones."""
    sums = torch.zeros(len(cuts) + 2, dtype=torch.float64)
    targets, original = targets.to(device_of(graph.module)), torch.empty(0)
    for number, output in branches(cuts, graph, flat_inputs(graph, inputs, where)):
        scores = class_scores(output).float()
        if number < 0:
            original = scores
            _check_original(scores, targets, measure, where)
            sums[-2] = scores[:, 0].numel()
            sums[-1] = _right(scores, targets) if measure == "accuracy" else 0
        else:
            sums[number] = _distance(original, scores, targets, measure)
        step(len(scores))
    return sums


def _distance(original: Tensor, masked: Tensor, targets: Tensor, measure: Measure) -> float:
    """D summed over all predictions of a batch."""
    if measure == "accuracy":
        return _right(original, targets) - _right(masked, targets)
    return _kl(original, masked)


def _kl(original: Tensor, masked: Tensor) -> float:
    """Σ KL(softmax original ‖ softmax masked) over all predictions, in nats; scores (N, classes, *space)."""
    p, q = original.double().log_softmax(1), masked.double().log_softmax(1)
    return max(0.0, float((p.exp() * (p - q)).sum()))  # rounding may go below


def _right(scores: Tensor, targets: Tensor) -> int:
    return int((scores.argmax(1) == targets).sum())


def _check_original(scores: Tensor, targets: Tensor, measure: Measure, where: str) -> None:
    if measure == "accuracy":
        check_targets(targets, scores, where)
    if not bool(torch.isfinite(scores).all()):
        raise ModelError(f"the network's outputs on {where} are NaN or infinite", hint="Look for NaN in its weights.")


def _check_ratios(ratios: Sequence[float]) -> None:
    if not ratios or not all(0 < ratio < 1 for ratio in ratios):
        raise OptionError(f"ratios {list(ratios)} of a sensitivity scan must be between 0 and 1, and at least one")


def _counts(group: Group, ratios: Sequence[float]) -> tuple[int, ...]:
    """How many channels of a group to mask at each ratio, rising; none where it has but one."""
    most = group.channels - 1
    return tuple(min(max(round(ratio * group.channels), 1), most) for ratio in sorted(ratios)) if most else ()


def _least(group: Group, scores: FloatArray, count: int) -> npt.NDArray[np.int64]:
    return group.classes[np.argsort(scores[group.classes], kind="stable")[:count]]
