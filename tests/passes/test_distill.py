"""`distill` on a traced network: it learns, from whom it is told, and leaves all else alone."""

from __future__ import annotations

import copy

import pytest
import torch
from fxpress.ir.errors import DataError, OptionError, TrainingError
from fxpress.passes.train.distill import Distill
from torch import nn

import fxpress


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(54, 3)]
    return nn.Sequential(*layers).eval()


def batches(count: int = 8, seed: int = 0):
    """Which of the three rows of an image is the brightest."""
    inputs = torch.rand(count * 16, 1, 3, 3, generator=torch.Generator().manual_seed(seed))
    targets = inputs.sum((1, 3)).argmax(1)
    return list(zip((inputs * 4 - 2).split(16), targets.split(16), strict=True))


def agreement(one, two) -> float:
    with torch.no_grad():
        return float((torch.softmax(one, 1) - torch.softmax(two, 1)).abs().mean())


DATA = fxpress.Data(train=batches(), val=batches(2, seed=1))
EXAMPLE = torch.zeros(2, 1, 3, 3)


def test_learns_from_the_targets():
    options = {"loss": "cross-entropy", "epochs": 15, "lr": 0.1}
    model = network(0)
    before = copy.deepcopy(model.state_dict())
    compiled = fxpress.compile(model, [{"distill": options}], EXAMPLE, data=DATA)
    first, last = compiled.report["trace"], compiled.report["distill"]
    assert last.accuracy > max(0.85, first.accuracy + 0.2)
    assert last.semantics == "training"
    assert last.metrics["loss"][-1] < 0.5 * last.metrics["loss"][0]
    assert last.metrics["steps"] == 15 * 8
    assert max(last.metrics["val_accuracy"]) == last.metrics["val_accuracy"][last.metrics["kept_epoch"] - 1]
    assert last.accuracy == pytest.approx(max(last.metrics["val_accuracy"]))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not compiled.module.training


def test_learns_from_a_given_teacher():
    teacher = network(1)
    options = {"alpha": 1.0, "temperature": 1.0, "epochs": 30, "lr": 0.1, "weight_decay": 0.0, "keep": "last"}
    compiled = fxpress.compile(network(2), [{"distill": options}], EXAMPLE, data=DATA, teacher=teacher)
    inputs = torch.cat([x for x, _ in batches(2, seed=1)])
    assert agreement(compiled(inputs), teacher(inputs)) < 0.3 * agreement(network(2)(inputs), teacher(inputs))


def test_the_original_is_the_teacher_by_default():
    # at the start the student is the teacher: nothing to learn, and no step moves it far
    options = {"alpha": 1.0, "epochs": 1, "weight_decay": 0.0}
    folded = fxpress.compile(network(3), ["fold-batchnorm", {"distill": options}], EXAMPLE, data=DATA)
    inputs = batches()[0][0]
    assert folded.report["distill"].metrics["loss"][0] < 1e-6
    torch.testing.assert_close(folded(inputs), network(3)(inputs), rtol=1e-3, atol=1e-4)


def test_same_seed_same_weights():
    def weights(seed: int) -> torch.Tensor:
        shuffled = torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(*(torch.cat(part) for part in zip(*batches(), strict=True))),
            batch_size=16,
            shuffle=True,
        )
        data = fxpress.Data(train=shuffled)
        options = {"epochs": 1, "loss": "cross-entropy"}
        compiled = fxpress.compile(network(0), [{"distill": options}], EXAMPLE, data=data, seed=seed)
        return next(compiled.module.parameters()).detach()

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_what_may_be_missing_or_wrong():
    with pytest.raises(DataError, match="pass 'distill' needs data to train on, and none was given"):
        fxpress.compile(network(0), ["distill"], EXAMPLE)
    with pytest.raises(DataError, match=r"train loader .* is empty"):
        fxpress.compile(network(0), ["distill"], EXAMPLE, data=fxpress.Data(train=[]))
    with pytest.raises(DataError, match="a generator: it would be used up"):
        fxpress.compile(network(0), ["distill"], EXAMPLE, data=fxpress.Data(train=(b for b in batches())))
    with pytest.raises(OptionError, match=r"distill.*no option 'epoch'.*did you mean 'epochs'"):
        Distill(epoch=3)
    with pytest.raises(OptionError, match="option 'temperature': given 0"):
        Distill(temperature=0)
    options = {"lr": 1e30, "warmup": 0.0, "clip_norm": None, "loss": "cross-entropy"}
    with pytest.raises(TrainingError, match=r"distill.*the loss is .*learning rate.*Lower lr"):
        fxpress.compile(network(0), [{"distill": options}], EXAMPLE, data=DATA)


def test_a_teacher_with_other_classes():
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(9, 5))
    with pytest.raises(OptionError, match=r"teacher outputs of the student's shape \(16, 3\), given: \(16, 5\)"):
        fxpress.compile(network(0), ["distill"], EXAMPLE, data=DATA, teacher=teacher)
