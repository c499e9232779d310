"""The label rules: one row of a table for each operation and layer.

Five families cover nearly everything (see `FAMILIES` and `LAYER_RULES` at the end):

    pointwise    operands are united position by position (`torch.Tag.pointwise`)
    movement     the same ATen op runs on the labels
    along a dim  pooling, norms, softmax, reductions: channels pass, or are tied where the op mixes them
    producer     convolution, linear, embedding: read channels, give out fresh atoms (`mixing.py`)
    contraction  matmul, einsum, attention: shared dimensions are united (`mixing.py`)

An operation in none of them pins what it reads and is named: it never guesses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import operator
import torch
from torch import Tensor, fx

from . import mixing
from .graph import TensorSpec
from .labels import Labels, _unlabelled, along, collapse, compress, shape_of, varies, varying, zeros

Rule = Callable[[Labels, fx.Node], Any]


def apply_rule(labels: Labels, node: fx.Node) -> Any:
    """Labels of one node, by the rule of its operation."""
    if node.op == "call_module":
        return layer_rule(labels, node)
    if node.op == "output":
        return network_output(labels, node)
    rule = rule_of(node.target)
    return (rule or unknown)(labels, node)


def rule_of(target: Any) -> Rule | None:
    """The rule of a function, None where there is none."""
    if not isinstance(target, torch._ops.OpOverload):
        return size_arithmetic if target is not operator.getitem else getitem
    if torch.Tag.pointwise in target.tags:
        return pointwise
    return FAMILIES.get(target._schema.name.removeprefix("aten::"))


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument by its position or its name in the op's schema."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def unknown(labels: Labels, node: fx.Node) -> Any:
    """An operation without a rule: what it reads is pinned."""
    labels.unknown.append(node)
    for source in node.all_input_nodes:
        if isinstance(source.meta.get("spec"), TensorSpec):
            labels.pin(labels.read(source), f"{node.target} has no label rule")
    return _unlabelled(node.meta["spec"])


def network_output(labels: Labels, node: fx.Node) -> None:
    """What the network returns keeps its shape."""
    for source in node.all_input_nodes:
        if isinstance(source.meta.get("spec"), TensorSpec):
            labels.pin(labels.read(source), "is an output of the network")
    labels.readers[node] = tuple(node.all_input_nodes)


# -- pointwise ------------------------------------------------------------------------------------------------


def pointwise(labels: Labels, node: fx.Node) -> Any:
    """Unite the operands position by position; a dimension that an operand only broadcasts over is not tied."""
    sources = [n for n in node.all_input_nodes if isinstance(n.meta["spec"], TensorSpec)]
    moving = [n for n in sources if not labels.is_constant(n)]
    spec = node.meta["spec"]
    shape = spec.shape if isinstance(spec, TensorSpec) else spec[0].shape
    read = [labels.read(n) for n in moving]
    if len(sources) == 1 and read and read[0].shape == shape:
        return read[0]
    result = _meet(labels, [_align(r, shape) for r in read], shape)
    for constant in sources:
        if labels.is_constant(constant):
            _adopt(labels, labels.representative(constant), result)
    return result


def _align(operand: Tensor, shape: Sequence[int]) -> Tensor:
    """The same labels with leading dimensions of size 1, so that dimensions correspond."""
    missing = len(shape) - operand.dim()
    return operand[(None,) * missing] if missing else operand


def _meet(labels: Labels, operands: list[Tensor], shape: Sequence[int]) -> Tensor:
    """Labels of the result of a pointwise op on operands of equal rank."""
    moving = [o for o in operands if varying(o)]
    if not moving:
        live = [o for o in operands if o.numel() and int(collapse(o).reshape(-1)[0])]
        for other in live[1:]:
            labels.unite(collapse(live[0]), collapse(other))
        return (live[0] if live else zeros((1,) * len(shape))).expand(tuple(shape))
    lead = max(moving, key=lambda o: o.numel() if len(varying(o)) else 0)
    channels = varying(lead)
    for other in operands:
        if other is lead:
            continue
        spans = any(other.shape[d] > 1 for d in channels)
        if spans and not varying(other) and not bool(collapse(other).any()):
            labels.pin(lead, "meets a tensor whose channels cannot be cut")
            lead = zeros((1,) * len(shape))
        elif varying(other) or spans:
            labels.unite(other.expand(tuple(shape)), lead.expand(tuple(shape)))
        else:
            labels.pin(other, "has one channel that is broadcast over many")
    return lead.expand(tuple(shape))


def _adopt(labels: Labels, constant: fx.Node, result: Tensor) -> None:
    """A constant operand takes over the labels of what it meets, in its own shape."""
    shape = shape_of(constant)
    if all(n == 1 for n in shape):
        return
    missing = result.dim() - len(shape)
    broadcast = [d for d in range(result.dim()) if d < missing or shape[d - missing] == 1]
    own = labels.tie(result, broadcast)
    for d in broadcast:
        own = own.narrow(d, 0, 1)
    own = own[(0,) * missing] if missing else own
    if constant in labels.constants:
        labels.unite(labels.constants[constant], own)
    else:
        labels.constants[constant] = own


# -- movement -------------------------------------------------------------------------------------------------


def same(labels: Labels, node: fx.Node) -> Any:
    """Ops that change neither shape nor place: copies, casts, dropout."""
    return labels.read(node.args[0])


def movement(labels: Labels, node: fx.Node) -> Any:
    """Run the same op on the labels."""
    args = fx.map_arg(node.args, labels.read)
    kwargs = fx.map_arg(node.kwargs, labels.read)
    if node.target in _VIEWS:
        return _reshape(args[0], node.meta["spec"].shape)
    moved: Any = node.target(*args, **kwargs)  # type: ignore[operator]
    if isinstance(moved, Tensor):
        return compress(moved) if moved.numel() > 4096 and moved.is_contiguous() else moved
    return tuple(moved)


def _reshape(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Reshape; dimensions at either end that keep their size and along which nothing changes are not copied."""
    before, after = 0, 0
    limit = min(x.dim(), len(shape))
    while before < limit and x.shape[before] == shape[before] and not varies(x, before):
        before += 1
    while after < limit - before and x.shape[-1 - after] == shape[-1 - after] and not varies(x, x.dim() - 1 - after):
        after += 1
    inner = x[(0,) * before]
    inner = inner[(..., *(0,) * after)] if after else inner
    inner = inner.reshape(tuple(shape)[before : len(shape) - after])
    if inner.numel() > 4096 and inner.is_contiguous():
        inner = compress(inner)
    return inner[(None,) * before + (...,) + (None,) * after].expand(tuple(shape))


