"""Why channels cannot be cut: every locked channel is led back to the operation that locks it.

A channel is locked where a union reaches a pin (`labels.py`), or where it alone fills some tensor. Solved *without* the
pins, the unions tell which pins each channel reaches; channels that reach the same pins make one `Locked` set.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import csgraph, csr_matrix
from torch import Tensor, fx

from .dialect import op_name
from .graph import Graph
from .groups import Groups, batch_size, tensors
from .labels import IntArray, Labels, collapse

HINTS: tuple[tuple[str, str], ...] = (
    ("is an output of the network", "The network's outputs keep their shape; what leads up to them can be cut."),
    ("has no label rule", "Compute the same with operations that have a rule, or register one in fxpress.ir.rules."),
    ("broadcast over many", "Give both operands the same number of channels, or keep this one at a single channel."),
    ("rolled along", "Roll over space, or split and concatenate the channels instead."),
    ("padded along", "Pad the channels with zeros (mode 'constant')."),
    ("change its result", "Its result would depend on how many channels there are; use a learned layer, such as a "
     "linear layer, in its place."),
    ("runs along the channels", "An order among the channels forbids to leave some out; move it to another dimension."),
    ("statistics would change", "A batch norm in its place has statistics for each channel by itself; "
     "or cut it all the same (prune-channels: {norms: refit}): the norm then runs over the channels that stay."),
    ("product-quantized layer", "Cut channels before they are quantized, or choose a width of sub-spaces that divides "
     "the inputs that belong to one channel."),
    ("computed from the input", "The weight has no channels of its own to cut; cut the layers around it."),
    ("parameter that is also", "Use separate parameters for the layer and for the value."),
    ("together", "One of them cannot go alone, as shuffles, halves or shared layers give each of them to all others; "
     "the layers inside the branches can be cut."),
    ("single channel", "A tensor keeps one channel at least."),
)  # fmt: skip
"""Part of a reason → what the reader can do about it."""


@dataclass(frozen=True)
class Reason:
    """What stands in the way of a cut.

    Attributes:
        node: name of the node that locks the channels.
        op: what it calls, e.g. `aten.cumsum.default`, or its layer's type.
        source: the line of the model's code, e.g. `model.py:63 out = self.conv1(x)`; "" where it is not known.
        text: the reason in words.
        hint: what can be done about it.
    """

    node: str
    op: str
    source: str
    text: str
    hint: str


@dataclass
class Locked:
    """Channels that reach the same operations that may not lose a channel.

    Attributes:
        reasons: one for each of these operations.
        channels: how many independent channels, counted as if nothing were pinned.
        slots: (name, dimension) of the parameters that hold them.
        members: names of the nodes whose tensors hold them.
        macs: multiply-accumulates per image of which they have a part, counted as `Groups.saving` does.
        params: parameters, likewise.
    """

    reasons: tuple[Reason, ...]
    channels: int = 0
    slots: list[tuple[str, int]] = field(default_factory=list)
    members: list[str] = field(default_factory=list)
    macs: float = 0.0
    params: float = 0.0


def find_locked(groups: Groups) -> list[Locked]:
    """Every set of locked channels, those with most MACs first."""
    labels = groups.labels
    free = _solve_without_pins(labels)
    sets, owner = _gather(groups, free)
    for slot, vector in labels.slots.items():
        for index in _present(owner, vector):
            sets[index].slots.append((slot.name, slot.dim))
    for node, value in tensors(labels):
        for index in _present(owner, value):
            if node.name not in sets[index].members:
                sets[index].members.append(node.name)
    _add_costs(groups, sets, owner)
    return sorted((found for found in sets if found.members or found.slots), key=lambda found: -found.macs)


def _solve_without_pins(labels: Labels) -> IntArray:
    """Component of every atom under the unions alone."""
    if not labels.left:
        return np.arange(labels.atoms, dtype=np.int64)
    rows, cols = np.concatenate(labels.left), np.concatenate(labels.right)
    kept = (rows != 0) & (cols != 0)  # a union with 0 is a pin in other words, and would join all that is pinned
    ones = np.ones(int(kept.sum()), np.int8)
    links = csr_matrix((ones, (rows[kept], cols[kept])), shape=(labels.atoms, labels.atoms))
    components: IntArray = csgraph.connected_components(links, directed=False)[1].astype(np.int64)
    return components


def _causes(groups: Groups, free: IntArray) -> Iterator[tuple[Reason, IntArray]]:
    """Each thing that locks, with the components that it locks directly."""
    labels, graph = groups.labels, groups.graph
    for pin in labels.pins:
        yield reason_at(graph, pin.node, pin.reason), np.unique(free[pin.atoms[pin.atoms != 0]])
    for left, right, node in zip(labels.left, labels.right, labels.causes, strict=True):
        pinned = np.where(left == 0, right, left)[(left == 0) != (right == 0)]
        if len(pinned):
            yield reason_at(graph, node, "meets channels that cannot be cut"), np.unique(free[pinned])
    done: set[int] = set()
    for node, value in tensors(labels):
        atoms = collapse(value).reshape(-1).numpy()
        classes = np.unique(groups.class_of[atoms])
        if len(classes) == 1 and classes[0] != 0 and classes[0] not in done:
            done.add(int(classes[0]))
            many = len(atoms) > 1
            text = f"ties all {len(atoms)} channels of its tensor together" if many else "has a single channel"
            yield reason_at(graph, node, text), np.unique(free[atoms])


def reason_at(graph: Graph, node: fx.Node, text: str) -> Reason:
    """A reason with the node's operation, its line of source and a hint."""
    layer = graph.layer(node)
    op = type(layer).__name__ if layer is not None else op_name(node.target) if node.op == "call_function" else node.op
    hint = next((hint for part, hint in HINTS if part in text), "")
    return Reason(node.name, op, str(node.meta.get("source") or ""), text, hint)


