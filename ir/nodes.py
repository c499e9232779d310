"""What a node was given: arguments by the names of the op's schema, its first operand, its shape."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import fx

from .graph import TensorSpec


@cache
def _schema(target: torch._ops.OpOverload[..., Any]) -> tuple[tuple[str, Any], ...]:
    return tuple((argument.name, argument.default_value) for argument in target._schema.arguments)


def arguments(node: fx.Node) -> dict[str, Any]:
    """Every argument of an ATen call by its name in the schema, defaults filled in."""
    assert isinstance(node.target, torch._ops.OpOverload)
    schema = _schema(node.target)
    given: dict[str, Any] = dict(schema)
    given.update(zip(given, node.args, strict=False))
    given.update(node.kwargs)
    return given


def set_argument(node: fx.Node, name: str, value: Any) -> None:
    """Replace an argument by its name in the schema, where it stands."""
    assert isinstance(node.target, torch._ops.OpOverload)
    position = [known for known, _ in _schema(node.target)].index(name)
    if position < len(node.args):
        node.update_arg(position, value)
    else:
        node.update_kwarg(name, value)


def operand(node: fx.Node) -> fx.Node:
    """The node that comes first among a node's arguments."""
    first = node.args[0]
    assert isinstance(first, fx.Node), f"{node.name} does not begin with a tensor"
    return first


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Shape of a tensor node on the example inputs."""
    spec = node.meta["spec"]
    assert isinstance(spec, TensorSpec), f"{node.name} has no tensor shape"
    return spec.shape


def call(node: fx.Node, *args: Any, **kwargs: Any) -> Any:
    """Run a node's function on other arguments."""
    assert callable(node.target)
    return node.target(*args, **kwargs)
