"""Exported ATen to layers: an operation on a module's own parameters becomes a `call_module` of that layer.

The owner of the *weight* decides, not the class that the user wrote: `aten.conv2d(x, p.weight, p.bias, ...)` becomes a
plain `nn.Conv2d` under the path `p`, with the configuration of the operation. timm's `Conv2dSame` is thus a pad and a
`Conv2d`, its `LayerNorm2d` a permute and a `LayerNorm`; state-dict keys are the model's own either way. A weight that is
computed before use (weight standardisation, layer scale) stays a value of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from . import dialect
from .errors import GraphError

Arguments = dict[str, Any]
Described = tuple[str, Arguments] | None


@dataclass(frozen=True)
class Store:
    """The tensors of a model by name: `tensors` in the model's order, `persistent` those of its state dict."""

    tensors: dict[str, Tensor]
    persistent: frozenset[str]

    def names(self, name: str) -> list[str]:
        """All names of one tensor (more than one where it is tied), the given one first."""
        same = self.tensors[name]
        return [name, *(n for n in self.tied.get(id(same), []) if n != name)]

    @property
    def tied(self) -> dict[int, list[str]]:
        """Names by identity of the tensor."""
        if not hasattr(self, "_tied"):
            table: dict[int, list[str]] = {}
            for name, tensor in self.tensors.items():
                table.setdefault(id(tensor), []).append(name)
            object.__setattr__(self, "_tied", table)
        found: dict[int, list[str]] = self._tied  # type: ignore[attr-defined]
        return found


@dataclass
class Layers:
    """Layers found so far: their type, configuration and tensors by path."""

    described: dict[str, tuple[str, Arguments]] = field(default_factory=dict)


def raise_layers(
    graph: fx.Graph, store: Store, origin: Callable[[str], nn.Module | None]
) -> dict[str, tuple[str, Arguments]]:
    """Replace operations on parameters by `call_module` nodes.

    Args:
        graph: functional ATen with `get_attr` nodes on the names of `store`.
        store: the model's tensors.
        origin: the user's module under a path, for what the operation does not tell (a momentum of None).

    Returns:
        layer type and configuration by path.
    """
    layers: dict[str, tuple[str, Arguments]] = {}
    read = _read_names(graph, store)
    for node in list(graph.nodes):
        name = getattr(node.target, "_opname", "") if node.op == "call_function" else ""
        if name in _DROPOUTS:
            _raise_dropout(graph, node, layers, store)
        elif name in _RULES:
            _raise_layer(graph, node, layers, store, read, origin)
    return layers


def _read_names(graph: fx.Graph, store: Store) -> set[str]:
    """Names of all tensors that the graph reads, under each of their names."""
    return {n for node in graph.nodes if node.op == "get_attr" and node.users for n in store.names(str(node.target))}


def bound(node: fx.Node) -> Arguments:
    """Arguments of an ATen call by name, defaults filled in."""
    schema = node.target._schema.arguments
    given = {a.name: v for a, v in zip(schema, node.args, strict=False)}
    return {**{a.name: a.default_value for a in schema if a.has_default_value()}, **given, **node.kwargs}


# Rules: from the arguments of an operation to a layer type and its configuration -------------------------------------


@dataclass(frozen=True)
class _Rule:
    """`roles`: arguments that are tensors of the layer, under the same names; `describe`: type and configuration."""

    describe: Callable[[Arguments], Described]
    roles: tuple[str, ...] = ("weight", "bias")
    input: str = "input"


def _shape(node: Any) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def _expanded(value: Any, count: int) -> list[int]:
    """ATen takes one number for all spatial dimensions as well."""
    values = [int(v) for v in (value if isinstance(value, (list, tuple)) else [value])]
    return values * count if len(values) == 1 else values


def _conv(a: Arguments) -> Described:
    weight, n = _shape(a["weight"]), len(_shape(a["weight"])) - 2
    padding = a["padding"] if isinstance(a["padding"], str) else _expanded(a["padding"], n)
    return f"Conv{n}d", {
        "in_channels": weight[1] * a["groups"],
        "out_channels": weight[0],
        "kernel_size": list(weight[2:]),
        "stride": _expanded(a["stride"], n),
        "padding": padding,
        "dilation": _expanded(a["dilation"], n),
        "groups": a["groups"],
        "bias": a["bias"] is not None,
    }


def _conv_transpose(a: Arguments) -> Described:
    weight, n = _shape(a["weight"]), len(_shape(a["weight"])) - 2
    return f"ConvTranspose{n}d", {
        "in_channels": weight[0],
        "out_channels": weight[1] * a["groups"],
        "kernel_size": list(weight[2:]),
        "stride": _expanded(a["stride"], n),
        "padding": _expanded(a["padding"], n),
        "output_padding": _expanded(a["output_padding"], n),
        "groups": a["groups"],
        "bias": a["bias"] is not None,
        "dilation": _expanded(a["dilation"], n),
    }


def _convolution(a: Arguments) -> Described:
    return _conv_transpose(a) if a["transposed"] else _conv(a)