_VIEWS = {
    torch.ops.aten.view.default,
    torch.ops.aten._unsafe_view.default,
    torch.ops.aten.reshape.default,
    torch.ops.aten.view_as.default,
    torch.ops.aten.reshape_as.default,
}


def permutation_along(labels: Labels, node: fx.Node) -> Any:
    """roll and flip: nothing happens along dimensions where labels do not change."""
    x = labels.read(node.args[0])
    dims = argument(node, 2 if "roll" in str(node.target) else 1, "dims", [])
    if dims and not any(varies(x, d % x.dim()) for d in dims):
        return x
    if "roll" in str(node.target):
        labels.pin(x, "is rolled along its channels")
    return movement(labels, node)


def expand(labels: Labels, node: fx.Node) -> Any:
    """A dimension of size 1 that is expanded may be expanded to fewer: it gets atoms of its own."""
    x, shape = labels.read(node.args[0]), shape_of(node)
    x = _align(x, shape)
    grown = [d for d in range(1, len(shape)) if x.shape[d] == 1 and shape[d] > 1]
    if len(grown) == 1 and not varying(x) and not bool(collapse(x).any()):
        return labels.fresh(shape, grown[0])
    return x.expand(shape)


def concatenate(labels: Labels, node: fx.Node) -> Any:
    """cat and stack; where labels change along other dimensions, the pieces are tied across the joined one."""
    shape = shape_of(node)
    dim = int(argument(node, 1, "dim", 0)) % len(shape)
    stacking = "stack" in str(node.target)
    pieces = [_piece(labels, source, dim, stacking) for source in node.args[0]]  # type: ignore[union-attr]
    pieces = [piece for piece in pieces if piece.numel()]
    if any(d != dim for piece in pieces for d in varying(piece)):
        first = labels.tie(pieces[0], [dim]).narrow(dim, 0, 1)
        for piece in pieces[1:]:
            labels.unite(first, labels.tie(piece, [dim]).narrow(dim, 0, 1))
        return first.expand(shape)
    vectors = [piece.as_strided((piece.shape[dim],), (piece.stride(dim),), piece.storage_offset()) for piece in pieces]
    return along(torch.cat(vectors), dim, shape)


