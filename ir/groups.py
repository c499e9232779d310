"""Dependency groups: which channels of a network can be cut, and what each cut saves.

`find_groups` solves the unions that `labels.py` collected. Atoms that must live and die together form a *class*;
classes that appear in the same slots and tensors form a *group* (the 64 channels of a residual stage, say). A class is
*locked* where it may not be cut: it is pinned, or some tensor would be left without a channel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_matrix
from torch import Tensor, fx

from .graph import Graph
from .labels import IntArray, Labels, Slot, collapse, find_labels, varying

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Size:
    """Cost of a network: multiply-accumulates per image, and parameters."""

    macs: float
    params: float


@dataclass(frozen=True)
class Group:
    """Classes of channels that appear together everywhere.

    Attributes:
        index: position in `Groups.groups`.
        name: path or name of the first layer that produces the channels.
        classes: the classes, in the order of their first channel.
        slots: dimensions of parameters that hold these channels.
        members: names of the nodes whose tensors hold them.
    """

    index: int
    name: str
    classes: IntArray
    slots: tuple[Slot, ...]
    members: tuple[str, ...]

    @property
    def channels(self) -> int:
        """Number of classes: how many independent channels the group has."""
        return len(self.classes)


@dataclass
class Groups:
    """All groups of a graph, and the cost of the graph as a function of the classes that are kept.

    Attributes:
        class_of: class of each atom, shape (atoms,); class 0 is what may not be cut.
        count: number of classes.
        locked: which classes may not be cut, shape (count,).
        held: the classes of every tensor of the graph, with its node.
    """

    graph: Graph
    labels: Labels
    class_of: IntArray
    count: int
    locked: BoolArray
    groups: list[Group] = field(default_factory=list)
    held: list[tuple[fx.Node, IntArray]] = field(default_factory=list)
    _vectors: dict[tuple[int, ...], IntArray] = field(default_factory=dict)

    # -- what a tensor holds --------------------------------------------------------------------------------

    def vector(self, labels: Tensor) -> IntArray:
        """Classes of labels with expanded dimensions collapsed, flattened."""
        key = identity(labels)
        known = self._vectors.get(key)
        if known is None:
            known = self.class_of[collapse(labels).reshape(-1).numpy()]
            self._vectors[key] = known
        return known

    def axis(self, labels: Tensor) -> tuple[int, IntArray] | None:
        """The one dimension of a tensor that is labelled, and its classes; None where nothing could be cut."""
        dims = varying(labels)
        if not dims:
            return None
        if len(dims) > 1:
            grid = self.class_of[collapse(labels).numpy()]
            dims = [d for d in dims if (grid != grid.take([0], axis=d)).any()] or dims[:1]
            assert len(dims) == 1, "classes change along more than one dimension"
            picked = grid[tuple(slice(None) if d == dims[0] else 0 for d in range(grid.ndim))]
        else:
            picked = self.vector(labels)
        return (dims[0], picked) if picked.any() else None

    def channels(self, node: fx.Node) -> tuple[int, IntArray] | None:
        """Labelled dimension of a node's tensor and the class of each of its channels; None where it has none."""
        value = self.labels.constants.get(node, self.labels.values.get(node))
        return self.axis(value) if isinstance(value, Tensor) else None

    def of(self, node: fx.Node) -> list[Group]:
        """Groups whose channels a node's tensor holds."""
        axis = self.channels(node)
        return [] if axis is None else [self.groups[i] for i in np.unique(self.group_of[axis[1]]) if i >= 0]

    @cached_property
    def group_of(self) -> IntArray:
        """Index of each class's group, -1 for locked classes, shape (count,)."""
        index = np.full(self.count, -1, dtype=np.int64)
        for group in self.groups:
            index[group.classes] = group.index
        return index

    # -- cost -----------------------------------------------------------------------------------------------

    def cost(self, kept: BoolArray | None = None) -> Size:
        """Cost of the graph when the classes with `kept[class]` false are cut, shape (count,); None keeps all."""
        return self._cost(np.ones(self.count) if kept is None else kept.astype(np.float64))

    @cached_property
    def _cost(self) -> _CostFunction:
        return _CostFunction(self)

    @cached_property
    def cuttable_macs(self) -> float:
        """Share (0-1) of the MACs that goes when every group is cut down to one channel."""
        kept = np.ones(self.count, dtype=bool)
        for group in self.groups:
            kept[group.classes[1:]] = False
        whole = self.cost().macs
        return 1 - self.cost(kept).macs / whole if whole else 0.0

    def saving(self, group: Group) -> Size:
        """What goes when a whole group is cut: its share of the network's MACs and parameters."""
        kept = np.ones(self.count, dtype=bool)
        kept[group.classes] = False
        before, after = self.cost(), self.cost(kept)
        return Size(before.macs - after.macs, before.params - after.params)


