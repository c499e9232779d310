"""From nodes of a traced network back to the modules of the network itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...ir.errors import OptionError
from ...ir.graph import Graph
from ...runtime.forward import modes_restored
from ...runtime.training.features import module_path, tapped


def output_paths(module: nn.Module, traced: Graph, nodes: list[fx.Node]) -> list[str]:
    """For each node, the path of the innermost module whose (last) output is that very tensor on the example inputs.

    Args:
        module: the network.
        traced: its trace.
        nodes: nodes of `traced`.

    Raises:
        OptionError: a tensor is computed between modules, in the code of one of them.
    """
    outputs = _outputs(module, {path for node in nodes for path in ancestors(module_path(node))}, traced)
    found = []
    for node, value in zip(nodes, _values(traced, nodes), strict=True):
        path = next((path for path in ancestors(module_path(node)) if _equal(outputs.get(path), value)), None)
        if path is None:
            raise OptionError(
                f"the teacher's activation {node.name!r} {tuple(value.shape)} ({node.meta.get('source', 'no line')}) "
                "is not the output of any of its modules",
                hint="Give the teacher as a graph, fxpress.trace(teacher, example_inputs), or name the places.",
            )
        found.append(path)
    return found


def ancestors(path: str) -> Iterator[str]:
    """The path itself, then every module around it, from the inside."""
    while path:
        yield path
        path = path.rpartition(".")[0]


def _values(graph: Graph, nodes: list[fx.Node]) -> tuple[Tensor, ...]:
    """The nodes' tensors on the example inputs, in evaluation mode."""
    twin = tapped(graph.module, [node.name for node in nodes])
    with torch.no_grad(), modes_restored(twin):
        values: tuple[Tensor, ...] = twin.eval()(*graph.example_args, **graph.example_kwargs)[1]
    return values


def _outputs(module: nn.Module, paths: set[str], traced: Graph) -> dict[str, Tensor]:
    """Copies of the last outputs of those modules that give one tensor."""
    outputs: dict[str, Tensor] = {}

    def keep(path: str, output: Any) -> None:
        if isinstance(output, Tensor):
            outputs[path] = output.clone()

    handles = [
        child.register_forward_hook(lambda _, __, output, path=path: keep(path, output))
        for path, child in module.named_modules(remove_duplicate=False)
        if path in paths
    ]
    try:
        with torch.no_grad(), modes_restored(module):
            module.eval()
            module(*traced.example_args, **traced.example_kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def _equal(one: Tensor | None, two: Tensor) -> bool:
    return one is not None and one.shape == two.shape and torch.allclose(one, two, rtol=1e-3, atol=1e-4)
