"""The lint: what proves the structure of a graph."""

from __future__ import annotations

from torch import fx, nn

from .errors import GraphError


def lint(module: fx.GraphModule) -> None:
    """Check the structure of a graph module.

    Raises:
        GraphError: a node has no shape or no user, a layer or tensor is missing or unused, or a layer's sizes do not
            fit its input.
    """
    module.graph.lint()
    used: set[str] = set()
    layers = dict(module.named_modules(remove_duplicate=False))
    for node in module.graph.nodes:
        if node.op in ("call_module", "get_attr"):
            used.add(str(node.target))
        if node.op != "output" and "spec" not in node.meta:
            raise GraphError(f"node {node.name!r} ({node.op} {node.target}) has no shape in its metadata")
        if not node.users and node.op not in ("placeholder", "output"):
            raise GraphError(f"node {node.name!r} ({node.op} {node.target}) is dead: nothing reads it")
        if node.op == "call_module":
            _lint_layer(node, layers[str(node.target)])
    _lint_tensors(layers, used)


def _lint_tensors(modules: dict[str, nn.Module], used: set[str]) -> None:
    """Every parameter and buffer belongs to a called layer or is read by a `get_attr`."""
    for path, child in modules.items():
        for leaf in (*child._parameters, *child._buffers):
            name = f"{path}.{leaf}" if path else leaf
            if name not in used and path not in used and getattr(child, leaf) is not None:
                raise GraphError(f"{name!r} is in the graph's state but no node uses it")


def _lint_layer(node: fx.Node, layer: nn.Module) -> None:
    """A layer reads as many channels as its input has and writes as many as its node's shape says."""
    source, made = node.args[0], getattr(node.meta["spec"], "shape", None)
    given = getattr(source.meta.get("spec"), "shape", None) if isinstance(source, fx.Node) else None
    if given is None or made is None:  # no tensor, or several
        return
    for attribute, shape in (("in", given), ("out", made)):
        stated, actual = _stated(layer, attribute, shape)
        if stated != actual:
            raise GraphError(
                f"layer {node.target!r} ({type(layer).__name__}) states {stated} {attribute}put channels, "
                f"but its {attribute}put {tuple(shape)} has {actual}"
            )


def _stated(layer: nn.Module, side: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """Channels that a layer states for one side, and those of the shape; equal numbers where it states none."""
    if hasattr(layer, "in_channels"):  # torch's convolutions, and fxpress's own
        rank = len(layer.kernel_size)  # type: ignore[arg-type]
        return int(getattr(layer, f"{side}_channels")), shape[len(shape) - rank - 1]
    if hasattr(layer, "in_features"):
        return int(getattr(layer, f"{side}_features")), shape[-1]
    if isinstance(layer, (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)):
        return layer.num_features, shape[1]
    if isinstance(layer, nn.GroupNorm):
        return layer.num_channels, shape[1]
    return 0, 0
