"""Two networks on the same images, from layer to layer: what each layer reads and should give, without starting anew.

A layer behind quantised ones learns from what these give now, so that a network of fifty layers would have to run fifty
times. Here its images stop in front of a layer, and go on from there once it is quantised, as far as the tensors on
which the rest depends fit into the memory that is allowed; where they do not, images run again from where they did.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ...ir.errors import DataError, ModelError
from ...ir.graph import Graph, TensorSpec, submodule
from ...ir.groups import batch_size
from ...ir.nodes import operand
from ...ir.verify import evaluating
from ...runtime.data import Inputs, Loader, images_in
from ...runtime.forward import device_of
from ..analyse.sharing import processes, share
from ..analyse.streaming import limited
from ..layerwise.streams import HELD, precision_of

Pair = tuple[Any, Any]
"""A node's value in the original network, and in the one that is being quantised: one object where both are equal."""

State = dict[fx.Node, Pair]
Visit = Callable[[str, Tensor, Tensor], None]
"""Gets a layer's node, what the layer reads (of the network being quantised), and what it should give (original)."""


class Walk:
    """Calibration images on their way through two networks with the same nodes.

    Under `torchrun` each process has its share of every batch.

    Args:
        before: the original network.
        after: the other one; its layers may be replaced on the way, behind where the images are. May be `before`.
        loader: batches of `(inputs, targets)`.
        images: at most so many of them are used.
        memory: bytes of tensors that may be kept between layers.
    """

    def __init__(self, before: Graph, after: Graph, loader: Loader, images: int, memory: int) -> None:
        self.before, self.after, self.loader, self.images, self.memory = before, after, loader, images, memory
        self.nodes = before.nodes
        self._place = {node.name: index for index, node in enumerate(self.nodes)}
        self._last_use = _last_uses(self.nodes)
        self._at = 0
        self._kept: deque[State] | None = None
        self.seen = 0
        """Images of all processes together in the last pass over the loader."""

    def visit(self, names: Sequence[str], visit: Visit) -> None:
        """Show what the layers of some nodes read and should give, batch by batch.

        Args:
            names: of nodes, none before those of earlier calls.
            visit: called for each of them with each part of a batch.

        Raises:
            DataError: the loader or a batch is unsound.
            ModelError: a tensor holds NaN or infinite values.
        """
        stop, wanted = max(self._place[name] for name in names), set(names)
        keep = self._bytes(stop) <= self.memory
        kept = deque[State]()
        with evaluating(self.before.module), evaluating(self.after.module):
            for state in self._states(used_up=keep):
                self._advance(state, stop, wanted, visit)
                if keep:
                    kept.append({node: pair for node, pair in state.items() if self._last_use[node] >= stop})
        if keep:
            self._at, self._kept = stop, kept

    # -- where the images are -------------------------------------------------------------------------------

    def _states(self, *, used_up: bool) -> Iterator[State]:
        """The tensors of each part of a batch where the images stopped; from the loader if they are not kept."""
        if self._kept is None:
            yield from self._fresh()
            return
        for _ in range(len(self._kept)):
            state = self._kept.popleft()
            if not used_up:
                self._kept.append(state)
            yield dict(state)

    def _fresh(self) -> Iterator[State]:
        device, dtype, who = device_of(self.before.module), precision_of(self.before.module), processes()
        holders = [node for node in self.nodes if node.op == "placeholder"]
        self.seen = 0
        for index, inputs in enumerate(limited(self.loader, "calibration", self.images)):
            self.seen += images_in(inputs)
            if images_in(inputs) <= who.process_index:
                continue
            leaves = self._leaves(inputs, index, len(holders))
            mine = [share(t, who.process_index, who.num_processes) for t in leaves]
            moved = [t.to(device, dtype if t.is_floating_point() else None) for t in mine]
            for start in range(0, len(moved[0]), self._part):
                own = [t[start : start + self._part] for t in moved]
                yield {node: (tensor, tensor) for node, tensor in zip(holders, own, strict=True)}

    def _leaves(self, inputs: Inputs, index: int, count: int) -> list[Tensor]:
        """The tensors of a batch in the order of the network's inputs."""
        names = self.before.example_kwargs
        ordered = [inputs[name] for name in names if name in inputs] if isinstance(inputs, dict) else inputs
        leaves: list[Tensor] = pytree.tree_leaves(ordered)
        if len(leaves) != count:
            raise DataError(
                f"batch {index} of calibration has {len(leaves)} input tensors, the network takes {count}",
                hint="Compare with the example inputs that it was traced with.",
            )
        return leaves

    # -- running --------------------------------------------------------------------------------------------

    def _advance(self, state: State, stop: int, wanted: set[str], visit: Visit) -> None:
        """Compute all nodes up to one, in place of `state`, and show the wanted ones."""
        for node in self.nodes[self._at : stop + 1]:
            if node.op in ("placeholder", "get_attr", "output"):
                continue
            pair = self._run(node, state, only_before=node.name in wanted and self._place[node.name] == stop)
            if node.name in wanted:
                read = self._value(operand(node), state)[1]
                _check(read, operand(node).name)
                _check(pair[0], node.name)
                visit(node.name, read, pair[0])
            if self._place[node.name] == stop:
                return
            state[node] = pair
            for source in node.all_input_nodes:
                if self._last_use[source] <= self._place[node.name]:
                    state.pop(source, None)

    def _run(self, node: fx.Node, state: State, *, only_before: bool) -> Pair:
        inputs = [self._value(source, state) for source in node.all_input_nodes]
        first = self._call(node, state, 0)
        if only_before or (all(old is new for old, new in inputs) and self._same(node)):
            return first, first
        return first, self._call(node, state, 1)

    def _call(self, node: fx.Node, state: State, side: int) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: self._value(source, state)[side])
        graph = (self.before, self.after)[side]
        target: Any = graph.layer(node) if node.op == "call_module" else node.target
        try:
            return (
                getattr(args[0], str(target))(*args[1:], **kwargs)
                if node.op == "call_method"
                else target(*args, **kwargs)
            )
        except (RuntimeError, ValueError, TypeError) as error:
            shapes = ", ".join(str(tuple(t.shape)) for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor))
            raise DataError(
                f"the network cannot take a batch of calibration: at node {node.name!r} with tensors {shapes}: "
                f"{str(error).strip().partition(chr(10))[0].rstrip('.')}",
                hint="Compare with the example inputs that it was traced with.",
            ) from error

    def _value(self, node: fx.Node, state: State) -> Pair:
        if node.op != "get_attr":
            return state[node]
        return self.before.tensor(str(node.target)), self.after.tensor(str(node.target))

    def _same(self, node: fx.Node) -> bool:
        """Whether a node's layer is the same in both networks."""
        if node.op != "call_module" or self.before is self.after:
            return True
        old, new = (list(_tensors(submodule(g.module, str(node.target)))) for g in (self.before, self.after))
        return len(old) == len(new) and all(a is b for a, b in zip(old, new, strict=True))

    # -- sizes ----------------------------------------------------------------------------------------------

    @cached_property
    def _part(self) -> int:
        """Images that run at a time: as many as let the largest node's tensors be of a moderate size."""
        if not self.before.dynamic_batch:
            return max(1, batch_size(self.before))
        most = max(sum(map(_numbers, (node, *node.all_input_nodes))) for node in self.nodes)
        return max(1, int(HELD / max(1, 2 * most / batch_size(self.before))))

    def _bytes(self, stop: int) -> float:
        """What keeping the images in front of a node would take in this process."""
        live = [n for i, n in enumerate(self.nodes[:stop]) if n.op != "get_attr" and self._last_use[n] >= stop]
        per_image = 4 * sum(map(_numbers, live)) / batch_size(self.before)
        sides = 1 if self.before is self.after else 2
        world: int = processes().num_processes
        return per_image * sides * self.images / world


def _last_uses(nodes: Sequence[fx.Node]) -> dict[fx.Node, int]:
    """Place of the last node that reads each node."""
    place = {node: index for index, node in enumerate(nodes)}
    return {node: max((place[user] for user in node.users), default=-1) for node in nodes}


def _numbers(node: fx.Node) -> int:
    """Numbers that a node's value holds on the example inputs."""
    if node.op == "get_attr":
        return 0
    specs = pytree.tree_leaves(node.meta.get("spec"))
    return sum(spec.numel for spec in specs if isinstance(spec, TensorSpec))


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _check(tensor: Tensor, name: str) -> None:
    if not bool(torch.isfinite(tensor.sum(dtype=torch.float64))):
        raise ModelError(
            f"activations at {name!r} of shape {tuple(tensor.shape)} are NaN or infinite on calibration data",
            hint="Look at the weights before that node, or use float32 where float16 overflows.",
        )
