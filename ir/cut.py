"""Cutting classes of channels out of a graph: slicing parameters, and rewriting the constants that hold sizes.

`apply_cut(groups, dead)` builds a new graph; the old one is left as it is. Nothing here decides what to cut, and
nothing is believed: `verify.prove_cut` compares the result with the masked network before it is used.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from .errors import CutError
from .graph import Graph, TensorSpec, remove_dead_code
from .groups import BoolArray, Groups, tensors
from .labels import IntArray

aten = torch.ops.aten


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
                _rescale(self, node, new)
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


# -- layers -------------------------------------------------------------------------------------------------


def fit_layer(layer: nn.Module, cut: Cut, node: fx.Node) -> None:
    """Set the sizes that a layer states to those of its sliced tensors."""
    weight: Any = getattr(layer, "weight", None)
    if isinstance(layer, nn.modules.conv._ConvNd):
        if layer.groups > 1 and layer.groups == layer.in_channels:
            layer.groups = _kept_inputs(cut, node, layer.in_channels)
        first, second = weight.shape[0], weight.shape[1] * layer.groups
        layer.in_channels, layer.out_channels = (first, second) if layer.transposed else (second, first)
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = weight.shape
    elif isinstance(layer, nn.Embedding):
        layer.num_embeddings, layer.embedding_dim = weight.shape
    elif isinstance(layer, nn.GroupNorm):
        size = layer.num_channels // layer.num_groups
        layer.num_channels = _kept_inputs(cut, node, layer.num_channels)
        layer.num_groups = max(1, layer.num_channels // size)  # a single group that is refitted stays one
    elif isinstance(layer, (nn.LayerNorm, nn.RMSNorm)):
        if node in cut.labels.refitted:
            layer.normalized_shape = (_kept_inputs(cut, node, layer.normalized_shape[0]),)
    elif isinstance(layer, (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)):
        layer.num_features = _kept_inputs(cut, node, layer.num_features)
    elif isinstance(layer, nn.PReLU):
        layer.num_parameters = weight.shape[0]
    elif type(layer).__name__ == "ChannelMask":
        layer.channels = _kept_inputs(cut, node, int(layer.channels))  # type: ignore[assignment, arg-type]


def _kept_inputs(cut: Cut, node: fx.Node, count: int) -> int:
    """Channels that stay of a node's first input; a layer that was already fitted (shared) gives the same again."""
    found = cut.axis(node.args[0])  # type: ignore[arg-type]
    return count if found is None else int(found[1].sum())


# -- constants of nodes -------------------------------------------------------------------------------------


def _argument(node: fx.Node, name: str) -> tuple[int | None, Any]:
    """Position and value of a schema argument; position None where it is a keyword or left out."""
    for position, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if argument.name == name:
            if position < len(node.args):
                return position, node.args[position]
            return None, node.kwargs.get(name, argument.default_value)
    return None, None


def _set(node: fx.Node, name: str, value: Any) -> None:
    position, _ = _argument(node, name)
    if position is None:
        node.update_kwarg(name, value)
    else:
        node.update_arg(position, value)


def sizes(cut: Cut, node: fx.Node, new: fx.Node) -> None:
    """view, expand, zeros: the size along the cut dimension."""
    found = cut.axis(node)
    if found is None:
        return
    dim, stays = found
    name = "shape" if _argument(node, "shape")[1] is not None else "size"
    given = list(_argument(new, name)[1])
    offset = len(node.meta["spec"].shape) - len(given)  # `repeat`-like ops may state more, never fewer
    if given[dim - offset] != -1:
        given[dim - offset] = _scaled(new, given[dim - offset], int(stays.sum()), len(stays))
        _set(new, name, given)


def _scaled(new: fx.Node, size: Any, kept: int, total: int) -> Any:
    """A size times kept/total: a number, or arithmetic on a symbolic size."""
    if not isinstance(size, fx.Node):
        return int(size) * kept // total
    graph = new.graph
    value = int(size.meta["spec"])
    with graph.inserting_before(new):
        product = graph.call_function(operator.mul, (size, kept))
        result = graph.call_function(operator.floordiv, (product, total))
    product.meta["spec"], result.meta["spec"] = value * kept, value * kept // total
    return result


def unflatten(cut: Cut, node: fx.Node, new: fx.Node) -> None:
    """unflatten(x, dim, sizes): the one of the new dimensions that is cut."""
    found = cut.axis(node)
    if found is None:
        return
    dim, stays = found
    given = list(_argument(new, "sizes")[1])
    at = int(_argument(new, "dim")[1]) % len(node.args[0].meta["spec"].shape)  # type: ignore[union-attr]
    if at <= dim < at + len(given) and given[dim - at] != -1:
        given[dim - at] = _scaled(new, given[dim - at], int(stays.sum()), len(stays))
        _set(new, "sizes", given)


