"""Options of how to train: what `TrainSettings` holds, for pipeline files."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ...ir.errors import OptionError
from ...runtime.training import TrainSettings
from ..options import InvalidOptionError, Options

_Share = Annotated[float, Field(ge=0, lt=1)]
_Positive = Annotated[float, Field(gt=0)]
_Count = Annotated[int, Field(ge=1)]
_NotNegative = Annotated[float, Field(ge=0)]


class TrainingOptions(Options):
    """How long, how fast, on what, and what is kept of it."""

    # how long and how fast
    epochs: _Count = 10
    """Passes over the training data."""
    lr: _Positive = 0.02
    """Highest learning rate, reached after the warm-up."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """`sgd` has Nesterov momentum."""
    momentum: _Share = 0.9
    """Of `sgd`."""
    weight_decay: _NotNegative = 5e-4
    """Of weights; biases and normalisation have none."""
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    """The learning rate falls to 0 along a cosine, by `gamma` at each milestone, or not at all."""
    milestones: tuple[_Positive, ...] = ()
    """Epochs after which `step` falls; none: after half and three quarters of the run."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Factor of `step`."""
    warmup: _Share = 0.05
    """Share of all steps in which the learning rate rises from 0."""
    clip_norm: _Positive | None = 1.0
    """Gradients of a larger norm are scaled down to it: a folded network has no batch norm to tame them."""
    accumulate: _Count = 1
    """Batches per step of the optimiser: as if the batch were so many times larger."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """`bf16` computes in bfloat16 where that is safe and keeps float32 weights."""
    # on what
    mixup: _NotNegative = 0.0
    """Parameter of mixup's Beta distribution: images and targets are blended in pairs; 0 does without."""
    cutmix: _NotNegative = 0.0
    """The same of CutMix: rectangles of other images are pasted in; with `mixup` too, each batch gets one of them."""
    cache_teacher: bool = False
    """Keep the teacher's outputs per image, for inputs that do not change from epoch to epoch."""
    cache_limit_bytes: _Count = 1 << 30
    """The most that these may take."""
    # what is kept
    ema: _Share = 0.0
    """Decay per step of a moving average of the weights, which is then evaluated and kept; 0 does without."""
    keep: Literal["best", "last"] = "best"
    """`best` keeps the epoch with the highest accuracy on `data.val`, if there is one; `last` the last."""
    patience: _Count | None = None
    """Stop after so many epochs without a higher accuracy on `data.val`."""
    checkpoint_every: _Count | None = None
    """Steps between checkpoints in the workdir, if there is one; by default there is one after each epoch."""
    log: str | None = None
    """Folder for a log as CSV and TensorBoard events; by default `log` in the workdir, if there is one."""
    log_every: _Count = 10
    """Steps between rows of the log."""

    @model_validator(mode="after")
    def _fit_together(self) -> TrainingOptions:
        try:
            self.train_settings()
        except OptionError as error:
            raise InvalidOptionError(error.what, hint=error.hint) from None
        return self

    def train_settings(self) -> TrainSettings:
        """These options as settings of the training loop."""
        return TrainSettings(**self.model_dump(include=set(TrainingOptions.model_fields) - {"log"}))
