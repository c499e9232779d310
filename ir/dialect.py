"""What may stand in a graph: an allow-list of layers and the test for operations.

Layers are plain `torch.nn` classes (fxpress's own register themselves) that are rebuilt from a few JSON values.
Operations are functional ATen (or torchvision) overloads, resolved by name through the dispatcher's schema alone, and a
literal table of functions on sizes. Nothing else can be named by a stored graph, so loading one executes no code of it.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .errors import GraphError

Op = Callable[..., Any]
JSON = Any


@dataclass(frozen=True)
class LayerSpec:
    """A layer type of the dialect.

    Args:
        cls: the class.
        fields: names of the constructor's arguments, each also an attribute of the built layer.
        given: fields whose attribute is a tensor, None where the layer was built without it (`bias=False`).
    """

    cls: type[nn.Module]
    fields: tuple[str, ...]
    given: tuple[str, ...] = ()


_CONV = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "bias")
_TRANSPOSED = (*_CONV[:5], "output_padding", "groups", "bias", "dilation")
_BATCH = ("num_features", "eps", "momentum", "affine", "track_running_stats")

LAYERS: dict[str, LayerSpec] = {
    **{f"Conv{n}d": LayerSpec(getattr(nn, f"Conv{n}d"), _CONV, ("bias",)) for n in (1, 2, 3)},
    **{f"ConvTranspose{n}d": LayerSpec(getattr(nn, f"ConvTranspose{n}d"), _TRANSPOSED, ("bias",)) for n in (1, 2, 3)},
    "Linear": LayerSpec(nn.Linear, ("in_features", "out_features", "bias"), ("bias",)),
    **{f"BatchNorm{n}d": LayerSpec(getattr(nn, f"BatchNorm{n}d"), _BATCH) for n in (1, 2, 3)},
    **{f"InstanceNorm{n}d": LayerSpec(getattr(nn, f"InstanceNorm{n}d"), _BATCH) for n in (1, 2, 3)},
    "GroupNorm": LayerSpec(nn.GroupNorm, ("num_groups", "num_channels", "eps", "affine")),
    "LayerNorm": LayerSpec(nn.LayerNorm, ("normalized_shape", "eps", "elementwise_affine", "bias"), ("bias",)),
    "RMSNorm": LayerSpec(nn.RMSNorm, ("normalized_shape", "eps", "elementwise_affine")),
    "Embedding": LayerSpec(
        nn.Embedding, ("num_embeddings", "embedding_dim", "padding_idx", "scale_grad_by_freq", "sparse")
    ),
    "PReLU": LayerSpec(nn.PReLU, ("num_parameters",)),
    "Dropout": LayerSpec(nn.Dropout, ("p",)),
    "Dropout2d": LayerSpec(nn.Dropout2d, ("p",)),
    "AlphaDropout": LayerSpec(nn.AlphaDropout, ("p",)),
    "FeatureAlphaDropout": LayerSpec(nn.FeatureAlphaDropout, ("p",)),
}


def register_layer(cls: type[nn.Module], fields: tuple[str, ...], given: tuple[str, ...] = ()) -> None:
    """Add a layer type under its class name; `fields` as in `LayerSpec`.

    Raises:
        GraphError: another class has that name already.
    """
    known = LAYERS.get(cls.__name__)
    if known is not None and known.cls is not cls:
        raise GraphError(f"layer name {cls.__name__!r} belongs to {known.cls.__module__} already")
    LAYERS[cls.__name__] = LayerSpec(cls, fields, given)


def layer_name(layer: nn.Module) -> str:
    """Name of a layer's type in `LAYERS`.

    Raises:
        GraphError: the class is not in the dialect (a subclass does not count as its parent).
    """
    name = type(layer).__name__
    spec = LAYERS.get(name)
    if spec is None or spec.cls is not type(layer):
        raise GraphError(
            f"layer type {type(layer).__module__}.{name} is not in the dialect",
            hint="Register it with fxpress.ir.dialect.register_layer, or trace the model again.",
        )
    return name


def config(layer: nn.Module) -> dict[str, JSON]:
    """Constructor arguments of a layer as JSON values, plus `absent`: tensors that this one lacks although its class
    has them (a batch norm without bias).

    Raises:
        GraphError: the class is not in the dialect.
    """
    name = layer_name(layer)
    spec = LAYERS[name]
    values = {f: _value(getattr(layer, f), f in spec.given) for f in spec.fields}
    absent = sorted(_own(_create(spec, values)) - _own(layer))
    return {**values, "absent": absent} if absent else values


def build(name: str, config: dict[str, JSON]) -> nn.Module:
    """The layer of that type with its tensors on the `meta` device: no memory is taken until real ones are put in.

    Raises:
        GraphError: unknown type, unknown field, or a value that the layer does not accept.
    """
    spec = LAYERS.get(name)
    if spec is None:
        raise GraphError(f"unknown layer type {name!r}", hint=f"Known: {', '.join(sorted(LAYERS))}.")
    values = dict(config)
    absent = values.pop("absent", [])
    unknown = sorted(set(values) - set(spec.fields))
    if unknown:
        raise GraphError(f"{name} has no option {unknown[0]!r}", hint=f"Known: {', '.join(spec.fields)}.")
    layer = _create(spec, values)
    for leaf in absent:
        if leaf not in _own(layer):
            raise GraphError(f"{name} has no tensor {leaf!r} that could be absent")
        setattr(layer, leaf, None)
    return layer


def _create(spec: LayerSpec, values: dict[str, JSON]) -> nn.Module:
    arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    try:
        with torch.device("meta"):
            return spec.cls(**arguments)
    except (TypeError, ValueError, RuntimeError, ZeroDivisionError, OverflowError) as error:
        raise GraphError(f"{spec.cls.__name__} cannot be built from {values}: {error}") from error


def _value(value: Any, given: bool) -> JSON:
    if given:
        return value is not None
    return list(value) if isinstance(value, tuple) else value


def _own(layer: nn.Module) -> set[str]:
    tensors = {**layer._parameters, **layer._buffers}
    return {name for name, tensor in tensors.items() if tensor is not None}


# Operations -----------------------------------------------------------------------------------------------------------

NAMESPACES = ("aten", "torchvision")
_NAME = re.compile(r"(aten|torchvision)\.([A-Za-z_]\w*)\.([A-Za-z_]\w*)")
# functional by schema, yet not a function of tensors alone: files, printing, foreign memory, unchecked indices
_DENIED = frozenset({"from_file", "save", "print", "warn", "format", "get_device", "is_pinned", "pin_memory",
                     "_pin_memory", "record_stream", "_assert_async", "_assert_scalar", "_functional_assert_async",
                     "_functional_assert_scalar", "_debug_has_internal_overlap", "_nested_from_padded",
                     "_from_blob", "_cuda_getCurrentRawStream", "_unsafe_index", "_unsafe_masked_index"})  # fmt: skip
SIZE_OPS: dict[str, Op] = {
    **{f"operator.{f.__name__}": f for f in (
        operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.truediv,
        operator.neg, operator.pow, operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge,
        operator.and_, operator.or_, operator.not_)},
    **{f"torch.{f.__name__}": f for f in (torch.sym_max, torch.sym_min, torch.sym_float, torch.sym_int,
                                          torch.sym_ite, torch.sym_not)},
    **{f"math.{f.__name__}": f for f in (math.ceil, math.floor, math.trunc)},
}  # fmt: skip
_SIZE_NAMES = {op: name for name, op in SIZE_OPS.items()}


def allowed(op: object) -> bool:
    """Whether an operation may be the target of a `call_function` node."""
    if isinstance(op, torch._ops.OpOverload):
        return op.namespace in NAMESPACES and op._schema.name.partition("::")[2] not in _DENIED and is_functional(op)
    return callable(op) and op in _SIZE_NAMES


def is_functional(op: torch._ops.OpOverload) -> bool:
    """Whether an overload writes to none of its arguments and returns something."""
    return not op._schema.is_mutable and len(op._schema.returns) > 0


def op_name(op: object) -> str:
    """Name of an allowed operation: `aten.add.Tensor`, `operator.getitem`.

    Raises:
        GraphError: the operation is not in the dialect.
    """
    if not allowed(op):
        raise GraphError(f"operation {op} is not in the dialect: it writes to an argument, does I/O or is unknown")
    if isinstance(op, torch._ops.OpOverload):
        return f"{op.namespace}.{op._schema.name.partition('::')[2]}.{op._overloadname}"
    return _SIZE_NAMES[op]  # type: ignore[index]


def op_from_name(name: str) -> Op:
    """The operation of that name; the inverse of `op_name`.

    Raises:
        GraphError: no such operation, or one that is not in the dialect.
    """
    if name in SIZE_OPS:
        return SIZE_OPS[name]
    match = _NAME.fullmatch(name)
    op = _overload(*match.groups()) if match else None
    if op is None or not allowed(op):
        raise GraphError(
            f"unknown operation {name!r}", hint="An operation is named like aten.add.Tensor and writes to no argument."
        )
    return op


def _overload(namespace: str, packet_name: str, overload_name: str) -> torch._ops.OpOverload | None:
    if not torch._C._jit_get_schemas_for_operator(f"{namespace}::{packet_name}"):
        return None
    packet = getattr(getattr(torch.ops, namespace), packet_name, None)
    if not isinstance(packet, torch._ops.OpOverloadPacket) or overload_name not in packet.overloads():  # type: ignore[no-untyped-call]
        return None
    op = getattr(packet, overload_name)
    return op if isinstance(op, torch._ops.OpOverload) else None
