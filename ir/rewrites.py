"""What a cut changes in a node besides its tensors: sizes that layers state, and constants that ops hold.

Each rule brings one node `new` of the new graph in line with what stays of the tensors of its original `node`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx, nn

from .errors import CutError
from .graph import TensorSpec
from .labels import IntArray, Slot
from .nodes import arguments, operand, set_argument, shape_of

if TYPE_CHECKING:
    from .cut import Cut

aten = torch.ops.aten


def fit_layer(layer: nn.Module, cut: Cut, node: fx.Node) -> None:
    """Set the sizes that a layer states to those of its sliced tensors; one that is called twice is fitted twice."""
    for types, fit in FITS.items():
        if isinstance(layer, types):
            fit(layer, cut, node)


def _fit_convolution(layer: Any, cut: Cut, node: fx.Node) -> None:
    if layer.groups > 1 and layer.groups == layer.in_channels:
        layer.groups = _kept_inputs(cut, node, layer.in_channels)
    first, second = layer.weight.shape[0], layer.weight.shape[1] * layer.groups
    layer.in_channels, layer.out_channels = (first, second) if getattr(layer, "transposed", False) else (second, first)


def _fit_linear(layer: Any, _cut: Cut, _node: fx.Node) -> None:
    layer.out_features, layer.in_features = layer.weight.shape


def _fit_embedding(layer: Any, _cut: Cut, _node: fx.Node) -> None:
    layer.num_embeddings, layer.embedding_dim = layer.weight.shape


def _fit_group_norm(layer: Any, cut: Cut, node: fx.Node) -> None:
    size = layer.num_channels // layer.num_groups
    layer.num_channels = _kept_inputs(cut, node, layer.num_channels)
    layer.num_groups = max(1, layer.num_channels // size)  # a single group that is refitted stays one


def _fit_layer_norm(layer: Any, cut: Cut, node: fx.Node) -> None:
    if node in cut.labels.refitted:
        layer.normalized_shape = (_kept_inputs(cut, node, layer.normalized_shape[0]),)


def _fit_batch_norm(layer: Any, cut: Cut, node: fx.Node) -> None:
    layer.num_features = _kept_inputs(cut, node, layer.num_features)


def _fit_prelu(layer: Any, _cut: Cut, _node: fx.Node) -> None:
    layer.num_parameters = layer.weight.shape[0]


def _fit_own(layer: Any, cut: Cut, node: fx.Node) -> None:
    """Layers of fxpress.runtime, which this package may not import."""
    if hasattr(layer, "mask"):  # ChannelMask, SelectionMask
        layer.channels = layer.mask.shape[0]
    if hasattr(layer, "codebook"):  # PQLinear, PQConv2d
        _fit_quantized(layer, cut, node)
    if hasattr(layer, "binary_weight"):  # BinaryLinear, BinaryConv2d
        _fit_binary(layer, cut, node)
    if hasattr(layer, "weight_scale"):  # Int8Linear, Int8Conv2d
        (_fit_convolution if hasattr(layer, "groups") else _fit_linear)(layer, cut, node)


def _fit_quantized(layer: Any, cut: Cut, node: fx.Node) -> None:
    """Outputs are columns of the indices; inputs the sub-spaces that stay, of which the last may be ragged."""
    old: Any = cut.groups.graph.layer(node)
    widths = np.full(len(old.codebook), old.subspace)
    widths[-1] = old.last_width
    slot = cut.labels.slots.get(Slot(cut.labels.first_name(f"{node.target}.codebook"), 0))
    stays = slice(None) if slot is None else cut.stays(cut.groups.vector(slot))
    layer.fit(inputs=int(widths[stays].sum()), outputs=layer.indices.shape[2])


def _fit_binary(layer: Any, cut: Cut, node: fx.Node) -> None:
    """The sizes, and the values of the weights that stay: their common factor is a mean over those that were there."""
    whole: Any = cut.groups.graph.layer(node)
    if hasattr(layer, "groups") and layer.groups == layer.in_channels > 1:
        layer.groups = _kept_inputs(cut, node, layer.in_channels)
    if layer.weight.shape == whole.weight.shape:
        return
    name = cut.labels.first_name(f"{node.target}.weight")
    slots = [cut.labels.slots.get(Slot(name, dim)) for dim in (0, 1)]
    layer.keep(whole, *(None if slot is None else cut.indices(cut.groups.vector(slot)) for slot in slots))
    outputs, inputs = layer.weight.shape[:2]
    if hasattr(layer, "groups"):
        layer.in_channels, layer.out_channels = inputs * layer.groups, outputs
    else:
        layer.in_features, layer.out_features = inputs, outputs


FITS: dict[Any, Callable[[Any, Cut, fx.Node], None]] = {
    nn.modules.conv._ConvNd: _fit_convolution,
    nn.Linear: _fit_linear,
    nn.Embedding: _fit_embedding,
    nn.GroupNorm: _fit_group_norm,
    (nn.LayerNorm, nn.RMSNorm): _fit_layer_norm,
    nn.modules.batchnorm._NormBase: _fit_batch_norm,
    nn.PReLU: _fit_prelu,
    nn.Module: _fit_own,
}


def _kept_inputs(cut: Cut, node: fx.Node, count: int) -> int:
    """Channels that stay of a node's first input; a layer that was already fitted (shared) gives the same again."""
    found = cut.axis(operand(node))
    return count if found is None else int(found[1].sum())


