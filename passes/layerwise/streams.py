"""Tensors of two networks on the same batches, as they come by: nothing of them is kept."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from ...ir.errors import DataError, ModelError
from ...ir.graph import Graph
from ...ir.groups import batch_size
from ...ir.verify import evaluating
from ...runtime.data import Inputs, Loader, images_in
from ...runtime.forward import call, device_of
from ..analyse.sharing import processes, share
from ..analyse.streaming import limited

Tensors = dict[str, Tensor]
Visit = Callable[[Tensors, Tensors], None]

HELD = 2**26
"""Numbers that the tensors shown at a time may hold."""


def prefix(module: fx.GraphModule, names: Sequence[str]) -> fx.GraphModule:
    """A module on the same layers that gives the tensors of the named nodes as a tuple, and computes nothing else."""
    graph, table = fx.Graph(), dict[fx.Node, fx.Node]()
    graph.graph_copy(module.graph, table)
    by_name = {node.name: fresh for node, fresh in table.items()}
    graph.output(tuple(by_name[name] for name in names))
    codegen = graph._codegen = copy.copy(module.graph._codegen)
    if isinstance(codegen, _PyTreeCodeGen):
        info = codegen.pytree_info
        whole = None if info.out_spec is None else pytree.tree_structure((0,) * len(names))
        codegen.pytree_info = _PyTreeInfo(info.orig_args, info.in_spec, whole)
    for node in reversed(graph.nodes):
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)
    twin = fx.GraphModule(nn.Module(), fx.Graph())
    for name in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
        setattr(twin, name, getattr(module, name))  # the tables themselves: layers that change later change here too
    twin.training = module.training
    twin.graph = graph
    return twin


def stream_pair(
    before: Graph,
    after: Graph,
    loader: Loader,
    wanted: tuple[Sequence[str], Sequence[str]],
    visit: Visit,
    step: Callable[[int], None],
) -> None:
    """Run two networks over a loader in evaluation mode, and show `visit` the wanted tensors of both, by name.

    Batches are cut into parts small enough that the wanted tensors of one part hold at most `HELD` numbers, where the
    network takes batches of any size. Under `torchrun` each process sees every `world`-th image of a batch, and none
    of a batch with too few.

    Args:
        before: the first network.
        after: the second; takes the same inputs.
        loader: batches of `(inputs, targets)`.
        wanted: names of nodes of the first and of the second network; a network of which none is wanted does not run.
        visit: called once per part of a batch.
        step: called behind each batch with its number of images.

    Raises:
        DataError: the loader or a batch is unsound.
        ModelError: a wanted tensor holds NaN or infinite values.
    """
    pairs = zip((before, after), wanted, strict=True)
    networks = [(prefix(graph.module, names), names) for graph, names in pairs if names]
    place, dtype = device_of(before.module), precision_of(before.module)
    who = processes()
    with evaluating(before.module), evaluating(after.module):
        for index, inputs in enumerate(limited(loader, "calibration", None)):
            if images_in(inputs) > who.process_index:
                mine = _mine(inputs, who.process_index, who.num_processes, place, dtype)
                for part in _parts(mine, before, wanted[0], after, wanted[1]):
                    found = [dict(zip(names, _run(network, part, index), strict=True)) for network, names in networks]
                    _check(found, index)
                    visit(*(found.pop(0) if names else {} for names in wanted))
            step(images_in(inputs))


def _parts(inputs: Inputs, before: Graph, old: Sequence[str], after: Graph, new: Sequence[str]) -> Iterator[Inputs]:
    """A batch in parts whose wanted tensors fit into memory, judged by the sizes on the example inputs."""
    images = images_in(inputs)
    numbers = sum(
        node.meta["spec"].numel / batch_size(graph)
        for graph, names in ((before, old), (after, new))
        for node in graph.nodes
        if node.name in names
    )
    size = max(1, int(HELD / max(numbers, 1))) if before.dynamic_batch else images
    for start in range(0, images, size):
        part: Inputs = pytree.tree_map(lambda tensor, start=start: tensor[start : start + size], inputs)
        yield part


def _mine(inputs: Inputs, rank: int, world: int, device: torch.device, dtype: torch.dtype) -> Inputs:
    """This process's images, where and in what precision the network wants them."""

    def moved(tensor: Tensor) -> Tensor:
        return share(tensor, rank, world).to(device, dtype if tensor.is_floating_point() else None)

    result: Inputs = pytree.tree_map(moved, inputs)
    return result


def _run(network: nn.Module, inputs: Inputs, index: int) -> tuple[Tensor, ...]:
    try:
        result: tuple[Tensor, ...] = call(network, inputs)
    except (RuntimeError, ValueError, TypeError) as error:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in pytree.tree_leaves(inputs))
        raise DataError(
            f"the network cannot take batch {index} of calibration (inputs {shapes}): "
            f"{str(error).strip().partition(chr(10))[0].rstrip('.')}",
            hint="Compare with the example inputs that it was traced with.",
        ) from error
    return result


def precision_of(module: nn.Module) -> torch.dtype:
    """Type of the network's first floating-point parameter."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


def _check(found: list[Tensors], index: int) -> None:
    for tensors in reversed(found):  # what layers read comes before what they give
        for name, tensor in tensors.items():
            if not bool(torch.isfinite(tensor.sum(dtype=torch.float64))):
                raise ModelError(
                    f"activations at {name!r} of shape {tuple(tensor.shape)} are NaN or infinite on batch {index} "
                    "of calibration",
                    hint="Look at the weights before that node, or use float32 where float16 overflows.",
                )
