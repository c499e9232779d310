"""From the arguments of an ATen operation to the layer that computes it: type and configuration, one rule each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx

from ..nodes import arguments

Arguments = dict[str, Any]
Described = tuple[str, Arguments]


@dataclass(frozen=True)
class Rule:
    """How an operation becomes a layer.

    Args:
        describe: arguments to layer type and configuration, None where there is no such layer.
        roles: arguments that are tensors of the layer, under the names that they have in it.
        input: the argument that is the layer's input.
    """

    describe: Callable[[Arguments], Described | None]
    roles: tuple[str, ...] = ("weight", "bias")
    input: str = "input"


def _shape(node: Any) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def _spatial(value: Any, count: int) -> list[int]:
    """ATen takes one number for all spatial dimensions as well."""
    values = [int(v) for v in (value if isinstance(value, (list, tuple)) else [value])]
    return values * count if len(values) == 1 else values


def _conv(a: Arguments) -> Described:
    weight, n = _shape(a["weight"]), len(_shape(a["weight"])) - 2
    return f"Conv{n}d", {
        "in_channels": weight[1] * a["groups"],
        "out_channels": weight[0],
        "kernel_size": list(weight[2:]),
        "stride": _spatial(a["stride"], n),
        "padding": a["padding"] if isinstance(a["padding"], str) else _spatial(a["padding"], n),
        "dilation": _spatial(a["dilation"], n),
        "groups": a["groups"],
        "bias": a["bias"] is not None,
    }


def _conv_transpose(a: Arguments) -> Described:
    weight, n = _shape(a["weight"]), len(_shape(a["weight"])) - 2
    return f"ConvTranspose{n}d", {
        "in_channels": weight[0],
        "out_channels": weight[1] * a["groups"],
        "kernel_size": list(weight[2:]),
        "stride": _spatial(a["stride"], n),
        "padding": _spatial(a["padding"], n),
        "output_padding": _spatial(a["output_padding"], n),
        "groups": a["groups"],
        "bias": a["bias"] is not None,
        "dilation": _spatial(a["dilation"], n),
    }


def _convolution(a: Arguments) -> Described:
    return _conv_transpose(a) if a["transposed"] else _conv(a)


def _linear(a: Arguments) -> Described | None:
    weight = _shape(a["weight"])
    if len(weight) != 2:
        return None
    return "Linear", {"in_features": weight[1], "out_features": weight[0], "bias": a["bias"] is not None}


def _running_norm(kind: str, a: Arguments, batch_statistics: bool) -> Described | None:
    """A norm that uses its running statistics, or has none at all."""
    tracked = a["running_mean"] is not None
    known = next((a[r] for r in ("weight", "bias", "running_mean") if a[r] is not None), None)
    if known is None or tracked == batch_statistics:
        return None
    values: Arguments = {
        "num_features": _shape(known)[0],
        "eps": a["eps"],
        "momentum": a["momentum"],
        "affine": a["weight"] is not None or a["bias"] is not None,
        "track_running_stats": tracked,
    }
    rank = max(len(_shape(a["input"])) - 2, 1)
    return (f"{kind}{rank}d", {**values, **_lacking(a)}) if rank <= 3 else None


def moved_statistics(node: fx.Node) -> str:
    """Name of the running mean that a norm left in the graph would move although the model is in evaluation mode."""
    rule = RULES.get(getattr(node.target, "_opname", ""))
    if rule is None or "running_mean" not in rule.roles:
        return ""
    a = arguments(node)
    moves = a["running_mean"] is not None and (a.get("training") or a.get("use_input_stats"))
    return str(getattr(a["running_mean"], "target", "")) if moves else ""


def _lacking(a: Arguments) -> Arguments:
    """`absent` for a norm that has a weight but no bias, or the reverse."""
    absent = [role for role in ("weight", "bias") if a[role] is None]
    return {"absent": absent} if len(absent) == 1 else {}


def _group_norm(a: Arguments) -> Described | None:
    known = a["weight"] if a["weight"] is not None else a["bias"]
    if known is None:
        return None
    values = {"num_groups": a["num_groups"], "num_channels": _shape(known)[0], "eps": a["eps"], "affine": True}
    return "GroupNorm", {**values, **_lacking(a)}


def _layer_norm(a: Arguments) -> Described | None:
    if a["weight"] is None:
        return None
    return "LayerNorm", {
        "normalized_shape": [int(s) for s in a["normalized_shape"]],
        "eps": a["eps"],
        "elementwise_affine": True,
        "bias": a["bias"] is not None,
    }


def _rms_norm(a: Arguments) -> Described:
    shape = [int(s) for s in a["normalized_shape"]]
    return "RMSNorm", {"normalized_shape": shape, "eps": a["eps"], "elementwise_affine": True}


def _embedding(a: Arguments) -> Described:
    rows, width = _shape(a["weight"])
    return "Embedding", {
        "num_embeddings": rows,
        "embedding_dim": width,
        "padding_idx": None if a["padding_idx"] < 0 else a["padding_idx"],
        "scale_grad_by_freq": a["scale_grad_by_freq"],
        "sparse": a["sparse"],
    }


def _prelu(a: Arguments) -> Described:
    return "PReLU", {"num_parameters": _shape(a["weight"])[0] if _shape(a["weight"]) else 1}


_STATISTICS = ("weight", "bias", "running_mean", "running_var")
RULES: dict[str, Rule] = {
    **{f"conv{n}d": Rule(_conv) for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": Rule(_conv_transpose) for n in (1, 2, 3)},
    "convolution": Rule(_convolution),
    "linear": Rule(_linear),
    "batch_norm": Rule(lambda a: _running_norm("BatchNorm", a, a["training"]), _STATISTICS),
    "instance_norm": Rule(lambda a: _running_norm("InstanceNorm", a, a["use_input_stats"]), _STATISTICS),
    "group_norm": Rule(_group_norm),
    "layer_norm": Rule(_layer_norm),
    "rms_norm": Rule(_rms_norm, ("weight",)),
    "embedding": Rule(_embedding, ("weight",), "indices"),
    "prelu": Rule(_prelu, ("weight",), "self"),
}
DROPOUTS = {
    "dropout": "Dropout",
    "feature_dropout": "Dropout2d",
    "alpha_dropout": "AlphaDropout",
    "feature_alpha_dropout": "FeatureAlphaDropout",
}
