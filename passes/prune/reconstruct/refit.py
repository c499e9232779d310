"""Reconstruction: consumers' weights by least squares, layer by layer from the front."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, fx, nn

from ....ir.graph import Graph
from ....ir.nodes import operand
from ...layerwise.moments import SecondMoments
from ...layerwise.patches import Reading, rows, weight_of_rows, weight_rows
from ...layerwise.placing import add_constant, bias_of, set_weight
from .changes import Change
from .consumers import Consumer, kept, layer_of
from .least_squares import fit

POSITIONS = 256
"""Output positions per image of which a layer learns; a map with more gives a fixed random choice of them."""

MEMORY = 2**30
"""Bytes of Gram matrices that exist at a time."""


class Refit:
    """Learns one consumer's weights from what it reads and from what it gave before the cut.

    Args:
        after: the network behind the cut.
        consumer: the layer.
        sequential: whether inputs come from the network behind the cut; else from before, without removed channels.
    """

    def __init__(self, after: Graph, consumer: Consumer, *, sequential: bool) -> None:
        self.consumer, self.sequential = consumer, sequential
        self.node = next(node for node in after.nodes if node.name == consumer.name)
        self.layer = layer_of(after, consumer)
        self.source = operand(self.node).name if sequential else consumer.source
        device = self.layer.weight.device
        self._inputs, self._outputs = kept(consumer.inputs, device), kept(consumer.outputs, device)
        self.moments = SecondMoments(*_sizes(self.layer), device)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add a batch: inputs, from the network that `sequential` says, and responses before the cut."""
        if not self.sequential:
            x = x.index_select(self.consumer.dim, self._inputs)
        y = y.index_select(-1 if isinstance(self.layer, nn.Linear) else 1, self._outputs)
        for part_x, part_y in rows(self.layer, x, y, POSITIONS):
            self.moments.add(part_x, part_y)

    def finish(self, after: Graph) -> Change:
        """Put the weights in; the layer stays as it is where they are no better once rounded to its type."""
        weight, groups = weight_rows(self.layer), self.moments.gram.shape[0]
        bias = bias_of(self.layer)
        before = self.moments.error(weight, bias.reshape(groups, -1))
        fitted, constant = fit(self.moments, weight)
        fitted = fitted.to(weight.dtype)
        error = self.moments.error(fitted, constant)
        if not error < before:
            return Change(self.consumer.layer, "least-squares", "unchanged", before, before)
        set_weight(self.layer, weight_of_rows(self.layer, fitted))
        place = add_constant(after, self.node, constant.flatten() - bias)
        return Change(self.consumer.layer, "least-squares", place, before, error)


def memory(layer: Reading) -> int:
    """Bytes of the sums that the least-squares problems of a layer need."""
    return SecondMoments.bytes(*_sizes(layer))


def _sizes(layer: Reading) -> tuple[int, int, int]:
    """Groups, features and outputs of a layer's least-squares problems."""
    groups, outputs, features = weight_rows(layer).shape
    return groups, features, outputs


def stages(after: Graph, consumers: Sequence[Consumer], *, sequential: bool) -> list[list[Consumer]]:
    """Consumers that can learn in one pass over the data: none behind another, and within memory."""
    depth = _depths(after, consumers) if sequential else dict.fromkeys((c.name for c in consumers), 0)
    result: list[list[Consumer]] = []
    used, last = 0, -1
    for consumer in sorted(consumers, key=lambda c: depth[c.name]):
        need = memory(layer_of(after, consumer))
        if depth[consumer.name] != last or used + need > MEMORY:
            result.append([])
            used, last = 0, depth[consumer.name]
        result[-1].append(consumer)
        used += need
    return result


def _depths(after: Graph, consumers: Iterable[Consumer]) -> dict[str, int]:
    """How many consumers lie before each one, on the longest way."""
    names = {consumer.name for consumer in consumers}
    depth: dict[fx.Node, int] = {}
    for node in after.nodes:
        before = max((depth[source] for source in node.all_input_nodes), default=0)
        depth[node] = before + (node.name in names)
    return {node.name: level for node, level in depth.items() if node.name in names}
