"""`fold-batchnorm`: batch norms disappear into the layers before them."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, fx
from torch.nn.modules.batchnorm import _BatchNorm

from ...ir.graph import Graph
from ..base import EXACT, Context, Pass, PassResult, Semantics, Skip
from .affine import LINEAR, fold_into, layers_before


class FoldBatchnorm(Pass):
    """Fold every batch norm into the convolution or linear layer whose output it alone reads.

    In evaluation mode a batch norm is an affine map per channel of the running mean μ and variance v:

        bn(y) = γ (y − μ) / √(v + ε) + β = s y + t      with  s = γ / √(v + ε),  t = β − s μ

    and behind a linear map `y = w ∗ x + b` it only changes that map:

        s (w ∗ x + b) + t = (s w) ∗ x + (s b + t)       so  w' = s w  and  b' = s b + t

    with s on the output channels of w. Behind a concatenation of such layers each takes its own part of s and t.
    Without γ and β (`affine=False`) they are 1 and 0, without a bias b is 0. The new weights are computed in double
    precision and rounded once to the dtype of the layer. A folded network computes the same in evaluation mode; fine-
    tuned further, it no longer normalises by batch statistics.

    Source: S. Ioffe, C. Szegedy, Batch Normalization, ICML 2015, section 3.1 (inference).
    """

    name: ClassVar[str] = "fold-batchnorm"
    semantics: ClassVar[Semantics] = EXACT

    def run(self, graph: Graph, context: Context) -> PassResult:  # noqa: ARG002
        """Fold what can be folded; the rest is skipped with its reason."""
        norms = [node for node in graph.nodes if isinstance(graph.layer(node), _BatchNorm)]
        skips = []
        with graph.edit(self.name):
            for node in norms:
                reason = fold_into_producer(graph, node)
                if reason is not None:
                    skips.append(Skip(node.name, reason))
        notes = [f"folded {len(norms) - len(skips)} of {len(norms)} batch norms"] if norms else []
        return PassResult(notes, skips, metrics={"folded": len(norms) - len(skips)})


def fold_into_producer(graph: Graph, node: fx.Node) -> str | None:
    """Fold one batch norm node; a reason where that is not possible."""
    norm = graph.layer(node)
    assert isinstance(norm, _BatchNorm)
    if norm.running_mean is None or norm.running_var is None:
        return "it keeps no running statistics, so it normalises by the batch"
    sources = layers_before(graph, node, LINEAR)
    if isinstance(sources, str):
        return sources
    fold_into(graph, sources, 1, *affine_of(norm))
    node.replace_all_uses_with(node.all_input_nodes[0])
    node.graph.erase_node(node)  # or the layer would still have two readers when the next norm is looked at
    return None


def affine_of(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Factor s and term t, both `(C,)` in double precision, with `bn(y) = s y + t` in evaluation mode."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    scale = torch.rsqrt(variance + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -scale * mean
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    return scale, shift
