"""Product-quantized layers: they read channels a whole sub-space at a time.

A sub-space of d inputs has one codebook and one row of indices per output: its inputs live and die together, and a cut
drops them with their codebook (dimension 0) and their indices (dimension 1). Where a sub-space straddles channels, as
behind a flatten whose positions per channel are no multiple of d, it ties these channels. Outputs are fresh atoms, one
column of the indices (dimension 2) and one entry of the bias each.

A packed binary network (`BinaryNetwork`) has nothing that could be cut any more: it pins what it reads.

The layers are those of fxpress.runtime.layers, which this package may not import; they come by name (`rules.LAYERS`).
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import torch
from scipy.sparse import csgraph, csr_matrix
from torch import Tensor, fx

from ..labels import Labels, Term, along, channel_vector, collapse, unlabelled, varies, varying
from ..nodes import operand, shape_of
from .producers import data_input

Shape = tuple[int, ...]


def product_quantized_linear(labels: Labels, node: fx.Node, layer: Any, path: str) -> Any:
    """PQLinear, over the last dimension; channels along another one pass, and the layer stays as it is."""
    source = operand(node)
    x, shape = data_input(labels, source), shape_of(node)
    labels.readers[node] = (source,)
    last = x.dim() - 1
    if not varies(x, last) and varying(x):
        passed = x.narrow(last, 0, 1).expand(shape)
        _count(labels, node, layer, x.shape, shape, (collapse(passed).reshape(-1),) * 2)
        return passed
    spaces = _read(labels, layer, path, channel_vector(labels, x, last))
    fresh = labels.atoms_vector(shape[-1])
    _write(labels, layer, path, fresh)
    _count(labels, node, layer, x.shape, shape, (spaces, fresh))
    return along(fresh, last, shape)


def product_quantized_convolution(labels: Labels, node: fx.Node, layer: Any, path: str) -> Any:
    """PQConv2d; groups stay equally wide, as those of any convolution: position j of every group is tied."""
    source = operand(node)
    x, shape = data_input(labels, source), shape_of(node)
    labels.readers[node] = (source,)
    channel = len(shape) - 3
    read = channel_vector(labels, x, channel)
    if layer.groups > 1:
        read = labels.tie(read.view(layer.groups, -1), [0])[0]
    spaces = _read(labels, layer, path, read)
    fresh = labels.atoms_vector(shape[channel] // layer.groups)
    written = fresh.repeat(layer.groups) if layer.groups > 1 else fresh
    _write(labels, layer, path, written)
    _count(labels, node, layer, x.shape, layer.sums_shape(x.shape), (spaces, fresh))
    return along(written, channel, shape)


def binary_network(labels: Labels, node: fx.Node, layer: Any, path: str) -> Any:  # noqa: ARG001
    """BinaryNetwork: its weights are bits in one tensor, its norms integers."""
    for source in node.all_input_nodes:
        labels.pin(labels.read(source), "is read by a packed binary network: cut before `emit`")
    labels.readers[node] = tuple(node.all_input_nodes)
    labels.terms.append(Term(node, layer.macs([shape_of(source) for source in node.all_input_nodes]), ()))
    return unlabelled(node.meta["spec"])


def _read(labels: Labels, layer: Any, path: str, read: Tensor) -> Tensor:
    """Tie the inputs of each sub-space; labels of the sub-spaces, `(M,)`."""
    width, count = layer.subspace, len(layer.codebook)
    padded = torch.cat([read, read[-1:].expand(count * width - len(read))]).view(count, width)
    _explain(labels, padded, read)
    spaces = labels.tie(padded, [1])[:, 0]
    labels.bind(f"{path}.codebook", 0, spaces)
    labels.bind(f"{path}.indices", 1, spaces)
    return spaces


def _explain(labels: Labels, padded: Tensor, read: Tensor) -> None:
    """Where the sub-spaces tie all channels to each other, say so here: it is this layer that keeps them."""
    count, width = padded.shape
    atoms, inverse = np.unique(padded.numpy(), return_inverse=True)
    rows = inverse.reshape(count, width)
    pairs = (rows[:, :1].repeat(width, axis=1).reshape(-1), rows.reshape(-1))
    links = csr_matrix((np.ones(rows.size, np.int8), pairs), shape=(len(atoms), len(atoms)))
    if len(atoms) > 1 and csgraph.connected_components(links, directed=False)[0] == 1:
        why = "straddle its channels" if count > 1 else "hold all of its channels"
        labels.pin(read, f"is read by a product-quantized layer, whose sub-spaces of {width} {why}")


def _write(labels: Labels, layer: Any, path: str, written: Tensor) -> None:
    labels.bind(f"{path}.indices", 2, written)
    if layer.bias is not None:
        labels.bind(f"{path}.bias", 0, written)


def _count(labels: Labels, node: fx.Node, layer: Any, given: Shape, shape: Shape, kept: tuple[Tensor, Tensor]) -> None:
    """Multiply-accumulates: K for each input to fill the tables, and one look-up per tap, sub-space and output.

    Wu et al. 2016, section 3.3. A layer that runs by its dense weight (`kernel: dense`, `dense-int8`) costs what a
    dense one does.
    """
    taps, count, _ = layer.indices.shape
    if layer.kernel in ("dense", "dense-int8"):
        labels.terms.append(Term(node, prod(shape) * taps * layer.inputs, kept))
        return
    labels.terms.append(Term(node, prod(given) * layer.codewords, kept[:1]))
    labels.terms.append(Term(node, prod(shape) * taps * count, kept))
