"""Data movement: the same ATen op runs on the labels, or a shortcut of equal result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..labels import (
    Labels,
    along,
    channel_vector,
    collapse,
    compress,
    restride,
    varies,
    varying,
    zeros,
)
from ..nodes import arguments, call, shape_of
from .pointwise import align


def same(labels: Labels, node: fx.Node) -> Any:
    """Ops that change neither shape nor place: copies, casts, dropout."""
    return labels.read(node.args[0])


def movement(labels: Labels, node: fx.Node) -> Any:
    """Run the same op on the labels."""
    if node.target in _VIEWS:
        return _reshape(labels.read(node.args[0]), shape_of(node))
    args: Any = fx.map_arg(node.args, labels.read)
    kwargs: Any = fx.map_arg(node.kwargs, labels.read)
    moved = call(node, *args, **kwargs)
    if isinstance(moved, Tensor):
        return compress(moved) if moved.is_contiguous() else moved
    return tuple(moved)


def _reshape(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Reshape; dimensions at either end that keep their size and along which nothing changes are not copied."""
    before, after = 0, 0
    limit = min(x.dim(), len(shape))
    while before < limit and x.shape[before] == shape[before] and not varies(x, before):
        before += 1
    while after < limit - before and x.shape[-1 - after] == shape[-1 - after] and not varies(x, x.dim() - 1 - after):
        after += 1
    for dim in (*range(before), *range(x.dim() - after, x.dim())):
        x = x.narrow(dim, 0, 1)
    inner = [1] * before + list(shape[before : len(shape) - after]) + [1] * after
    x = x.reshape(inner)
    if x.is_contiguous():
        x = compress(x)
    return x.expand(tuple(shape))


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
    dims = arguments(node)["dims"]
    if dims and not any(varies(x, d % x.dim()) for d in dims):
        return x
    if "roll" in str(node.target):
        labels.pin(x, "is rolled along its channels")
    return movement(labels, node)


def expand(labels: Labels, node: fx.Node) -> Any:
    """A dimension of size 1 that is expanded may be expanded to fewer: it gets atoms of its own."""
    x, shape = labels.read(node.args[0]), shape_of(node)
    x = align(x, shape)
    grown = [d for d in range(1, len(shape)) if x.shape[d] == 1 and shape[d] > 1]
    if len(grown) == 1 and not varying(x) and not bool(collapse(x).any()):
        return labels.fresh(shape, grown[0])
    return x.expand(shape)


def concatenate(labels: Labels, node: fx.Node) -> Any:
    """cat and stack; where labels change along other dimensions, the pieces are tied across the joined one."""
    shape = shape_of(node)
    dim = arguments(node)["dim"] % len(shape)
    stacking = "stack" in str(node.target)
    pieces = [_piece(labels, source, dim, stacking) for source in arguments(node)["tensors"]]
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
    x, indices = labels.read(node.args[0]), arguments(node)["indices"]
    indexed = [d for d, i in enumerate(indices) if i is not None]
    one_list = len(indexed) == 1 and len(shape_of(indices[indexed[0]])) == 1
    if one_list and not varies(x, indexed[0]):
        return collapse_dim(x, indexed[0]).expand(shape_of(node))
    if not all(i is None or labels.is_constant(i) for i in indices):
        return labels.unknown_operation(node)
    real = [None if i is None else labels.constant_value(i) for i in indices]
    return compress(torch.ops.aten.index.Tensor(x, real))


def index_select(labels: Labels, node: fx.Node) -> Any:
    """Gather along one dimension by constant indices."""
    given = arguments(node)
    x, dim = labels.read(node.args[0]), given["dim"] % len(shape_of(node))
    if not varies(x, dim):
        return collapse_dim(x, dim).expand(shape_of(node))
    if not labels.is_constant(given["index"]):
        return labels.unknown_operation(node)
    return compress(x.index_select(dim, labels.constant_value(given["index"])))


def collapse_dim(x: Tensor, dim: int) -> Tensor:
    """The labels with one dimension cut down to size 1."""
    return x.narrow(dim, 0, 1)


def pad(labels: Labels, node: fx.Node) -> Any:
    """Padding along channels with a constant makes new channels, which get atoms of their own."""
    x, shape = labels.read(node.args[0]), shape_of(node)
    amounts = next(v for k, v in arguments(node).items() if k in ("pad", "padding"))
    touched = [x.dim() - 1 - i // 2 for i, n in enumerate(amounts) if n != 0]
    moving = [d for d in set(touched) if varies(x, d)]
    if not moving:
        return restride(x, shape)
    mode = arguments(node).get("mode", "constant")
    if mode != "constant" or len(varying(x)) > 1:
        labels.pin(x, f"is padded along its channels (mode {mode})")
        return zeros(shape)
    (dim,) = moving
    before, after = amounts[2 * (x.dim() - 1 - dim)], amounts[2 * (x.dim() - 1 - dim) + 1]
    vector = x.as_strided((x.shape[dim],), (x.stride(dim),), x.storage_offset())
    kept = vector[max(0, -before) : len(vector) - max(0, -after)]
    pieces = [labels.atoms_vector(max(0, before)), kept, labels.atoms_vector(max(0, after))]
    return along(torch.cat(pieces), dim, shape)


def pixel_shuffle(labels: Labels, node: fx.Node) -> Any:
    """(C r^2, H, W) -> (C, H r, W r): the r^2 channels of one output channel live together."""
    x, shape = labels.read(node.args[0]), shape_of(node)
    vector = channel_vector(labels, x, x.dim() - 3).view(shape[-3], -1)
    return along(labels.tie(vector, [1])[:, 0], len(shape) - 3, shape)


def pixel_unshuffle(labels: Labels, node: fx.Node) -> Any:
    """(C, H r, W r) -> (C r^2, H, W): each channel becomes r^2 that live together."""
    x, shape = labels.read(node.args[0]), shape_of(node)
    vector = channel_vector(labels, x, x.dim() - 3)
    return along(vector.repeat_interleave(shape[-3] // len(vector)), len(shape) - 3, shape)


def channel_shuffle(labels: Labels, node: fx.Node) -> Any:
    """The native channel shuffle moves position j of every group: groups are tied."""
    x, groups = labels.read(node.args[0]), arguments(node)["groups"]
    grid = labels.tie(channel_vector(labels, x, 1).view(groups, -1), [0])
    return along(grid.t().reshape(-1), 1, shape_of(node))


def im2col(labels: Labels, node: fx.Node) -> Any:
    """(B, C, H, W) -> (B, C kh kw, L): each channel is repeated for every tap."""
    x, shape = labels.read(node.args[0]), shape_of(node)
    vector = channel_vector(labels, x, 1)
    return along(vector.repeat_interleave(shape[1] // len(vector)), 1, shape)


def col2im(labels: Labels, node: fx.Node) -> Any:
    """(B, C kh kw, L) -> (B, C, H, W): the taps of a channel are summed, so they live together."""
    x, shape = labels.read(node.args[0]), shape_of(node)
    vector = channel_vector(labels, x, 1).view(shape[1], -1)
    return along(labels.tie(vector, [1])[:, 0], 1, shape)


def getitem(labels: Labels, node: fx.Node) -> Any:
    """One of the outputs of an op."""
    return labels.read(node.args[0])[node.args[1]]


def size_arithmetic(_labels: Labels, node: fx.Node) -> Any:
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
