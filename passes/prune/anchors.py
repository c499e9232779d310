"""Where masks belong: behind every layer that produces channels or adds something to them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from ...ir.graph import Graph, TensorSpec
from ...ir.groups import Groups
from ...ir.labels import IntArray
from ...runtime.layers.pq_layer import PQLayer

PRODUCERS = (_ConvNd, nn.Linear, nn.Embedding, PQLayer)
NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm)
_PRODUCING_OPS = frozenset({"convolution", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d",
                            "conv_transpose3d", "linear", "addmm", "embedding"})  # fmt: skip
_NORM_OPS = frozenset({"batch_norm", "instance_norm", "group_norm", "layer_norm", "native_batch_norm",
                       "native_group_norm", "native_layer_norm"})  # fmt: skip


@dataclass(frozen=True)
class Anchor:
    """A node behind which a mask belongs.

    Args:
        node: the node.
        path: name of the layer whose channels these are: the node's own, or the one before a norm.
        dim: dimension of its tensor that holds channels.
        classes: class of each of them, shape (channels,); 0 where it cannot be cut.
        produces: whether the channels begin here.
    """

    node: fx.Node
    path: str
    dim: int
    classes: IntArray
    produces: bool


def find_anchors(graph: Graph, groups: Groups) -> list[Anchor]:
    """All places for masks, in execution order; of a layer and the norm that alone reads it, only the norm's."""
    anchors: dict[fx.Node, Anchor] = {}
    for node in graph.nodes:
        produces = _is(graph, node, PRODUCERS, _PRODUCING_OPS)
        if not (produces or _is(graph, node, NORMS, _NORM_OPS)) or not isinstance(node.meta.get("spec"), TensorSpec):
            continue
        axis = groups.channels(node)
        if axis is None or not (groups.group_of[axis[1]] >= 0).any():
            continue
        source = node.args[0]
        path = str(node.target) if node.op == "call_module" else node.name
        if not produces and isinstance(source, fx.Node) and source in anchors and len(source.users) == 1:
            before = anchors.pop(source)
            path, produces = before.path, before.produces
        anchors[node] = Anchor(node, path, *axis, produces)
    return list(anchors.values())


def _is(graph: Graph, node: fx.Node, layers: tuple[type[nn.Module], ...], ops: frozenset[str]) -> bool:
    if node.op == "call_module":
        return isinstance(graph.layer(node), layers)
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.name.rpartition("::")[2] in ops
