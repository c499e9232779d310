"""An independent copy of a graph."""

from __future__ import annotations

from torch import Tensor, nn

from ..ir.graph import Graph


def clone_graph(graph: Graph) -> Graph:
    """A copy that shares no tensor with `graph`, so that training one does not change the other; ties stay ties."""
    twin = graph.copy()
    fresh: dict[int, Tensor] = {}
    for module in twin.module.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    table[name] = fresh.setdefault(id(tensor), _clone(tensor))  # type: ignore[assignment]
    return twin


def _clone(tensor: Tensor) -> Tensor:
    copy = tensor.detach().clone()
    return nn.Parameter(copy, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy
