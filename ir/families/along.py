"""Operations along dimensions: channels pass, or are tied where the operation mixes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx

from ..graph import TensorSpec
from ..labels import Labels, restride, unlabelled, varies, varying
from ..nodes import arguments, operand

Rule = Callable[[Labels, fx.Node], Any]


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
    return labels.tie(x, [arguments(node)["dim"] % x.dim()])


def glu(labels: Labels, node: fx.Node) -> Any:
    """First half times the sigmoid of the second half along a dimension."""
    x = labels.read(node.args[0])
    dim = arguments(node)["dim"] % x.dim()
    first, second = x.chunk(2, dim)
    labels.unite(first, second)
    return first


def reduction(kind: str) -> Rule:
    """Rule for reductions over dimensions.

    A sum, and a p-norm, over cut channels loses only zeros; a mean is rescaled by the share that is kept. With
    `norms="refit"` a mean or variance runs over the channels that stay, as a norm that is written out would. Anything
    else (a maximum) would change its result, so its channels are pinned. Of two labelled dimensions the inner one is
    taken for the channels (the width of the heads), as in `groups.py`.
    """

    def rule(labels: Labels, node: fx.Node) -> Any:
        x = labels.read(node.args[0])
        dims, keep = _reduced(node, x.dim())
        if any(varies(x, d) for d in dims):
            refit = labels.norms == "refit" and kind in ("mean", "variance") and len(varying(x)) == 1
            if refit:
                labels.refitted[node] = x
            elif kind not in ("sum", "mean"):
                labels.pin(x, f"{node.target} over the channels would change its result")
            elif _inner(labels, x, dims):
                labels.readers[node] = (operand(node),)
                if kind == "mean":
                    labels.rescaled[node] = x
            else:
                return _without(labels.tie(x, dims), dims, keep, node)
            return unlabelled(node.meta["spec"])
        return _without(x, dims, keep, node)

    return rule


def _inner(labels: Labels, x: Tensor, dims: Sequence[int]) -> bool:
    """Whether what is reduced is the innermost labelled dimension, the one that cuts run along."""
    others = [d for d in varying(x) if d not in dims]
    innermost = max(d for d in dims if varies(x, d))
    return not others or (innermost > max(others) and labels.attention == "width")


def _without(x: Tensor, dims: Sequence[int], keep: bool, node: fx.Node) -> Any:
    """Labels without the dimensions that are reduced, which they do not change along."""
    for d in sorted(dims, reverse=True):
        x = x.narrow(d, 0, 1) if keep else x.select(d, 0)
    spec = node.meta["spec"]
    return x if isinstance(spec, TensorSpec) else tuple(x for _ in spec)


def _reduced(node: fx.Node, rank: int) -> tuple[list[int], bool]:
    """Dimensions over which a reduction runs, and whether it keeps them with size 1."""
    stated = arguments(node)
    given = stated.get("dim", stated.get("dims"))
    keep = bool(stated.get("keepdim", False))
    if given is None or given == []:
        return list(range(rank)), keep
    return [d % rank for d in ([given] if isinstance(given, int) else given)], keep


def along_dim(labels: Labels, node: fx.Node) -> Any:
    """cumsum, sort and the like: fine along dimensions that are not labelled."""
    x = labels.read(node.args[0])
    dim = arguments(node)["dim"] % x.dim()
    if varies(x, dim):
        labels.pin(x, f"{node.target} runs along the channels")
        return unlabelled(node.meta["spec"])
    spec = node.meta["spec"]
    if isinstance(spec, TensorSpec):
        return restride(x, spec.shape)
    return tuple(restride(x, item.shape) for item in spec)
