"""Losses against scipy, the loop against hand-written steps, and everything that may go wrong."""

from __future__ import annotations

import copy
import io
import random

import numpy as np
import pytest
import torch
from fxpress.ir.errors import DataError, OptionError, TrainingError
from fxpress.runtime.data import Data, load_data
from fxpress.runtime.training import CrossEntropy, KnowledgeDistillation, Lesson, TrainSettings, train
from rich.console import Console
from scipy import special
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reference_kd(outputs, targets, teacher, temperature, alpha):
    """The formula in numpy and scipy, prediction by prediction."""
    z, v = (np.moveaxis(x.numpy(), 1, -1).reshape(-1, x.shape[1]) for x in (outputs, teacher))
    hard = -special.log_softmax(z, axis=1)[np.arange(len(z)), targets.numpy().ravel()].mean()
    soft = special.rel_entr(special.softmax(v / temperature, axis=1), special.softmax(z / temperature, axis=1))
    return (1 - alpha) * hard + alpha * temperature**2 * soft.sum(1).mean()


class TestLosses:
    @pytest.mark.parametrize(("temperature", "alpha"), [(1.0, 1.0), (4.0, 0.9), (0.5, 0.3), (20.0, 0.0)])
    @pytest.mark.parametrize("space", [(), (3, 2)])
    def test_distillation_against_scipy(self, temperature, alpha, space):
        outputs, teacher = 3 * draw(6, 5, *space), 3 * draw(6, 5, *space, seed=1)
        targets = torch.randint(5, (6, *space))
        loss = KnowledgeDistillation(temperature, alpha)(Lesson(outputs, targets, teacher))
        assert loss.item() == pytest.approx(reference_kd(outputs, targets, teacher, temperature, alpha), rel=1e-12)

    def test_gradients(self):
        outputs, teacher, targets = draw(4, 5).requires_grad_(), draw(4, 5, seed=1), torch.tensor([0, 4, 2, 2])
        for objective in (KnowledgeDistillation(3.0, 0.7), CrossEntropy(0.1)):
            assert torch.autograd.gradcheck(lambda z, f=objective: f(Lesson(z, targets, teacher)), (outputs,))

    def test_gradient_in_closed_form(self):
        outputs, teacher = draw(4, 5).requires_grad_(), draw(4, 5, seed=1)
        KnowledgeDistillation(3.0, 1.0)(Lesson(outputs, torch.zeros(4).long(), teacher)).backward()
        expected = 3.0 * (special.softmax(outputs.detach() / 3, axis=1) - special.softmax(teacher / 3, axis=1)) / 4
        np.testing.assert_allclose(outputs.grad.numpy(), expected, atol=1e-12)

    def test_zero_where_they_agree_and_finite_far_out(self):
        outputs = 1e4 * draw(4, 5)
        objective = KnowledgeDistillation(4.0, 1.0)
        assert objective(Lesson(outputs, torch.zeros(4).long(), outputs + 7)).item() == pytest.approx(0, abs=1e-9)
        assert torch.isfinite(objective(Lesson(outputs.bfloat16(), torch.zeros(4).long(), -outputs.bfloat16())))

    def test_label_smoothing(self):
        outputs, targets = draw(4, 5), torch.tensor([0, 1, 2, 3])
        smooth = np.full((4, 5), 0.1 / 5)
        smooth[np.arange(4), targets] += 0.9
        expected = -(smooth * special.log_softmax(outputs.numpy(), axis=1)).sum(1).mean()
        assert CrossEntropy(0.1)(Lesson(outputs, targets)).item() == pytest.approx(expected, rel=1e-12)

    def test_bad_options(self):
        with pytest.raises(OptionError, match=r"temperature 0.0 must be above 0"):
            KnowledgeDistillation(temperature=0.0)
        with pytest.raises(OptionError, match=r"alpha 1.5"):
            KnowledgeDistillation(alpha=1.5)
        with pytest.raises(OptionError, match=r"label_smoothing 1.0 is out of range"):
            CrossEntropy(1.0)
        with pytest.raises(OptionError, match=r"student's shape \(2, 3\), given: \(2, 4\)"):
            KnowledgeDistillation()(Lesson(torch.zeros(2, 3), torch.zeros(2).long(), torch.zeros(2, 4)))
        with pytest.raises(OptionError, match="given: none"):
            KnowledgeDistillation()(Lesson(torch.zeros(2, 3), torch.zeros(2).long()))


