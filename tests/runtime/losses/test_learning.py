"""What the losses are for: after the same training, a student that learned scale factors compares classes better."""

from __future__ import annotations

import numpy as np
import torch
from fxpress.runtime.data import load_data
from fxpress.runtime.training import KnowledgeDistillation, ScaleFactor, TrainSettings, train
from fxpress.runtime.training.losses import rank_correlation, ratio_error
from torch import nn


def network(width: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


def test_scale_factors_teach_ratios_better_than_plain_distillation():
    data = load_data("digits", seed=0)
    inputs, targets = (torch.cat(part) for part in zip(*data.val, strict=True))
    teacher = network(64, 0)
    train(teacher, data, settings=TrainSettings(epochs=8, lr=0.05, keep="last"))
    scores = teacher.eval()(inputs).detach()

    def held_out(objective, seed):
        student = network(8, seed)
        settings = TrainSettings(epochs=4, lr=0.05, keep="last")
        train(student, data, objective=objective, teacher=teacher, settings=settings, seed=seed)
        found = student.eval()(inputs).detach()
        return ratio_error(found, scores, targets), rank_correlation(found, scores, targets)

    plain = np.array([held_out(KnowledgeDistillation(), seed) for seed in (1, 2, 3)])
    better = np.array([held_out(ScaleFactor(warmup_epochs=1), seed) for seed in (1, 2, 3)])
    assert (better[:, 0] < plain[:, 0]).all()
    assert (better[:, 1] > plain[:, 1]).all()
    assert better[:, 0].mean() < 0.9 * plain[:, 0].mean()
