"""Cutting classes of channels out of a graph: slicing parameters, and rewriting the constants that hold sizes.

`apply_cut(groups, dead)` builds a new graph; the old one is left as it is. Nothing here decides what to cut, and
nothing is believed: `verify.prove_cut` compares the result with the masked network before it is used.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, fx, nn

from .errors import CutError
from .graph import Graph, TensorSpec, remove_dead_code
from .groups import BoolArray, Groups, tensors
from .labels import IntArray
from .rewrites import REWRITES, fit_layer, rescale


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
        for node, value in tensors(self.labels):
            if not self.kept[groups.vector(value)].any():
                raise CutError(f"the cut would leave {node.name} without a channel", hint="keep at least one")

    # -- what stays of a tensor -----------------------------------------------------------------------------

    def axis(self, node: fx.Node) -> tuple[int, BoolArray] | None:
        """Cut dimension of a node's tensor and which of its channels stay; None where all stay."""
        found = self.groups.channels(node)
        if found is None:
            return None
        stays = self.kept[found[1]]
        return None if stays.all() else (found[0], stays)

    def mask(self, labels: Tensor) -> Tensor | None:
        """True where a position stays, in a shape that broadcasts against the tensor; None where all stay."""
        found = self.groups.axis(labels)
        if found is None or self.kept[found[1]].all():
            return None
        shape = [1] * labels.dim()
        shape[found[0]] = -1
        return torch.from_numpy(self.kept[found[1]]).view(shape)

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
        cuts: dict[str, dict[int, BoolArray]] = {}
        for slot, vector in self.labels.slots.items():
            stays = self.kept[self.groups.vector(vector)]
            if not stays.all():
                cuts.setdefault(slot.name, {})[slot.dim] = stays
        for node, value in self.labels.constants.items():
            found = self.groups.axis(value)
            if found is not None and not self.kept[found[1]].all():
                name = str(node.target) if node.op == "get_attr" else f"%{node.name}"
                cuts.setdefault(name, {})[found[0]] = self.kept[found[1]]
        computed = {f"%{node.name}": node for node in self._computed(cuts)}
        values = {name: self.labels.constant_value(node) for name, node in computed.items()}
        shared = _aliases(twin.module)
        for name, dims in cuts.items():
            if name not in computed:
                fresh = _sliced(twin.tensor(name), dims)
                for alias in shared.get(name, [name]):
                    twin.set_tensor(alias, fresh)
                shared_parameter(twin, shared.get(name, [name]))
        for name, node in computed.items():
            _fold(twin, node, nodes[node.name], _sliced(values[name], cuts.get(name, {})))

    def _computed(self, cuts: dict[str, dict[int, BoolArray]]) -> list[fx.Node]:
        """Computed constants that are cut, or that are computed from a parameter that is."""
        frontier = []
        for node in self.groups.graph.module.graph.nodes:
            if node.op == "get_attr" or not self.labels.is_constant(node):
                continue
            if not any(not self.labels.is_constant(user) for user in node.users):
                continue
            if f"%{node.name}" in cuts or any(str(s.target) in cuts for s in _sources(node)):
                frontier.append(node)
        return frontier

    def _rewrite(self, twin: Graph, node: fx.Node, new: fx.Node) -> None:
        """Bring one node's constants, layer and shape in line with what stays."""
        if new.op == "call_module":
            fit_layer(twin.module.get_submodule(str(new.target)), self, node)
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
        shape[found[0]] = int(self.kept[found[1]].sum())
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


def _sliced(tensor: Tensor, dims: dict[int, BoolArray]) -> Tensor:
    """The tensor with only the indices that stay along each of `dims`."""
    tensor = tensor.detach()
    for dim, stays in sorted(dims.items(), key=lambda item: item[1].mean()):
        tensor = tensor.index_select(dim, torch.from_numpy(np.flatnonzero(stays)))
    return tensor if dims else tensor.clone()


def _aliases(module: nn.Module) -> dict[str, list[str]]:
    """Names of parameters that are one and the same tensor."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: group for group in names.values() for name in group if len(group) > 1}


def shared_parameter(twin: Graph, names: list[str]) -> None:
    """Make names that held one tensor hold one tensor again."""
    first = twin.tensor(names[0])
    for name in names[1:]:
        owner, _, leaf = name.rpartition(".")
        setattr(twin.module.get_submodule(owner), leaf, first)


def _fold(twin: Graph, node: fx.Node, new: fx.Node, value: Tensor) -> None:
    """Put the value of a computed constant in its place, trainable where what it was computed from was."""
    name = f"{node.name}_folded"
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