class TestSettings:
    def test_learning_rate(self):
        settings = TrainSettings(lr=2.0, warmup=0.2)
        found = [settings.learning_rate(p) for p in (0.0, 0.1, 0.2, 0.6, 1.0)]
        assert found == pytest.approx([0.0, 1.0, 2.0, 1.0, 0.0])
        assert TrainSettings(lr=2.0, warmup=0.0).learning_rate(0.0) == 2.0

    @pytest.mark.parametrize(
        "option", [{"epochs": 0}, {"lr": 0}, {"lr": float("nan")}, {"optimizer": "lion"}, {"momentum": 1},
                   {"warmup": 1}, {"weight_decay": -1}, {"clip_norm": 0}, {"precision": "fp8"}, {"keep": "all"}]
    )  # fmt: skip
    def test_bad_options(self, option):
        with pytest.raises(OptionError, match=f"training option '{next(iter(option))}' is"):
            TrainSettings(**option)

    def test_decay_spares_biases(self):
        optimizer = TrainSettings(weight_decay=0.1, optimizer="adamw").build_optimizer(nn.Linear(2, 3))
        assert [(g["weight_decay"], g["params"][0].ndim) for g in optimizer.param_groups] == [(0.1, 2), (0.0, 1)]
        with pytest.raises(TrainingError, match="no trainable parameter"):
            TrainSettings().build_optimizer(nn.ReLU())


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


def problem(count=96, seed=0):
    """Three classes that a small network can tell apart."""
    inputs = draw(count, 1, 2, 2, seed=seed).float()
    return inputs, inputs.flatten(1)[:, :3].argmax(1)


def batches(size=16, count=96, seed=0):
    return [(x, y) for x, y in zip(*(part.split(size) for part in problem(count, seed)), strict=True)]


