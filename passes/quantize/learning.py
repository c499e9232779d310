"""From a dense layer to codewords and indices, one layer after the other."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...ir.graph import Graph
from ...runtime.data import Loader
from ...runtime.layers.pq_codebook import as_stored
from ...runtime.layers.pq_conv2d import PQConv2d
from ...runtime.layers.pq_linear import PQLinear
from ..analyse.sharing import first_ones, shared_sum
from ..layerwise.moments import SecondMoments
from ..layerwise.patches import rows, weight_rows
from ..layerwise.placing import add_constant, bias_of, set_weight
from .codes import Codes, first_codes, in_order
from .correction import Correction
from .outcome import Outcome
from .plan import Dense, Job
from .problem import Problem, make_problem
from .progress import Bar
from .recipe import Recipe
from .walk import Walk

MEMORY = 2**30
"""Bytes of Gram matrices that exist at a time, and of images between layers; one layer may need more."""


class Learner:
    """Quantises the layers of a network.

    Args:
        before: the network as it is.
        after: a copy; its layers get decoded weights one by one, and become quantised ones at the end.
        jobs: layers in the order of execution.
        recipe: how.
        bar: shows progress.
    """

    def __init__(self, before: Graph, after: Graph, jobs: Sequence[Job], recipe: Recipe, bar: Bar) -> None:
        self.before, self.after, self.jobs, self.recipe, self.bar = before, after, jobs, recipe, bar
        self.made: dict[str, PQConv2d | PQLinear] = {}
        self.outcomes: list[Outcome] = []
        self.images = 0

    def run(self, loader: Loader | None) -> None:
        """Learn all layers, and put them into the network behind.

        Args:
            loader: calibration data; not needed without correction.
        """
        if self.recipe.correction == "none" or loader is None:
            for job in self.jobs:
                self._finish(job, self._first(job), None, None)
        else:
            self._corrected(loader)

    def _corrected(self, loader: Loader) -> None:
        accumulated = self.recipe.correction == "accumulated"
        walk = Walk(self.before, self.after if accumulated else self.before, loader, self.recipe.images, MEMORY)
        for stage in self._stages():
            found = {job.name: (job, _moments(job, crossed=accumulated)) for job in stage}
            self.bar.say(f"{stage[0].path}: images")

            def add(name: str, x: Tensor, y: Tensor, found: dict[str, tuple[Job, SecondMoments]] = found) -> None:
                job, moments = found[name]
                for part_x, part_y in rows(job.layer, x, y, self.recipe.positions):
                    moments.add(part_x, part_y)

            walk.visit(list(found), add)
            self.images = walk.seen
            for job, moments in found.values():
                moments.adopt(shared_sum(moments.tensors))
                self._learn(job, moments)

    def _stages(self) -> list[list[Job]]:
        """Layers whose sums are gathered together: one by one if they depend on each other, else within memory."""
        if self.recipe.correction == "accumulated":
            return [[job] for job in self.jobs]
        result: list[list[Job]] = []
        used = 0
        for job in self.jobs:
            need = 4 * job.layout.groups * (job.layout.inputs * job.layout.taps + 1) ** 2
            if not result or used + need > MEMORY:
                result.append([])
                used = 0
            result[-1].append(job)
            used += need
        return result

    def _first(self, job: Job) -> Codes:
        """k-means; its seed depends on the layer's name alone, so that others may be skipped."""
        self.bar.say(f"{job.path}: k-means")
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.recipe.seed}/{job.path}".encode()))
        weight = in_order(job.layout, weight_rows(job.layer).detach().to(_precision(job)))
        return first_codes(job.layout, weight, generator, self.recipe.iterations, self.recipe.rate_weight)

    def _learn(self, job: Job, moments: SecondMoments) -> None:
        groups, count = job.layout.groups, moments.count
        bias = bias_of(job.layer).reshape(groups, -1)
        means = moments.gram[:, :-1, -1].double() / count, moments.cross[:, -1].double() / count
        weight = weight_rows(job.layer).detach()
        problem = make_problem(job.layout, moments, weight, bias, ridge=self.recipe.ridge, centred=self.recipe.refit)
        codes = self._first(job)
        correction = Correction(problem, codes)
        first = problem.response_error(correction.gap, correction.first)
        for sweep in range(self.recipe.sweeps):
            self.bar.say(f"{job.path}: sweep {sweep + 1} of {self.recipe.sweeps}")
            correction.sweep()
        self._finish(job, codes, (problem, correction, first), means if self.recipe.refit else None)

    def _finish(
        self,
        job: Job,
        codes: Codes,
        corrected: tuple[Problem, Correction, float] | None,
        means: tuple[Tensor, Tensor] | None,
    ) -> None:
        """Put the layer in; a bias that is refitted makes the mean response the wanted one."""
        codes.codebook, codes.labels = first_ones([codes.codebook, codes.labels])
        codes.codebook = as_stored(codes.codebook, job.setting.codebook)
        node = next(node for node in self.after.nodes if node.name == job.name)
        layer = self.after.layer(node)
        assert isinstance(layer, (nn.Conv2d, nn.Linear))
        quantized = _quantized(job, layer, codes, self.recipe.entropy)
        set_weight(layer, quantized.decoded().detach())
        place = "unchanged"
        if means is not None:
            wanted = means[1] - (weight_rows(layer).detach().double() @ means[0][..., None])[..., 0]
            place = add_constant(self.after, node, wanted.flatten() - bias_of(layer))
        self.made[job.path] = quantized
        self.outcomes.append(_outcome(job, codes, layer, corrected, place))
        self.bar.done()


def _outcome(
    job: Job, codes: Codes, layer: Dense, corrected: tuple[Problem, Correction, float] | None, place: str
) -> Outcome:
    old, new = job.layer.weight.detach().double(), layer.weight.detach().double()
    sizes = (job.layout.width, job.layout.words, job.setting.codebook, job.dense_bytes, job.bytes)
    distance = float((old - new).norm() / old.norm().clamp(min=1e-300))
    coded = codes.code_bits / max(1, codes.labels.numel())
    if corrected is None:
        return Outcome(job.path, *sizes, distance, coded, place=place)
    problem, correction, before = corrected
    gap = problem.weight - codes.decoded()
    after = problem.response_error(gap, problem.error(gap))
    errors = [problem.relative(error) for error in correction.errors]
    return Outcome(job.path, *sizes, distance, coded, before, after, errors, place)


def _precision(job: Job) -> torch.dtype:
    """What is computed in: single precision, double for a layer that is."""
    return torch.float64 if job.layer.weight.dtype == torch.float64 else torch.float32


def _moments(job: Job, *, crossed: bool) -> SecondMoments:
    layout = job.layout
    sizes = (layout.groups, layout.inputs * layout.taps, layout.outputs)
    return SecondMoments(*sizes, job.layer.weight.device, dtype=_precision(job), crossed=crossed)


def _quantized(job: Job, layer: Dense, codes: Codes, entropy: bool) -> PQConv2d | PQLinear:
    options = {"codebook": job.setting.codebook, "entropy": entropy}
    if isinstance(layer, nn.Linear):
        return PQLinear.from_weights(layer, codes.codebook, codes.indices, **options)
    return PQConv2d.from_weights(layer, codes.codebook, codes.indices, **options)


def install(after: Graph, made: dict[str, PQConv2d | PQLinear], author: str) -> None:
    """Put quantised layers in the place of dense ones, with the biases that these have now."""
    with after.edit(author):
        for path, layer in made.items():
            dense = after.module.get_submodule(path)
            layer.bias = dense.bias  # type: ignore[assignment]
            after.module.set_submodule(path, layer)