def _linear(a: Arguments) -> Described:
    weight = _shape(a["weight"])
    if len(weight) != 2:
        return None
    return "Linear", {"in_features": weight[1], "out_features": weight[0], "bias": a["bias"] is not None}


def _running_norm(kind: str, a: Arguments, batch_statistics: bool) -> Described:
    tracked = a["running_mean"] is not None
    known = next((a[r] for r in ("weight", "bias", "running_mean") if a[r] is not None), None)
    if known is None or tracked == batch_statistics:
        return None
    affine = [r for r in ("weight", "bias") if a[r] is not None]
    values: Arguments = {
        "num_features": _shape(known)[0],
        "eps": a["eps"],
        "momentum": a["momentum"],
        "affine": bool(affine),
        "track_running_stats": tracked,
    }
    absent = [r for r in ("weight", "bias") if affine and r not in affine]
    return f"{kind}{max(len(_shape(a['input'])) - 2, 1)}d", {**values, "absent": absent} if absent else values


def _batch_norm(a: Arguments) -> Described:
    return _running_norm("BatchNorm", a, a["training"])


def _instance_norm(a: Arguments) -> Described:
    return _running_norm("InstanceNorm", a, a["use_input_stats"])


def _group_norm(a: Arguments) -> Described:
    affine = [r for r in ("weight", "bias") if a[r] is not None]
    if not affine:
        return None
    values = {"num_groups": a["num_groups"], "num_channels": _shape(a[affine[0]])[0], "eps": a["eps"], "affine": True}
    return "GroupNorm", values if len(affine) == 2 else {**values, "absent": ["bias" if "weight" in affine else "weight"]}


def _layer_norm(a: Arguments) -> Described:
    if a["weight"] is None:
        return None
    return "LayerNorm", {
        "normalized_shape": [int(s) for s in a["normalized_shape"]],
        "eps": a["eps"],
        "elementwise_affine": True,
        "bias": a["bias"] is not None,
    }


def _rms_norm(a: Arguments) -> Described:
    shape = [int(s) for s in a["normalized_shape"]]
    return "RMSNorm", {"normalized_shape": shape, "eps": a["eps"], "elementwise_affine": True}


def _embedding(a: Arguments) -> Described:
    rows, width = _shape(a["weight"])
    return "Embedding", {
        "num_embeddings": rows,
        "embedding_dim": width,
        "padding_idx": None if a["padding_idx"] < 0 else a["padding_idx"],
        "scale_grad_by_freq": a["scale_grad_by_freq"],
        "sparse": a["sparse"],
    }


def _prelu(a: Arguments) -> Described:
    return "PReLU", {"num_parameters": _shape(a["weight"])[0] if _shape(a["weight"]) else 1}


