"""Consumers: the layers that read channels which a cut removes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from ....ir.cut import Cut
from ....ir.graph import Graph, TensorSpec, submodule
from ....ir.groups import BoolArray
from ....ir.nodes import operand, shape_of
from ....runtime.layers.pq_layer import PQLayer
from ...base import Skip
from ...fuse.affine import is_tied
from ...layerwise.patches import Reading


@dataclass(frozen=True)
class Consumer:
    """A convolution or linear layer some of whose inputs are removed.

    Attributes:
        name: of its node, the same in the network before and behind the cut.
        layer: path of the layer, likewise.
        source: name of the node that it reads in the network before the cut.
        inputs: which of its input channels (or features) stay, shape (in,).
        outputs: which of its output channels stay, shape (out,).
        dim: the dimension of its input that holds the channels.
    """

    name: str
    layer: str
    source: str
    inputs: BoolArray
    outputs: BoolArray
    dim: int


def find_consumers(cut: Cut) -> tuple[list[Consumer], list[Skip]]:
    """Every layer that reads removed channels, in execution order, and what else mixes them, with the reason.

    What passes channels on one by one (pooling, activations, norms, adds, depthwise convolutions) loses nothing but
    the removed channels themselves: the loss is where they are mixed.
    """
    consumers, skips = [], []
    for node, sources in cut.labels.readers.items():
        if not any(_loses(cut, node, source) for source in sources):
            continue
        found = _consumer(cut, node)
        if isinstance(found, Consumer):
            consumers.append(found)
        elif found is not None:
            skips.append(Skip(node.name, found))
    return consumers, skips


def _loses(cut: Cut, node: fx.Node, source: fx.Node) -> bool:
    return node.op != "output" and isinstance(source.meta.get("spec"), TensorSpec) and cut.axis(source) is not None


def _consumer(cut: Cut, node: fx.Node) -> Consumer | str | None:
    """The consumer at a node; the reason why it cannot be compensated; None where it mixes no removed channels."""
    layer, source = cut.groups.graph.layer(node), operand(node)
    found = cut.axis(source)
    if layer is None or found is None:
        return "removed channels are mixed here by an operation without weights of its own"
    if not isinstance(layer, (_ConvNd, nn.Linear)):
        kind = type(layer).__name__
        if isinstance(layer, PQLayer):
            return f"removed channels are mixed here by a {kind}, whose outputs share codewords: none is refitted alone"
        return f"removed channels are mixed here by a {kind}, which is no convolution or linear layer"
    dim, inputs = found
    rank = len(shape_of(source))
    depthwise = isinstance(layer, _ConvNd) and layer.groups == layer.in_channels > 1
    if depthwise or (isinstance(layer, nn.Linear) and dim != rank - 1):
        return None
    if rank < 2 or (isinstance(layer, _ConvNd) and (dim, rank) != (1, len(layer.kernel_size) + 2)):
        return f"removed channels lie along dimension {dim} of {rank} of its input, which are not the channels it mixes"
    reason = _unfit(cut.groups.graph, node, layer)
    return reason or Consumer(node.name, str(node.target), source.name, inputs, _outputs(cut, node, layer), dim)


def _unfit(graph: Graph, node: fx.Node, layer: Reading) -> str | None:
    """Why a layer's tensors cannot be set for one place alone."""
    if len(node.args) > 1 or node.kwargs:
        return "it is called with more than its input"
    calls = sum(other.op == "call_module" and other.target == node.target for other in graph.nodes)
    if calls > 1:
        return f"layer {node.target} is called {calls} times"
    return f"a parameter of {node.target} is shared with another layer" if is_tied(graph, layer) else None


def _outputs(cut: Cut, node: fx.Node, layer: Reading) -> BoolArray:
    found = cut.axis(node)
    width = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    return np.ones(width, dtype=bool) if found is None else found[1]


def kept(flags: BoolArray, device: torch.device | None = None) -> torch.Tensor:
    """Positions that are true, as an index."""
    return torch.from_numpy(np.flatnonzero(flags)).to(device)


def layer_of(graph: Graph, consumer: Consumer) -> Reading:
    """The layer of a consumer in the network before or behind the cut."""
    layer = submodule(graph.module, consumer.layer)
    assert isinstance(layer, (_ConvNd, nn.Linear))
    return layer
