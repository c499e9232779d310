"""Accuracy, loss and latency against numbers computed by other means."""

from __future__ import annotations

import time

import pytest
import torch
from fxpress.ir.errors import DataError, ModelError, OptionError
from fxpress.runtime.measure import Latency, accuracy, evaluate, latency_ratio
from torch import nn


class Fixed(nn.Module):
    """Gives its input back as class scores."""

    def forward(self, scores):
        return scores


def scores(count, classes=3):
    return torch.randn(count, classes, generator=torch.Generator().manual_seed(count))


class TestEvaluate:
    def test_counts_over_uneven_batches(self):
        batches = [(scores(5), torch.tensor([0, 1, 2, 0, 1])), (scores(2), torch.tensor([2, 2]))]
        found = evaluate(Fixed(), batches)
        logits, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
        likelihood = logits.double().softmax(1)[torch.arange(7), targets]
        assert found.images == found.targets == 7
        assert found.accuracy == pytest.approx((logits.argmax(1) == targets).double().mean().item())
        assert found.loss == pytest.approx(-likelihood.log().mean().item(), rel=1e-6)
        assert accuracy(Fixed(), batches) == found.accuracy

    def test_maps_of_targets_count_pixels(self):
        found = evaluate(Fixed(), [(torch.randn(2, 3, 4, 5), torch.zeros(2, 4, 5).long())])
        assert (found.images, found.targets) == (2, 40)

    @pytest.mark.parametrize("wrap", [lambda x: (x, None), lambda x: {"out": x}, lambda x: {"aux": None, "logits": x}])
    def test_class_scores_among_several_outputs(self, wrap):
        network = Fixed()
        network.forward = wrap
        batch = (torch.eye(3), torch.tensor([0, 1, 2]))
        assert accuracy(network, [batch]) == 1.0

    def test_runs_in_eval_mode_and_restores_every_mode(self):
        network = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm1d(3), nn.Sequential(nn.BatchNorm1d(3)))
        network[2].eval()
        batches = [(torch.randn(8, 3), torch.zeros(8).long())] * 2
        assert evaluate(network, batches).loss == evaluate(network, batches).loss
        assert [network.training, network[0].training, network[2].training] == [True, True, False]
        assert torch.equal(network[1].running_mean, torch.zeros(3))

    def test_bad_outputs_and_inputs(self):
        network = nn.Linear(3, 3)
        network.weight.data[0, 0] = float("nan")
        with pytest.raises(ModelError, match="outputs on batch 0 of val are NaN"):
            evaluate(network, [(scores(2), torch.tensor([0, 1]))])
        with pytest.raises(DataError, match=r"cannot take batch 0 of val .inputs .2, 3.."):
            evaluate(nn.Linear(4, 3), [(scores(2), torch.tensor([0, 1]))])
        with pytest.raises(DataError, match=r"val loader .list. is empty"):
            evaluate(Fixed(), [])
        with pytest.raises(ModelError, match="holds no class scores"):
            evaluate(nn.Flatten(0), [(scores(2), torch.tensor([0, 1]))])


class Worker(nn.Module):
    """Takes a given CPU time, whatever else the machine does."""

    def __init__(self, ms):
        super().__init__()
        self.ms, self.calls = ms, 0

    def forward(self, x):
        self.calls += 1
        assert not self.training
        assert torch.get_num_threads() == 1
        end = time.process_time() + self.ms / 1e3
        while time.process_time() < end:
            pass
        return x


class TestLatency:
    def test_ratio_and_medians(self):
        slow, fast = Worker(8.0), Worker(2.0)
        found = latency_ratio(fast, slow, torch.zeros(4, 1), rounds=5)
        assert 0.24 < found.ratio < 0.3
        assert found.ratio_low <= found.ratio <= found.ratio_high
        assert 2 <= found.candidate_ms < found.reference_ms
        assert found.reference_ms >= 8
        assert (found.batch, found.rounds, found.threads, found.clock) == (4, 5, 1, "cpu")
        assert slow.training
        assert fast.calls > slow.calls  # the quick one is called more often per round

    def test_threads_come_back(self):
        before = torch.get_num_threads()
        latency_ratio(Worker(0.1), Worker(0.1), torch.zeros(1, 1), rounds=1)
        assert torch.get_num_threads() == before

    def test_wall_time_counts_waiting(self):
        class Waiter(nn.Module):
            def forward(self, x):
                time.sleep(0.004)

        wall = latency_ratio(Waiter(), Waiter(), torch.zeros(1, 1), rounds=3, clock="wall")
        cpu = latency_ratio(Waiter(), Waiter(), torch.zeros(1, 1), rounds=3)
        assert cpu.candidate_ms < 2 < 4 <= wall.candidate_ms
        two = latency_ratio(nn.ReLU(), nn.ReLU(), torch.zeros(1, 1), rounds=1, threads=2, round_ms=0.1)
        assert (two.threads, two.clock) == (2, "wall")

    def test_text(self):
        text = str(Latency(0.5, 0.49, 0.52, 1.0, 0.1, 2.0, 0.1, 64, 21, 1, "cpu"))
        assert text == "0.500 [0.490, 0.520] of the time: 1.00 against 2.00 ms, batch 64, 1 thread, cpu time"

    def test_bad_numbers(self):
        with pytest.raises(OptionError, match="at least 1 round and 1 thread, not 0 and 1"):
            latency_ratio(Fixed(), Fixed(), torch.zeros(1), rounds=0)
