"""Many masked networks for little more than one: what they have in common runs once.

Up to the first layer that reads a masked channel, a masked network is the network itself. So the network runs once from
front to back, and where a set of channels is first read, the rest of it runs once more with that set masked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import fx
from torch.utils import _pytree as pytree

from ...ir.cut import Cut
from ...ir.errors import DataError
from ...ir.graph import Graph
from ...ir.verify import MaskedNetwork
from ...runtime.data import Inputs
from ...runtime.forward import device_of


def branches(cuts: Sequence[Cut], graph: Graph, leaves: list[Any]) -> Iterator[tuple[int, Any]]:
    """The network's own output as number −1, then the output with each cut masked, in the order of the network.

    Args:
        cuts: sets of channels of the graph; each is masked alone, to zero where it is read.
        graph: the network, in the mode in which it is to run.
        leaves: inputs in the order of its placeholders, see `flat_inputs`.
    """
    nodes, output = graph.nodes, graph.module.graph.process_outputs
    starts: dict[int, list[int]] = {}
    for number, cut in enumerate(cuts):
        starts.setdefault(_first_reader(cut, nodes), []).append(number)
    yield -1, output(fx.Interpreter(graph.module).run(*leaves, enable_io_processing=False))
    plain = fx.Interpreter(graph.module)
    plain.args_iter = iter(leaves)
    last = max(starts, default=-1)
    for place, node in enumerate(nodes[: last + 1]):
        for number in starts.get(place, ()):
            masked = MaskedNetwork(cuts[number])
            masked.env = dict(plain.env)
            yield number, output(_advance(masked, nodes[place:]))
        _advance(plain, [node])


def flat_inputs(graph: Graph, inputs: Inputs, where: str) -> list[Any]:
    """Inputs in the order of the graph's placeholders, on its device and in its precision.

    Raises:
        DataError: other inputs than the network has.
    """
    device = device_of(graph.module)
    examples = pytree.tree_leaves((graph.example_args, graph.example_kwargs))
    if isinstance(inputs, dict) and set(inputs) == set(graph.example_kwargs):
        inputs = {name: inputs[name] for name in graph.example_kwargs}
    leaves = pytree.tree_leaves(inputs)
    if len(leaves) != len(examples):
        raise DataError(
            f"{where} has {len(leaves)} inputs, the network takes {len(examples)}",
            hint="Compare with the example inputs that it was traced with.",
        )
    return [leaf.to(device, example.dtype) for leaf, example in zip(leaves, examples, strict=True)]


def _first_reader(cut: Cut, nodes: list[fx.Node]) -> int:
    """Position of the first node that reads a channel of a cut, or normalises it anew; the last node's if none does."""
    labels, groups = cut.labels, cut.groups
    for place, node in enumerate(nodes):
        sources = (*labels.readers.get(node, ()), *((node,) if node in labels.refitted else ()))
        axes = [axis for axis in map(groups.channels, sources) if axis is not None]
        if any(not cut.kept[axis[1]].all() for axis in axes):
            return place
    return len(nodes) - 1


def _advance(network: fx.Interpreter, nodes: list[fx.Node]) -> Any:
    """Run some nodes, dropping values that no later one reads; returns the last value."""
    value = None
    for node in nodes:
        value = network.env[node] = network.run_node(node)
        for done in network.user_to_last_uses.get(node, ()):
            network.env.pop(done, None)
    return value
