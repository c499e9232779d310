"""The tensors of a model by name, and the module tree of a graph made of copies of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, fx, nn

from ..errors import ModelError, TraceError


class Store:
    """All tensors of a model under their names, in the model's order.

    Args:
        state: what the state dict holds.
        constants: buffers that are not in the state dict, and constants of the model's code.
    """

    def __init__(self, state: Mapping[str, Tensor], constants: Mapping[str, Tensor]) -> None:
        self.tensors: dict[str, Tensor] = {**state, **constants}
        self.persistent = frozenset(state)
        self._tied: dict[int, list[str]] = {}
        self._homes: set[str] = set()
        for name, tensor in self.tensors.items():
            self._tied.setdefault(id(tensor), []).append(name)
            self._homes.update(_parents(name))

    def names(self, name: str) -> list[str]:
        """All names of a tensor, several where it is tied, in the model's order."""
        return self._tied[id(self.tensors[name])]

    def lives_below(self, path: str) -> bool:
        """Whether some tensor's name starts with this path."""
        return path in self._homes


def _parents(name: str) -> Iterable[str]:
    parts = name.split(".")[:-1]
    return (".".join(parts[:i]) for i in range(1, len(parts) + 1))


def check_finite(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Every tensor has values, no NaN among them, and none is infinite in parameters and running statistics.

    Raises:
        ModelError: names the first tensor that does not.
    """
    for name, tensor in tensors:
        if torch.nn.parameter.is_lazy(tensor) or tensor.is_meta:
            raise ModelError(f"{name!r} has no values yet", hint="Initialise the model (run it once) before tracing.")
        if tensor.is_inference():
            raise ModelError(
                f"{name!r} was made under torch.inference_mode and cannot be trained or exported",
                hint="Create and load the model outside of inference mode.",
            )
        # one sum finds nearly every healthy tensor; it may also overflow, so the elements have the last word
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.detach().sum())):
            _check_elements(name, tensor)


def _check_elements(name: str, tensor: Tensor) -> None:
    nan = int(torch.isnan(tensor).sum())
    trained = isinstance(tensor, nn.Parameter) or name.rpartition(".")[2].startswith("running_")
    infinite = int(torch.isinf(tensor).sum()) if trained else 0  # a mask buffer may hold -inf
    if nan or infinite:
        count = f"{nan} NaN" if nan else f"{infinite} infinite"
        raise ModelError(
            f"{name!r} of shape {tuple(tensor.shape)} holds {count} values",
            hint="Load finite weights; the training that made these has diverged.",
        )


def build_tree(graph: fx.Graph, store: Store, layers: Mapping[str, nn.Module]) -> fx.GraphModule:
    """The runnable module: layers, parameters and buffers that the graph reads, copied, under the model's names.

    A tied tensor is one tensor under all its names; a shared layer is one layer under all its paths.

    Args:
        graph: nodes that call `layers` and read tensors of `store`.
        layers: layers by path, their tensors still on the `meta` device.
    """
    called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    layers = {path: layers[path] for path in called}
    wanted = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    wanted |= {f"{path}.{leaf}" for path in called for leaf in own_tensors(layers[path])}
    used = {name for first in wanted for name in store.names(first)}
    # built empty and filled, in the model's order: GraphModule would copy attributes in the order of their use
    module = fx.GraphModule(nn.Module(), fx.Graph())
    copies: dict[int, Tensor] = {}
    for name, tensor in store.tensors.items():
        if name in used:
            _hold(module, layers, name, copies.setdefault(id(tensor), _copy(tensor)), name in store.persistent)
    for path in sorted(called):
        _home(module, layers, path)
    _share_layers(module, store, called)
    module.graph = graph
    return module


def own_tensors(layer: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a layer itself, by name."""
    tensors = {**layer._parameters, **layer._buffers}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _copy(tensor: Tensor) -> Tensor:
    copy = tensor.detach().clone()
    return nn.Parameter(copy, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy


def _hold(root: nn.Module, layers: Mapping[str, nn.Module], name: str, tensor: Tensor, persistent: bool) -> None:
    path, _, leaf = name.rpartition(".")
    owner = _home(root, layers, path)
    owner._parameters.pop(leaf, None)
    owner._buffers.pop(leaf, None)
    _check_free(owner, leaf, name)
    if isinstance(tensor, nn.Parameter):
        owner.register_parameter(leaf, tensor)
    else:
        owner.register_buffer(leaf, tensor, persistent=persistent)


def _home(root: nn.Module, layers: Mapping[str, nn.Module], path: str) -> nn.Module:
    """The module at a path; on the way there, layers where they belong and empty modules elsewhere."""
    module, at = root, ""
    for part in path.split(".") if path else ():
        at = f"{at}.{part}" if at else part
        if part not in module._modules:
            _check_free(module, part, at)
            module.add_module(part, layers[at] if at in layers else nn.Module())
        child = module._modules[part]
        assert child is not None
        module = child
    return module


def _check_free(owner: nn.Module, name: str, path: str) -> None:
    if hasattr(owner, name):
        raise TraceError(
            f"{path!r} has the name of an attribute of {type(owner).__name__}, which takes its place in the graph",
            hint="Rename it in the model.",
        )


def _share_layers(root: nn.Module, store: Store, called: set[str]) -> None:
    """Where a module had several paths in the model, put the one layer under all of them."""
    for path in sorted(called):
        layer = root.get_submodule(path)
        leaves = own_tensors(layer)
        for name in store.names(f"{path}.{next(iter(leaves))}") if leaves else ():
            other = name.rpartition(".")[0]
            if other not in called and all(_tied(store, f"{path}.{n}", f"{other}.{n}") for n in leaves):
                _replace_by(root, other, layer)


def _replace_by(root: nn.Module, path: str, layer: nn.Module) -> None:
    """Put a shared layer at a path unless something of its own lives there."""
    old = root.get_submodule(path)
    if set(own_tensors(old)) == set(own_tensors(layer)) and not old._modules:
        root.set_submodule(path, layer)


def _tied(store: Store, one: str, other: str) -> bool:
    return other in store.tensors and store.tensors[one] is store.tensors[other]