def split(cut: Cut, node: fx.Node, new: fx.Node) -> None:
    """split, chunk: explicit sizes of the pieces."""
    pieces: Any = cut.labels.values[node]
    source = cut.axis(node.args[0])  # type: ignore[arg-type]
    dim = int(_argument(node, "dim")[1] or 0) % pieces[0].dim()
    if source is None or source[0] != dim:
        return
    widths = []
    for piece in pieces:
        mask = cut.mask(piece)
        widths.append(piece.shape[dim] if mask is None else int(mask.sum()))
    new.target = aten.split_with_sizes.default
    new.args, new.kwargs = (new.args[0], widths, dim), {}


def slices(cut: Cut, node: fx.Node, new: fx.Node) -> None:
    """slice, narrow: where the piece begins and ends among what stays."""
    source = cut.axis(node.args[0])  # type: ignore[arg-type]
    rank = len(node.args[0].meta["spec"].shape)  # type: ignore[union-attr]
    dim = int(_argument(node, "dim")[1] or 0) % rank
    if source is None or source[0] != dim:
        return
    stays = source[1]
    positions = np.arange(len(stays))[_window(node, len(stays))]
    rank_of = np.cumsum(stays) - 1
    wanted = rank_of[positions[stays[positions]]]
    if len(wanted) and (np.diff(wanted) != 1).any():
        return _gathered(cut, new, dim, wanted)
    begin = int(wanted[0]) if len(wanted) else 0
    if node.target is aten.narrow.default:
        new.args = (new.args[0], dim, begin, len(wanted))
    else:
        new.target, new.kwargs = aten.slice.Tensor, {}
        new.args = (new.args[0], dim, begin, begin + len(wanted), 1)


def _window(node: fx.Node, length: int) -> slice:
    """The positions that slice or narrow takes."""
    if node.target is aten.narrow.default:
        start = int(node.args[2]) % length  # type: ignore[arg-type]
        return slice(start, start + int(node.args[3]))  # type: ignore[arg-type]
    return slice(_argument(node, "start")[1], _argument(node, "end")[1], _argument(node, "step")[1] or 1)


def _gathered(cut: Cut, new: fx.Node, dim: int, wanted: IntArray) -> None:
    """Positions that are no range any more are gathered by index."""
    new.target, new.kwargs = aten.index_select.default, {}
    new.args = (new.args[0], dim, _index_buffer(new, wanted))


def _index_buffer(new: fx.Node, wanted: IntArray) -> fx.Node:
    """A buffer of indices in front of a node."""
    module: Any = new.graph.owning_module
    name = f"{new.name}_index"
    module.register_buffer(name, torch.from_numpy(np.ascontiguousarray(wanted)), persistent=False)
    with new.graph.inserting_before(new):
        constant = new.graph.get_attr(name)
    constant.meta["spec"] = TensorSpec((len(wanted),), torch.int64)
    return constant


def slice_scatter(cut: Cut, node: fx.Node, new: fx.Node) -> None:
    """slice_scatter(x, src, dim, start, end): where the piece goes among what stays."""
    source = cut.axis(node.args[0])  # type: ignore[arg-type]
    dim = int(_argument(node, "dim")[1] or 0) % len(node.meta["spec"].shape)
    if source is None or source[0] != dim:
        return
    stays = source[1]
    start, end, step = slice(*(_argument(node, name)[1] for name in ("start", "end", "step"))).indices(len(stays))
    if step != 1:
        raise CutError(f"{node.name} writes every {step}th channel, which cannot be cut")
    new.args = (*new.args[:2], dim, int(stays[:start].sum()), int(stays[:end].sum()), 1)
    new.kwargs = {}


def select(cut: Cut, node: fx.Node, new: fx.Node) -> None:
    """select(x, dim, index): the index among what stays."""
    source = cut.axis(node.args[0])  # type: ignore[arg-type]
    dim = int(node.args[1]) % len(node.args[0].meta["spec"].shape)  # type: ignore[arg-type, union-attr]
    if source is not None and source[0] == dim:
        position = int(node.args[2]) % len(source[1])  # type: ignore[arg-type]
        new.update_arg(2, int(source[1][:position].sum()))


def gather(cut: Cut, node: fx.Node, new: fx.Node) -> None:
    """index and index_select with constant indices along the cut dimension."""
    source, result = cut.axis(node.args[0]), cut.axis(node)  # type: ignore[arg-type]
    if source is None:
        return
    dim, stays = source
    if node.target is aten.index_select.default:
        indexed, indices = int(node.args[1]) % len(node.meta["spec"].shape), node.args[2]  # type: ignore[arg-type]
    else:
        listed: Any = node.args[1]
        given = [d for d, i in enumerate(listed) if i is not None]
        if dim not in given:
            return
        if len(given) > 1:
            raise CutError(f"{node.name} gathers along several dimensions, one of which is cut")
        indexed, indices = dim, listed[dim]
    if indexed != dim:
        return
    old = cut.labels.constant_value(indices).numpy()
    if old.ndim != 1:
        raise CutError(f"{node.name} gathers channels with indices of shape {old.shape}", hint="ignore its group")
    old = old % len(stays)
    wanted = (np.cumsum(stays) - 1)[old[stays[old]]]
    assert result is None or len(wanted) == int(result[1].sum())
    _gathered(cut, new, dim, wanted)


