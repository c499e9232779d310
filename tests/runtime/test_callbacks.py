"""Callbacks: when they are called, with what, and how their parameter groups are trained."""

from __future__ import annotations

import pytest
import torch
from fxpress.runtime.data import Data
from fxpress.runtime.training import Callback, Lesson, Objective, Taps, TrainSettings, train
from torch import nn

INPUTS = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
BATCHES = [(x, x[:, :3].argmax(1)) for x in INPUTS.split(8)]


class Recorder(Callback):
    def __init__(self, stop_after: int = 99) -> None:
        self.calls, self.stop_after = [], stop_after

    def before_epoch(self, epoch):
        self.calls.append(("before", epoch))

    def after_step(self, lr, epoch):
        self.calls.append(("step", round(lr, 6), epoch))

    def after_epoch(self, result):
        self.calls.append(("after", result.loss))
        return sum(call[0] == "after" for call in self.calls) >= self.stop_after


def test_the_order_of_calls_and_what_they_are_told():
    recorder, settings = Recorder(), TrainSettings(epochs=2, lr=0.1, warmup=0.25)
    result = train(nn.Linear(4, 3), Data(train=BATCHES), settings=settings, callbacks=[recorder])
    assert [call[0] for call in recorder.calls] == ["before", *["step"] * 4, "after"] * 2
    steps = [call for call in recorder.calls if call[0] == "step"]
    assert [epoch for _, _, epoch in steps] == [0.125 + k / 4 for k in range(8)]
    assert [lr for _, lr, _ in steps] == [round(settings.learning_rate((k + 0.5) / 8), 6) for k in range(8)]
    assert [call[1] for call in recorder.calls if call[0] == "after"] == [epoch.loss for epoch in result.epochs]


def test_a_callback_ends_the_run_and_all_hear_of_it():
    first, second = Recorder(stop_after=2), Recorder()
    settings = TrainSettings(epochs=5)
    result = train(nn.Linear(4, 3), Data(train=BATCHES), settings=settings, callbacks=[first, second])
    assert len(result.epochs) == 2
    assert result.steps == 8
    assert result.kept == 1
    assert first.calls == second.calls


def test_parameters_of_a_group_have_their_own_rate_and_decay():
    class Slow(Callback):
        def parameter_groups(self, student):
            return [{"params": [student.bias], "lr_scale": 0.5}, {"params": [student.weight], "weight_decay": 0.5}]

    student = nn.Linear(4, 3)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    x, y = BATCHES[0]
    loss = nn.functional.cross_entropy(student(x), y)
    grads = dict(zip(("weight", "bias"), torch.autograd.grad(loss, [student.weight, student.bias]), strict=True))
    settings = TrainSettings(epochs=1, lr=0.1, warmup=0.0, momentum=0.0, weight_decay=9.0)
    lr = settings.learning_rate(0.5)
    train(student, Data(train=[(x, y)]), settings=settings, callbacks=[Slow()])
    weight = before["weight"] - lr * (grads["weight"] + 0.5 * before["weight"])
    torch.testing.assert_close(student.weight.detach(), weight)
    torch.testing.assert_close(student.bias.detach(), before["bias"] - 0.5 * lr * grads["bias"])


class FeatureDistance(Objective):
    """A hint through an adapter that learns along."""

    needs_teacher = True

    def __init__(self):
        super().__init__()
        self.adapter = nn.Linear(5, 6)
        self.seen = []

    def forward(self, lesson: Lesson) -> torch.Tensor:
        (mine,), (theirs,) = lesson.features, lesson.teacher_features
        self.seen.append((mine.requires_grad, theirs.requires_grad))
        return (self.adapter(mine) - theirs).square().mean()


def test_taps_fill_the_features_and_the_objective_learns_along():
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    teacher = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    objective = FeatureDistance()
    before = objective.adapter.weight.detach().clone()
    settings, taps = TrainSettings(epochs=20, lr=0.1, weight_decay=0), Taps(["1"], ["1"])
    result = train(student, Data(train=BATCHES), objective=objective, teacher=teacher, settings=settings, taps=taps)
    assert result.epochs[-1].loss < 0.5 * result.epochs[0].loss
    assert not torch.equal(objective.adapter.weight, before)
    assert set(objective.seen) == {(True, False)}
    assert student(INPUTS).shape == (32, 3)


@pytest.mark.parametrize("place", ["7", "0.weight"])
def test_taps_that_are_not_there(place):
    from fxpress.ir.errors import OptionError

    with pytest.raises(OptionError, match=f"no module '{place}'"):
        train(nn.Sequential(nn.Linear(4, 3)), Data(train=BATCHES), taps=Taps([place], ["0"]))