_STATISTICS = ("weight", "bias", "running_mean", "running_var")
_RULES: dict[str, _Rule] = {
    **{f"conv{n}d": _Rule(_conv) for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": _Rule(_conv_transpose) for n in (1, 2, 3)},
    "convolution": _Rule(_convolution),
    "linear": _Rule(_linear),
    "batch_norm": _Rule(_batch_norm, _STATISTICS),
    "instance_norm": _Rule(_instance_norm, _STATISTICS),
    "group_norm": _Rule(_group_norm),
    "layer_norm": _Rule(_layer_norm),
    "rms_norm": _Rule(_rms_norm, ("weight",)),
    "embedding": _Rule(_embedding, ("weight",), "indices"),
    "prelu": _Rule(_prelu, ("weight",), "self"),
}


def _raise_layer(
    graph: fx.Graph,
    node: fx.Node,
    layers: dict[str, tuple[str, Arguments]],
    store: Store,
    read: set[str],
    origin: Callable[[str], nn.Module | None],
) -> None:
    rule = _RULES[node.target._opname]
    arguments = bound(node)
    owners = _owners(rule, arguments, node, store, read)
    described = rule.describe(arguments) if owners else None
    if described is None:
        return
    name, values = described
    for path in owners:
        full = name, _completed(name, dict(values), path, store, origin(path))
        if layers.get(path, full) == full and _fits(full, path, store):
            layers[path] = full
            _replace(graph, node, path, arguments[rule.input])
            return


def _owners(rule: _Rule, a: Arguments, node: fx.Node, store: Store, read: set[str]) -> list[str]:
    """Paths whose own tensors are exactly the operation's; the module that was running comes first."""
    given = {role: a[role] for role in rule.roles if a[role] is not None}
    if not given or not all(isinstance(v, fx.Node) and v.op == "get_attr" for v in given.values()):
        return []
    found: list[str] | None = None
    for role, value in given.items():
        paths = [n.removesuffix(f".{role}") for n in store.names(str(value.target)) if n.endswith(f".{role}")]
        found = paths if found is None else [p for p in found if p in paths]
    missing = [role for role in rule.roles if a[role] is None]
    owners = [p for p in found or [] if not any(f"{p}.{role}" in read for role in missing)]
    return sorted(owners, key=lambda p: p != node.meta.get("path"))


def _completed(name: str, values: Arguments, path: str, store: Store, origin: nn.Module | None) -> Arguments:
    """Add what the operation does not say: a cumulative momentum, and whether batches are counted."""
    if name.startswith(("BatchNorm", "InstanceNorm")):
        if getattr(origin, "momentum", 0.0) is None:
            values["momentum"] = None
        if values["track_running_stats"] and f"{path}.num_batches_tracked" not in store.persistent:
            values["absent"] = sorted([*values.get("absent", []), "num_batches_tracked"])
    return values


def _fits(described: tuple[str, Arguments], path: str, store: Store) -> bool:
    """Whether the layer's tensors have the shapes of the model's (a PReLU's weight may be 0-dimensional)."""
    layer = dialect.build(*described)
    own = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    return all(f"{path}.{n}" in store.tensors and store.tensors[f"{path}.{n}"].shape == t.shape for n, t in own.items())


def _replace(graph: fx.Graph, node: fx.Node, path: str, source: fx.Node) -> None:
    with graph.inserting_before(node):
        call = graph.call_module(path, (source,))
    call.meta = {**node.meta, "path": path}
    node.replace_all_uses_with(call)
    graph.erase_node(node)


# Dropout --------------------------------------------------------------------------------------------------------------

_DROPOUTS = {"dropout": "Dropout", "feature_dropout": "Dropout2d", "alpha_dropout": "AlphaDropout",
             "feature_alpha_dropout": "FeatureAlphaDropout"}  # fmt: skip


def _raise_dropout(graph: fx.Graph, node: fx.Node, layers: dict[str, tuple[str, Arguments]], store: Store) -> None:
    """An inactive dropout becomes a layer, so that `train()` activates it; one of probability 0 goes."""
    arguments = bound(node)
    if arguments["train"]:
        return
    if arguments["p"] == 0:
        node.replace_all_uses_with(arguments["input"])
        graph.erase_node(node)
        return
    layer = _DROPOUTS[node.target._opname], {"p": arguments["p"]}
    path = _free_path(node.meta.get("path", ""), layer, layers, store)
    layers[path] = layer
    _replace(graph, node, path, arguments["input"])


def _free_path(
    path: str, layer: tuple[str, Arguments], layers: dict[str, tuple[str, Arguments]], store: Store
) -> str:
    """The running module's path if it is a dropout (it owns nothing), else a name of its own below it."""
    candidates = [path] if path and not _inhabited(path, layers, store) else []
    stem = f"{path}.dropout" if path else "dropout"
    candidates += [stem, *(f"{stem}_{i}" for i in range(1, 1000))]
    for candidate in candidates:
        if layers.get(candidate) == layer or (candidate not in layers and not _inhabited(candidate, layers, store)):
            return candidate
    raise GraphError(f"no free name for a dropout below {path!r}")


def _inhabited(path: str, layers: dict[str, tuple[str, Arguments]], store: Store) -> bool:
    """Whether tensors or other layers live at or below a path."""
    below = f"{path}."
    return any(n.startswith(below) for n in store.tensors) or any(n.startswith(below) for n in layers)


# The module tree ------------------------------------------------------------------------------------------------------


def build_tree(graph: fx.Graph, store: Store, layers: dict[str, tuple[str, Arguments]]) -> nn.Module:
    """Layers, parameters and buffers that the graph reads, cloned, each under every name it has in the model.

    Raises:
        GraphError: a layer could not be built.
    """
    used = _used_names(graph, store, layers)
    root = nn.Module()
    for path in sorted(layers, key=lambda p: p.count(".")):
        _place(root, path, dialect.build(*layers[path]))
    copies: dict[int, Tensor] = {}
    for name, tensor in store.tensors.items():
        if name in used:
            copy = copies.setdefault(id(tensor), _clone(tensor))
            _hold(root, name, copy, name in store.persistent)
    return root


def _used_names(graph: fx.Graph, store: Store, layers: dict[str, tuple[str, Arguments]]) -> set[str]:
    read = _read_names(graph, store)
    for path, described in layers.items():
        layer = dialect.build(*described)
        for leaf, _ in [*layer.named_parameters(), *layer.named_buffers()]:
            read.update(store.names(f"{path}.{leaf}"))
    return read


def _clone(tensor: Tensor) -> Tensor:
    copy = tensor.detach().clone()
    return nn.Parameter(copy, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy


def _place(root: nn.Module, path: str, child: nn.Module) -> None:
    owner, _, leaf = path.rpartition(".")
    _container(root, owner).add_module(leaf, child)


def _hold(root: nn.Module, name: str, tensor: Tensor, persistent: bool) -> None:
    path, _, leaf = name.rpartition(".")
    owner = _container(root, path)
    if isinstance(tensor, nn.Parameter):
        owner.register_parameter(leaf, tensor)
    else:
        owner._buffers.pop(leaf, None)
        owner.register_buffer(leaf, tensor, persistent=persistent)


def _container(root: nn.Module, path: str) -> nn.Module:
    """The module at a path, made of empty modules where there is none."""
    module = root
    for part in path.split(".") if path else ():
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module._modules[part]  # type: ignore[assignment]
    return module


def tensor_names(layers: Iterable[str]) -> list[str]:
    """Sorted paths, parents first."""
    return sorted(layers)
