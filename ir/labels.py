"""Channel labels: which positions of which tensors live and die together.

An *atom* is one output channel of one producer. The graph is interpreted on integer tensors ("labels") of every
node's own shape that hold, at each position, the number of the atom to which the position belongs; 0 belongs to
nothing that may be cut. Data movement runs the very same ATen op on labels, producers give out fresh atoms, and
whatever must live and die together is *united*. The unions are collected as pairs and solved once; the resulting
*classes* of atoms are what a cut keeps or removes.

Labels are expanded with stride 0 along every dimension that does not matter (batch, space, tokens), so that a union
over a feature map costs as much as one over its channels.

The rules for the operations are in `rules.py`; this file holds what they share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import csgraph, csr_matrix
from torch import Tensor, fx

from .graph import Graph, TensorSpec
from .nodes import call, shape_of

IntArray = npt.NDArray[np.int64]
PINNED = 0


class Pin(NamedTuple):
    """Why atoms belong to nothing that may be cut."""

    atoms: IntArray
    node: fx.Node
    reason: str


class Term(NamedTuple):
    """Multiply-accumulates of one node: `macs` times the kept share of each label vector."""

    node: fx.Node
    macs: int
    vectors: tuple[Tensor, ...]


class Slot(NamedTuple):
    """One dimension of one parameter or buffer."""

    name: str
    dim: int


@dataclass
class Labels:
    """Everything that the interpretation of a graph on labels has found, unsolved.

    Attributes:
        values: labels of each node: a tensor, or a tuple of them for an op with several outputs.
        slots: labels along one dimension of a parameter or buffer, shape (size of that dimension,).
        constants: labels of computed constants and of parameters that are read as values, in their own shape.
        readers: activations that a node mixes over their channels, and which the oracle masks before that node.
        terms: multiply-accumulates as a function of what is kept.
        rescaled: mean-like reductions over labelled dimensions, whose result depends on how many are kept.
        slides: convolutions that slide along the channels, and what they read.
        refitted: norms over labelled dimensions that shall take their statistics over what is kept.
    """

    graph: Graph
    attention: str
    norms: str
    values: dict[fx.Node, Any] = field(default_factory=dict)
    slots: dict[Slot, Tensor] = field(default_factory=dict)
    constants: dict[fx.Node, Tensor] = field(default_factory=dict)
    readers: dict[fx.Node, tuple[fx.Node, ...]] = field(default_factory=dict)
    terms: list[Term] = field(default_factory=list)
    rescaled: dict[fx.Node, Tensor] = field(default_factory=dict)
    slides: dict[fx.Node, Tensor] = field(default_factory=dict)
    refitted: dict[fx.Node, Tensor] = field(default_factory=dict)
    pins: list[Pin] = field(default_factory=list)
    atoms: int = 1
    left: list[IntArray] = field(default_factory=list)
    right: list[IntArray] = field(default_factory=list)
    causes: list[fx.Node] = field(default_factory=list)
    node: fx.Node | None = None
    unknown: list[fx.Node] = field(default_factory=list)
    _computed: dict[fx.Node, Any] = field(default_factory=dict)
    _constant: set[fx.Node] = field(default_factory=set)
    _by_target: dict[str, fx.Node] = field(default_factory=dict)
    _first_names: dict[str, str] = field(default_factory=dict)

    # -- reading the graph ------------------------------------------------------------------------------------

    def is_constant(self, value: object) -> bool:
        """Whether a node depends on parameters, buffers and literals alone."""
        return isinstance(value, fx.Node) and value in self._constant

    def read(self, value: Any) -> Any:
        """Labels of an argument; a constant that nothing has bound yet gets fresh atoms, a size stays an int."""
        if not isinstance(value, fx.Node):
            return value
        if value in self._constant:
            value = self.representative(value)
            if value not in self.constants:
                self.constants[value] = self.fresh(shape_of(value))
            return self.constants[value]
        return self.values[value]

    def representative(self, constant: fx.Node) -> fx.Node:
        """The one node that stands for all reads of the same parameter."""
        if constant.op != "get_attr":
            return constant
        return self._by_target.setdefault(self.first_name(str(constant.target)), constant)

    def first_name(self, name: str) -> str:
        """The first of the names of a tensor that has several (tied weights)."""
        return self._first_names.get(name, name)

    def constant_value(self, node: fx.Node) -> Any:
        """The real value of a constant node, computed from the graph's tensors."""
        if node not in self._computed:
            if node.op == "get_attr":
                self._computed[node] = self.graph.tensor(str(node.target)).detach()
            else:
                args = fx.map_arg(node.args, self._constant_argument)
                kwargs = fx.map_arg(node.kwargs, self._constant_argument)
                with torch.no_grad():
                    self._computed[node] = call(node, *args, **kwargs)
        return self._computed[node]

    def _constant_argument(self, node: fx.Node) -> Any:
        """Value of a constant's argument; what `new_zeros` and its like take only type and device from is empty."""
        if self.is_constant(node):
            return self.constant_value(node)
        return torch.empty(0, dtype=node.meta["spec"].dtype)

    def unknown_operation(self, node: fx.Node) -> Any:
        """An operation without a rule: what it reads is pinned; returns the labels of its result."""
        self.unknown.append(node)
        for source in node.all_input_nodes:
            if isinstance(source.meta.get("spec"), TensorSpec):
                self.pin(self.read(source), f"{node.target} has no label rule")
        return unlabelled(node.meta["spec"])

    # -- atoms, unions, pins ----------------------------------------------------------------------------------

    def fresh(self, shape: Sequence[int], dim: int | None = None) -> Tensor:
        """Labels of fresh atoms, one per position, or one per index of `dim` and expanded over the rest."""
        if dim is None:
            count = int(np.prod(shape)) if shape else 1
            if count <= 1:
                return zeros(shape)
            self.atoms += count
            return torch.arange(self.atoms - count, self.atoms).view(tuple(shape))
        return along(self.atoms_vector(shape[dim]), dim, shape)

    def atoms_vector(self, count: int) -> Tensor:
        """`count` fresh atoms, shape (count,); a single channel is pinned, for a tensor must keep one."""
        if count <= 1:
            return zeros((count,))
        self.atoms += count
        return torch.arange(self.atoms - count, self.atoms)

    def unite(self, a: Tensor, b: Tensor) -> None:
        """Positions of `a` and `b`, broadcast against each other, live and die together."""
        if a is b:
            return
        if a.shape != b.shape:
            shape = np.broadcast_shapes(a.shape, b.shape)
            a, b = a.expand(shape), b.expand(shape)
        if a.data_ptr() == b.data_ptr() and a.stride() == b.stride():
            return
        sizes = [1 if sa == 0 and sb == 0 else n for n, sa, sb in zip(a.shape, a.stride(), b.stride(), strict=True)]
        a = a.as_strided(sizes, a.stride(), a.storage_offset())
        b = b.as_strided(sizes, b.stride(), b.storage_offset())
        self.left.append(a.reshape(-1).numpy())
        self.right.append(b.reshape(-1).numpy())
        self.causes.append(self.cause)

    @property
    def cause(self) -> fx.Node:
        """The node whose rule is being applied."""
        assert self.node is not None
        return self.node

    def pin(self, labels: Tensor, reason: str) -> None:
        """Positions of `labels` may not be cut, for the reason given."""
        atoms = collapse(labels).reshape(-1).numpy()
        if atoms.any():
            self.pins.append(Pin(atoms, self.cause, reason))

    def tie(self, labels: Tensor, dims: Sequence[int]) -> Tensor:
        """Unite positions over `dims`; returns labels that are constant (stride 0) along them."""
        moving = [d for d in dims if varies(labels, d)]
        if not moving:
            return labels
        first = labels
        for d in moving:
            first = first.narrow(d, 0, 1)
        first = first.expand(labels.shape)
        self.unite(labels, first)
        return first

    def bind(self, name: str, dim: int, vector: Tensor) -> None:
        """Labels along one dimension of a parameter; a second binding (a shared layer) unites with the first."""
        slot = Slot(self.first_name(name), dim)
        known = self.slots.get(slot)
        if known is None:
            self.slots[slot] = vector
        else:
            self.unite(known, vector)

    def solve(self) -> tuple[IntArray, int]:
        """Class of every atom, class 0 being the pinned one, and the number of classes."""
        left = [*self.left, *(np.zeros_like(pin.atoms) for pin in self.pins)]
        right = [*self.right, *(pin.atoms for pin in self.pins)]
        if not left:
            return np.arange(self.atoms, dtype=np.int64), self.atoms
        rows, cols = np.concatenate(left), np.concatenate(right)
        links = csr_matrix((np.ones(len(rows), np.int8), (rows, cols)), shape=(self.atoms, self.atoms))
        count, classes = csgraph.connected_components(links, directed=False)
        classes = classes.astype(np.int64)
        if classes[PINNED] != 0:  # scipy numbers components in order of their first member, so 0 is the pinned one
            raise AssertionError("class 0 must be the pinned class")
        return classes, int(count)


