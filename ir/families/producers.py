"""Producers: convolution, linear and embedding read channels and give out fresh atoms.

A weight has a slot for the channels that are read, and one for those that are given out.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from torch import Tensor, fx

from ..graph import TensorSpec
from ..labels import Labels, Term, along, channel_vector, collapse, unlabelled, varies, varying, zeros
from ..nodes import arguments, operand, shape_of


class Weight:
    """The weight of a producer: a layer's own parameter, or a node whose value is constant."""

    def __init__(self, labels: Labels, source: fx.Node | str) -> None:
        self.labels = labels
        self.name = source if isinstance(source, str) else constant_name(source)
        self.shape = tuple(labels.graph.tensor(source).shape) if isinstance(source, str) else shape_of(source)

    def bind(self, dim: int, vector: Tensor) -> None:
        """Give dimension `dim` its labels."""
        self.labels.bind(self.name, dim, vector)


def constant_name(node: fx.Node) -> str:
    """Slot name of a constant: its state-dict name, or `%node` for one that is computed."""
    return str(node.target) if node.op == "get_attr" else f"%{node.name}"


def data_input(labels: Labels, source: fx.Node) -> Tensor:
    """Labels of what a producer reads; a constant fed to a layer (a table of coordinates) is data, and pinned."""
    if not labels.is_constant(source):
        x: Tensor = labels.read(source)
        return x
    constant = labels.representative(source)
    if constant in labels.constants:
        labels.pin(labels.constants[constant], "is a constant that a layer reads as its input")
    labels.constants[constant] = zeros(shape_of(source))
    return labels.constants[constant]


def convolution_layer(labels: Labels, node: fx.Node, layer: Any, path: str) -> Any:
    """torch.nn.Conv1d ... ConvTranspose3d."""
    bias = f"{path}.bias" if layer.bias is not None else None
    return convolve(labels, node, Weight(labels, f"{path}.weight"), bias, layer.groups, layer.transposed)


def convolution_op(labels: Labels, node: fx.Node) -> Any:
    """A functional convolution, whose weight is a value of the graph."""
    given = arguments(node)
    weight, bias = given["weight"], given["bias"]
    if not labels.is_constant(weight) or not (bias is None or labels.is_constant(bias)):
        return dynamic(labels, node)
    transposed = "transpose" in str(node.target) or bool(given.get("transposed", False))
    name = constant_name(bias) if isinstance(bias, fx.Node) else None
    return convolve(labels, node, Weight(labels, weight), name, given["groups"], transposed)


def dynamic(labels: Labels, node: fx.Node) -> Any:
    """A producer whose weight is computed from the input."""
    for source in node.all_input_nodes:
        if isinstance(source.meta.get("spec"), TensorSpec):
            labels.pin(labels.read(source), "meets a weight that is computed from the input")
    return unlabelled(node.meta["spec"])


