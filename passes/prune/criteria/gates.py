"""The network with a gate on every class of channels, wherever an operation mixes them.

With all gates 1 it is the network itself, with some 0 the masked network of the oracle (`ir.verify`); the derivative of
the loss in a gate is what removal of the class costs to first order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from ....ir.errors import GraphError
from ....ir.graph import Graph
from ....ir.groups import Groups
from ....ir.verify import evaluating
from ....runtime.data import Inputs, check_targets
from ....runtime.forward import class_scores, device_of
from ...analyse.branching import flat_inputs


class GatedNetwork(fx.Interpreter):
    """Runs a graph, every class multiplied with its gate where it is read."""

    def __init__(self, graph: Graph, groups: Groups) -> None:
        super().__init__(graph.module, garbage_collect_values=True)
        self._gates = torch.ones(1, groups.count)
        self._reads: dict[fx.Node, dict[fx.Node, tuple[int, Tensor]]] = {}
        for node, sources in groups.labels.readers.items():
            for source in sources:
                axis = groups.channels(source)
                if axis is not None and not groups.locked[axis[1]].all():
                    self._reads.setdefault(node, {})[source] = (axis[0], torch.from_numpy(axis[1]))

    def run_gated(self, leaves: list[Any], gates: Tensor) -> Any:
        """Output for flat inputs; gates (images, classes) multiply the channels of each image."""
        self._gates = gates
        return self.graph.process_outputs(self.run(*leaves, enable_io_processing=False))

    def map_nodes_to_values(self, args: Any, n: fx.Node) -> Any:
        """Arguments of a node, gated if the node mixes channels."""
        reads = self._reads.get(n, {})

        def load(source: fx.Node) -> Any:
            value = self.env[source]
            return self._gated(source, value, *reads[source]) if source in reads else value

        return fx.map_arg(args, load)

    def _gated(self, source: fx.Node, value: Tensor, dim: int, classes: Tensor) -> Tensor:
        if dim == 0 or value.shape[0] != len(self._gates):
            raise GraphError(
                f"images cannot be told apart at node {source.name!r} of shape {tuple(value.shape)}: dimension 0 does "
                f"not hold the {len(self._gates)} images of the batch",
                hint="Take a criterion that needs no gradients of single images.",
            )
        shape = [len(self._gates)] + [1] * (value.dim() - 1)
        shape[dim] = len(classes)
        return value * self._gates[:, classes].view(shape).to(value.dtype)


def slopes_of(network: GatedNetwork, graph: Graph, inputs: Inputs, targets: Tensor, where: str) -> Tensor:
    """∂L_i/∂z of every image i and class, (images, classes), at gates 1; L is the cross entropy."""
    device, leaves = device_of(graph.module), flat_inputs(graph, inputs, where)
    gates = torch.ones(len(targets), network._gates.shape[1], device=device, requires_grad=True)
    with evaluating(graph.module), torch.enable_grad():
        loss = losses(network.run_gated(leaves, gates), targets.to(device), where).sum()
        (slopes,) = torch.autograd.grad(loss, gates)
    return slopes


def losses(output: Any, targets: Tensor, where: str) -> Tensor:
    """Cross entropy of every image, (images,); the mean over positions where targets are maps."""
    scores = class_scores(output).float()
    check_targets(targets, scores, where)
    values = functional.cross_entropy(scores, targets, reduction="none")
    return values.reshape(len(targets), -1).mean(1)