def zeros(shape: Sequence[int]) -> Tensor:
    """Labels of positions that belong to nothing that may be cut."""
    return _ZERO.expand(tuple(shape))


_ZERO = torch.zeros((), dtype=torch.int64)


def along(vector: Tensor, dim: int, shape: Sequence[int]) -> Tensor:
    """A vector of labels laid along `dim` of a tensor of the given shape, stride 0 elsewhere."""
    stride = [0] * len(shape)
    stride[dim] = vector.stride(0)
    return vector.as_strided(tuple(shape), stride, vector.storage_offset())


def varies(labels: Tensor, dim: int) -> bool:
    """Whether labels may differ along a dimension (they do not where it was expanded)."""
    return labels.shape[dim] > 1 and labels.stride(dim) != 0


def varying(labels: Tensor) -> list[int]:
    """Dimensions along which labels may differ."""
    return [d for d, (n, s) in enumerate(zip(labels.shape, labels.stride(), strict=True)) if n > 1 and s != 0]


def collapse(labels: Tensor) -> Tensor:
    """The same labels with every expanded dimension cut down to size 1."""
    sizes = [1 if s == 0 and n > 1 else n for n, s in zip(labels.shape, labels.stride(), strict=True)]
    return labels.as_strided(sizes, labels.stride(), labels.storage_offset())


