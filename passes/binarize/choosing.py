"""Which layers get one-bit weights, and why the others do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from ...ir.errors import OptionError
from ...ir.graph import Graph, TensorSpec
from ...ir.nodes import operand, shape_of
from ...runtime.layers import BinaryLayer, Int8Layer, PQLayer
from ...runtime.layers.padding import numeric_padding
from ..base import Skip
from ..fuse.affine import is_tied
from ..options import nearest
from ..quantize.int8 import unfit as unfit_int8

Ends = Literal["float", "int8", "binary"]
_MIXERS = (_ConvNd, nn.Linear, BinaryLayer, Int8Layer, PQLayer)


@dataclass(frozen=True)
class Job:
    """A layer to binarize, or to give 8 bits.

    Attributes:
        node: its only call.
        path: of the layer.
        inputs: whether what it reads is quantised too; a first layer reads the network's input as it is.
        kind: what it becomes.
    """

    node: fx.Node
    path: str
    inputs: bool
    kind: Literal["binary", "int8"] = "binary"


def choose(graph: Graph, first: Ends, last: Ends, ignore: Sequence[str], who: str) -> tuple[list[Job], list[Skip]]:
    """Layers to binarize (or to give 8 bits) in the order of execution, and what is left alone.

    First layers are those before which there is no other convolution or linear layer, last ones those behind which
    there is none.

    Raises:
        OptionError: a pattern that fits no layer.
    """
    mixers = [node for node in graph.nodes if isinstance(graph.layer(node), _MIXERS)]
    ignored = _ignored([str(node.target) for node in mixers], ignore, who)
    firsts, lasts = ends(graph, mixers)
    jobs, skips = dict[str, Job](), dict[str, Skip]()
    for node in mixers:
        path = str(node.target)
        wishes = {wish for group, wish in ((firsts, first), (lasts, last)) if node in group}
        small = "int8" in wishes and "float" not in wishes
        reason = "ignored by option" if path in ignored else (unfit_int8 if small else _unfit)(graph, node)
        if reason is None and "float" in wishes:
            reason = f"the {'first' if node in firsts else 'last'} layer keeps its precision"
        if reason is None:
            jobs[path] = Job(node, path, node not in firsts and not small, "int8" if small else "binary")
        elif reason:
            skips[path] = Skip(path, reason)
    return list(jobs.values()), list(skips.values())


def ends(graph: Graph, mixers: Sequence[fx.Node]) -> tuple[set[fx.Node], set[fx.Node]]:
    """Of some nodes those that have none of them before, and those that have none of them behind."""
    own, before, behind = set(mixers), set[fx.Node](), set[fx.Node]()
    for node in graph.nodes:
        if any(source in own or source in before for source in node.all_input_nodes):
            before.add(node)
    for node in reversed(graph.nodes):
        if any(user in own or user in behind for user in node.users):
            behind.add(node)
    return own - before, own - behind


def _ignored(paths: list[str], patterns: Sequence[str], who: str) -> set[str]:
    for pattern in patterns:
        if not any(fnmatchcase(path, pattern) for path in paths):
            listed = f"{', '.join(paths[:8])}{', ...' if len(paths) > 8 else ''}" or "none"
            raise OptionError(
                f"{who}, option 'ignore': no convolution or linear layer {pattern!r}: "
                f"{nearest(pattern, paths)}layers: {listed}"
            )
    return {path for path in paths if any(fnmatchcase(path, pattern) for pattern in patterns)}


def _unfit(graph: Graph, node: fx.Node) -> str | None:
    """Why a layer cannot be binarized; empty where it is already."""
    layer, shape = graph.layer(node), shape_of(operand(node))
    if isinstance(layer, (BinaryLayer, Int8Layer)):
        return ""
    if not isinstance(layer, (nn.Conv2d, nn.Linear)):
        return f"a {type(layer).__name__} has no binary form; Conv2d and Linear have"
    if isinstance(layer, nn.Conv2d):
        reason = _unfit_convolution(layer, shape)
    else:
        reason = None if len(shape) == 2 else f"it reads {shape}, whose channels are not dimension 1"
    return reason or _unfit_call(graph, node, layer)


def _unfit_convolution(layer: nn.Conv2d, shape: tuple[int, ...]) -> str | None:
    if layer.groups == layer.in_channels > 1:
        return "depthwise: each output has one input, so that one-bit weights would leave next to nothing of it"
    if layer.padding_mode != "zeros":
        return f"it pads with {layer.padding_mode!r}; binary convolutions pad with zeros"
    if numeric_padding(layer) is None:
        return "its padding 'same' is not the same on both sides"
    if shape[-2:] == (1, 1):
        return "it reads one position (a gate on pooled channels): too little work to gain by fewer bits"
    return None


def _unfit_call(graph: Graph, node: fx.Node, layer: nn.Conv2d | nn.Linear) -> str | None:
    if len(node.args) > 1 or node.kwargs:
        return "it is called with more than its input"
    calls = sum(other.op == "call_module" and other.target == node.target for other in graph.nodes)
    if calls > 1:
        return f"it is called {calls} times"
    if is_tied(graph, layer):
        return "a parameter of it is shared with another layer"
    spec = node.meta["spec"]
    kind = spec.dtype if isinstance(spec, TensorSpec) else None
    return None if kind is not None and kind.is_floating_point else f"its output is {kind}"
