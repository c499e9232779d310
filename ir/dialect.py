"""What may stand in a graph: an allow-list of layers and the test for operations.

Layers are plain `torch.nn` classes (fxpress's own register themselves) that are rebuilt from a few JSON values.
Operations are functional ATen (or torchvision) overloads, resolved by name through the dispatcher's schema alone, and a
literal table of functions on sizes. Nothing else can be named by a stored graph, so loading one executes no code of it.
"""

from __future__ import annotations

import functools
import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
        attributes: field → attribute, where the names differ.
    """

    cls: type[nn.Module]
    fields: tuple[str, ...]
    given: tuple[str, ...] = ()
    attributes: Mapping[str, str] = field(default_factory=dict)


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


def register_layer(
    cls: type[nn.Module],
    fields: tuple[str, ...],
    given: tuple[str, ...] = (),
    attributes: Mapping[str, str] | None = None,
) -> None:
    """Add a layer type under its class name; the rest as in `LayerSpec`.

    Raises:
        GraphError: another class has that name already.
    """
    known = LAYERS.get(cls.__name__)
    if known is not None and known.cls is not cls:
        raise GraphError(f"layer name {cls.__name__!r} belongs to {known.cls.__module__} already")
    LAYERS[cls.__name__] = LayerSpec(cls, fields, given, attributes or {})


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
    values = {f: _value(getattr(layer, spec.attributes.get(f, f)), f in spec.given) for f in spec.fields}
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
# Ops whose names begin with an underscore are torch's own business and may trust their arguments; these are emitted by
# exports and check theirs.
_PRIVATE = frozenset({
    "_to_copy", "_unsafe_view", "_softmax", "_log_softmax", "_safe_softmax", "_adaptive_avg_pool2d",
    "_adaptive_avg_pool3d", "_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d",
    "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "_native_batch_norm_legit", "_fused_rms_norm",
    "_native_batch_norm_legit_no_training", "_convolution", "_weight_norm", "_weight_norm_interface", "_trilinear",
    "_prelu_kernel", "_cdist_forward", "_fft_r2c", "_fft_c2r", "_fft_c2c", "_conj", "_conj_physical", "_neg_view",
    "_cast_Float", "_cast_Half", "_cast_Double", "_cast_Int", "_cast_Long", "_shape_as_tensor", "_local_scalar_dense",
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_attention_math", "_linalg_svd", "_linalg_eigh",
    "_linalg_det", "_linalg_slogdet", "_linalg_solve_ex", "_stack", "_is_all_true", "_embedding_bag",
    "__and__", "__or__", "__xor__", "__lshift__", "__rshift__",
})  # fmt: skip
_DENIED = frozenset({"from_file", "resize", "resize_as", "is_pinned", "pin_memory", "set", "set_data", "rename", "grad",
                     "get_gradients", "data", "dict", "as_tensor", "tensor", "convolution_overrideable"})  # fmt: skip
_DENIED_PARTS = re.compile(
    r"backward|cudnn|miopen|mkldnn|fbgemm|sparse|nested|(?<!fake_)quantize_per|quantized|record_stream|_unsafe$"
)
_ARGUMENT = re.compile(r"(?:Optional\[|List\[)*(?:Tensor|int|bool|float|number|complex|str|Device|Generator)\]*")
_NUMBERS = frozenset({"sym_size", "sym_numel", "sym_stride", "sym_storage_offset", "item", "_local_scalar_dense"})
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
    """Whether an operation may be the target of a `call_function` node.

    Of ATen that is what writes to no argument and returns tensors (or a size), except what reads files, sees foreign
    memory, belongs to a backward pass or to a kind of tensor that a graph does not hold.
    """
    if isinstance(op, torch._ops.OpOverload):
        return op.namespace in NAMESPACES and _harmless(op)
    return callable(op) and op in _SIZE_NAMES


@functools.cache
def _harmless(op: torch._ops.OpOverload) -> bool:
    schema, name = op._schema, op._opname
    if schema.is_mutable or name in _DENIED or _DENIED_PARTS.search(name):
        return False
    if name.startswith("_") and name not in _PRIVATE:
        return False
    gives = name in _NUMBERS or any("Tensor" in str(returned.type) for returned in schema.returns)
    return gives and all(_ARGUMENT.fullmatch(str(argument.type)) for argument in schema.arguments)


def op_name(op: object) -> str:
    """Name of an allowed operation: `aten.add.Tensor`, `operator.getitem`.

    Raises:
        GraphError: the operation is not in the dialect.
    """
    if not allowed(op):
        raise GraphError(f"operation {op} is not in the dialect: it writes to an argument, does I/O or is unknown")
    if isinstance(op, torch._ops.OpOverload):
        return f"{op.namespace}.{op._opname}.{op._overloadname}"
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
