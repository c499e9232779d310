"""Shapes and types on the example inputs: from the export's fake tensors, and from a run where those do not know."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..graph import TensorSpec


def describe(graph: fx.Graph) -> None:
    """Reduce the metadata of every node to what the dialect knows: `spec`, `path`, `source`."""
    for node in graph.nodes:
        meta = {"spec": spec_of(node.meta.get("val"))} if node.op != "output" else {}
        meta.update({key: node.meta[key] for key in ("path", "source") if node.meta.get(key)})
        node.meta = meta


def spec_of(value: Any) -> Any:
    """`TensorSpec` of a tensor, a tuple for several, the number behind a symbolic size; None in it if not known."""
    if isinstance(value, Tensor):
        return TensorSpec(tuple(spec_of(size) for size in value.shape), value.dtype)
    if isinstance(value, (tuple, list)):
        return tuple(spec_of(v) for v in value)
    return value.node.hint if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)) else value


def complete(module: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Run the network once if some size depends on data (`nonzero`, `item`), and note the sizes found."""
    calls = (node for node in module.graph.nodes if node.op in ("call_function", "call_module"))
    if any(_unknown(node.meta["spec"]) for node in calls):
        with torch.no_grad():
            _Measuring(module).run(*pytree.tree_leaves((args, kwargs)), enable_io_processing=False)


def _unknown(spec: Any) -> bool:
    if isinstance(spec, TensorSpec):
        return None in spec.shape
    return any(map(_unknown, spec)) if isinstance(spec, tuple) else spec is None


class _Measuring(fx.Interpreter):
    """Runs a graph and keeps the spec of each value."""

    def run_node(self, n: fx.Node) -> Any:
        """Run one node."""
        value = super().run_node(n)
        if n.op in ("call_function", "call_module"):
            n.meta["spec"] = spec_of(value)
        return value