class _CostFunction:
    """Sums of products of kept shares, vectorised: one sparse product per evaluation."""

    def __init__(self, groups: Groups) -> None:
        self._rows: list[IntArray] = [np.zeros(0, np.int64)]  # row 0 stands for a dimension that is never cut
        self._known: dict[int, int] = {}
        labels, graph = groups.labels, groups.graph
        batch = batch_size(graph)
        macs = [(term.macs / batch, [groups.vector(v) for v in term.vectors]) for term in labels.terms]
        by_name: dict[str, list[IntArray]] = {}
        for slot, vector in labels.slots.items():
            by_name.setdefault(slot.name, []).append(groups.vector(vector))
        for node, value in labels.constants.items():
            if node.op == "get_attr" and labels.first_name(str(node.target)) not in by_name:
                axis = groups.axis(value)
                by_name[labels.first_name(str(node.target))] = [axis[1]] if axis is not None else []
        params = [(float(p.numel()), by_name.get(name, [])) for name, p in graph.module.named_parameters()]
        self._macs, self._params = self._table(macs), self._table(params)
        self._shares = self._matrix(groups.count)

    def _table(self, terms: list[tuple[float, list[IntArray]]]) -> tuple[npt.NDArray[np.float64], IntArray]:
        width = max((len(vectors) for _, vectors in terms), default=0)
        index = np.zeros((len(terms), max(1, width)), dtype=np.int64)
        for row, (_, vectors) in enumerate(terms):
            for column, vector in enumerate(vectors):
                index[row, column] = self._row(vector)
        return np.array([amount for amount, _ in terms]), index

    def _row(self, vector: IntArray) -> int:
        if id(vector) not in self._known:
            self._known[id(vector)] = len(self._rows)
            self._rows.append(vector)
        return self._known[id(vector)]

    def _matrix(self, count: int) -> csr_matrix:
        lengths = np.array([len(row) for row in self._rows])
        pointers = np.concatenate([[0], np.cumsum(lengths)])
        weights = np.repeat(1.0 / np.maximum(lengths, 1), lengths)
        return csr_matrix((weights, np.concatenate(self._rows), pointers), shape=(len(self._rows), count))

    def __call__(self, kept: npt.NDArray[np.float64]) -> Size:
        shares = self._shares @ kept
        shares[0] = 1.0
        totals = [(amounts * shares[index].prod(axis=1)).sum() for amounts, index in (self._macs, self._params)]
        return Size(*(float(round(total)) for total in totals))


def batch_size(graph: Graph) -> int:
    """Images in the example inputs."""
    for node in graph.module.graph.nodes:
        if node.op == "placeholder" and getattr(node.meta.get("spec"), "shape", ()):
            return int(node.meta["spec"].shape[0])
    return 1


# -- solving --------------------------------------------------------------------------------------------------


def find_groups(graph: Graph, attention: str = "width", norms: str = "keep") -> Groups:
    """Dependency groups of a graph.

    Args:
        attention: `width` cuts the width inside all heads alike, `heads` cuts whole heads.
        norms: `keep` pins channels that a layer norm normalises; `refit` lets the norm run over those that are kept.
    """
    labels = find_labels(graph, attention, norms)
    _pin_conflicts(labels)
    class_of, count = _solve_rectangular(labels)
    groups = Groups(graph, labels, class_of, count, np.zeros(count, dtype=bool))
    _lock_and_group(groups)
    return groups


def _pin_conflicts(labels: Labels) -> None:
    """A parameter that is a layer's weight and also read as a value is left as it is: its dimensions are tied."""
    whole = {labels.first_name(str(n.target)): n for n in labels.constants if n.op == "get_attr"}
    for slot, vector in labels.slots.items():
        node = whole.get(slot.name)
        if node is not None:
            labels.node = node
            labels.pin(vector, "belongs to a parameter that is also used as a value")
            labels.pin(labels.constants[node], "belongs to a parameter that is also a layer's weight")


def identity(labels: Tensor) -> tuple[int, ...]:
    """Equal for label tensors that hold the same atoms in the same order, however they are expanded."""
    steps = [n for pair in zip(labels.shape, labels.stride(), strict=True) if pair[1] and pair[0] > 1 for n in pair]
    return (labels.data_ptr(), *steps)


def tensors(labels: Labels) -> Iterator[tuple[fx.Node, Tensor]]:
    """Every labelled tensor of a graph with its node."""
    for table in (labels.values, labels.constants):
        for node, value in table.items():
            for item in value if isinstance(value, tuple) else (value,):
                if isinstance(item, Tensor):
                    yield node, item


def _solve_rectangular(labels: Labels) -> tuple[IntArray, int]:
    """Classes under which every tensor stays a full grid: positions across the outer dimensions are tied."""
    crossed = {(t.data_ptr(), t.shape, t.stride()): (n, t) for n, t in tensors(labels) if len(varying(t)) > 1}
    while True:
        class_of, count = labels.solve()
        touched = np.zeros(count, dtype=bool)
        for node, value in crossed.values():
            grid = class_of[collapse(value).numpy()]
            dims = [d for d in varying(value) if (grid != grid.take([0], axis=d)).any()]
            # what has just been tied may make a later tensor a grid (a shuffle turns its view round): look again first
            if len(dims) > 1 and not touched[grid].any():
                touched[grid] = True
                labels.node = node
                labels.tie(value, dims[:-1])
        if not touched.any():
            return class_of, count


def _lock_and_group(groups: Groups) -> None:
    """Lock what may not be cut, and gather the rest by where it appears."""
    labels = groups.labels
    groups.held = [(node, groups.vector(value)) for node, value in tensors(labels)]
    vectors = {id(v): v for _, v in groups.held}
    vectors |= {id(v): v for v in (groups.vector(vector) for vector in labels.slots.values())}
    present = {key: _distinct(vector, groups.count) for key, vector in vectors.items()}
    for classes in present.values():
        if len(classes) == 1:
            groups.locked[classes] = True  # a class that fills a tensor alone
    groups.locked[0] = True
    free = np.flatnonzero(~groups.locked)
    if len(free):
        _gather(groups, free, present)


def _distinct(vector: IntArray, count: int) -> IntArray:
    """Sorted distinct entries of a vector of numbers below `count`."""
    if len(vector) < count // 8:
        return np.unique(vector)
    hit = np.zeros(count, dtype=bool)
    hit[vector] = True
    return np.flatnonzero(hit)


def _gather(groups: Groups, free: IntArray, present: dict[int, IntArray]) -> None:
    """Fill `groups.groups`: free classes that appear in the same tensors, in the order of their first class."""
    rng = np.random.default_rng(0)
    signature = np.zeros(groups.count, dtype=np.uint64)
    for classes in {classes.tobytes(): classes for classes in present.values()}.values():
        signature[classes] += rng.integers(1, 2**63, dtype=np.uint64)
    _, first, inverse = np.unique(signature[free], return_index=True, return_inverse=True)
    owner = np.full(groups.count, -1, dtype=np.int64)
    owner[free] = np.argsort(np.argsort(first))[inverse]
    owners = {
        key: [int(i) for i in _distinct(owner[classes] + 1, len(first) + 1) - 1] for key, classes in present.items()
    }
    slots: list[list[Slot]] = [[] for _ in first]
    members: list[list[str]] = [[] for _ in first]
    for slot, vector in groups.labels.slots.items():
        for index in owners[id(groups.vector(vector))]:
            if index >= 0:
                slots[index].append(slot)
    for node, held in groups.held:
        for index in owners[id(held)]:
            if index >= 0 and (not members[index] or members[index][-1] != node.name):
                members[index].append(node.name)
    order = np.argsort(owner[free], kind="stable")
    pieces = np.split(free[order], np.cumsum(np.bincount(owner[free]))[:-1])
    for index, classes in enumerate(pieces):
        groups.groups.append(
            Group(index, _title(slots[index], members[index]), classes, tuple(slots[index]), tuple(members[index]))
        )


def _title(slots: list[Slot], members: list[str]) -> str:
    """Name of a group: the layer whose output channels it holds."""
    for slot in slots:
        if (slot.dim, slot.name.rpartition(".")[2]) in ((0, "weight"), (2, "indices")):
            return slot.name.rpartition(".")[0]
    return slots[0].name if slots else members[0]
