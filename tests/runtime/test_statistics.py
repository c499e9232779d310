"""Statistics of batch norms: means over batches, as numpy gives them, and nothing else changes."""

from __future__ import annotations

import numpy as np
import torch
from fxpress.runtime.training.statistics import reestimate_norms
from torch import nn

from fxpress import Data


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.9), nn.Flatten(), nn.Linear(36, 2)
    )


def batches(count: int = 5) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(8, 2, 3, 3) * (k + 1) + k, torch.zeros(8, dtype=torch.long)) for k in range(count)]


def test_plain_means_over_batches() -> None:
    module, data = network().eval(), batches()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    assert reestimate_norms(module, Data(train=data), 3) == 3
    seen = [module[0](inputs).detach().numpy() for inputs, _ in data[:3]]
    norm = module[1]
    assert np.allclose(norm.running_mean, np.mean([x.mean((0, 2, 3)) for x in seen], axis=0), rtol=1e-4, atol=1e-5)
    assert np.allclose(norm.running_var, np.mean([x.var((0, 2, 3), ddof=1) for x in seen], axis=0), rtol=1e-4)
    assert norm.momentum == 0.1
    assert not any(layer.training for layer in module.modules())
    others = {name for name in before if "running" not in name and "tracked" not in name}
    assert all(torch.equal(module.state_dict()[name], before[name]) for name in others)


def test_as_many_batches_as_there_are() -> None:
    assert reestimate_norms(network(), Data(train=batches(2)), 100) == 2


def test_nothing_to_do() -> None:
    module = network()
    before = module[1].running_mean.clone()
    assert reestimate_norms(module, Data(train=batches()), 0) == 0
    assert torch.equal(module[1].running_mean, before)
    assert reestimate_norms(nn.Linear(2, 2), Data(), 10) == 0  # no norms: data is not asked for
    assert reestimate_norms(nn.BatchNorm1d(2, track_running_stats=False), Data(), 10) == 0