def sizes(cut: Cut, node: fx.Node, new: fx.Node) -> None:
    """view, expand, zeros: the size along the cut dimension."""
    found = cut.axis(node)
    if found is None:
        return
    dim, stays = found
    stated = arguments(new)
    name = "shape" if "shape" in stated else "size"
    given = list(stated[name])
    if given[dim] != -1:
        given[dim] = _scaled(new, given[dim], int(stays.sum()), len(stays))
        set_argument(new, name, given)


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
    stated = arguments(new)
    given, at = list(stated["sizes"]), stated["dim"] % len(shape_of(operand(node)))
    if at <= dim < at + len(given) and given[dim - at] != -1:
        given[dim - at] = _scaled(new, given[dim - at], int(stays.sum()), len(stays))
        set_argument(new, "sizes", given)


def split(cut: Cut, node: fx.Node, new: fx.Node) -> None:
    """split, chunk: explicit sizes of the pieces."""
    pieces: Any = cut.labels.values[node]
    source = cut.axis(operand(node))
    dim = arguments(node)["dim"] % pieces[0].dim()
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
    source = cut.axis(operand(node))
    dim = arguments(node)["dim"] % len(shape_of(node))
    if source is None or source[0] != dim:
        return
    stays = source[1]
    positions = np.arange(len(stays))[_window(node, len(stays))]
    rank_of = np.cumsum(stays) - 1
    wanted = rank_of[positions[stays[positions]]]
    if len(wanted) and (np.diff(wanted) != 1).any():
        _gathered(new, dim, wanted)
        return
    begin = int(wanted[0]) if len(wanted) else 0
    if node.target is aten.narrow.default:
        new.args = (new.args[0], dim, begin, len(wanted))
    else:
        new.target, new.kwargs = aten.slice.Tensor, {}
        new.args = (new.args[0], dim, begin, begin + len(wanted), 1)


def _window(node: fx.Node, length: int) -> slice:
    """The positions that slice or narrow takes."""
    given = arguments(node)
    if node.target is aten.narrow.default:
        start = given["start"] % length
        return slice(start, start + given["length"])
    return slice(given["start"], given["end"], given["step"])


def _gathered(new: fx.Node, dim: int, wanted: IntArray) -> None:
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
    source = cut.axis(operand(node))
    given = arguments(node)
    dim = given["dim"] % len(shape_of(node))
    if source is None or source[0] != dim:
        return
    stays = source[1]
    start, end, step = slice(given["start"], given["end"], given["step"]).indices(len(stays))
    if step != 1:
        raise CutError(f"{node.name} writes every {step}th channel, which cannot be cut")
    new.args = (*new.args[:2], dim, int(stays[:start].sum()), int(stays[:end].sum()), 1)
    new.kwargs = {}


def select(cut: Cut, node: fx.Node, new: fx.Node) -> None:
    """select(x, dim, index): the index among what stays."""
    source = cut.axis(operand(node))
    given = arguments(node)
    dim = given["dim"] % len(shape_of(operand(node)))
    if source is not None and source[0] == dim:
        position = given["index"] % len(source[1])
        new.update_arg(2, int(source[1][:position].sum()))


