"""`distill`: the network learns again, from a teacher or from the targets alone."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from ...ir.graph import Graph
from ...runtime.training import CrossEntropy, KnowledgeDistillation, Objective, TrainResult, TrainSettings, train
from ..base import TRAINING, Context, Pass, PassResult, Semantics

_Share = Annotated[float, Field(ge=0, lt=1)]
_Positive = Annotated[float, Field(gt=0)]
_OWN = {"loss", "temperature", "alpha", "label_smoothing"}


class Distill(Pass):
    """Train the network on `data.train`, by default to agree with its teacher: the network that was compiled.

    With student outputs z, teacher outputs v and targets y, `loss: kd` learns from

        L = (1 − α) · CE(y, softmax z) + α · T² · KL(softmax(v / T) ‖ softmax(z / T))

    and `loss: cross-entropy` from the first term alone. The teacher is in eval mode and gets no gradient. Under
    `torchrun` the processes share each batch. The same seed gives the same weights on the same machine.

    Source: G. Hinton, O. Vinyals, J. Dean, Distilling the Knowledge in a Neural Network, 2015.
    """

    name: ClassVar[str] = "distill"
    semantics: ClassVar[Semantics] = TRAINING
    needs: ClassVar[tuple[str, ...]] = ("train",)

    epochs: Annotated[int, Field(ge=1)] = 10
    """Passes over the training data."""
    loss: Literal["kd", "cross-entropy"] = "kd"
    """`kd` learns from the teacher and the targets, `cross-entropy` from the targets alone."""
    temperature: _Positive = 4.0
    """T: the higher, the more the teacher's small probabilities count."""
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Weight of the teacher; the targets have the rest."""
    label_smoothing: _Share = 0.0
    """Share of a target's probability that is spread over all classes."""
    lr: _Positive = 0.02
    """Highest learning rate; it falls to 0 along a cosine."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """`sgd` has Nesterov momentum."""
    momentum: _Share = 0.9
    """Of `sgd`."""
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    """Of weights; biases and normalisation have none."""
    warmup: _Share = 0.05
    """Share of all steps in which the learning rate rises from 0."""
    clip_norm: _Positive | None = 1.0
    """Gradients of a larger norm are scaled down to it: a folded network has no batch norm to tame them."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """`bf16` computes in bfloat16 where that is safe and keeps float32 weights."""
    keep: Literal["best", "last"] = "best"
    """`best` keeps the epoch with the highest accuracy on `data.val`, if there is one; `last` the last."""

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Train the graph's module in place."""
        settings = TrainSettings(**self.model_dump(exclude=_OWN))
        result = train(
            graph.module,
            context.data,
            objective=self._objective(),
            teacher=context.teacher if context.teacher is not None else context.original.module,
            settings=settings,
            seed=context.seed,
            console=context.console,
            title=self.name,
        )
        with graph.edit(self.name):
            pass  # the values have changed: the epoch moves on, the history tells
        return PassResult([_note(result)], metrics=_metrics(result))

    def _objective(self) -> Objective:
        if self.loss == "cross-entropy":
            return CrossEntropy(self.label_smoothing)
        return KnowledgeDistillation(self.temperature, self.alpha, self.label_smoothing)


def _note(result: TrainResult) -> str:
    first, kept = result.epochs[0], result.epochs[result.kept]
    note = f"{result.steps} steps, loss {first.loss:.3f} → {kept.loss:.3f}"
    if kept.val_accuracy is not None:
        note += f", kept epoch {result.kept + 1} of {len(result.epochs)}"
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
