"""The graph, and the only door through which it is edited.

A `Graph` owns a `torch.fx.GraphModule` in one dialect:

- `placeholder`, `get_attr` (parameters and buffers), `output`;
- `call_module`: plain `torch.nn` layers and fxpress layers under the model's own names (see `dialect.py`);
- `call_function`: functional ATen overloads (`torch.ops.aten.add.Tensor`), `operator.getitem` and, on symbolic
  sizes, the arithmetic of `operator`.

Every node carries `node.meta["spec"]`: a `TensorSpec` (shape and dtype on the example inputs), a tuple of them for an
op with several outputs, or an int for a size. `node.meta["path"]` is the module the node comes from and
`node.meta["source"]` the line of the model's code; both may be absent.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from .errors import GraphError
from .lint import lint

T = TypeVar("T")


@dataclass(frozen=True)
class TensorSpec:
    """Shape (on the example inputs) and dtype of one tensor of the graph."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count


class Graph:
    """A traced network with its example inputs.

    Args:
        module: the runnable graph module, in the dialect described above.
        example_args: positional example inputs, as `module` takes them.
        example_kwargs: keyword example inputs.
        dynamic_batch: whether dimension 0 of the inputs may change at run time.
        dropped: state-dict keys of the traced model that its forward pass in eval mode never reads (auxiliary heads).
    """

    def __init__(
        self,
        module: fx.GraphModule,
        example_args: tuple[Any, ...],
        example_kwargs: dict[str, Any] | None = None,
        *,
        dynamic_batch: bool = True,
        dropped: tuple[str, ...] = (),
    ) -> None:
        self.module = module
        self.example_args = example_args
        self.example_kwargs = dict(example_kwargs or {})
        self.dynamic_batch = dynamic_batch
        self.dropped = dropped
        self.epoch = 0
        self.history: list[str] = []
        self._analyses: dict[Callable[..., Any], tuple[int, Any]] = {}

    @property
    def nodes(self) -> list[fx.Node]:
        """All nodes in execution order."""
        return list(self.module.graph.nodes)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module."""
        return self.module(*args, **kwargs)

    def layer(self, node: fx.Node) -> nn.Module | None:
        """The layer that a `call_module` node runs, None for any other node."""
        return submodule(self.module, str(node.target)) if node.op == "call_module" else None

    def tensor(self, name: str) -> Tensor:
        """The parameter or buffer under a dotted name such as `layer1.0.conv1.weight`."""
        owner, _, leaf = name.rpartition(".")
        value = getattr(submodule(self.module, owner), leaf)
        if not isinstance(value, Tensor):
            raise GraphError(f"{name!r} is a {type(value).__name__}, not a parameter or buffer of the graph")
        return value

    def set_tensor(self, name: str, value: Tensor) -> None:
        """Put a new tensor under an existing name; it stays a parameter or a buffer, persistent or not, as it was."""
        owner, _, leaf = name.rpartition(".")
        module = submodule(self.module, owner)
        old = getattr(module, leaf)
        if isinstance(old, nn.Parameter):
            value = nn.Parameter(value.detach(), requires_grad=old.requires_grad)
        setattr(module, leaf, value)

    def owners(self) -> dict[str, list[tuple[nn.Module, Tensor, str]]]:
        """For each name of a parameter or buffer, all places (module, tensor, attribute) that hold that very tensor."""
        places: dict[int, list[tuple[nn.Module, Tensor, str]]] = {}
        names: dict[str, int] = {}
        for path, module in self.module.named_modules(remove_duplicate=False):
            for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    names[f"{path}.{leaf}" if path else leaf] = id(tensor)
                    places.setdefault(id(tensor), []).append((module, tensor, leaf))
        return {name: places[key] for name, key in names.items()}

    def analyse(self, analysis: Callable[[Graph], T]) -> T:
        """Result of a pure analysis `analysis(graph)`, computed once per epoch."""
        cached = self._analyses.get(analysis)
        if cached is None or cached[0] != self.epoch:
            cached = (self.epoch, analysis(self))
            self._analyses[analysis] = cached
        result: T = cached[1]
        return result

    def copy(self, *, compiled: bool = True) -> Graph:
        """An independent graph whose layers share their tensors with this one until either replaces them.

        Args:
            compiled: False leaves `module.recompile()` to a caller who is going to edit the nodes first.
        """
        twin = Graph(
            _copy_module(self.module, compiled=compiled),
            self.example_args,
            self.example_kwargs,
            dynamic_batch=self.dynamic_batch,
            dropped=self.dropped,
        )
        twin.epoch, twin.history = self.epoch, list(self.history)
        return twin

    def adopt(self, other: Graph) -> None:
        """Take over the state of another graph: how a proven candidate is committed."""
        self.module, self.history = other.module, list(other.history)
        self.example_args, self.example_kwargs = other.example_args, other.example_kwargs
        self.dynamic_batch, self.dropped = other.dynamic_batch, other.dropped
        self.epoch = max(self.epoch, other.epoch) + 1

    def lint(self) -> None:
        """Check the structure.

        Raises:
            GraphError: a node has no shape or no user, a layer or tensor is missing or unused, or a layer's sizes do
                not fit its input.
        """
        lint(self.module)

    @contextlib.contextmanager
    def edit(self, author: str) -> Iterator[fx.Graph]:
        """Edit the nodes; on leaving, dead code goes, the lint runs and the epoch moves on.

        If the body or the lint raises, the graph is as it was before.

        Args:
            author: name of the pass, kept in `history` and in `node.meta["author"]` of new nodes.

        Raises:
            GraphError: an invariant does not hold after the edit.
        """
        before = _copy_module(self.module)
        known = set(self.module.graph.nodes)
        try:
            yield self.module.graph
            for node in self.module.graph.nodes:
                if node not in known:
                    node.meta.setdefault("author", author)
            remove_dead_code(self.module)
            self.module.recompile()
            self.lint()
        except BaseException:
            self.module = before
            raise
        self.epoch += 1
        self.history.append(author)


def submodule(root: nn.Module, path: str) -> nn.Module:
    """The module under a dotted path; as `Module.get_submodule`, which takes ten times as long.

    Raises:
        KeyError: there is none.
    """
    for name in path.split(".") if path else ():
        child = root._modules[name]
        if child is None:
            raise KeyError(path)
        root = child
    return root


def remove_dead_code(module: fx.GraphModule) -> None:
    """Erase nodes that nothing reads, and the layers, parameters and buffers that no node uses.

    All ops of the dialect are functional, so a node without users is dead; placeholders stay, they are the signature.
    """
    for node in reversed(module.graph.nodes):
        if not node.users and node.op not in ("placeholder", "output"):
            module.graph.erase_node(node)
    used = {str(node.target) for node in module.graph.nodes if node.op in ("call_module", "get_attr")}
    owners = {str(node.target) for node in module.graph.nodes if node.op == "call_module"}
    for path, child in list(module.named_modules()):
        if path in owners:
            continue
        for name in [*child._parameters, *child._buffers]:
            if (f"{path}.{name}" if path else name) not in used:
                delattr(child, name)
    _remove_empty(module, "", owners)


def _remove_empty(module: nn.Module, path: str, owners: set[str]) -> bool:
    """Delete sub-modules that hold neither a used layer nor a tensor; return whether `module` itself is empty."""
    for name, child in list(module.named_children()):
        if _remove_empty(child, f"{path}.{name}" if path else name, owners):
            delattr(module, name)
    return path not in owners and not (module._modules or module._parameters or module._buffers)


def _copy_module(module: fx.GraphModule, *, compiled: bool = True) -> fx.GraphModule:
    """Copy nodes and module tree; tensors are shared. Without `compiled`, `recompile()` is left to the caller."""
    twin = fx.GraphModule(nn.Module(), fx.Graph())
    memo: dict[int, nn.Module] = {}
    for name, child in module._modules.items():
        twin.add_module(name, _copy_layer(child, memo) if child is not None else None)
    twin._parameters, twin._buffers = dict(module._parameters), dict(module._buffers)
    twin._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
    twin.training = module.training
    twin._graph = _copy_nodes(module.graph)
    twin._graph.owning_module = twin
    if compiled:
        twin.recompile()
    return twin


def _copy_layer(layer: nn.Module, memo: dict[int, nn.Module]) -> nn.Module:
    """A layer with its own tables of tensors and sub-modules; the tensors are shared, and shared layers stay so."""
    if id(layer) not in memo:
        twin = memo[id(layer)] = layer.__new__(type(layer))
        twin.__dict__.update(layer.__dict__)  # past Module.__setattr__, which would take most of the time
        twin.__dict__["_parameters"], twin.__dict__["_buffers"] = dict(layer._parameters), dict(layer._buffers)
        twin.__dict__["_non_persistent_buffers_set"] = set(layer._non_persistent_buffers_set)
        twin.__dict__["_modules"] = {
            name: _copy_layer(child, memo) if child is not None else None for name, child in layer._modules.items()
        }
    return memo[id(layer)]


def _copy_nodes(graph: fx.Graph) -> fx.Graph:
    """Copy of all nodes under the same names, with shallow copies of their metadata and the same signature."""
    twin = fx.Graph()
    twin._codegen = copy.copy(graph._codegen)
    table: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        fresh = twin.create_node(
            node.op,
            node.target,
            fx.map_arg(node.args, table.__getitem__),
            fx.map_arg(node.kwargs, table.__getitem__),
            node.name,
            node.type,
        )
        fresh.meta = dict(node.meta)
        table[node] = fresh
    return twin
