"""`distill`: the network learns again, from a teacher or from the targets alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

from rich.console import Console
from torch import nn

from ...ir.errors import OptionError
from ...ir.graph import Graph
from ...runtime.data import Data
from ...runtime.layers.pq_layer import PQLayer
from ...runtime.training import Taps, TrainResult, train
from ..analyse.recorder import WeightRecorder
from ..base import TRAINING, Context, Pass, PassResult, Semantics
from .knowledge import find_places
from .loss_options import LossOptions
from .training_options import TrainingOptions


class Distill(TrainingOptions, LossOptions, Pass):
    """Train the network on `data.train`, by default to agree with its teacher: the network that was compiled.

    With student outputs z, teacher outputs v, targets y, p = softmax(z / T) and q = softmax(v / T):

        kd             L = (1 − α) · CE(y, softmax z) + α · T² · KL(q ‖ p)
        scale-factor   L = kd + λ · T² · E(t, s)
        dkd            L = CE(y, softmax z) + T² · (dkd_alpha · KL(b ‖ a) + dkd_beta · KL(t ‖ s))
        cross-entropy  L = CE(y, softmax z)

    with a = [p_y, 1 − p_y] and b = [q_y, 1 − q_y]. The scale factors s_j = p_j / Σ_{k≠y} p_k, and t_j of the teacher
    alike, say how close each other class is to the image, by the share that it has of what the target leaves; E(t, s)
    is KL(t ‖ s), or another `form`. `attention` and `hint` add terms that compare features of both networks, at places
    of equal resolution.

    The teacher is in eval mode and gets no gradient. Under `torchrun` the processes share each batch. The same seed
    gives the same weights on the same machine, also when the run was interrupted and resumed.

    Sources: G. Hinton, O. Vinyals, J. Dean, Distilling the Knowledge in a Neural Network, 2015; Xu and Song 2018 (scale
    factor; the formula is our reading of the abstract); Zhao et al., Decoupled Knowledge Distillation, 2022.
    """

    name: ClassVar[str] = "distill"
    semantics: ClassVar[Semantics] = TRAINING
    needs: ClassVar[tuple[str, ...]] = ("train",)

    only: Literal["codebooks", "quantized"] | None = None
    """Train the codewords of product-quantized layers alone, or (`quantized`) these and the biases of the same layers;
    null trains all parameters. Indices never change."""
    record: bool | str = False
    """Record how the filters change over the second half of the epochs, for a later `criterion: statistics`: in this
    pipeline (`true`), or in a file of this name as well."""

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Train the graph's module in place."""
        teacher = context.teacher if context.teacher is not None else context.original.module
        taps = None
        if self.compares_features:
            taps = find_places(graph, teacher, places=self.places, teacher_places=self.teacher_places)
        inputs = graph.example_kwargs or graph.example_args
        recorder = self.recorder(graph.module)
        with _some_alone(graph.module, self.only) if self.only else contextlib.nullcontext():
            result = self.teach(
                graph.module,
                teacher,
                taps,
                inputs,
                context.data,
                seed=context.seed,
                console=context.console,
                workdir=context.workdir,
                recorder=recorder,
            )
        if recorder is not None and recorder.statistics.checkpoints:
            context.records.statistics = recorder.statistics
        with graph.edit(self.name):
            pass  # the values have changed: the epoch moves on, the history tells
        return PassResult([_note(result)], metrics=_metrics(result))

    def recorder(self, student: nn.Module) -> WeightRecorder | None:
        """Records the student's filters, if the options want that."""
        return WeightRecorder(student, skip=self.epochs // 2) if self.record else None

    def teach(
        self,
        student: nn.Module,
        teacher: nn.Module,
        taps: Taps | None,
        inputs: Any,
        data: Data,
        *,
        seed: int,
        console: Console,
        workdir: Path | None,
        recorder: WeightRecorder | None = None,
    ) -> TrainResult:
        """Train any student in place.

        Args:
            student: the network.
            teacher: another one.
            taps: places to compare, if the options want that.
            inputs: an example, as both take it; only looked at with `taps`.
            data: with `train`.
            seed: of the run.
            console: shows a progress bar if it is a terminal.
            workdir: for checkpoints, from the last of which the run goes on, and the log.
            recorder: looks at the student after each epoch; one of its own where None and the options want one.
        """
        recorder = recorder or self.recorder(student)
        log = self.log or (workdir and workdir / "log")
        result = train(
            student,
            data,
            objective=self.objective(student, teacher, taps, inputs, data, self.epochs, seed),
            teacher=teacher,
            settings=self.train_settings(),
            seed=seed,
            taps=taps,
            callbacks=[] if recorder is None else [recorder],
            checkpoints=workdir,
            log=Path(log) if log else None,
            console=console,
            title=self.name,
        )
        if recorder is not None and isinstance(self.record, str):
            recorder.statistics.save(self.record)
        return result


@contextlib.contextmanager
def _some_alone(network: nn.Module, only: str) -> Iterator[None]:
    """Until the block is left, no parameter learns but codewords of product-quantized layers, or also their biases."""
    layers = [layer for layer in network.modules() if isinstance(layer, PQLayer)]
    learned = {id(p) for layer in layers for p in ([layer.codebook] if only == "codebooks" else layer.parameters())}
    if not layers:
        raise OptionError(
            "pass 'distill', option 'only': the network has no product-quantized layer",
            hint="Put `product-quantize` before it, or leave the option out.",
        )
    frozen = [p for p in network.parameters() if p.requires_grad and id(p) not in learned]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


def _note(result: TrainResult) -> str:
    first, kept = result.epochs[0], result.epochs[result.kept]
    note = f"{result.steps} steps, loss {first.loss:.3f} → {kept.loss:.3f}"
    if kept.val_accuracy is not None:
        note += f", kept epoch {result.kept + 1} of {len(result.epochs)}"
    cache = result.teacher_cache
    if cache is not None:
        full = ", full" if cache.full else ""
        note += f", teacher asked about {cache.asked:,} of {cache.asked + cache.hits:,} images"
        note += f" ({cache.size_bytes:,} bytes kept{full})"
    return note


def _metrics(result: TrainResult) -> dict[str, Any]:
    return {
        "loss": [epoch.loss for epoch in result.epochs],
        "accuracy": [epoch.accuracy for epoch in result.epochs],
        "val_loss": [epoch.val_loss for epoch in result.epochs],
        "val_accuracy": [epoch.val_accuracy for epoch in result.epochs],
        "kept_epoch": result.kept + 1,
        "steps": result.steps,
        "images_per_second": result.images_per_second,
    }
