"""What a binary layer reads and what it should give, as Gram matrices from one pass over calibration images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rich.console import Console
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...ir.graph import Graph
from ...ir.nodes import operand, shape_of
from ...runtime.data import Loader
from ...runtime.layers import BinaryConv2d, BinaryLayer, BinaryLinear
from ..analyse.progress import counted
from ..analyse.sharing import processes, shared_sum
from ..layerwise.moments import SecondMoments
from ..layerwise.patches import rows, weight_rows
from ..layerwise.streams import Tensors, stream_pair
from .sources import op_name

WIDE = 1024
"""Layers with more features than this sum in single precision: a quantizer has few levels, and few digits are lost."""


@dataclass(frozen=True)
class Problem:
    """Least squares over signs of one group of a layer.

    Attributes:
        gram: G, (n, n), float64; centred where a constant is free.
        cross: h, (n, O).
        energy: yᵀy of all filters together, centred likewise.
        mean_x: (n,).
        mean_y: (O,).
    """

    gram: Tensor
    cross: Tensor
    energy: float
    mean_x: Tensor
    mean_y: Tensor


def plain_form(layer: BinaryLayer) -> nn.Conv2d | nn.Linear:
    """A layer of torch's own of the same sizes, without tensors: what `rows` looks at."""
    with torch.device("meta"):
        if isinstance(layer, BinaryLinear):
            return nn.Linear(layer.in_features, layer.out_features, bias=False)
        assert isinstance(layer, BinaryConv2d)
        sizes = layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation
        return nn.Conv2d(*sizes, layer.groups, bias=False)


def is_normalised(graph: Graph, node: fx.Node) -> bool:
    """Whether all that reads a node are batch norms, if need be behind max pools, dropout or concatenations."""
    for user in node.users:
        layer = graph.layer(user)
        passes = op_name(user) in ("cat", "dropout") or op_name(user).startswith("max_pool")
        if not isinstance(layer, _BatchNorm) and not (passes and is_normalised(graph, user)):
            return False
    return bool(node.users)


class Responses:
    """Sums over calibration images of what a layer reads and should give.

    Args:
        graph: the binary network.
        original: the network whose layer of the same path gives what is wanted; None: the latent weights do.
        node: of the layer.
        positions: of an output that are looked at, per image.
    """

    def __init__(self, graph: Graph, original: Graph | None, node: fx.Node, positions: int) -> None:
        layer = graph.layer(node)
        assert isinstance(layer, BinaryLayer)
        self.graph, self.original, self.node, self.positions = graph, original, node, positions
        self.plain = plain_form(layer)
        self.latent = weight_rows(self.plain, layer.weight.detach())
        groups, outputs, features = self.latent.shape
        dtype = torch.float32 if features > WIDE else torch.float64
        crossed = original is not None
        self.moments = SecondMoments(groups, features, outputs, layer.weight.device, dtype=dtype, crossed=crossed)

    def collect(self, loader: Loader, batches: int, console: Console | None, title: str) -> None:
        """Stream the images through; under `torchrun` each process takes its share and all get the sums."""
        read, path = operand(self.node).name, str(self.node.target)
        wanted = [node.name for node in self.original.nodes if node.target == path] if self.original else []

        def visit(before: Tensors, after: Tensors) -> None:
            x = after[read]
            shape = (len(x), *shape_of(self.node)[1:])
            y = before[wanted[0]] if wanted else x.new_zeros(()).expand(shape)
            for part_x, part_y in rows(self.plain, x, y, self.positions):
                self.moments.add(part_x, part_y)

        main = console if processes().is_main_process else None
        with counted(main, title, batches) as step:
            stream_pair(self.original or self.graph, self.graph, loader, (wanted, [read]), visit, step)
        self.moments.adopt(shared_sum(self.moments.tensors))

    def problems(self, *, centred: bool) -> list[Problem]:
        """One per group."""
        gram, count = self.moments.gram.double(), self.moments.count
        inner, mean_x = gram[:, :-1, :-1], gram[:, :-1, -1] / count
        if self.original is None:
            cross = inner @ self.latent.double().mT
            mean_y = (self.latent.double() @ mean_x[..., None])[..., 0]
            energies = (self.latent.double().mT * cross).sum((1, 2))
        else:
            cross, mean_y = self.moments.cross[:, :-1].double(), self.moments.cross[:, -1].double() / count
            energies = self.moments.energy.double().expand(len(gram)) / len(gram)  # of all groups: shared out
        if centred:
            inner = inner - count * mean_x[:, :, None] * mean_x[:, None]
            cross = cross - count * mean_x[:, :, None] * mean_y[:, None]
            shifted = count * mean_y.square().sum(1)
            energies = energies - (shifted if self.original is None else shifted.mean())
        return [
            Problem(g, h, float(e), x, y) for g, h, e, x, y in zip(inner, cross, energies, mean_x, mean_y, strict=True)
        ]
