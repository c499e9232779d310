"""Options of what to learn from, and the objective that they mean."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ...runtime.data import Data
from ...runtime.forward import call, device_of, forward, modes_restored
from ...runtime.training import CrossEntropy, KnowledgeDistillation, Objective, Taps
from ...runtime.training.features import tapped
from ...runtime.training.losses import (
    AttentionTransfer,
    DecoupledDistillation,
    Hint,
    ScaleFactor,
    Sum,
    mean_scale_factors,
)
from ...runtime.training.seeds import seeded
from ...runtime.training.share import make_accelerator, shared_batches, sum_of
from ..options import InvalidOptionError, Options

_Weight = Annotated[float, Field(ge=0)]
_Share = Annotated[float, Field(ge=0, le=1)]


class LossOptions(Options):
    """The loss, and the knowledge that is added to it."""

    loss: Literal["kd", "cross-entropy", "scale-factor", "dkd"] = "kd"
    """`kd`: teacher and targets; `scale-factor` adds the closeness of classes; `dkd` decoupled; or targets alone."""
    temperature: Annotated[float, Field(gt=0)] = 4.0
    """T: the higher, the more the teacher's small probabilities count."""
    alpha: _Share = 0.9
    """Weight of the teacher in `kd` and `scale-factor`; the targets have the rest."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of a target's probability that is spread over all classes."""
    standardise: bool = False
    """`kd` compares z-scores of the outputs, not their range and shift."""
    form: Literal["kl", "logratio", "mse"] = "kl"
    """How `scale-factor` measures its error: divergence, squared log-ratios of class pairs, or squared difference."""
    level: Literal["sample", "class", "mix"] = "sample"
    """Scale factors to learn: the teacher's on the same image, its mean over the image's class, or a mix of both."""
    mix: _Share = 0.5
    """Share of the class in `level: mix`."""
    lam: _Weight = 2.0
    """λ: weight of the scale factors' error."""
    dkd_alpha: _Weight = 1.0
    """Weight of target against the rest in `dkd`."""
    dkd_beta: _Weight = 8.0
    """Weight of the other classes among themselves in `dkd`."""
    loss_warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the run in which the terms of `scale-factor` and `dkd` rise from 0 to their weights."""
    attention: _Weight = 0.0
    """Weight of attention transfer at the `places`; 1000 is usual, 0 does without."""
    hint: _Weight = 0.0
    """Weight of hints at the `places`, features behind 1x1 adapters; 100 is usual, 0 does without."""
    places: tuple[str, ...] | None = None
    """Where features are compared, by name or pattern; by default the last activation of each resolution."""
    teacher_places: tuple[str, ...] | None = None
    """The same in the teacher, if they are called otherwise there."""

    @model_validator(mode="after")
    def _check_places(self) -> LossOptions:
        if (self.places or self.teacher_places) and not self.compares_features:
            raise InvalidOptionError("places are named and nothing compares them: give 'attention' or 'hint' a weight")
        return self

    @property
    def compares_features(self) -> bool:
        """Whether there is knowledge from inside the networks."""
        return self.attention > 0 or self.hint > 0

    def objective(
        self, student: nn.Module, teacher: nn.Module, taps: Taps | None, inputs: Any, data: Data, epochs: int, seed: int
    ) -> Objective:
        """The loss to learn from.

        Args:
            student: looked at for the channels of its places.
            teacher: likewise; asked about the whole training set for `level: class` and `mix`.
            taps: the places, if features are compared.
            inputs: an example, as both take it.
            data: `train` is read for class means.
            epochs: of the run.
            seed: of the order in which `train` is read.
        """
        terms = [self._score_loss(teacher, data, epochs * self.loss_warmup, seed)]
        if taps is not None and self.attention:
            terms.append(AttentionTransfer(self.attention))
        if taps is not None and self.hint:
            channels = _channels(student, taps.student, inputs), _channels(teacher, taps.teacher, inputs)
            with seeded(seed):  # the adapters begin with the same values in a resumed run
                terms.append(Hint(*channels, self.hint))
        return terms[0] if len(terms) == 1 else Sum(terms)

    def _score_loss(self, teacher: nn.Module, data: Data, warmup_epochs: float, seed: int) -> Objective:
        smoothing = self.label_smoothing
        if self.loss == "cross-entropy":
            return CrossEntropy(smoothing)
        if self.loss == "kd":
            return KnowledgeDistillation(self.temperature, self.alpha, smoothing, standardise=self.standardise)
        if self.loss == "dkd":
            weights = self.dkd_alpha, self.dkd_beta, self.temperature
            return DecoupledDistillation(*weights, warmup_epochs=warmup_epochs, label_smoothing=smoothing)
        means = None if self.level == "sample" else class_means(teacher, data, self.temperature, seed)
        return ScaleFactor(
            self.form,
            self.level,
            self.lam,
            self.temperature,
            alpha=self.alpha,
            warmup_epochs=warmup_epochs,
            label_smoothing=smoothing,
            mix=self.mix,
            class_means=means,
        )


def class_means(teacher: nn.Module, data: Data, temperature: float, seed: int) -> Tensor:
    """S of `mean_scale_factors` over `data.train`, float32 `(classes, classes)`; the processes share the work."""
    accelerator = make_accelerator()
    loader, home = data.need("train", who="scale factors of classes"), device_of(teacher)
    with torch.no_grad(), seeded(seed), modes_restored(teacher):
        teacher.to(accelerator.device).eval()
        batches = shared_batches(accelerator, loader, 0, seed=seed)
        stream = ((forward(teacher, inputs, "a batch of train"), targets) for inputs, targets in batches)
        means = mean_scale_factors(stream, temperature, share=lambda sums: sum_of(accelerator, sums))
    teacher.to(home)
    return means.float()


def _channels(network: nn.Module, places: Any, inputs: Any) -> list[int]:
    """Sizes of dimension 1 of the tensors at some places."""
    twin = tapped(network, places)
    with torch.no_grad(), modes_restored(twin):
        features: tuple[Tensor, ...] = call(twin.eval(), inputs)[1]
    return [feature.shape[1] for feature in features]
