"""Cutting classes of channels out of a graph: slicing parameters, and rewriting the constants that hold sizes.

`apply_cut(groups, dead)` builds a new graph; the old one is left as it is. Nothing here decides what to cut, and
nothing is believed: `verify.prove_cut` compares the result with the masked network before it is used.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, fx, nn

from .errors import CutError
from .families.producers import constant_name
from .graph import Graph, TensorSpec, remove_dead_code, submodule
from .groups import BoolArray, Groups
from .labels import IntArray
from .rewrites import REWRITES, fit_layer, rescale, spread_out


def apply_cut(groups: Groups, dead: IntArray, author: str = "cut") -> Graph:
    """A copy of the graph without the channels of the classes `dead`.

    Raises:
        CutError: a class may not be cut, a tensor would lose all its channels, or a node cannot be rewritten.
    """
    return Cut(groups, dead).apply(author)


class Cut:
    """A set of classes to remove from the graph of `groups`."""

    def __init__(self, groups: Groups, dead: IntArray) -> None:
        self.groups, self.labels = groups, groups.labels
        self.kept: BoolArray = np.ones(groups.count, dtype=bool)
        self.kept[dead] = False
        if not self.kept[groups.locked].all():
            raise CutError(f"{int((~self.kept & groups.locked).sum())} of the {len(dead)} classes to cut are locked")
        self._stays: dict[int, tuple[BoolArray, bool, Tensor]] = {}
        self._vectors: list[IntArray] = []
        for node, vector in {id(vector): (node, vector) for node, vector in groups.held}.values():
            if len(vector) and not self.stays(vector).any():
                hint = "Keep at least one channel of every tensor."
                raise CutError(f"the cut would leave {node.name} without a channel", hint=hint)

    # -- what stays of a tensor -----------------------------------------------------------------------------

    def _look_up(self, vector: IntArray) -> tuple[BoolArray, bool, Tensor]:
        """Of a vector of classes: which stay, whether all do, and the indices of those that do."""
        known = self._stays.get(id(vector))
        if known is None:
            stays = self.kept[vector]
            known = (stays, bool(stays.all()), torch.from_numpy(stays.nonzero()[0]))
            self._stays[id(vector)] = known
            self._vectors.append(vector)  # an id is good for as long as its object lives
        return known

    def stays(self, vector: IntArray) -> BoolArray:
        """Which entries of a vector of classes stay."""
        return self._look_up(vector)[0]

    def indices(self, vector: IntArray) -> Tensor | None:
        """Positions of a vector of classes that stay, None where all do."""
        _, whole, indices = self._look_up(vector)
        return None if whole else indices

    def axis(self, node: fx.Node) -> tuple[int, BoolArray] | None:
        """Cut dimension of a node's tensor and which of its channels stay; None where all stay."""
        found = self.groups.channels(node)
        return None if found is None or self.indices(found[1]) is None else (found[0], self.stays(found[1]))

    def mask(self, labels: Tensor) -> Tensor | None:
        """True where a position stays, in a shape that broadcasts against the tensor; None where all stay."""
        found = self.groups.axis(labels)
        if found is None or self.indices(found[1]) is None:
            return None
        shape = [1] * labels.dim()
        shape[found[0]] = -1
        return torch.from_numpy(self.stays(found[1])).view(shape)

    # -- the new graph --------------------------------------------------------------------------------------

    def apply(self, author: str) -> Graph:
        """Build the graph without the dead channels."""
        twin = self.groups.graph.copy(compiled=False)
        nodes = {node.name: node for node in twin.module.graph.nodes}
        self._slice_tensors(twin, nodes)
        for node in self.groups.graph.module.graph.nodes:
            self._rewrite(twin, node, nodes[node.name])
        remove_dead_code(twin.module)
        twin.module.recompile()
        twin.epoch += 1
        twin.history.append(author)
        return twin

    def _slice_tensors(self, twin: Graph, nodes: dict[str, fx.Node]) -> None:
        """Slice parameters and buffers; computed constants are replaced by their sliced value."""
        cuts: dict[str, dict[int, Tensor]] = {}
        for slot, labels in self.labels.slots.items():
            indices = self.indices(self.groups.vector(labels))
            if indices is not None:
                cuts.setdefault(slot.name, {})[slot.dim] = indices
        for node, value in self.labels.constants.items():
            found = self.groups.axis(value)
            indices = None if found is None else self.indices(found[1])
            if found is not None and indices is not None:
                cuts.setdefault(constant_name(node), {})[found[0]] = indices
        computed = {constant_name(node): node for node in self._computed(cuts)}
        values = {name: self.labels.constant_value(node) for name, node in computed.items()}
        owners = twin.owners()
        for name, dims in cuts.items():
            if name not in computed:
                _replace(owners[name], _sliced(owners[name][0][1], dims))
        for name, node in computed.items():
            _fold(twin, node, nodes[node.name], _sliced(values[name], cuts.get(name, {})))

    def _computed(self, cuts: dict[str, dict[int, Tensor]]) -> list[fx.Node]:
        """Computed constants that are cut, or that are computed from a parameter that is."""
        frontier = []
        for node in self.groups.graph.module.graph.nodes:
            if node.op == "get_attr" or not self.labels.is_constant(node):
                continue
            if not any(not self.labels.is_constant(user) for user in node.users):
                continue
            if constant_name(node) in cuts or any(str(s.target) in cuts for s in _sources(node)):
                frontier.append(node)
        return frontier

    def _rewrite(self, twin: Graph, node: fx.Node, new: fx.Node) -> None:
        """Bring one node's constants, layer and shape in line with what stays."""
        if node in self.labels.slides:
            spread_out(self, node, new)
            return  # it still sees, and gives out, as many channels as before
        if new.op == "call_module":
            fit_layer(submodule(twin.module, str(new.target)), self, node)
        elif new.op == "call_function" and not self.labels.is_constant(node):
            rule = REWRITES.get(new.target)
            if rule is not None:
                rule(self, node, new)
            if node in self.labels.rescaled:
                rescale(self, node, new)
        self._resize(node, new)

    def _resize(self, node: fx.Node, new: fx.Node) -> None:
        """Shapes after the cut; the widest count of channels a node ever had is remembered."""
        value = self.labels.constants.get(node, self.labels.values.get(node))
        if isinstance(value, tuple):
            new.meta["spec"] = tuple(
                self._spec(v, s) if isinstance(v, Tensor) else s for v, s in zip(value, node.meta["spec"], strict=True)
            )
        elif isinstance(value, Tensor) and isinstance(node.meta["spec"], TensorSpec):
            new.meta["spec"] = self._spec(value, node.meta["spec"])
            found = self.groups.axis(value)
            if found is not None:
                new.meta.setdefault("channels_before", len(found[1]))

    def _spec(self, value: Tensor, spec: TensorSpec) -> TensorSpec:
        found = self.groups.axis(value)
        if found is None:
            return spec
        shape = list(spec.shape)
        shape[found[0]] = int(self.stays(found[1]).sum())
        return TensorSpec(tuple(shape), spec.dtype)