class TestTrain:
    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    @pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
    def test_learns(self, optimizer, precision):
        lr = 0.1 if optimizer == "sgd" else 0.02
        student, settings = network(), TrainSettings(epochs=12, lr=lr, optimizer=optimizer, precision=precision)
        result = train(student, Data(train=batches(), val=batches(seed=1)), settings=settings)
        assert result.epochs[-1].loss < result.epochs[0].loss / 3
        assert result.epochs[result.kept].val_accuracy > 0.85
        assert result.steps == 72
        assert result.images_per_second > 0

    def test_equals_hand_written_steps(self):
        student, twin = nn.Linear(4, 3), nn.Linear(4, 3)
        twin.load_state_dict(student.state_dict())
        data = [(x.flatten(1), y) for x, y in batches()]
        settings = TrainSettings(epochs=2, lr=0.1, momentum=0.9, weight_decay=0.01, warmup=0.25, clip_norm=0.5)
        train(student, Data(train=data), settings=settings)
        velocity = {p: torch.zeros_like(p) for p in twin.parameters()}
        for step, (x, y) in enumerate(data * 2):
            loss = -twin(x).log_softmax(1)[range(len(y)), y].mean()
            grads = torch.autograd.grad(loss, list(velocity))
            scale = min(1.0, 0.5 / float(torch.cat([g.flatten() for g in grads]).norm()))
            progress = (step + 0.5) / 12
            lr = 0.1 * (progress / 0.25 if progress < 0.25 else 0.5 * (1 + np.cos(np.pi * (progress - 0.25) / 0.75)))
            with torch.no_grad():
                for p, g in zip(velocity, grads, strict=True):
                    g = g * scale + (0.01 * p if p.ndim > 1 else 0)
                    velocity[p] = 0.9 * velocity[p] + g
                    p -= lr * (g + 0.9 * velocity[p])
        for mine, theirs in zip(student.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)

    def test_same_seed_same_weights(self):
        def weights(seed):
            data = load_data("digits", limit=256, seed=1)
            torch.manual_seed(0)
            student = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Dropout(0.5), nn.Linear(16, 10))
            train(student, data, settings=TrainSettings(epochs=2), seed=seed)
            return student[1].weight

        assert torch.equal(weights(3), weights(3))
        assert not torch.equal(weights(3), weights(4))

    def test_leaves_modes_and_random_states_alone(self):
        student = network().eval()
        student[2].train()
        states = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tolist()
        train(student, Data(train=batches()), settings=TrainSettings(epochs=1))
        assert [layer.training for layer in student.modules()] == [False, False, False, True, False, False]
        assert float(student[2].running_mean.abs().sum()) > 0
        assert random.getstate() == states[0]
        assert torch.equal(torch.get_rng_state(), states[1])
        assert np.random.get_state()[1].tolist() == states[2]

    def test_distillation_pulls_towards_the_teacher_and_leaves_it_alone(self):
        teacher, student = network(1).train(), network(2)
        before = copy.deepcopy(teacher.state_dict())
        objective = KnowledgeDistillation(temperature=2.0, alpha=1.0)
        shuffled = [(x, torch.zeros_like(y)) for x, y in batches()]  # the targets say nothing
        settings = TrainSettings(epochs=30, lr=0.1, weight_decay=0)
        result = train(student, Data(train=shuffled), objective=objective, teacher=teacher, settings=settings)
        assert result.epochs[-1].loss < 0.05 * result.epochs[0].loss
        assert teacher.training
        assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
        assert all(p.grad is None for p in teacher.parameters())

    def test_the_best_epoch_is_kept(self):
        # the rate is far too high to stay where it once was good
        settings = TrainSettings(epochs=8, lr=3.0, warmup=0.0)
        student = network(5)
        result = train(student, Data(train=batches(), val=batches(seed=1)), settings=settings)
        scores = [epoch.val_accuracy for epoch in result.epochs]
        assert max(scores) == scores[result.kept] != min(scores)
        student.eval()
        inputs, targets = problem(seed=1)
        assert float((student(inputs).argmax(1) == targets).double().mean()) == pytest.approx(max(scores))
        last = train(
            network(5), Data(train=batches(), val=batches(seed=1)), settings=TrainSettings(epochs=2, keep="last")
        )
        assert last.kept == 1
        assert last.epochs[0].val_accuracy is None

    def test_a_loader_without_length(self):
        class Stream:
            def __iter__(self):
                return iter(batches())

        result = train(network(), Data(train=Stream()), settings=TrainSettings(epochs=3))
        assert result.steps == 18

    def test_loss_that_is_not_finite_restores_the_last_good_state(self):
        student, seen = network(), []

        class Breaking(CrossEntropy):
            def forward(self, lesson):
                seen.append(copy.deepcopy(student.state_dict()))
                loss = super().forward(lesson)
                return loss * float("nan") if len(seen) == 9 else loss

        text = r"the loss is nan at step 9 \(epoch 2, learning rate 0\.0\d+\); .*its state after epoch 1. Lower lr"
        with pytest.raises(TrainingError, match=text):
            train(student, Data(train=batches()), objective=Breaking(), settings=TrainSettings(epochs=3))
        for name, value in student.state_dict().items():  # the seventh step is the first of epoch 2
            if "running" not in name and "num_batches" not in name:
                assert torch.equal(value, seen[6][name])

    def test_divergence_in_the_first_epoch(self):
        student = network()
        before = copy.deepcopy(student.state_dict())
        settings = TrainSettings(epochs=1, lr=1e30, warmup=0.0)
        with pytest.raises(TrainingError, match="state before training"):
            train(student, Data(train=batches()), settings=settings)
        assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())

    def test_bad_loaders(self):
        settings = TrainSettings(epochs=2)
        with pytest.raises(DataError, match="training needs data to train on"):
            train(network(), Data(), settings=settings)
        with pytest.raises(DataError, match="is empty"):
            train(network(), Data(train=[]), settings=settings)
        with pytest.raises(DataError, match="a generator: it would be used up after the first of 2 epochs"):
            train(network(), Data(train=(b for b in batches())), settings=settings)
        with pytest.raises(DataError, match=r"list_iterator.*no batch on epoch 2: it is used up"):
            train(network(), Data(train=iter(batches())), settings=settings)
        with pytest.raises(DataError, match=r"batch 0 of train: target 7 is out of range, the network has 3 outputs"):
            train(network(), Data(train=[(x, y * 0 + 7) for x, y in batches()]), settings=settings)
        with pytest.raises(DataError, match=r"cannot take batch 0 of train \(inputs \(16, 1, 2, 3\)\)"):
            train(network(), Data(train=[(torch.zeros(16, 1, 2, 3), torch.zeros(16).long())]), settings=settings)
        with pytest.raises(DataError, match=r"cannot take batch 0 of train .*more than 1 value per channel"):
            train(network(), Data(train=batches(size=1)), settings=settings)

    def test_bad_teachers(self):
        student = network()
        with pytest.raises(OptionError, match="needs a teacher"):
            train(student, Data(train=batches()), objective=KnowledgeDistillation())
        with pytest.raises(OptionError, match="share parameters"):
            train(student, Data(train=batches()), objective=KnowledgeDistillation(), teacher=student)

    def test_the_bar_is_shown_on_terminals_only(self):
        texts = {}
        for terminal in (True, False):
            stream = io.StringIO()
            console = Console(file=stream, force_terminal=terminal, width=160)
            train(network(), Data(train=batches()), settings=TrainSettings(epochs=1), console=console, title="learning")
            texts[terminal] = stream.getvalue()
        assert texts[False] == ""
        for words in ("learning", "epoch 1/1", "loss", "accuracy", "images/s"):
            assert words in texts[True]


def test_a_torch_loader_as_it_is():
    loader = DataLoader(TensorDataset(*problem()), batch_size=16, shuffle=True)
    result = train(network(), Data(train=loader), settings=TrainSettings(epochs=2))
    assert result.steps == 12
