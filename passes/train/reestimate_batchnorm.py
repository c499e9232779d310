"""`reestimate-batchnorm`: batch norms look again at what they normalise."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar

from pydantic import Field
from torch.nn.modules.batchnorm import _BatchNorm

from ...ir.graph import Graph
from ...runtime.training.statistics import reestimate_norms
from ..base import LOSSY, Context, Pass, PassResult, Semantics


class ReestimateBatchnorm(Pass):
    """Replace the running means and variances of all batch norms by those of `data.calibration`, without gradients.

    A cut or quantised network gives its batch norms other inputs than those whose statistics they hold. Here μ and v of
    `bn(y) = γ (y − μ) / √(v + ε) + β` become means over the batches, each normalised by itself on its way, as in
    training; γ, β and every other weight stay. It needs batch norms that `fold-batchnorm` has not folded yet.

    Source: Y. Wu, J. Johnson, Rethinking "Batch" in BatchNorm, 2021, section 3.1.
    """

    name: ClassVar[str] = "reestimate-batchnorm"
    semantics: ClassVar[Semantics] = LOSSY
    needs: ClassVar[tuple[str, ...]] = ("calibration",)

    batches: Annotated[int, Field(ge=1)] = 100
    """At most so many batches are looked at."""

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Estimate, and move the epoch on."""
        norms = [m for m in graph.module.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
        loader = context.data.need("calibration", who=self.title())
        used = reestimate_norms(graph.module, replace(context.data, train=loader), self.batches, seed=context.seed)
        with graph.edit(self.name):
            pass  # the values have changed: the epoch moves on, the history tells
        note = f"statistics of {len(norms)} batch norms from {used} batches"
        return PassResult([note if norms else "no batch norm keeps statistics"], metrics={"norms": len(norms)})