def _piece(labels: Labels, source: Any, dim: int, stacking: bool) -> Tensor:
    """Labels of one operand of a concatenation; an unbound constant gets atoms along the joined dimension alone."""
    if labels.is_constant(source) and labels.representative(source) not in labels.constants and not stacking:
        shape = shape_of(source)
        if len(shape) > dim:
            labels.constants[labels.representative(source)] = labels.fresh(shape, dim)
    piece: Tensor = labels.read(source)
    return piece.unsqueeze(dim) if stacking else piece


def index(labels: Labels, node: fx.Node) -> Any:
    """Gather by constant indices; computed indices may gather only along dimensions that are not labelled."""
    x, indices = labels.read(node.args[0]), node.args[1]
    indexed = [d for d, i in enumerate(indices) if i is not None]  # type: ignore[arg-type]
    if not any(varies(x, d) for d in indexed) and len(indexed) == 1 and len(shape_of(indices[indexed[0]])) == 1:  # type: ignore[index]
        return collapse_dim(x, indexed[0]).expand(shape_of(node))
    if not all(i is None or labels.is_constant(i) for i in indices):  # type: ignore[union-attr]
        return unknown(labels, node)
    real = [None if i is None else labels.constant_value(i) for i in indices]  # type: ignore[union-attr]
    return compress(torch.ops.aten.index.Tensor(x, real))


def index_select(labels: Labels, node: fx.Node) -> Any:
    """Gather along one dimension by constant indices."""
    x, dim = labels.read(node.args[0]), int(node.args[1]) % len(shape_of(node))  # type: ignore[arg-type]
    if not varies(x, dim):
        return collapse_dim(x, dim).expand(shape_of(node))
    if not labels.is_constant(node.args[2]):
        return unknown(labels, node)
    return compress(x.index_select(dim, labels.constant_value(node.args[2])))  # type: ignore[arg-type]


def collapse_dim(x: Tensor, dim: int) -> Tensor:
    """The labels with one dimension cut down to size 1."""
    return x.narrow(dim, 0, 1)


