"""What a node is called in the drawing, and the family that decides how its card looks."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from ...ir.dialect import op_name
from ...ir.graph import Graph, TensorSpec
from ...runtime.layers import PQConv2d, PQLayer

KINDS: dict[str, tuple[str, ...]] = {
    "norm": ("BatchNorm", "InstanceNorm", "GroupNorm", "LayerNorm", "RMSNorm", "batch_norm", "layer_norm", "rms_norm"),
    "conv": ("Conv", "PQConv", "conv", "unfold", "im2col"),
    "linear": (
        "Linear", "PQLinear", "Embedding", "linear", "matmul", "bmm", "mm", "einsum", "scaled_dot_product", "baddbmm",
    ),
    "dropout": ("Dropout", "AlphaDropout", "FeatureAlphaDropout", "dropout"),
    "act": ("PReLU", "relu", "gelu", "silu", "sigmoid", "hard", "tanh", "softmax", "leaky", "elu", "mish", "clamp"),
    "pool": ("max_pool", "avg_pool", "adaptive", "mean", "amax", "upsample", "interpolate"),
    "join": ("add", "sub", "mul", "div", "cat", "stack", "maximum", "minimum"),
    "shape": (
        "view", "reshape", "flatten", "permute", "transpose", "squeeze", "unsqueeze", "split", "chunk", "slice",
        "select", "expand", "contiguous", "clone", "getitem", "pixel", "channel_shuffle", "pad", "roll", "repeat",
        "unbind", "index", "constant_pad", "to", "_to_copy", "alias", "detach",
    ),
}  # fmt: skip
"""Family → how its op names begin; the first match counts. What matches nothing is `other`."""


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def kind_of(node: fx.Node, title: str) -> str:
    """Family of a node: `input`, `output`, `param`, `size`, one of `KINDS`, or `other`."""
    fixed = {"placeholder": "input", "output": "output", "get_attr": "param"}.get(node.op)
    if fixed is not None:
        return fixed
    if not any(isinstance(spec, TensorSpec) for spec in specs_of(node)):
        return "size"
    return next((kind for kind, starts in KINDS.items() if title.lstrip("_").startswith(starts)), "other")


def title_of(graph: Graph, node: fx.Node) -> str:
    """`Conv2d` for a layer, `add` for `aten.add.Tensor`, the node's own kind for the rest."""
    layer = graph.layer(node)
    if layer is not None:
        return type(layer).__name__
    if node.op != "call_function":
        return {"placeholder": "input", "get_attr": "parameter"}.get(node.op, node.op)
    return operation_of(node).split(".")[1]


def operation_of(node: fx.Node) -> str:
    """Full name of what a node calls: `aten.add.Tensor`, or the layer's or tensor's place in the model."""
    return op_name(node.target) if node.op == "call_function" else str(node.target)


def detail_of(layer: nn.Module | None) -> str:
    """What distinguishes one layer from others of its type: `3×3 /2, 4 groups`."""
    if isinstance(layer, PQLayer):
        kernel = f"{'×'.join(map(str, layer.kernel_size))}, " if isinstance(layer, PQConv2d) else ""  # noqa: RUF001
        return f"{kernel}{layer.codewords} codewords of {layer.subspace}"
    if not isinstance(layer, CONVOLUTIONS):
        return f"{layer.in_features} → {layer.out_features}" if isinstance(layer, nn.Linear) else ""
    parts = ["×".join(map(str, layer.kernel_size))]  # noqa: RUF001
    if any(step != 1 for step in layer.stride):
        parts[0] += f" /{layer.stride[0]}"
    if layer.groups > 1:
        parts.append("depthwise" if layer.groups == layer.in_channels else f"{layer.groups} groups")
    return ", ".join(parts)


def specs_of(node: fx.Node) -> list[TensorSpec]:
    """The tensors that a node gives: none for a size, several for an op with several outputs."""
    spec: Any = node.meta.get("spec")
    if isinstance(spec, TensorSpec):
        return [spec]
    return [part for part in spec if isinstance(part, TensorSpec)] if isinstance(spec, (tuple, list)) else []


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")