def gather(cut: Cut, node: fx.Node, new: fx.Node) -> None:
    """index and index_select with constant indices along the cut dimension."""
    source, result, stated = cut.axis(operand(node)), cut.axis(node), arguments(node)
    if source is None:
        return
    dim, stays = source
    if node.target is aten.index_select.default:
        indexed, indices = stated["dim"] % len(shape_of(node)), stated["index"]
    else:
        listed = stated["indices"]
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
    _gathered(new, dim, wanted)


def pad(cut: Cut, node: fx.Node, new: fx.Node) -> None:
    """Padding along channels: how many of the new channels stay on either side."""
    found = cut.axis(node)
    amounts = list(arguments(node)["pad"])
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
    count = arguments(node)["groups"]
    source = cut.axis(operand(node))
    if source is not None and count > 1 and count == len(source[1]):
        set_argument(new, "groups", int(source[1].sum()))


def group_norm(cut: Cut, node: fx.Node, new: fx.Node) -> None:
    """Functional group norm: whole groups have gone."""
    source = cut.axis(operand(node))
    if source is not None:
        size = len(source[1]) // arguments(node)["num_groups"]
        new.update_arg(1, max(1, int(source[1].sum()) // size))


def layer_norm(cut: Cut, node: fx.Node, new: fx.Node) -> None:
    """Functional layer or RMS norm over what stays."""
    source = cut.axis(operand(node))
    if source is not None and node in cut.labels.refitted:
        new.update_arg(1, [int(source[1].sum())])


def attention(cut: Cut, node: fx.Node, new: fx.Node) -> None:
    """The default scale of attention, 1/sqrt(width), stays that of the original width."""
    source, shape = cut.axis(operand(node)), shape_of(operand(node))
    if source is not None and source[0] == len(shape) - 1 and arguments(node)["scale"] is None:
        new.update_kwarg("scale", float(shape[-1]) ** -0.5)


def spread_out(cut: Cut, node: fx.Node, new: fx.Node) -> None:
    """A filter along the channels reads zeros where channels have gone; what stays of its result is taken behind it."""
    found = cut.axis(operand(node))
    if found is None:
        return
    dim, stays = found
    graph, source, width = new.graph, operand(new), int(stays.sum())
    places = np.where(stays, np.cumsum(stays) - 1, width)  # dead channels take the zero behind the last one
    with graph.inserting_before(new):
        padded = graph.call_function(aten.constant_pad_nd.default, (source, [0, 1]))
        spread = graph.call_function(aten.index_select.default, (padded, dim, None))
    new.replace_input_with(source, spread)
    users = list(new.users)
    with graph.inserting_after(new):
        kept = graph.call_function(aten.index_select.default, (new, dim, None))
    for user in users:
        user.replace_input_with(new, kept)
    dtype = node.meta["spec"].dtype
    for made, size in ((padded, width + 1), (spread, len(stays)), (kept, width)):
        shape = (*shape_of(node)[:dim], size, *shape_of(node)[dim + 1 :])
        made.meta["spec"] = TensorSpec(shape, dtype)
    for made, wanted in ((spread, places), (kept, np.flatnonzero(stays))):
        made.update_arg(2, _index_buffer(made, wanted))


def rescale(cut: Cut, node: fx.Node, new: fx.Node) -> None:
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


Rewrite = Callable[[Any, fx.Node, fx.Node], None]

REWRITES: dict[Any, Rewrite] = {
    **dict.fromkeys((aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default), sizes),
    **dict.fromkeys((aten.broadcast_to.default, aten.zeros.default, aten.ones.default, aten.full.default), sizes),
    **dict.fromkeys(
        (aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.empty.memory_format), sizes
    ),
    aten.unflatten.int: unflatten,
    **dict.fromkeys((aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.split.sizes), split),
    **dict.fromkeys((aten.slice.Tensor, aten.narrow.default), slices),
    aten.slice_scatter.default: slice_scatter,
    aten.select.int: select,
    **dict.fromkeys((aten.index.Tensor, aten.index_select.default), gather),
    **dict.fromkeys((aten.pad.default, aten.constant_pad_nd.default), pad),
    **dict.fromkeys((aten.conv1d.default, aten.conv2d.default, aten.conv3d.default), convolution),
    **dict.fromkeys((aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding), convolution),
    **dict.fromkeys(
        (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input), convolution
    ),
    aten.group_norm.default: group_norm,
    **dict.fromkeys((aten.layer_norm.default, aten.rms_norm.default), layer_norm),
    aten.scaled_dot_product_attention.default: attention,
}
