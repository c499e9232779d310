"""Pointwise operations: operands are united position by position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

from ..graph import TensorSpec
from ..labels import Labels, collapse, varying, zeros
from ..nodes import shape_of


def pointwise(labels: Labels, node: fx.Node) -> Any:
    """Unite the operands position by position; a dimension that an operand only broadcasts over is not tied."""
    sources = [n for n in node.all_input_nodes if isinstance(n.meta["spec"], TensorSpec)]
    moving = [n for n in sources if not labels.is_constant(n)]
    spec = node.meta["spec"]
    shape = spec.shape if isinstance(spec, TensorSpec) else spec[0].shape
    read = [labels.read(n) for n in moving]
    if len(sources) == 1 and read and read[0].shape == shape:
        return read[0]
    result = _meet(labels, [align(r, shape) for r in read], shape)
    for constant in sources:
        if labels.is_constant(constant):
            adopt(labels, labels.representative(constant), result)
    return result


def align(operand: Tensor, shape: Sequence[int]) -> Tensor:
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


def adopt(labels: Labels, constant: fx.Node, result: Tensor) -> None:
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
