"""reestimate-batchnorm: statistics become those of the data, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fxpress.ir.errors import DataError
from fxpress.runtime.data import Data
from torch import Tensor, nn

import fxpress


def network() -> nn.Module:
    layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5))
    return nn.Sequential(*layers).eval()


def batches(count: int = 4) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(6, 3, 6, 6), torch.zeros(6, dtype=torch.int64)) for _ in range(count)]


def compiled(net: nn.Module, data: list[Any], **options: Any) -> Any:
    passes = [{"reestimate-batchnorm": options}] if options else ["reestimate-batchnorm"]
    return fxpress.compile(net, passes, torch.randn(2, 3, 6, 6), data=Data(calibration=data))


def test_statistics_are_means_over_the_batches() -> None:
    net, data = network(), batches()
    result = compiled(net, data)
    found = result.module.get_submodule("1")
    responses = [net[0](x).detach() for x, _ in data]  # type: ignore[index]
    torch.testing.assert_close(found.running_mean, torch.stack([y.mean((0, 2, 3)) for y in responses]).mean(0))
    torch.testing.assert_close(found.running_var, torch.stack([y.var((0, 2, 3)) for y in responses]).mean(0))
    assert result.report["reestimate-batchnorm"].notes == ["statistics of 1 batch norms from 4 batches"]
    assert result.report["reestimate-batchnorm"].distance > 0


def test_everything_else_stays() -> None:
    net = network()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    after = compiled(net, batches()).module.state_dict()
    changed = {name for name in before if not torch.equal(after[name], before[name])}
    assert changed == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_no_more_batches_than_asked_for() -> None:
    assert compiled(network(), batches(), batches=2).report.rows[-1].notes == [
        "statistics of 1 batch norms from 2 batches"
    ]


def test_without_batch_norms_nothing_happens() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 5)).eval()
    result = compiled(net, batches())
    assert result.report.rows[-1].notes == ["no batch norm keeps statistics"]
    assert result.report.rows[-1].distance == 0


def test_it_needs_calibration_data() -> None:
    with pytest.raises(DataError, match="'reestimate-batchnorm' needs data to calibrate with"):
        fxpress.compile(network(), ["reestimate-batchnorm"], torch.randn(2, 3, 6, 6), data=Data(val=batches()))