def _gather(groups: Groups, free: IntArray) -> tuple[list[Locked], IntArray]:
    """Sets of locked channels, and for every atom the index of its set (-1: may be cut), shape (atoms,)."""
    reaches: dict[int, list[Reason]] = {}
    for reason, components in _causes(groups, free):
        for component in components.tolist():
            known = reaches.setdefault(component, [])
            if reason not in known:
                known.append(reason)
    index: dict[tuple[Reason, ...], int] = {}
    sets: list[Locked] = []
    of_component: npt.NDArray[np.int64] = np.full(int(free.max()) + 1, -1, dtype=np.int64)
    for component, reasons in reaches.items():
        key = tuple(reasons)
        if key not in index:
            index[key] = len(sets)
            sets.append(Locked(key))
        of_component[component] = index[key]
        sets[index[key]].channels += 1
    owner = of_component[free]
    owner[~groups.locked[groups.class_of]] = -1
    owner[0] = -1
    return sets, owner


def _present(owner: IntArray, labels: Tensor) -> list[int]:
    found = np.unique(owner[collapse(labels).reshape(-1).numpy()])
    return [int(index) for index in found if index >= 0]


def _add_costs(groups: Groups, sets: list[Locked], owner: IntArray) -> None:
    """MACs and parameters of the layers that make or read each set, as `Groups.saving` counts them for groups."""
    batch = batch_size(groups.graph)
    for term in groups.labels.terms:
        for index, kept in _remaining(owner, term.vectors).items():
            sets[index].macs += term.macs / batch * (1 - kept)
    by_name: dict[str, list[Tensor]] = {}
    for slot, vector in groups.labels.slots.items():
        by_name.setdefault(slot.name, []).append(vector)
    for name, parameter in groups.graph.module.named_parameters():
        for index, kept in _remaining(owner, by_name.get(name, [])).items():
            sets[index].params += parameter.numel() * (1 - kept)


def _remaining(owner: IntArray, vectors: Any) -> dict[int, float]:
    """Set → product over the vectors of the share that does not belong to the set."""
    kept: dict[int, float] = {}
    for vector in vectors:
        held, counts = np.unique(owner[collapse(vector).reshape(-1).numpy()], return_counts=True)
        for index, count in zip(held.tolist(), counts.tolist(), strict=True):
            if index >= 0:
                kept[index] = kept.get(index, 1.0) * (1 - count / counts.sum())
    return kept