def _sources(node: fx.Node) -> list[fx.Node]:
    """Parameters and buffers that a constant is computed from."""
    seen: dict[fx.Node, None] = {}
    stack = [node]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in seen:
                seen[source] = None
                stack.append(source)
    return [source for source in seen if source.op == "get_attr"]


def _sliced(tensor: Tensor, dims: dict[int, Tensor]) -> Tensor:
    """The tensor with only the given indices along each of `dims`."""
    tensor = tensor.detach()
    for dim, indices in dims.items():
        tensor = tensor.index_select(dim, indices)
    return tensor


def _replace(places: list[tuple[nn.Module, Tensor, str]], value: Tensor) -> None:
    """Put one tensor in all places of another; a parameter is replaced by one parameter, shared as before."""
    old = places[0][1]
    if isinstance(old, nn.Parameter):
        value = nn.Parameter(value, requires_grad=old.requires_grad)
    for module, _, leaf in places:
        (module._parameters if isinstance(old, nn.Parameter) else module._buffers)[leaf] = value  # type: ignore[assignment]


def _fold(twin: Graph, node: fx.Node, new: fx.Node, value: Tensor) -> None:
    """Put the value of a computed constant in its place, trainable where what it was computed from was."""
    name, value = f"{node.name}_folded", value.clone()  # a view of a parameter must not be trained with it
    trainable = value.is_floating_point() and any(
        isinstance(twin.tensor(str(s.target)), nn.Parameter) for s in _sources(new)
    )
    if trainable:
        twin.module.register_parameter(name, nn.Parameter(value))
    else:
        twin.module.register_buffer(name, value)
    with twin.module.graph.inserting_before(new):
        constant = twin.module.graph.get_attr(name)
    constant.meta = {**node.meta, "spec": TensorSpec(tuple(value.shape), value.dtype)}
    new.replace_all_uses_with(constant)