def compress(labels: Tensor) -> Tensor:
    """The same labels with stride 0 wherever the values happen not to change along a dimension."""
    shape = labels.shape
    for d in varying(labels):
        first = labels.narrow(d, 0, 1)
        if bool((labels == first).all()):
            labels = first.expand(shape)
    return labels


def restride(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Labels that do not change along the dimensions whose size differs, in the new shape."""
    strides = [0 if n != m else s for n, m, s in zip(x.shape, shape, x.stride(), strict=True)]
    return x.as_strided(tuple(shape), strides, x.storage_offset())


def channel_vector(labels: Labels, x: Tensor, dim: int) -> Tensor:
    """Labels along one dimension, shape (C,), united over all others."""
    dim %= x.dim()
    if any(d != dim for d in varying(x)):
        x = labels.tie(x, [d for d in range(x.dim()) if d != dim])
    return x.as_strided((x.shape[dim],), (x.stride(dim),), x.storage_offset())


def constant_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that depend on parameters, buffers and literals alone; `x.new_zeros(3, 4)` takes only its type from x."""
    constant: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "get_attr":
            constant.add(node)
        elif node.op == "call_function":
            sources = node.all_input_nodes
            typed = getattr(node.target, "overloadpacket", None) in _NEW and all(s is node.args[0] for s in sources)
            if typed or all(source in constant for source in sources):
                constant.add(node)
    return constant


_NEW = {getattr(torch.ops.aten, f"new_{kind}") for kind in ("zeros", "ones", "full", "empty")}


def find_labels(graph: Graph, attention: str = "width", norms: str = "keep") -> Labels:
    """Interpret a graph on labels.

    Args:
        attention: `width` cuts the width inside all heads alike, `heads` cuts whole heads.
        norms: `keep` pins channels that a layer norm normalises, since its statistics would change; `refit` lets them
            be cut, and the norm take its statistics over those that are kept.
    """
    from .rules import apply_rule

    labels = Labels(graph, attention, norms)
    labels._constant = constant_nodes(graph.module.graph)
    labels._first_names = _first_names(graph)
    for node in graph.module.graph.nodes:
        labels.node = node
        if node.op == "placeholder":
            labels.values[node] = unlabelled(node.meta["spec"])
        elif node not in labels._constant:
            labels.values[node] = apply_rule(labels, node)
    return labels


def _first_names(graph: Graph) -> dict[str, str]:
    """For every name of a tensor that has several, the first one."""
    seen: dict[int, str] = {}
    names = {name: seen.setdefault(id(places[0][1]), name) for name, places in graph.owners().items()}
    return {name: first for name, first in names.items() if name != first}


def unlabelled(spec: Any) -> Any:
    """Labels of something that may not be cut: the shape of a spec, all pinned; a size stays an int."""
    if isinstance(spec, TensorSpec):
        return zeros(spec.shape)
    if isinstance(spec, (tuple, list)):
        return tuple(unlabelled(item) for item in spec)
    return spec
