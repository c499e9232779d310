"""Features: the tensors inside a network, given out beside its outputs.

Attention transfer and hints compare what student and teacher hold at the same depth. `Taps` names these places in both,
`tapped` makes a module that computes the same and gives the tensors there as well.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from ...ir.errors import OptionError


@dataclass(frozen=True)
class Taps:
    """Places of knowledge: the k-th of the student is compared with the k-th of the teacher.

    Args:
        student: names of nodes of an `fx.GraphModule`, or paths of modules of any network (their output is meant).
        teacher: the same in the teacher; as many.

    Raises:
        OptionError: none at all, or not as many on both sides.
    """

    student: Sequence[str]
    teacher: Sequence[str]

    def __post_init__(self) -> None:
        if not self.student or len(self.student) != len(self.teacher):
            raise OptionError(
                f"taps name {len(self.student)} places in the student and {len(self.teacher)} in the teacher",
                hint="Name at least one, and one in the teacher for each in the student.",
            )


def tapped(module: nn.Module, places: Sequence[str]) -> nn.Module:
    """A module whose forward gives `(outputs, features)`, features a tuple of tensors in the order of `places`.

    It holds the very layers, parameters and buffers of `module`: training one trains the other, and a mode set on one
    is the mode of the other's layers. An `fx.GraphModule` becomes another one with a richer output (its state-dict keys
    are the same; it compiles and runs under DDP). Any other network is wrapped; hooks are there while it runs. Of a
    layer that runs several times, the last output is given.

    Args:
        module: the network.
        places: names of nodes (only of an `fx.GraphModule`), or paths of modules.

    Raises:
        OptionError: no place of that name; or, when it runs, a module there that was not called, gave no tensor, or
            whose output was overwritten in place later on.
    """
    if isinstance(module, fx.GraphModule):
        return _richer(module, [find_node(module.graph, place) for place in places])
    paths = dict(module.named_modules(remove_duplicate=False))
    for place in places:
        if place not in paths or not place:
            raise _unknown(place, [path for path in paths if path], "module")
    return _Hooked(module, tuple(places))


def find_node(graph: fx.Graph, place: str) -> fx.Node:
    """The node of this name, or the last one that the module under this path computed.

    Raises:
        OptionError: there is none.
    """
    nodes: list[fx.Node] = [node for node in graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    for node in nodes:
        if node.name == place:
            return node
    for node in reversed(nodes):
        path = module_path(node)
        if path == place or path.startswith(f"{place}."):
            return node
    names = [name for node in nodes for name in (node.name, module_path(node)) if name]
    raise _unknown(place, names, "node or module")


def module_path(node: fx.Node) -> str:
    """Path of the module that a node comes from; empty where that is not known."""
    return str(node.target) if node.op == "call_module" else str(node.meta.get("path") or "")


def _unknown(place: str, names: Iterable[str], kind: str) -> OptionError:
    close = difflib.get_close_matches(place, list(dict.fromkeys(names)), n=3, cutoff=0.5)
    hint = f"Did you mean {', '.join(map(repr, close))}?" if close else "`print(graph.module.graph)` lists all nodes."
    if not close and kind == "module":
        hint = "`model.named_modules()` lists all paths."
    return OptionError(f"the network has no {kind} {place!r}", hint=hint)


def _richer(module: fx.GraphModule, nodes: list[fx.Node]) -> fx.GraphModule:
    """A graph module on the same tables of layers and tensors whose output is `(output, (tensors of the nodes))`."""
    graph, table = fx.Graph(), dict[fx.Node, fx.Node]()
    output = graph.graph_copy(module.graph, table)
    features = tuple(table[node] for node in nodes)
    codegen = graph._codegen = copy.copy(module.graph._codegen)
    info = codegen.pytree_info if isinstance(codegen, _PyTreeCodeGen) else None
    if isinstance(codegen, _PyTreeCodeGen) and info is not None and info.out_spec is not None:
        # the generated code unflattens a flat tuple: it needs the structure of the whole
        flat = list(output) if isinstance(output, (tuple, list)) else [output]
        whole = (pytree.tree_unflatten([0] * len(flat), info.out_spec), (0,) * len(features))
        codegen.pytree_info = _PyTreeInfo(info.orig_args, info.in_spec, pytree.tree_structure(whole))
        graph.output((*flat, *features))
    else:
        graph.output((output, features))
    twin = fx.GraphModule(nn.Module(), fx.Graph())
    # the tables themselves, not copies: whatever replaces a tensor in one replaces it in the other
    for name in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
        setattr(twin, name, getattr(module, name))
    twin.training = module.training
    twin.graph = graph
    return twin


class _Hooked(nn.Module):
    """Any network, with hooks on some of its modules while it runs."""

    def __init__(self, module: nn.Module, places: tuple[str, ...]) -> None:
        super().__init__()
        self.module, self.places, self.training = module, places, module.training

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, tuple[Tensor, ...]]:
        """`(outputs, features)`."""
        found: dict[str, tuple[Tensor, int]] = {}

        def keep(place: str, output: Any) -> None:
            if not isinstance(output, Tensor):
                raise OptionError(f"module {place!r} gives a {type(output).__name__}, not a tensor to compare")
            found[place] = (output, 0 if output.is_inference() else output._version)

        handles = [
            self.module.get_submodule(place).register_forward_hook(lambda _, __, out, place=place: keep(place, out))
            for place in self.places
        ]
        try:
            outputs = self.module(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        return outputs, tuple(_still(found.get(place), place) for place in self.places)


def _still(found: tuple[Tensor, int] | None, place: str) -> Tensor:
    """The tensor of a place, if there is one and nothing has written over it since."""
    if found is None:
        raise OptionError(f"module {place!r} was not called in the forward pass", hint="Name one that is.")
    tensor, version = found
    if not tensor.is_inference() and tensor._version != version:
        raise OptionError(
            f"the output of module {place!r} is changed in place later in the forward pass",
            hint="Name the module that changes it, or the one around both.",
        )
    return tensor
