"""Exported ATen to layers: an operation on a module's own parameters becomes a `call_module` of that layer.

The owner of the *weight* decides, not the class that the user wrote: `aten.conv2d(x, p.weight, p.bias, ...)` becomes
a plain `nn.Conv2d` under the path `p`, with the configuration of the operation. timm's `Conv2dSame` is thus a pad and a
`Conv2d`, its `LayerNorm2d` a permute and a `LayerNorm`; state-dict keys are the model's own either way. A weight that
is computed before use (weight standardisation, layer scale), and a second use of a weight in another configuration,
stay operations on values of the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import fx, nn

from . import dialect
from .nodes import arguments
from .tracing.layer_rules import DROPOUTS, RULES, Arguments, Described, Rule
from .tracing.module_tree import Store, own_tensors

Origin = Callable[[str], nn.Module | None]


@dataclass
class _Raising:
    """One run: what it works on, the names that the graph reads, and the layers found so far by path."""

    graph: fx.Graph
    store: Store
    origin: Origin
    read: set[str]
    layers: dict[str, nn.Module] = field(default_factory=dict)
    described: dict[str, Described] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)  # every path at or above a layer


def raise_layers(graph: fx.Graph, store: Store, origin: Origin) -> dict[str, nn.Module]:
    """Replace operations on parameters by `call_module` nodes.

    Args:
        graph: functional ATen, `get_attr` nodes on the names of `store`, the export's fake tensors as `val`.
        store: the model's tensors.
        origin: the user's module under a path, for what an operation does not tell (a momentum of None).

    Returns:
        the layers by path, their tensors on the `meta` device.
    """
    read = {n for node in graph.nodes if node.op == "get_attr" and node.users for n in store.names(str(node.target))}
    run = _Raising(graph, store, origin, read)
    calls = [node for node in graph.nodes if node.op == "call_function"]
    ruled = [(node, rule) for node in calls if (rule := RULES.get(getattr(node.target, "_opname", ""))) is not None]
    # a module's own call says what its layer is; then uses of its weight from elsewhere may be calls of that layer
    elsewhere = [(node, rule) for node, rule in ruled if not _raise_layer(run, node, rule, at_home=True)]
    for node, rule in elsewhere:
        _raise_layer(run, node, rule, at_home=False)
    for node in calls:  # after all others, for the names that are still free
        if getattr(node.target, "_opname", "") in DROPOUTS:
            _raise_dropout(run, node)
    return run.layers


def _raise_layer(run: _Raising, node: fx.Node, rule: Rule, *, at_home: bool) -> bool:
    """Make a call of a layer of an operation if one fits; only of the running module's own with `at_home`."""
    given = arguments(node)
    owners = _owners(run, rule, given)
    if at_home:
        owners = [path for path in owners if _is_running(run, node, path)]
    described = rule.describe(given) if owners else None
    if described is None:
        return False
    for path in owners:
        if _claim(run, path, _completed(run, path, *described)):
            _replace(run, node, path, given[rule.input])
            return True
    return False


def _owners(run: _Raising, rule: Rule, a: Arguments) -> list[str]:
    """Paths whose own tensors are exactly the operation's, in the model's order."""
    given = {role: a[role] for role in rule.roles if a[role] is not None}
    if not given or not all(isinstance(v, fx.Node) and v.op == "get_attr" for v in given.values()):
        return []
    candidates = [_homes(run, str(value.target), role) for role, value in given.items()]
    # a tensor of that role which the graph reads elsewhere would become part of the layer
    lacking = [role for role in rule.roles if a[role] is None]
    return [
        path
        for path in candidates[0]
        if all(path in others for others in candidates) and not any(f"{path}.{role}" in run.read for role in lacking)
    ]


def _is_running(run: _Raising, node: fx.Node, path: str) -> bool:
    """Whether a path leads to the module that was running (a shared one has several; its first is the layer's)."""
    here = node.meta.get("path", "")
    running = run.origin(here)
    return path == here or (running is not None and run.origin(path) is running)


def _homes(run: _Raising, name: str, role: str) -> list[str]:
    """Paths under which a tensor has the name of its role; a shared module has several, and its first is used."""
    return [n.removesuffix(f".{role}") for n in run.store.names(name) if n.endswith(f".{role}")]


def _completed(run: _Raising, path: str, name: str, values: Arguments) -> Described:
    """Add what the operation does not say: a cumulative momentum, and whether batches are counted."""
    if not name.startswith(("BatchNorm", "InstanceNorm")):
        return name, values
    values = dict(values)
    if getattr(run.origin(path), "momentum", 0.0) is None:
        values["momentum"] = None
    if values["track_running_stats"] and f"{path}.num_batches_tracked" not in run.store.persistent:
        values["absent"] = sorted([*values.get("absent", []), "num_batches_tracked"])
    return name, values


def _claim(run: _Raising, path: str, described: Described) -> bool:
    """Whether the layer at a path is, or can become, the one described."""
    if path in run.described:
        return run.described[path] == described
    layer = dialect.build(*described)
    tensors = run.store.tensors
    for leaf, tensor in own_tensors(layer).items():
        name = f"{path}.{leaf}"
        if name not in tensors or tensors[name].shape != tensor.shape:
            return False
    _add(run, path, described, layer)
    return True


def _add(run: _Raising, path: str, described: Described, layer: nn.Module) -> None:
    run.described[path], run.layers[path] = described, layer
    parts = path.split(".")
    run.taken.update(".".join(parts[:i]) for i in range(1, len(parts) + 1))


def _replace(run: _Raising, node: fx.Node, path: str, source: fx.Node) -> None:
    with run.graph.inserting_before(node):
        call = run.graph.call_module(path, (source,))
    call.meta = {**node.meta, "path": path}
    node.replace_all_uses_with(call)
    run.graph.erase_node(node)


def _raise_dropout(run: _Raising, node: fx.Node) -> None:
    """An inactive dropout becomes a layer, so that `train()` activates it; one of probability 0 goes."""
    given = arguments(node)
    if given["train"]:
        return
    if given["p"] == 0:
        node.replace_all_uses_with(given["input"])
        run.graph.erase_node(node)
        return
    described: Described = DROPOUTS[node.target._opname], {"p": given["p"]}  # type: ignore[union-attr]
    path = _dropout_path(run, node.meta.get("path", ""), described)
    if path not in run.layers:
        _add(run, path, described, dialect.build(*described))
    _replace(run, node, path, given["input"])


def _dropout_path(run: _Raising, path: str, described: Described) -> str:
    """The running module's own path if nothing else lives there (it is a dropout), else a free name below it."""
    stem, count = f"{path}.dropout" if path else "dropout", 0
    candidate = path or stem
    while run.described.get(candidate) != described:
        if candidate not in run.taken and not run.store.lives_below(candidate) and not _is_tensor(run, candidate):
            return candidate
        candidate = f"{stem}_{count}" if count else stem
        count += 1
    return candidate


def _is_tensor(run: _Raising, path: str) -> bool:
    return path in run.store.tensors
