"""Evidence from gradients of the cross entropy on single images, from one pass over the data.

Under `torchrun` every process looks at all of these images, so that all find the same.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils import _pytree as pytree

from ....ir.errors import OptionError
from ....ir.graph import Graph
from ....ir.groups import Groups
from ....ir.verify import evaluating
from ....runtime.data import Inputs
from ....runtime.forward import device_of, to_device
from ....runtime.layers.pq_layer import PQLayer
from ...analyse.progress import counted
from ...analyse.streaming import limited_batches
from .gates import GatedNetwork, losses, slopes_of
from .members import Member, Source, filters, produces
from .observing import loader_of

FISHER_IMAGES = 256  # one backward pass each


def slopes(graph: Graph, groups: Groups, source: Source) -> list[Member]:
    """∂L_i/∂z of every class's gate z = 1 for every image i, (n, images): a member per group."""
    return _by_group(groups, torch.cat(_slopes(graph, groups, source)))


def batch_slopes(graph: Graph, groups: Groups, source: Source) -> list[Member]:
    """Mean of ∂L_i/∂z over each batch, (n, batches): a member per group."""
    return _by_group(groups, torch.stack([batch.mean(0) for batch in _slopes(graph, groups, source)]))


def fisher(graph: Graph, groups: Groups, source: Source) -> list[Member]:
    """The weights of every filter and mean_i (∂L_i/∂w)², (n, weights) each; one backward pass per image."""
    if not graph.dynamic_batch:
        raise OptionError(
            f"{source.who} needs gradients of single images, and this network was traced for a fixed batch",
            hint="Trace it with a dynamic batch, or take another criterion.",
        )
    network = _dense(graph)
    names = [_weight_name(member.name) for member in filters(graph, groups, source)]
    weights = {name: network.tensor(name).detach() for name in names}
    squares = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
    seen, limit = 0, min(source.limit or FISHER_IMAGES, FISHER_IMAGES)
    with counted(source.console, "gradients", None) as step, evaluating(network.module), torch.enable_grad():
        for inputs, targets in limited_batches(loader_of(source), "calibration", limit):
            for image in range(len(targets)):
                one = pytree.tree_map(lambda t, image=image: t[image : image + 1], inputs)
                for name, gradient in _gradients(network, weights, one, targets[image : image + 1]).items():
                    squares[name] += gradient.detach().float().square()
                step(1)
            seen += len(targets)
    return [
        Member(member.name, member.classes, (*member.evidence, _rows(groups, member.name, squares[name] / seen)))
        for member, name in zip(filters(graph, groups, source), names, strict=True)
    ]


def _dense(graph: Graph) -> Graph:
    """The network with the decoded weights of product-quantized layers in their place: these have gradients."""
    twin = graph.copy()
    layers = {str(node.target): twin.layer(node) for node in twin.nodes if node.op == "call_module"}
    for path, layer in layers.items():
        if isinstance(layer, PQLayer):
            plain = layer.dense()
            plain.register_forward_hook(lambda _module, _x, y, layer=layer: layer.finish(y))
            twin.module.set_submodule(path, plain)
    return twin


def _weight_name(name: str) -> str:
    """Name of the weight that a member of `filters` is, in the network of `_dense`."""
    return f"{name.rpartition('.')[0]}.weight"


def _gradients(graph: Graph, weights: dict[str, Tensor], inputs: Inputs, targets: Tensor) -> dict[str, Tensor]:
    """Gradient of the loss of one image in each weight."""
    leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
    device = device_of(graph.module)
    moved = to_device(inputs, device)
    args, kwargs = ((), moved) if isinstance(moved, dict) else (moved if isinstance(moved, tuple) else (moved,), {})
    loss = losses(functional_call(graph.module, leaves, args, kwargs), targets.to(device), "an image").sum()
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(leaves, found, strict=True) if gradient is not None}


def _rows(groups: Groups, name: str, tensor: Tensor) -> Tensor:
    """A tensor of a weight's shape as a row per filter, as `filters` has it."""
    dim = next(slot.dim for slot in groups.labels.slots if slot.name == name and produces(groups.graph, slot))
    return tensor.movedim(dim if name.endswith(".weight") else 0, 0).flatten(1)


def _slopes(graph: Graph, groups: Groups, source: Source) -> list[Tensor]:
    """∂L_i/∂z of each batch, (images, classes)."""
    network, found = GatedNetwork(graph, groups), []
    with counted(source.console, "gradients", None) as step:
        for index, (inputs, targets) in enumerate(limited_batches(loader_of(source), "calibration", source.limit)):
            found.append(slopes_of(network, graph, inputs, targets, f"batch {index} of calibration").cpu())
            step(len(targets))
    return found


def _by_group(groups: Groups, values: Tensor) -> list[Member]:
    """A member per group from values (anything, classes)."""
    return [
        Member(group.name, group.classes, (values[:, torch.from_numpy(group.classes)].T,)) for group in groups.groups
    ]
