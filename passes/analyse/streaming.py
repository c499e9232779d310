"""One eval forward pass per batch over a loader, with the tensors of any nodes on the way.

Statistics, Gram matrices and scores all read activations; they differ only in what they do with them. Here the network
runs once per batch, however many nodes are looked at, and nothing outlives its batch.

Under `torchrun` each process runs every `world`-th image of each batch, so that a visitor which sums has only to add up
its sums over the processes at the end (`sharing.shared_sum`, or `sharing.shared_list` and a merge of its own).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Sized

import torch
from rich.console import Console
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ...ir.errors import DataError, OptionError
from ...ir.graph import Graph, TensorSpec
from ...runtime.data import Inputs, Loader, checked_batches, images_in
from ...runtime.forward import call, device_of
from ...runtime.training.features import find_node
from .progress import counted
from .sharing import processes, share

Visit = Callable[[dict[str, Tensor]], None]
VisitEach = Callable[[str, Tensor], None]


def stream(
    graph: Graph,
    loader: Loader,
    visit: Visit,
    *,
    nodes: Sequence[str],
    limit: int | None = None,
    name: str = "calibration",
    title: str = "statistics",
    console: Console | None = None,
) -> int:
    """Run the network once per batch and give the visitor all tensors of the nodes together.

    Holds the tensors of all `nodes` for one batch; `stream_each` holds one at a time.

    Args:
        graph: the network; runs in eval mode without gradients on its own device, its modes stay as they are.
        loader: iterable of `(inputs, targets)` of any length, also of unknown one; targets are not looked at.
        visit: called once per batch with `{node: tensor}`, tensors `(N, ...)` as the network computed them. Under
            torchrun N counts this process's images, and a process without any in a batch is not called.
        nodes: names of nodes (inputs too), or paths of modules, whose last node is meant.
        limit: stop after so many images of all processes together; None takes all.
        name: what to call the loader in an error.
        title: what the progress bar says.
        console: where it is shown, if it is a terminal.

    Returns:
        How many images were looked at by all processes together.

    Raises:
        DataError: an empty loader, a bad batch, or one that the network cannot take.
        OptionError: a node that does not exist or gives no tensor, or a limit below 1.
    """
    held: dict[str, Tensor] = {}

    def keep(node: str, tensor: Tensor) -> None:
        held[node] = tensor
        if len(held) == len(set(nodes)):
            try:
                visit(dict(held))
            finally:
                held.clear()

    return stream_each(graph, loader, keep, nodes=nodes, limit=limit, name=name, title=title, console=console)


def stream_each(
    graph: Graph,
    loader: Loader,
    visit: VisitEach,
    *,
    nodes: Sequence[str],
    limit: int | None = None,
    name: str = "calibration",
    title: str = "statistics",
    console: Console | None = None,
) -> int:
    """As `stream`, but the visitor gets `(node, tensor)` as soon as it is computed, and it need not be held."""
    module = _visited(graph, nodes, visit)
    device, dtype = device_of(module), _dtype_of(module)
    accelerator, seen = processes(), 0
    rank, world = accelerator.process_index, accelerator.num_processes
    main = console if accelerator.is_main_process else None
    steps = batches_within(loader, limit)
    with counted(main, title, steps) as step, torch.no_grad():
        for index, inputs in enumerate(limited(loader, name, limit)):
            images = images_in(inputs)
            if images > rank:
                moved = pytree.tree_map(lambda t: _moved(share(t, rank, world), device, dtype), inputs)
                _run(module, moved, f"batch {index} of {name}")
            seen += images
            step(images)
    return seen


def limited(loader: Loader, name: str, limit: int | None) -> Iterator[Inputs]:
    """Checked inputs, batch by batch, up to so many images; the last batch is cut to fit.

    Raises:
        DataError: an empty loader or a bad batch.
        OptionError: a limit below 1.
    """
    for inputs, _ in limited_batches(loader, name, limit):
        yield inputs


def limited_batches(loader: Loader, name: str, limit: int | None) -> Iterator[tuple[Inputs, Tensor]]:
    """Checked `(inputs, targets)` up to so many images; see `limited`."""
    if limit is not None and limit < 1:
        raise OptionError(f"a limit of {limit} images leaves nothing to look at", hint="Give 1 or more, or None.")
    left = limit
    for inputs, targets in checked_batches(loader, name):
        if left is None:
            yield inputs, targets
            continue
        count = min(left, images_in(inputs))
        yield pytree.tree_map(lambda t, count=count: t[:count], inputs), targets[:count]
        left -= count
        if not left:
            return


def batches_within(loader: Loader, limit: int | None) -> int | None:
    """How many batches a loader gives up to so many images; None where that cannot be told beforehand."""
    if limit is None or not isinstance(loader, Sized):
        return len(loader) if isinstance(loader, Sized) else None
    size = getattr(loader, "batch_size", None)
    return min(len(loader), -(-limit // size)) if isinstance(size, int) else None


class _Visitor(nn.Module):
    """Shows a tensor to somebody on its way through the network."""

    def __init__(self, node: str, visit: VisitEach) -> None:
        super().__init__()
        self.node, self.visit = node, visit

    def forward(self, tensor: Tensor) -> None:
        """Show it; what goes wrong there is no fault of the batch."""
        try:
            self.visit(self.node, tensor)
        except Exception as error:
            raise _VisitError(error) from error


class _VisitError(Exception):
    """Carries a visitor's error out of the network, where others are the batch's fault."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


def _visited(graph: Graph, nodes: Sequence[str], visit: VisitEach) -> nn.Module:
    """A copy of the network on the same tensors, in eval mode, that calls the visitor behind each of the nodes."""
    module = graph.copy(compiled=False).module
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    for number, (name, node) in enumerate({name: find_tensor(module.graph, name) for name in nodes}.items()):
        path = f"_visitor_{number}"
        module.add_module(path, _Visitor(name, visit))
        with module.graph.inserting_after(inputs[-1] if node in inputs else node):
            module.graph.call_module(path, (node,))
    module.recompile()
    return module.eval()


def find_tensor(graph: fx.Graph, name: str) -> fx.Node:
    """The node of a name, an input's too, or the last of the module under a path.

    Raises:
        OptionError: there is none, or it does not give one tensor.
    """
    inputs = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    node = inputs.get(name) or find_node(graph, name)
    if not isinstance(node.meta.get("spec"), TensorSpec):
        raise OptionError(f"node {name!r} gives no single tensor", hint="Name one that does, such as a layer.")
    return node


def _run(module: nn.Module, inputs: Inputs, where: str) -> None:
    try:
        call(module, inputs)
    except _VisitError as error:
        raise error.error from None
    except (RuntimeError, ValueError, TypeError) as error:
        tensors = pytree.tree_leaves(inputs)
        raise DataError(
            f"the network cannot take {where} (inputs {', '.join(str(tuple(t.shape)) for t in tensors)}): "
            f"{str(error).strip().partition(chr(10))[0].rstrip('.')}",
            hint="Compare with the example inputs that it was traced with.",
        ) from error


def _dtype_of(module: nn.Module) -> torch.dtype | None:
    """The precision of a network's first floating-point parameter."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), None)


def _moved(tensor: Tensor, device: torch.device, dtype: torch.dtype | None) -> Tensor:
    """An input on the network's device, a floating-point one in the network's precision."""
    return tensor.to(device, dtype if tensor.is_floating_point() else None)
