"""`alternate-update`: one-bit weights by least squares, layer by layer from the front."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, fx, nn

from ...ir.errors import OptionError
from ...ir.graph import Graph
from ...ir.nodes import shape_of
from ...runtime.layers import BinaryLayer
from ...runtime.training.statistics import reestimate_norms
from ..base import LOSSY, Context, Pass, PassResult, Semantics, Skip
from ..layerwise.patches import weight_of_rows, weight_rows
from ..options import nearest
from ..train.distill import Distill
from .judging import First, Judge
from .responses import Responses, is_normalised
from .signs import fit_signs

_Count = Annotated[int, Field(ge=1)]
LEAST = 1e-3
"""Size of the smallest latent weights as a share of the filter's mean: a weight of 0 has no sign."""


@dataclass(frozen=True)
class Update:
    """What became of one layer.

    Attributes:
        layer: its path.
        errors: share of the wanted response's variance that is missed: at the start, with the best factors for the
            signs as they were, and after every sweep.
        flips: signs that changed in the end.
        weights: how many there are.
        loss_before, loss_behind: of the network; see `Judge`.
        kept: whether the update stayed.
    """

    layer: str
    errors: list[float]
    flips: int
    weights: int
    loss_before: float
    loss_behind: float
    kept: bool


class AlternateUpdate(Pass):
    """Fit signs b and factors α of binary layers to what the original network's layers give, from the front.

    Per filter, with inputs X as the layer gets them behind the layers that were fitted before it, and responses y of
    the same layer of the original network (before its batch norm),

        min over α, b of ‖y − α X b‖²       α = bᵀh / bᵀG b,    b_i = sign(α (h_i − α Σ_{j≠i} G_ij b_j))

    by turns until no sign flips, on G = XᵀX and h = Xᵀy alone, which are centred where a batch norm follows. The error
    never rises from step to step. Then batch norms take their statistics anew, the layers behind may be trained for
    some batches, and the update stays only if the loss on other images is no higher than before: else all of it is
    undone.

    So that training can go on, latent weights are given sizes, W_i = α b_i m_i / mean |m|, where m_i is the number
    that would stand best in the place of α b_i. A sign that the responses hardly determine is the first to turn; if
    all had the size α, they would be equally far from turning, and training had to learn anew which ones matter.

    Sources: Zhang, Yan and Zhang 2021 (the formulas are our reading of the abstract); see `signs.py`.
    """

    name: ClassVar[str] = "alternate-update"
    semantics: ClassVar[Semantics] = LOSSY

    target: Literal["original", "latent"] = "original"
    """Responses to fit: of the original network's layer, or of the latent weights on the same inputs."""
    ignore: tuple[str, ...] = ()
    """Patterns of layers that stay as they are."""
    sweeps: _Count = 20
    """Times that all signs of a layer are looked at, at most."""
    images: _Count = 1024
    """Calibration images, at most; as many of `data.val` judge."""
    positions: _Count = 64
    """Output positions of a convolution per image that are looked at; the same ones of every image."""
    batches: _Count = 10
    """Of calibration, from which batch norms take their statistics after each layer."""
    tune: Annotated[int, Field(ge=0)] = 0
    """Batches of `data.train` with which the layers behind are trained after each update; 0: none."""
    lr: Annotated[float, Field(gt=0)] = 0.005
    """Highest learning rate of that."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of that: `bf16` computes in bfloat16 where that is safe."""

    def needed(self) -> tuple[str, ...]:
        """Calibration data, and training data where layers are trained."""
        return ("calibration", "train") if self.tune else ("calibration",)

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Update layer after layer; each is kept or undone."""
        original = context.original if self.target == "original" else None
        nodes, skips = self._nodes(graph, original)
        if not nodes:
            return PassResult(["no binary layer to update"], skips)
        teacher = context.teacher if context.teacher is not None else context.original.module
        judge = Judge(context.data, self.images, teacher, self.title())
        loss, updates = judge.loss(graph.module), list[Update]()
        for number, node in enumerate(nodes):
            title = f"{self.name}: {node.target} ({number + 1} of {len(nodes)})"
            updates.append(self._update(graph, original, node, judge, loss, context, teacher, title))
            loss = updates[-1].loss_behind if updates[-1].kept else loss
        with graph.edit(self.name):
            pass  # the values have changed: the epoch moves on, the history tells
        skips += [Skip(u.layer, _undone(u, judge.name)) for u in updates if not u.kept]
        first = updates[0].loss_before
        notes = [*_notes(updates), f"{judge.name} {first:.4f} → {loss:.4f}"]
        return PassResult(notes, skips, metrics={"layers": [asdict(u) for u in updates], "loss": [first, loss]})

    def _nodes(self, graph: Graph, original: Graph | None) -> tuple[list[fx.Node], list[Skip]]:
        found = [node for node in graph.nodes if isinstance(graph.layer(node), BinaryLayer)]
        paths = [str(node.target) for node in found]
        for pattern in self.ignore:
            if not any(fnmatchcase(path, pattern) for path in paths):
                raise OptionError(
                    f"{self.title()}, option 'ignore': no binary layer {pattern!r}: {nearest(pattern, paths)}"
                    f"binary layers: {', '.join(paths[:8]) or 'none'}"
                )
        nodes, skips = [], []
        for node in found:
            ignored = any(fnmatchcase(str(node.target), pattern) for pattern in self.ignore)
            reason = "ignored by option" if ignored else _unfit(graph, original, node)
            if reason is None:
                nodes.append(node)
            else:
                skips.append(Skip(str(node.target), reason))
        return nodes, skips

    def _update(
        self, graph: Graph, original: Graph | None, node: fx.Node, judge: Judge, loss: float, context: Context,
        teacher: nn.Module, title: str,
    ) -> Update:  # fmt: skip
        before = {name: value.detach().clone() for name, value in graph.module.state_dict().items()}
        responses = Responses(graph, original, node, self.positions)
        responses.collect(judge.learned, judge.batches, context.console, title)
        errors, flips = _fit(graph, node, responses, self.sweeps)
        self._reestimate(graph, context)
        if self.tune:
            self._tune(graph, node, teacher, context)
        behind = judge.loss(graph.module)
        kept = behind <= loss
        if not kept:
            _restore(graph.module, before)
        layer: Any = graph.layer(node)
        return Update(str(node.target), errors, flips, layer.weight.numel(), loss, behind, kept)

    def _reestimate(self, graph: Graph, context: Context) -> None:
        data = replace(context.data, train=context.data.need("calibration", who=self.title()))
        reestimate_norms(graph.module, data, self.batches, seed=context.seed)

    def _tune(self, graph: Graph, node: fx.Node, teacher: nn.Module, context: Context) -> None:
        """Train what is behind a node."""
        options = Distill(epochs=1, lr=self.lr, keep="last", warmup=0.1, precision=self.precision)
        train = First(context.data.need("train", who=self.title()), self.tune)
        data = replace(context.data, train=train, val=None)
        with _frozen(graph, node) as left:
            if left:
                options.teach(
                    graph.module, teacher, None, None, data, seed=context.seed, console=context.console, workdir=None
                )
        graph.module.eval()


def _unfit(graph: Graph, original: Graph | None, node: fx.Node) -> str | None:
    """Why a layer cannot be updated."""
    layer = graph.layer(node)
    assert isinstance(layer, BinaryLayer)
    if layer.weights != "binary":
        return f"its weights are {layer.weights}; signs alone are fitted"
    if layer.scale != "filter" and not is_normalised(graph, node):
        return f"its scale is {layer.scale!r}, and no batch norm behind it makes up for a factor per filter"
    if sum(other.target == node.target for other in graph.nodes) > 1:
        return "it is called several times"
    if original is None:
        return None
    twins = [other for other in original.nodes if other.op == "call_module" and other.target == node.target]
    if len(twins) != 1 or not isinstance(original.layer(twins[0]), (nn.Conv2d, nn.Linear)):
        return "the original network has no convolution or linear layer of that name; 'target: latent' needs none"
    if shape_of(twins[0]) != shape_of(node):
        return f"it gives {shape_of(node)}, in the original network {shape_of(twins[0])}; 'target: latent' needs none"
    return None


@torch.no_grad()
def _fit(graph: Graph, node: fx.Node, responses: Responses, sweeps: int) -> tuple[list[float], int]:
    """Put signs and factors in; the errors on the way, and how many signs are others than before."""
    layer: Any = graph.layer(node)
    normalised = is_normalised(graph, node)
    problems = responses.problems(centred=normalised or layer.bias is not None)
    old, values, constants, losses = weight_rows(responses.plain, layer.binary_weight).double(), [], [], []
    for problem, rows in zip(problems, old, strict=True):
        alpha, signs = rows.abs().mean(1), torch.where(rows >= 0, 1.0, -1.0).double().T
        fit = fit_signs(problem.gram, problem.cross, alpha, signs, sweeps)
        fitted = torch.where(fit.alpha > 0, fit.alpha * fit.signs, rows.T)  # what has no answer stays
        values.append((fitted * torch.where(fit.alpha > 0, _graded(fit.margins), 1.0)).T)
        constants.append(problem.mean_y - problem.mean_x @ fitted)
        losses.append(fit.losses)
    new = torch.stack(values)
    _install(layer, weight_of_rows(responses.plain, new), torch.cat(constants), free=normalised)
    energy = sum(problem.energy for problem in problems)
    return _errors(losses, energy), int(((new >= 0) != (old >= 0)).sum())


def _graded(margins: Tensor) -> Tensor:
    """Sizes of latent weights as factors of α, (n, O), of mean 1 per filter: what turns soonest is the smallest."""
    sizes = margins / margins.mean(0).clamp(min=torch.finfo(margins.dtype).tiny)
    sizes = sizes.clamp(min=LEAST)
    return sizes / sizes.mean(0)


def _install(layer: Any, weight: Tensor, constant: Tensor, *, free: bool) -> None:
    """New latent weights; with one factor for the layer (or none) it stays."""
    if layer.scale != "filter":
        sizes = weight.abs().flatten(1).mean(1).view(-1, *[1] * (weight.dim() - 1))
        weight = weight / sizes * layer.weight.abs().mean().double()
    layer.weight.copy_(weight)
    if layer.bias is not None and not free:
        layer.bias.copy_(constant)


def _errors(losses: list[list[float]], energy: float) -> list[float]:
    """Of all groups together; a group that ended early stays as it was."""
    longest = max(map(len, losses))
    totals = [sum(own[min(i, len(own) - 1)] for own in losses) for i in range(longest)]
    return [max(energy + total, 0.0) / energy if energy > 0 else 0.0 for total in totals]


@torch.no_grad()
def _restore(module: nn.Module, state: dict[str, Tensor]) -> None:
    for name, value in module.state_dict().items():
        value.copy_(state[name])


@contextmanager
def _frozen(graph: Graph, node: fx.Node) -> Iterator[int]:
    """Within, what comes before a node and its layer do not learn; how many parameters are left."""
    nodes = graph.nodes
    before = [graph.layer(one) for one in nodes[: nodes.index(node) + 1]]
    frozen = {p for layer in before if layer is not None for p in layer.parameters() if p.requires_grad}
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield sum(parameter.requires_grad for parameter in graph.module.parameters())
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


def _notes(updates: list[Update]) -> list[str]:
    kept = [u for u in updates if u.kept]
    notes = [f"{len(kept)} of {len(updates)} layers updated"]
    if kept:
        start, best, end = (sum(u.errors[i] for u in kept) / len(kept) for i in (0, 1, -1))
        flips, weights = sum(u.flips for u in kept), sum(u.weights for u in kept)
        notes.append(f"mean share of the response that is missed {start:.3f}, best factors {best:.3f}, signs {end:.3f}")
        notes.append(f"{flips:,} of {weights:,} signs changed ({flips / weights:.1%})")
    return notes


def _undone(update: Update, name: str) -> str:
    return f"undone: {name} would rise from {update.loss_before:.4f} to {update.loss_behind:.4f}"
