"""The label rules as data: which family of rules each operation and layer belongs to.

    pointwise     operands are united position by position (every op with `torch.Tag.pointwise`)
    movement      the same ATen op runs on the labels
    along         pooling, softmax, reductions: channels pass, or are tied where the op mixes them
    norms         channel by channel, group by group, or over all channels
    producers     convolution, linear, embedding: read channels, give out fresh atoms
    quantized     product-quantized layers: producers that read whole sub-spaces of channels
    contractions  matmul, einsum, attention: the dimensions that they sum over are united

An operation in none of them pins what it reads and is named: it never guesses. How to add one: a function
`(labels, node) -> labels of the result` in its family's file, and a row here; where the operation holds sizes or
positions of channels, a row in `rewrites.py` as well.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from .families import along, contractions, movement, norms, producers, quantized
from .families.pointwise import pointwise
from .graph import TensorSpec
from .labels import Labels

Rule = Callable[[Labels, fx.Node], Any]
LayerRule = Callable[[Labels, fx.Node, Any, str], Any]


def apply_rule(labels: Labels, node: fx.Node) -> Any:
    """Labels of one node, by the rule of its operation or layer."""
    if node.op == "output":
        return network_output(labels, node)
    if node.op == "call_module":
        layer = labels.graph.layer(node)
        layer_rule = LAYERS.get(type(layer).__name__)
        return layer_rule(labels, node, layer, str(node.target)) if layer_rule else labels.unknown_operation(node)
    rule = rule_of(node.target)
    return rule(labels, node) if rule else labels.unknown_operation(node)


def rule_of(target: Any) -> Rule | None:
    """The rule of a function, None where there is none."""
    if not isinstance(target, torch._ops.OpOverload):
        return movement.getitem if target is operator.getitem else movement.size_arithmetic
    if torch.Tag.pointwise in target.tags:
        return pointwise
    return OPERATIONS.get(target._schema.name.removeprefix("aten::"))


def network_output(labels: Labels, node: fx.Node) -> None:
    """What the network returns keeps its shape."""
    for source in node.all_input_nodes:
        if isinstance(source.meta.get("spec"), TensorSpec):
            labels.pin(labels.read(source), "is an output of the network")
    labels.readers[node] = tuple(node.all_input_nodes)


def _rows(rule: Any, *names: str, suffixes: tuple[Any, ...] = ("",)) -> dict[str, Any]:
    """One rule under several names, each name once per suffix (`1d`, `2d`, `3d`), filled in at `{}`."""
    return {name.format(suffix): rule for text in names for name in text.split() for suffix in suffixes}


def _pools(*names: str) -> dict[str, Rule]:
    """Rows for operations on the last 1, 2 or 3 dimensions, whose number is filled in at `{}`."""
    return {name.format(n): along.spatial(n) for text in names for name in text.split() for n in (1, 2, 3)}


_BATCH = norms.per_channel("weight", "bias", "running_mean", "running_var")

LAYERS: dict[str, LayerRule] = {
    **_rows(producers.convolution_layer, "Conv{}d ConvTranspose{}d", suffixes=(1, 2, 3)),
    "Linear": producers.linear_layer,
    "Embedding": producers.embedding_layer,
    "BinaryConv2d": producers.binary_convolution,
    "BinaryLinear": producers.linear_layer,
    "Int8Conv2d": producers.int8_convolution,
    "Int8Linear": producers.int8_linear,
    "PQLinear": quantized.product_quantized_linear,
    "PQConv2d": quantized.product_quantized_convolution,
    "BinaryNetwork": quantized.binary_network,
    **_rows(_BATCH, "BatchNorm{}d InstanceNorm{}d", suffixes=(1, 2, 3)),
    "GroupNorm": norms.group_norm_layer,
    **_rows(norms.layer_norm_layer, "LayerNorm RMSNorm"),
    "PReLU": norms.per_channel("weight"),
    "ChannelMask": norms.per_channel("mask"),
    "SelectionMask": norms.per_channel("mask", "keep"),
    **_rows(norms.same_layer, "Dropout Dropout1d Dropout2d Dropout3d AlphaDropout FeatureAlphaDropout Identity"),
    "HalfWaveQuantizer": norms.same_layer,  # value by value, and of 0 it gives 0
}

OPERATIONS: dict[str, Rule] = {
    **_rows(pointwise, "hardswish where masked_fill rsub floor_divide log_sigmoid fill remainder logit"),
    # movement
    **_rows(
        movement.same,
        "contiguous clone to _to_copy type_as alias detach lift_fresh",
        "dropout native_dropout feature_dropout alpha_dropout feature_alpha_dropout",
    ),
    **_rows(
        movement.movement,
        "view reshape _unsafe_view view_as reshape_as flatten unflatten unsqueeze squeeze",
        "permute transpose t movedim moveaxis swapaxes swapdims numpy_T mT",
        "select slice narrow split split_with_sizes unsafe_split chunk unsafe_chunk tensor_split hsplit vsplit unbind",
        "unfold diagonal tile repeat repeat_interleave slice_scatter select_scatter",
    ),
    **_rows(movement.permutation_along, "roll flip"),
    **_rows(movement.expand, "expand expand_as broadcast_to"),
    **_rows(movement.concatenate, "cat concat concatenate stack"),
    "index": movement.index,
    "index_select": movement.index_select,
    **_rows(movement.pad, "pad constant_pad_nd"),
    **_rows(movement.pad, "reflection_pad{}d replication_pad{}d", suffixes=(1, 2, 3)),
    "pixel_shuffle": movement.pixel_shuffle,
    "pixel_unshuffle": movement.pixel_unshuffle,
    "channel_shuffle": movement.channel_shuffle,
    "im2col": movement.im2col,
    "col2im": movement.col2im,
    **_rows(movement.factory, "zeros ones full empty new_zeros new_ones new_full new_empty"),
    **_rows(movement.like, "zeros_like ones_like full_like empty_like"),
    "sym_size": movement.size_arithmetic,
    # along a dimension
    **_pools(
        "max_pool{}d max_pool{}d_with_indices adaptive_max_pool{}d avg_pool{}d adaptive_avg_pool{}d",
        "_adaptive_avg_pool{}d",
        "upsample_nearest{}d upsample_nearest_exact{}d _upsample_nearest_exact{}d",
    ),
    "upsample_linear1d": along.spatial(1),
    **_rows(along.spatial(2), "upsample_bilinear2d upsample_bicubic2d"),
    **_rows(along.spatial(2), "_upsample_bilinear2d_aa _upsample_bicubic2d_aa"),
    "upsample_trilinear3d": along.spatial(3),
    **_rows(along.softmax, "softmax _softmax log_softmax _log_softmax"),
    "glu": along.glu,
    **_rows(along.reduction("sum"), "sum linalg_vector_norm norm frobenius_norm"),
    "mean": along.reduction("mean"),
    **_rows(along.reduction("variance"), "var std var_mean std_mean"),
    **_rows(along.reduction("other"), "amax amin max min argmax argmin prod logsumexp all any median nanmean"),
    **_rows(along.along_dim, "cumsum cumprod sort topk argsort cummax"),
    # norms
    **_rows(norms.batch_norm_op, "batch_norm instance_norm"),
    **_rows(norms.layer_norm_op, "layer_norm native_layer_norm rms_norm"),
    "group_norm": norms.group_norm_op,
    # producers and contractions
    **_rows(producers.convolution_op, "conv{}d conv_transpose{}d", suffixes=(1, 2, 3)),
    **_rows(producers.convolution_op, "convolution _convolution"),
    "linear": producers.linear_op,
    **_rows(contractions.matmul, "matmul bmm mm"),
    "einsum": contractions.einsum,
    "scaled_dot_product_attention": contractions.attention,
}
