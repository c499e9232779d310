"""How to train: the numbers of an optimisation, and the optimiser and schedule they mean."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ...ir.errors import OptionError, TrainingError


@dataclass(frozen=True)
class TrainSettings:
    """The numbers of one training run.

    Args:
        epochs: passes over the training loader.
        lr: highest learning rate, reached after the warm-up.
        optimizer: `sgd` with Nesterov momentum, or `adamw`.
        momentum: of `sgd`.
        weight_decay: of weights; biases and normalisation parameters (one dimension) have none.
        schedule: after the warm-up the rate falls to 0 along half a `cosine`, by `gamma` at each milestone (`step`),
            or not at all (`constant`).
        milestones: epochs after which `step` falls; after half and three quarters of the epochs where there are none.
        gamma: factor of `step`.
        warmup: share of all steps, 0-1, in which the learning rate rises linearly from 0.
        clip_norm: gradients of a larger 2-norm are scaled down to it; None never does.
        accumulate: batches per optimiser step: their gradients are averaged.
        precision: `fp32`, or `bf16` for autocast to bfloat16.
        mixup: α of mixup's Beta(α, α) (Zhang et al. 2018, https://arxiv.org/abs/1710.09412); 0 does without.
        cutmix: the same of CutMix (Yun et al. 2019, https://arxiv.org/abs/1905.04899); with both, each batch gets one
            of them at random.
        ema: decay per step of an exponential moving average of the weights, which then is what is evaluated and kept;
            0 does without.
        keep: `best` keeps the epoch with the highest accuracy on `data.val` if there is one; `last` keeps the last
            and never looks at `data.val`.
        patience: the run ends after so many epochs without a higher accuracy on `data.val`; None never does.
        cache_teacher: ask the teacher only about images that it has not seen; for inputs that stay the same.
        cache_limit_bytes: the most that the teacher's kept outputs may take.
        checkpoint_every: optimiser steps between checkpoints within an epoch; None writes them after epochs only.
        log_every: optimiser steps between two rows of the log.
    """

    epochs: int = 10
    lr: float = 0.05
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    milestones: tuple[float, ...] = ()
    gamma: float = 0.1
    warmup: float = 0.05
    clip_norm: float | None = None
    accumulate: int = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    mixup: float = 0.0
    cutmix: float = 0.0
    ema: float = 0.0
    keep: Literal["best", "last"] = "best"
    patience: int | None = None
    cache_teacher: bool = False
    cache_limit_bytes: int = 1 << 30
    checkpoint_every: int | None = None
    log_every: int = 10

    def __post_init__(self) -> None:
        for option, (good, words) in self._allowed().items():
            if not good:
                raise OptionError(f"training option {option!r} is {getattr(self, option)!r}, allowed: {words}")
        if self.patience is not None and self.keep != "best":
            raise OptionError("training option 'patience' looks at data.val", hint="Take keep: best with it.")
        if self.milestones and self.schedule != "step":
            raise OptionError(f"milestones have no meaning for schedule: {self.schedule}", hint="Take schedule: step.")
        if self.cache_teacher and (self.mixup or self.cutmix):
            raise OptionError(
                "cache_teacher needs inputs that stay the same, and mixup and cutmix change them",
                hint="Leave out one of them.",
            )

    def _allowed(self) -> dict[str, tuple[bool, str]]:
        count = {name: getattr(self, name) for name in ("epochs", "accumulate", "cache_limit_bytes", "log_every")}
        perhaps = {name: getattr(self, name) for name in ("patience", "checkpoint_every")}
        return {
            **{name: (value >= 1, "at least 1") for name, value in count.items()},
            **{name: (value is None or value >= 1, "at least 1, or none") for name, value in perhaps.items()},
            "lr": (0 < self.lr < math.inf, "above 0"),
            "optimizer": (self.optimizer in ("sgd", "adamw"), "sgd or adamw"),
            "momentum": (0 <= self.momentum < 1, "at least 0 and below 1"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "at least 0"),
            "schedule": (self.schedule in ("cosine", "step", "constant"), "cosine, step or constant"),
            "milestones": (_rising(self.milestones) and all(0 < m < self.epochs for m in self.milestones),
                           f"rising, above 0 and below the {self.epochs} epochs"),
            "gamma": (0 < self.gamma <= 1, "above 0 and at most 1"),
            "warmup": (0 <= self.warmup < 1, "at least 0 and below 1"),
            "clip_norm": (self.clip_norm is None or self.clip_norm > 0, "above 0, or none"),
            "precision": (self.precision in ("fp32", "bf16"), "fp32 or bf16"),
            "mixup": (0 <= self.mixup < math.inf, "at least 0"),
            "cutmix": (0 <= self.cutmix < math.inf, "at least 0"),
            "ema": (0 <= self.ema < 1, "at least 0 and below 1"),
            "keep": (self.keep in ("best", "last"), "best or last"),
        }  # fmt: skip

    def learning_rate(self, progress: float) -> float:
        """The learning rate at a share `progress` of the run, 0-1."""
        if progress < self.warmup:
            return self.lr * progress / self.warmup
        if self.schedule == "constant":
            return self.lr
        if self.schedule == "step":
            milestones = self.milestones or (self.epochs / 2, self.epochs * 3 / 4)
            return self.lr * self.gamma ** sum(progress * self.epochs >= milestone for milestone in milestones)
        done = (progress - self.warmup) / (1 - self.warmup)
        return self.lr * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))

    def build_optimizer(
        self, module: nn.Module, objective: nn.Module | None = None, groups: Sequence[dict[str, Any]] = ()
    ) -> torch.optim.Optimizer:
        """The optimiser of all parameters that require a gradient.

        Args:
            module: the network.
            objective: may learn as well (adapters between features).
            groups: parameters that are treated on their own, see `Callback.parameter_groups`.

        Raises:
            TrainingError: there is no parameter to train.
        """
        own = {id(parameter) for group in groups for parameter in group["params"]}
        learners = [module, objective] if objective is not None else [module]
        parameters = [p for learner in learners for p in learner.parameters() if p.requires_grad and id(p) not in own]
        if not parameters and not own:
            raise TrainingError("the network has no trainable parameter", hint="Train before emit freezes it.")
        ordinary: list[dict[str, Any]] = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        every = [*ordinary, *({"weight_decay": 0.0, **group} for group in groups)]
        every = [group for group in every if group["params"]]
        if self.optimizer == "adamw":
            return torch.optim.AdamW(every, lr=self.lr)
        return torch.optim.SGD(every, lr=self.lr, momentum=self.momentum, nesterov=self.momentum > 0)


def _rising(values: Sequence[float]) -> bool:
    return all(one < two for one, two in itertools.pairwise(values))