def pad(labels: Labels, node: fx.Node) -> Any:
    """Padding along channels with a constant makes new channels, which get atoms of their own."""
    x, shape = labels.read(node.args[0]), shape_of(node)
    amounts: Any = node.args[1]
    touched = [x.dim() - 1 - i // 2 for i, n in enumerate(amounts) if n != 0]
    moving = [d for d in set(touched) if varies(x, d)]
    if not moving:
        return _restride(x, shape)
    mode = argument(node, 2, "mode", "constant") if "constant" not in str(node.target) else "constant"
    if mode != "constant" or len(varying(x)) > 1:
        labels.pin(x, f"is padded along its channels (mode {mode})")
        return zeros(shape)
    (dim,) = moving
    before, after = amounts[2 * (x.dim() - 1 - dim)], amounts[2 * (x.dim() - 1 - dim) + 1]
    vector = x.as_strided((x.shape[dim],), (x.stride(dim),), x.storage_offset())
    kept = vector[max(0, -before) : len(vector) - max(0, -after)]
    pieces = [labels.atoms_vector(max(0, before)), kept, labels.atoms_vector(max(0, after))]
    return along(torch.cat(pieces), dim, shape)


def _restride(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Labels that do not change along the dimensions whose size differs, in the new shape."""
    strides = [0 if n != m else s for n, m, s in zip(x.shape, shape, x.stride(), strict=True)]
    return x.as_strided(tuple(shape), strides, x.storage_offset())


def pixel_shuffle(labels: Labels, node: fx.Node) -> Any:
    """(C r^2, H, W) -> (C, H r, W r): the r^2 channels of one output channel live together."""
    x, shape = labels.read(node.args[0]), shape_of(node)
    vector = mixing.channel_vector(labels, x, x.dim() - 3).view(shape[-3], -1)
    return along(labels.tie(vector, [1])[:, 0], len(shape) - 3, shape)


def pixel_unshuffle(labels: Labels, node: fx.Node) -> Any:
    """(C, H r, W r) -> (C r^2, H, W): each channel becomes r^2 that live together."""
    x, shape = labels.read(node.args[0]), shape_of(node)
    vector = mixing.channel_vector(labels, x, x.dim() - 3)
    return along(vector.repeat_interleave(shape[-3] // len(vector)), len(shape) - 3, shape)


def channel_shuffle(labels: Labels, node: fx.Node) -> Any:
    """The native channel shuffle moves position j of every group: groups are tied."""
    x, groups = labels.read(node.args[0]), int(node.args[1])  # type: ignore[arg-type]
    grid = labels.tie(mixing.channel_vector(labels, x, 1).view(groups, -1), [0])
    return along(grid.t().reshape(-1), 1, shape_of(node))


def im2col(labels: Labels, node: fx.Node) -> Any:
    """(B, C, H, W) -> (B, C kh kw, L): each channel is repeated for every tap."""
    x, shape = labels.read(node.args[0]), shape_of(node)
    vector = mixing.channel_vector(labels, x, 1)
    return along(vector.repeat_interleave(shape[1] // len(vector)), 1, shape)


def col2im(labels: Labels, node: fx.Node) -> Any:
    """(B, C kh kw, L) -> (B, C, H, W): the taps of a channel are summed, so they live together."""
    x, shape = labels.read(node.args[0]), shape_of(node)
    vector = mixing.channel_vector(labels, x, 1).view(shape[1], -1)
    return along(labels.tie(vector, [1])[:, 0], 1, shape)


def getitem(labels: Labels, node: fx.Node) -> Any:
    """One of the outputs of an op."""
    return labels.read(node.args[0])[node.args[1]]


def size_arithmetic(labels: Labels, node: fx.Node) -> Any:
    """Arithmetic on symbolic sizes: the value on the example inputs."""
    return node.meta["spec"]


def factory(labels: Labels, node: fx.Node) -> Any:
    """zeros, ones, full ... of a shape that follows the batch: a constant, cut by asking for a smaller one."""
    shape = shape_of(node)
    rest = shape[1:]
    if not rest or all(n == 1 for n in rest) or torch.Size(rest).numel() > 65536:
        return zeros(shape)
    return labels.fresh(rest).expand(shape)


def like(labels: Labels, node: fx.Node) -> Any:
    """zeros_like, ones_like ...: as large as what they are like."""
    return labels.read(node.args[0])


# -- along a dimension ----------------------------------------------------------------------------------------


def spatial(count: int) -> Rule:
    """Rule for ops on the last `count` dimensions (pooling, interpolation): channels pass."""

    def rule(labels: Labels, node: fx.Node) -> Any:
        x = labels.read(node.args[0])
        x = labels.tie(x, range(x.dim() - count, x.dim()))
        spec = node.meta["spec"]
        if isinstance(spec, TensorSpec):
            return _restride_last(x, spec.shape, count)
        return tuple(_restride_last(x, item.shape, count) for item in spec)

    return rule


def _restride_last(x: Tensor, shape: Sequence[int], count: int) -> Tensor:
    stride = [*x.stride()[: x.dim() - count], *([0] * count)]
    return x.as_strided(tuple(shape), stride, x.storage_offset())


def softmax(labels: Labels, node: fx.Node) -> Any:
    """Positions that are normalised against each other live and die together."""
    x = labels.read(node.args[0])
    return labels.tie(x, [int(node.args[1]) % x.dim()])  # type: ignore[arg-type]


def glu(labels: Labels, node: fx.Node) -> Any:
    """First half times the sigmoid of the second half along a dimension."""
    x = labels.read(node.args[0])
    dim = int(argument(node, 1, "dim", -1)) % x.dim()
    first, second = x.chunk(2, dim)
    labels.unite(first, second)
    return first


def reduction(kind: str) -> Rule:
    """Rule for reductions over dimensions.

    A sum, and a p-norm, over cut channels loses only zeros; a mean is rescaled by the share that is kept; anything
    else (a maximum, a variance) would change its result, so its channels are pinned. Of two labelled dimensions the
    inner one is taken for the channels (the width of the heads), as in `groups.py`.
    """

    def rule(labels: Labels, node: fx.Node) -> Any:
        x = labels.read(node.args[0])
        dims, keep = _reduced(node, kind, x.dim())
        moving = [d for d in dims if varies(x, d)]
        if moving:
            others = [d for d in varying(x) if d not in dims]
            summed = kind != "other" and (not others or (max(moving) > max(others) and labels.attention == "width"))
            if kind == "other":
                labels.pin(x, f"{node.target} over the channels would change its result")
            elif summed:
                labels.readers[node] = (node.args[0],)  # type: ignore[assignment]
                if kind == "mean":
                    labels.rescaled[node] = x
            else:
                labels.tie(x, dims)
            if kind == "other" or summed:
                return _unlabelled(node.meta["spec"])
        for d in sorted(dims, reverse=True):
            x = x.narrow(d, 0, 1) if keep else x.select(d, 0)
        spec = node.meta["spec"]
        return x if isinstance(spec, TensorSpec) else tuple(x for _ in spec)

    return rule


def _reduced(node: fx.Node, kind: str, rank: int) -> tuple[list[int], bool]:
    """Dimensions over which a reduction runs, and whether it keeps them with size 1."""
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    given: Any = None
    for name in ("dim", "dims"):
        if name in names:
            given = argument(node, names.index(name), name)
    keep = bool(argument(node, names.index("keepdim"), "keepdim", False)) if "keepdim" in names else False
    if given is None or given == []:
        return list(range(rank)), keep
    return [int(d) % rank for d in ([given] if isinstance(given, int) else given)], keep


def along_dim(labels: Labels, node: fx.Node) -> Any:
    """cumsum, sort and the like: fine along dimensions that are not labelled."""
    x = labels.read(node.args[0])
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    dim = int(argument(node, names.index("dim"), "dim", -1)) % x.dim()
    if varies(x, dim):
        labels.pin(x, f"{node.target} runs along the channels")
        return _unlabelled(node.meta["spec"])
    spec = node.meta["spec"]
    if isinstance(spec, TensorSpec):
        return _restride(x, spec.shape)
    return tuple(_restride(x, item.shape) for item in spec)


# -- norms ----------------------------------------------------------------------------------------------------


def batch_norm_op(labels: Labels, node: fx.Node) -> Any:
    """Functional batch or instance norm: channel by channel."""
    x = labels.read(node.args[0])
    vector = mixing.channel_vector(labels, x, 1)
    for parameter in node.args[1:5]:
        if isinstance(parameter, fx.Node):
            _adopt(labels, labels.representative(parameter), vector)
    return along(vector, 1, x.shape)


def layer_norm_op(labels: Labels, node: fx.Node) -> Any:
    """Functional layer or RMS norm."""
    return normalized(labels, node, len(node.args[1]), [a for a in node.args[2:4] if isinstance(a, fx.Node)])  # type: ignore[arg-type]


def normalized(labels: Labels, node: fx.Node, count: int, parameters: Sequence[fx.Node] = ()) -> Tensor:
    """Layer or RMS norm over the last `count` dimensions: its statistics run over all channels.

    So none can go, or (`norms="refit"`) the statistics are those of the channels that stay.
    """
    x: Tensor = labels.read(node.args[0])
    dims = range(x.dim() - count, x.dim())
    if any(varies(x, d) for d in dims):
        if labels.norms == "refit" and varying(x) == [x.dim() - 1]:
            labels.refitted[node] = x
        else:
            labels.pin(x, "is normalised over its channels, whose statistics would change")
            x = zeros(x.shape)
    for parameter in parameters:
        _adopt(labels, labels.representative(parameter), x)
    return x


def group_norm_op(labels: Labels, node: fx.Node) -> Any:
    """Functional group norm."""
    vector, result = grouped_norm(labels, node, int(node.args[1]))  # type: ignore[arg-type]
    for parameter in node.args[2:4]:
        if isinstance(parameter, fx.Node):
            _adopt(labels, labels.representative(parameter), vector)
    return result


def grouped_norm(labels: Labels, node: fx.Node, groups: int) -> tuple[Tensor, Tensor]:
    """Group norm: whole groups can go, their statistics are their own. Returns the channel vector and the labels."""
    x = labels.read(node.args[0])
    vector = mixing.channel_vector(labels, x, 1)
    if groups == 1 and varying(vector) and labels.norms == "refit":
        result = along(vector, 1, x.shape)
        labels.refitted[node] = result
        return vector, result
    if groups == 1 and varying(vector):
        labels.pin(vector, "is normalised over all its channels, whose statistics would change")
        return zeros(vector.shape), zeros(x.shape)
    vector = labels.tie(vector.view(groups, -1), [1]).reshape(-1)
    return vector, along(vector, 1, x.shape)


# -- layers ---------------------------------------------------------------------------------------------------


def layer_rule(labels: Labels, node: fx.Node) -> Any:
    """Labels of a `call_module` node, by the type of its layer."""
    layer = labels.graph.layer(node)
    rule = LAYER_RULES.get(type(layer).__name__)
    return rule(labels, node, layer, str(node.target)) if rule else unknown(labels, node)


def per_channel(*tensors: str, dim: int = 1) -> Callable[..., Any]:
    """Layers that work channel by channel and own one value per channel under each of the names given."""

    def rule(labels: Labels, node: fx.Node, layer: Any, path: str) -> Any:
        x = labels.read(node.args[0])
        channels = getattr(layer, "dim", dim)
        vector = mixing.channel_vector(labels, x, channels)
        for name in tensors:
            value = getattr(layer, name, None)
            if value is not None and value.numel() == len(vector) > 1:
                labels.bind(f"{path}.{name}", 0, vector)
        return along(vector, channels % x.dim(), x.shape)

    return rule


def group_norm_layer(labels: Labels, node: fx.Node, layer: Any, path: str) -> Any:
    """torch.nn.GroupNorm."""
    vector, result = grouped_norm(labels, node, layer.num_groups)
    for name in ("weight", "bias"):
        if getattr(layer, name) is not None:
            labels.bind(f"{path}.{name}", 0, vector)
    return result


def layer_norm_layer(labels: Labels, node: fx.Node, layer: Any, path: str) -> Any:
    """torch.nn.LayerNorm and RMSNorm."""
    x = normalized(labels, node, len(layer.normalized_shape))
    if node in labels.refitted:
        for name in ("weight", "bias"):
            if getattr(layer, name, None) is not None:
                labels.bind(f"{path}.{name}", 0, mixing.channel_vector(labels, x, x.dim() - 1))
    return x


def same_layer(labels: Labels, node: fx.Node, layer: Any, path: str) -> Any:
    """Dropout and Identity."""
    return labels.read(node.args[0])


def embedding_layer(labels: Labels, node: fx.Node, layer: Any, path: str) -> Any:
    """torch.nn.Embedding: fresh atoms along the embedding dimension."""
    vector = labels.atoms_vector(layer.embedding_dim)
    labels.bind(f"{path}.weight", 1, vector)
    shape = shape_of(node)
    return along(vector, len(shape) - 1, shape)


LAYER_RULES: dict[str, Callable[..., Any]] = {
    **{f"Conv{n}d": mixing.convolution_layer for n in (1, 2, 3)},
    **{f"ConvTranspose{n}d": mixing.convolution_layer for n in (1, 2, 3)},
    **{f"BatchNorm{n}d": per_channel("weight", "bias", "running_mean", "running_var") for n in (1, 2, 3)},
    **{f"InstanceNorm{n}d": per_channel("weight", "bias", "running_mean", "running_var") for n in (1, 2, 3)},
    **{f"Dropout{n}": same_layer for n in ("", "1d", "2d", "3d")},
    "AlphaDropout": same_layer,
    "FeatureAlphaDropout": same_layer,
    "Identity": same_layer,
    "Linear": mixing.linear_layer,
    "GroupNorm": group_norm_layer,
    "LayerNorm": layer_norm_layer,
    "RMSNorm": layer_norm_layer,
    "PReLU": per_channel("weight"),
    "ChannelMask": per_channel("mask"),
    "Embedding": embedding_layer,
}

FAMILIES: dict[str, Rule] = {
    **dict.fromkeys(
        ("hardswish", "where", "masked_fill", "rsub", "floor_divide", "log_sigmoid", "fill", "remainder", "logit"),
        pointwise,
    ),
    **dict.fromkeys(
        ("contiguous", "clone", "to", "_to_copy", "type_as", "dropout", "alias", "detach", "feature_dropout", "lift_fresh")
        + ("alpha_dropout", "feature_alpha_dropout", "_cast_Float", "_cast_Half", "native_dropout", "rrelu"),
        same,
    ),
    **dict.fromkeys(
        ("view", "reshape", "_unsafe_view", "view_as", "reshape_as", "permute", "transpose", "t", "flatten", "unflatten")
        + ("unsqueeze", "squeeze", "movedim", "moveaxis", "swapaxes", "swapdims", "numpy_T", "mT", "T", "select", "slice")
        + ("narrow", "split", "split_with_sizes", "chunk", "tensor_split", "unbind", "unfold", "diagonal", "tile", "repeat")
        + ("repeat_interleave", "slice_scatter", "select_scatter", "unsafe_split", "unsafe_chunk", "hsplit", "vsplit"),
        movement,
    ),
    "roll": permutation_along,
    "flip": permutation_along,
    "expand": expand,
    "expand_as": expand,
    "broadcast_to": expand,
    "cat": concatenate,
    "concat": concatenate,
    "concatenate": concatenate,
    "stack": concatenate,
    "index": index,
    "index_select": index_select,
    "pad": pad,
    "constant_pad_nd": pad,
    **{f"{mode}_pad{n}d": pad for mode in ("reflection", "replication") for n in (1, 2, 3)},
    "pixel_shuffle": pixel_shuffle,
    "pixel_unshuffle": pixel_unshuffle,
    "channel_shuffle": channel_shuffle,
    "im2col": im2col,
    "col2im": col2im,
    **dict.fromkeys(("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty", "arange"), factory),
    **dict.fromkeys(("zeros_like", "ones_like", "full_like", "empty_like"), like),
    **{f"{kind}_pool{n}d": spatial(n) for kind in ("max", "avg", "adaptive_avg", "adaptive_max", "lp") for n in (1, 2, 3)},
    **{f"_{kind}_pool{n}d": spatial(n) for kind in ("adaptive_avg",) for n in (2, 3)},
    **{f"max_pool{n}d_with_indices": spatial(n) for n in (1, 2, 3)},
    **{f"upsample_{mode}{n}d": spatial(n) for mode in ("nearest", "nearest_exact") for n in (1, 2, 3)},
    **{f"_upsample_nearest_exact{n}d": spatial(n) for n in (1, 2, 3)},
    **dict.fromkeys(("upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"), spatial(2)),
    "upsample_linear1d": spatial(1),
    "upsample_trilinear3d": spatial(3),
    **dict.fromkeys(("softmax", "_softmax", "log_softmax", "_log_softmax"), softmax),
    "glu": glu,
    **dict.fromkeys(("sum", "linalg_vector_norm", "norm", "frobenius_norm"), reduction("sum")),
    "mean": reduction("mean"),
    **dict.fromkeys(
        ("amax", "amin", "max", "min", "var", "std", "var_mean", "std_mean", "prod", "argmax", "argmin", "logsumexp", "all", "any")
        + ("median", "nanmean"),
        reduction("other"),
    ),
    **dict.fromkeys(("cumsum", "cumprod", "sort", "topk", "argsort", "cummax"), along_dim),
    "batch_norm": batch_norm_op,
    "instance_norm": batch_norm_op,
    "layer_norm": layer_norm_op,
    "native_layer_norm": layer_norm_op,
    "rms_norm": layer_norm_op,
    "group_norm": group_norm_op,
    **{f"conv{n}d": mixing.convolution_op for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": mixing.convolution_op for n in (1, 2, 3)},
    "convolution": mixing.convolution_op,
    "_convolution": mixing.convolution_op,
    "linear": mixing.linear_op,
    **dict.fromkeys(("matmul", "bmm", "mm"), mixing.matmul),
    "einsum": mixing.einsum,
    "scaled_dot_product_attention": mixing.attention,
    "sym_size": size_arithmetic,
}