def convolve(
    labels: Labels,
    node: fx.Node,
    weight: Weight,
    bias: str | None,
    groups: int,
    transposed: bool,
    sums: Sequence[int] | None = None,
) -> Any:
    """Labels of a convolution's output; the weight's slots and the cost are noted.

    Weights have shape (O, I/groups, *kernel), transposed ones (I, O/groups, *kernel). Depthwise convolutions pass
    labels through; grouped ones tie position j of every group, for all groups must stay equally wide. `sums` is the
    shape of what is computed, where a pool that belongs to the layer makes less of it.
    """
    source = operand(node)
    x, shape = data_input(labels, source), shape_of(node)
    rank = len(weight.shape) - 2
    if weight.shape[:2] == (1, 1) and rank == 1 and shape == x.shape and varying(x) == [x.dim() - 1]:
        return _slide(labels, node, x, weight.shape[-1])
    channel = len(shape) - rank - 1
    read = channel_vector(labels, x, channel)
    inputs, outputs = len(read), shape[channel]
    kernel = prod(weight.shape[2:])
    labels.readers[node] = (source,)
    if groups == inputs and groups > 1:
        written = read.repeat_interleave(outputs // inputs) if outputs != inputs else read
        weight.bind(0, read if transposed else written)
        macs = prod(x.shape if transposed else sums or shape) * kernel * (weight.shape[1] if transposed else 1)
        labels.terms.append(Term(node, macs, (written,)))
    else:
        if groups > 1:
            read = labels.tie(read.view(groups, -1), [0]).reshape(-1)
        fresh = labels.atoms_vector(outputs // groups)
        written = fresh.repeat(groups) if groups > 1 else fresh
        share = read[: inputs // groups] if groups > 1 else read
        weight.bind(0, read if transposed else written)
        weight.bind(1, fresh if transposed else share)
        macs = prod(x.shape if transposed else sums or shape) * kernel * weight.shape[1]
        labels.terms.append(Term(node, macs, (fresh, share)))
    if bias is not None:
        labels.bind(bias, 0, written)
    return along(written, channel, shape)


def _slide(labels: Labels, node: fx.Node, x: Tensor, kernel: int) -> Tensor:
    """A filter that slides along the channels (efficient channel attention): each keeps its place among the others.

    Dead channels read as zeros between those that stay; `rewrites.spread_out` puts these zeros there.
    """
    labels.readers[node] = (operand(node),)
    labels.slides[node] = x
    labels.terms.append(Term(node, prod(x.shape) * kernel, ()))
    return x


def binary_convolution(labels: Labels, node: fx.Node, layer: Any, path: str) -> Any:
    """BinaryConv2d: as a convolution; α, a mean of latent weights, is kept by a cut (`rewrites.fit_layer`)."""
    bias = f"{path}.bias" if layer.bias is not None else None
    return convolve(labels, node, Weight(labels, f"{path}.weight"), bias, layer.groups, transposed=False)


class Stepped(Weight):
    """The weight of an 8-bit layer: each output has a step of its own, which is cut with it."""

    def bind(self, dim: int, vector: Tensor) -> None:
        """Give dimension `dim` its labels, and the steps those of the outputs."""
        super().bind(dim, vector)
        if dim == 0:
            self.labels.bind(f"{self.name}_scale", 0, vector)


def int8_convolution(labels: Labels, node: fx.Node, layer: Any, path: str) -> Any:
    """Int8Conv2d."""
    bias = f"{path}.bias" if layer.bias is not None else None
    sums = layer.sums_shape(shape_of(operand(node))) if layer.pool else None
    return convolve(labels, node, Stepped(labels, f"{path}.weight"), bias, layer.groups, transposed=False, sums=sums)


def int8_linear(labels: Labels, node: fx.Node, layer: Any, path: str) -> Any:
    """Int8Linear."""
    bias = f"{path}.bias" if layer.bias is not None else None
    return linear(labels, node, Stepped(labels, f"{path}.weight"), bias)


def linear_layer(labels: Labels, node: fx.Node, layer: Any, path: str) -> Any:
    """torch.nn.Linear."""
    bias = f"{path}.bias" if layer.bias is not None else None
    return linear(labels, node, Weight(labels, f"{path}.weight"), bias)


def linear_op(labels: Labels, node: fx.Node) -> Any:
    """A functional linear, whose weight is a value of the graph."""
    weight, bias = arguments(node)["weight"], arguments(node)["bias"]
    if not labels.is_constant(weight) or not (bias is None or labels.is_constant(bias)):
        return dynamic(labels, node)
    return linear(labels, node, Weight(labels, weight), constant_name(bias) if bias is not None else None)


def linear(labels: Labels, node: fx.Node, weight: Weight, bias: str | None) -> Any:
    """Labels of x W^T + b over the last dimension, weight (out, in).

    Where the last dimension is not labelled but another is (mixing tokens, channels along another axis), the labels
    pass and the weight stays as it is.
    """
    source = operand(node)
    x, shape = data_input(labels, source), shape_of(node)
    labels.readers[node] = (source,)
    last = x.dim() - 1
    macs = prod(shape) * weight.shape[1]
    if not varies(x, last) and varying(x):
        passed = x.narrow(last, 0, 1).expand(shape)
        labels.terms.append(Term(node, macs, (collapse(passed).reshape(-1),)))
        return passed
    read = channel_vector(labels, x, last)
    fresh = labels.atoms_vector(shape[-1])
    weight.bind(1, read)
    weight.bind(0, fresh)
    if bias is not None:
        labels.bind(bias, 0, fresh)
    labels.terms.append(Term(node, macs, (fresh, read)))
    return along(fresh, last, shape)


def embedding_layer(labels: Labels, node: fx.Node, layer: Any, path: str) -> Any:
    """torch.nn.Embedding: fresh atoms along the embedding dimension."""
    vector = labels.atoms_vector(layer.embedding_dim)
    labels.bind(f"{path}.weight", 1, vector)
    shape = shape_of(node)
    return along(vector, len(shape) - 1, shape)