def pad(cut: Cut, node: fx.Node, new: fx.Node) -> None:
    """Padding along channels: how many of the new channels stay on either side."""
    found = cut.axis(node)
    amounts = list(node.args[1])  # type: ignore[arg-type]
    rank = len(node.meta["spec"].shape)
    if found is None or 2 * (rank - 1 - found[0]) >= len(amounts):
        return
    dim, stays = found
    at = 2 * (rank - 1 - dim)
    before, after = amounts[at], amounts[at + 1]
    if before > 0:
        amounts[at] = int(stays[:before].sum())
    if after > 0:
        amounts[at + 1] = int(stays[len(stays) - after :].sum())
    if min(before, after) < 0:
        raise CutError(f"{node.name} crops channels by padding {before}, {after}", hint="ignore its group")
    new.update_arg(1, amounts)


def convolution(cut: Cut, node: fx.Node, new: fx.Node) -> None:
    """A functional depthwise convolution has as many groups as channels stay."""
    position, count = _argument(node, "groups")
    source = cut.axis(node.args[0])  # type: ignore[arg-type]
    if source is not None and count > 1 and count == len(source[1]):
        _set(new, "groups", int(source[1].sum()))


def group_norm(cut: Cut, node: fx.Node, new: fx.Node) -> None:
    """Functional group norm: whole groups have gone."""
    source = cut.axis(node.args[0])  # type: ignore[arg-type]
    if source is not None:
        size = len(source[1]) // int(node.args[1])  # type: ignore[arg-type]
        new.update_arg(1, max(1, int(source[1].sum()) // size))


def layer_norm(cut: Cut, node: fx.Node, new: fx.Node) -> None:
    """Functional layer or RMS norm over what stays."""
    source = cut.axis(node.args[0])  # type: ignore[arg-type]
    if source is not None and node in cut.labels.refitted:
        new.update_arg(1, [int(source[1].sum())])


def attention(cut: Cut, node: fx.Node, new: fx.Node) -> None:
    """The default scale of attention, 1/sqrt(width), stays that of the original width."""
    query = node.args[0]
    source = cut.axis(query)  # type: ignore[arg-type]
    width = query.meta["spec"].shape[-1]  # type: ignore[union-attr]
    if source is not None and source[0] == len(query.meta["spec"].shape) - 1 and node.kwargs.get("scale") is None:  # type: ignore[union-attr]
        new.update_kwarg("scale", float(width) ** -0.5)


def _rescale(cut: Cut, node: fx.Node, new: fx.Node) -> None:
    """A mean over cut channels counts the dead ones as zeros: it is multiplied by the share that stays."""
    mask = cut.mask(cut.labels.rescaled[node])
    if mask is None:
        return
    graph = new.graph
    users = list(new.users)
    with graph.inserting_after(new):
        scaled = graph.call_function(aten.mul.Scalar, (new, float(mask.double().mean())))
    scaled.meta = dict(new.meta)
    for user in users:
        user.replace_input_with(new, scaled)


Rewrite = Callable[[Cut, fx.Node, fx.Node], None]

REWRITES: dict[Any, Rewrite] = {
    **dict.fromkeys((aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default), sizes),
    **dict.fromkeys((aten.broadcast_to.default, aten.zeros.default, aten.ones.default, aten.full.default), sizes),
    **dict.fromkeys((aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.empty.memory_format), sizes),
    aten.unflatten.int: unflatten,
    **dict.fromkeys((aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.split.sizes), split),
    **dict.fromkeys((aten.slice.Tensor, aten.narrow.default), slices),
    aten.slice_scatter.default: slice_scatter,
    aten.select.int: select,
    **dict.fromkeys((aten.index.Tensor, aten.index_select.default), gather),
    **dict.fromkeys((aten.pad.default, aten.constant_pad_nd.default), pad),
    **dict.fromkeys((aten.conv1d.default, aten.conv2d.default, aten.conv3d.default), convolution),
    **dict.fromkeys((aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding), convolution),
    **dict.fromkeys((aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input), convolution),
    aten.group_norm.default: group_norm,
    **dict.fromkeys((aten.layer_norm.default, aten.rms_norm.default), layer_norm),
    aten.scaled_dot_product_attention.default: attention,
}
