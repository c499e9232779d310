"""How to train: the numbers of an optimisation, and the optimiser and schedule they mean."""

from __future__ import annotations

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
        lr: highest learning rate: reached after the warm-up, falling to 0 along a cosine.
        optimizer: `sgd` with Nesterov momentum, or `adamw`.
        momentum: of `sgd`.
        weight_decay: of weights; biases and normalisation parameters (one dimension) have none.
        warmup: share of all steps, 0-1, in which the learning rate rises linearly from 0.
        clip_norm: gradients of a larger 2-norm are scaled down to it; None never does.
        precision: `fp32`, or `bf16` for autocast to bfloat16.
        keep: `best` keeps the epoch with the highest accuracy on `data.val` if there is one; `last` keeps the last
            and never looks at `data.val`.
    """

    epochs: int = 10
    lr: float = 0.05
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 0.05
    clip_norm: float | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    keep: Literal["best", "last"] = "best"

    def __post_init__(self) -> None:
        allowed = {
            "epochs": (self.epochs >= 1, "at least 1"),
            "lr": (0 < self.lr < math.inf, "above 0"),
            "optimizer": (self.optimizer in ("sgd", "adamw"), "sgd or adamw"),
            "momentum": (0 <= self.momentum < 1, "at least 0 and below 1"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "at least 0"),
            "warmup": (0 <= self.warmup < 1, "at least 0 and below 1"),
            "clip_norm": (self.clip_norm is None or self.clip_norm > 0, "above 0, or none"),
            "precision": (self.precision in ("fp32", "bf16"), "fp32 or bf16"),
            "keep": (self.keep in ("best", "last"), "best or last"),
        }
        for option, (good, words) in allowed.items():
            if not good:
                raise OptionError(f"training option {option!r} is {getattr(self, option)!r}, allowed: {words}")

    def learning_rate(self, progress: float) -> float:
        """The learning rate at a share `progress` of the run, 0-1: linear warm-up, then half a cosine to 0."""
        if progress < self.warmup:
            return self.lr * progress / self.warmup
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
