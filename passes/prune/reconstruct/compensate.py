"""Compensation of a cut: who reads what is gone, what each of them gets instead, and what that gained."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rich.console import Console
from torch import Tensor

from ....ir.cut import Cut
from ....ir.graph import Graph
from ....ir.verify import distance, run
from ....runtime.data import Loader
from ....runtime.measure import accuracy
from ...analyse.progress import counted
from ...analyse.sharing import processes, shared_sum
from ...base import Skip
from ...layerwise.placing import add_constant
from ...layerwise.streams import stream_pair
from .bias import MissingResponse
from .changes import Change
from .consumers import Consumer, find_consumers, layer_of
from .refit import MEMORY, Refit, memory, stages

Method = Literal["bias", "least-squares"]
Step = Callable[[int], None]


@dataclass
class Compensation:
    """What compensation did.

    Attributes:
        method: `bias` or `least-squares`.
        changes: one per layer, in the order of treatment.
        skips: what reads removed channels and was left alone, and why.
        moved: relative distance of the outputs on the example inputs from those before the cut, `plain` and with the
            `method`.
        accuracy: on validation data, 0-1: `before` the cut, `plain` behind it, and with the `method`; empty without
            such data.
    """

    method: Method
    changes: list[Change] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)
    moved: dict[str, float] = field(default_factory=dict)
    accuracy: dict[str, float] = field(default_factory=dict)

    @property
    def notes(self) -> list[str]:
        """Sentences for the report."""
        before, behind = (_mean([getattr(change, side) for change in self.changes]) for side in ("before", "after"))
        what = {"bias": "means of removed channels folded into", "least-squares": "least squares gave new weights to"}
        notes = [
            f"{what[self.method]} {len(self.changes)} layers: mean relative error {before:.3f} → {behind:.3f}"
            if self.changes
            else "no layer reads removed channels: nothing to reconstruct"
        ]
        folded = [change for change in self.changes if change.method == "bias"]
        if self.method == "least-squares" and folded:
            notes.append(f"{len(folded)} layers too large for least squares got their bias: {_names(folded)}")
        worst = max(folded, key=lambda change: change.border, default=None)
        if worst is not None and worst.border > 0:
            notes.append(f"zero-padded borders are off by {worst.border:.3f} of the response at most ({worst.layer})")
        if self.changes:
            notes.append(
                f"outputs are {self.moved[self.method]:.2g} from before, {self.moved['plain']:.2g} if only cut"
            )
        if self.accuracy:
            steps = ", ".join(f"{value:.2%} {_STAGE[name]}" for name, value in self.accuracy.items())
            notes.append(f"validation accuracy {steps}")
        return notes

    @property
    def metrics(self) -> dict[str, Any]:
        """Numbers for the report, as JSON values."""
        return {
            "layers": [asdict(change) for change in self.changes],
            "output_distance": dict(self.moved),
            "accuracy": dict(self.accuracy),
        }


_STAGE = {
    "before": "before the cut",
    "plain": "with the cut alone",
    "bias": "with bias folding",
    "least-squares": "with least squares",
}


def compensate(
    cut: Cut,
    after: Graph,
    loader: Loader,
    *,
    method: Method = "least-squares",
    sequential: bool = True,
    validation: Loader | None = None,
    console: Console | None = None,
) -> Compensation:
    """Change the layers of a cut network that read removed channels so that they respond more as before the cut.

    Args:
        cut: what was removed; its graph is the network before.
        after: the network behind the cut; its layers get new tensors.
        loader: calibration data, read once per stage.
        method: `bias` puts the mean of what is missing into a constant (`bias.py`), `least-squares` finds new weights
            for what is left (`least_squares.py`), from at most `refit.POSITIONS` output positions of each image; layers
            whose Gram matrix needs more than `refit.MEMORY` get the former.
        sequential: whether least squares goes layer by layer from the front, each learning from inputs as the
            layers before it give them now (so that it makes up for their errors too), which takes a pass over the
            data per layer; otherwise all learn from the inputs before the cut, in one pass.
        validation: to tell the accuracy before and after.
        console: where progress is shown.

    Raises:
        DataError: the loader or a batch is unsound.
        ModelError: activations that are NaN or infinite.
    """
    consumers, skips = find_consumers(cut)
    result, before = Compensation(method, skips=skips), cut.groups.graph
    outputs = run(before)
    result.moved["plain"] = distance(outputs, run(after))
    if validation is not None:
        result.accuracy = {"before": accuracy(before, validation), "plain": accuracy(after, validation)}
    small = [c for c in consumers if method == "least-squares" and memory(layer_of(after, c)) <= MEMORY]
    large = [c for c in consumers if c not in small]
    plan = stages(after, small, sequential=sequential)
    steps = (len(plan) + bool(large)) * len(loader) if isinstance(loader, Sized) else None
    title = "bias folding" if method == "bias" else "least squares"
    with counted(console if processes().is_main_process else None, title, steps) as step:
        if large:
            result.changes += _fold(before, after, large, loader, step)
        for stage in plan:
            result.changes += _refit(before, after, stage, loader, sequential, step)
    after.epoch += 1
    result.moved[method] = distance(outputs, run(after))
    if validation is not None:
        result.accuracy[method] = accuracy(after, validation)
    return result


def _fold(before: Graph, after: Graph, consumers: Sequence[Consumer], loader: Loader, step: Step) -> list[Change]:
    """Bias folding of all consumers in one pass."""
    found = [MissingResponse(layer_of(before, consumer), consumer) for consumer in consumers]
    names = list(dict.fromkeys(name for c in consumers for name in (c.source, c.name)))

    def visit(old: dict[str, Tensor], _: dict[str, Tensor]) -> None:
        for one in found:
            one.add(old[one.consumer.source], old[one.consumer.name])

    stream_pair(before, after, loader, (names, ()), visit, step)
    nodes = {node.name: node for node in after.nodes}
    for one in found:
        one.adopt(shared_sum(one.tensors))
    return [one.change(add_constant(after, nodes[one.consumer.name], one.constant())) for one in found]


def _refit(
    before: Graph, after: Graph, stage: Sequence[Consumer], loader: Loader, sequential: bool, step: Step
) -> list[Change]:
    """Least squares for the consumers of one stage in one pass."""
    found = [Refit(after, consumer, sequential=sequential) for consumer in stage]
    names, sources = [consumer.name for consumer in stage], [one.source for one in found]
    old_names, new_names = (names, sources) if sequential else ([*sources, *names], [])
    wanted = (list(dict.fromkeys(old_names)), list(dict.fromkeys(new_names)))

    def visit(old: dict[str, Tensor], new: dict[str, Tensor]) -> None:
        for one in found:
            one.add((new if sequential else old)[one.source], old[one.consumer.name])

    stream_pair(before, after, loader, wanted, visit, step)
    for one in found:
        one.moments.adopt(shared_sum(one.moments.tensors))
    return [one.finish(after) for one in found]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))


def _names(changes: Sequence[Change]) -> str:
    more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
    return ", ".join(change.layer for change in changes[:3]) + more
