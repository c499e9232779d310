"""The parts of the driver: schedules, mixing, averages, accumulation, patience, the teacher's cache, the log."""

from __future__ import annotations

import copy
import csv
import io
import time

import numpy as np
import pytest
import torch
from fxpress.ir.errors import OptionError
from fxpress.runtime.data import Data
from fxpress.runtime.data.images import EpochSampler
from fxpress.runtime.training import Callback, CrossEntropy, KnowledgeDistillation, Objective, TrainSettings, train
from fxpress.runtime.training.ema import MovingAverage
from fxpress.runtime.training.log import Log
from fxpress.runtime.training.mixing import Mixing, hard_targets
from fxpress.runtime.training.teacher_cache import TeacherCache
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def images(count: int = 24, seed: int = 0):
    inputs = torch.randn(count, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
    return inputs, inputs[:, 0, 0, :3].argmax(1)


def batches(size: int = 8, count: int = 24, seed: int = 0):
    return list(zip(*(part.split(size) for part in images(count, seed)), strict=True))


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


class TestSchedule:
    def test_step(self):
        found = TrainSettings(epochs=10, lr=1.0, schedule="step", milestones=(4, 9), warmup=0.0)
        assert [found.learning_rate(p) for p in (0.0, 0.39, 0.4, 0.89, 0.9, 1.0)] == pytest.approx(
            [1.0, 1.0, 0.1, 0.1, 0.01, 0.01]
        )
        usual = TrainSettings(epochs=8, lr=1.0, schedule="step", gamma=0.5, warmup=0.0)
        assert [usual.learning_rate(p) for p in (0.4, 0.6, 0.8)] == pytest.approx([1.0, 0.5, 0.25])

    @given(st.sampled_from(["cosine", "step", "constant"]), st.floats(0, 0.9), st.floats(0, 1))
    def test_never_above_the_highest_and_rising_in_the_warm_up(self, schedule, warmup, progress):
        found = TrainSettings(lr=2.0, schedule=schedule, warmup=warmup)
        assert 0 <= found.learning_rate(progress) <= 2.0 + 1e-12
        if progress < warmup:
            assert found.learning_rate(progress) == pytest.approx(2.0 * progress / warmup)
        elif schedule == "constant":
            assert found.learning_rate(progress) == 2.0

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"schedule": "linear"}, "'schedule' is 'linear', allowed: cosine, step or constant"),
            ({"schedule": "step", "milestones": (3, 2)}, "'milestones' is"),
            ({"schedule": "step", "milestones": (12,)}, "below the 10 epochs"),
            ({"milestones": (3,)}, "no meaning for schedule: cosine"),
            ({"gamma": 0.0}, "'gamma'"),
            ({"accumulate": 0}, "'accumulate' is 0, allowed: at least 1"),
            ({"ema": 1.0}, "'ema'"),
            ({"mixup": -0.1}, "'mixup'"),
            ({"patience": 0}, "'patience' is 0, allowed: at least 1, or none"),
            ({"patience": 2, "keep": "last"}, "'patience' looks at data.val"),
            ({"cache_teacher": True, "cutmix": 1.0}, "mixup and cutmix change them"),
            ({"checkpoint_every": 0}, "'checkpoint_every'"),
        ],
    )
    def test_bad_options(self, options, words):
        with pytest.raises(OptionError, match=words):
            TrainSettings(**options)


class Spy(Objective):
    """Cross entropy that keeps what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.lessons: list = []
        self.inner = CrossEntropy(0.1)

    def forward(self, lesson):
        self.lessons.append(lesson)
        return self.inner(lesson)


class TestMixing:
    @given(st.floats(0.1, 2), st.booleans(), st.booleans(), st.integers(0, 1000))
    @settings(deadline=None, max_examples=25)
    def test_targets_are_the_shares_of_the_images(self, alpha, mixup, cutmix, seed):
        if not mixup and not cutmix:
            return
        torch.manual_seed(seed)
        mixing = Mixing(TrainSettings(mixup=alpha * mixup, cutmix=alpha * cutmix))
        mixing.build(6)
        # image k is constant k: what share of it is left can be read off
        inputs = torch.arange(6.0)[:, None, None, None].expand(6, 1, 8, 8).contiguous()
        mixed, targets = mixing((inputs, torch.arange(6)), "batch 0")
        assert mixed.shape == inputs.shape
        assert targets.shape == (6, 6)
        torch.testing.assert_close(targets.sum(1), torch.ones(6))
        torch.testing.assert_close(mixed.mean((1, 2, 3)), targets @ torch.arange(6.0), atol=1e-4, rtol=1e-4)
        assert torch.equal(hard_targets(targets), targets.argmax(1))

    def test_the_run_learns_from_mixed_targets_and_counts_the_larger_share(self):
        spy = Spy()
        result = train(network(), Data(train=batches()), objective=spy, settings=TrainSettings(epochs=2, mixup=0.4))
        assert all(lesson.targets.shape == (8, 3) for lesson in spy.lessons)
        assert any(bool((lesson.targets.amax(1) < 0.999).any()) for lesson in spy.lessons)
        right = sum(float((one.outputs.argmax(1) == one.targets.argmax(1)).sum()) for one in spy.lessons[:3])
        assert result.epochs[0].accuracy == right / 24

    def test_only_images_can_be_mixed(self):
        vectors = [(x.flatten(1), y) for x, y in batches()]
        with pytest.raises(OptionError, match=r"need images \(N, C, H, W\).*batch 0 of train has inputs \(8, 16\)"):
            train(nn.Linear(16, 3), Data(train=vectors), settings=TrainSettings(epochs=1, mixup=0.1))


class TestAverage:
    def test_against_the_recurrence(self):
        module = nn.BatchNorm1d(2)
        average, expected = MovingAverage(module, 0.9), np.ones(2)
        for step in range(1, 40):
            with torch.no_grad():
                module.weight.fill_(step)
                module.num_batches_tracked.fill_(step)
            average.update()
            decay = min(0.9, (1 + step) / (10 + step))
            expected = decay * expected + (1 - decay) * step
        np.testing.assert_allclose(average.average["weight"].numpy(), expected, rtol=1e-5)
        assert int(average.average["num_batches_tracked"]) == 39
        with average.applied():
            np.testing.assert_allclose(module.weight.detach().numpy(), expected, rtol=1e-5)
        assert float(module.weight.detach()[0]) == 39.0

    @pytest.mark.parametrize("keep", ["best", "last"])
    def test_it_is_what_is_evaluated_and_kept(self, keep):
        seen: list[dict] = []

        class Follow(Callback):
            def after_step(self, lr, epoch):
                seen.append(copy.deepcopy(student.state_dict()))

        student = network()
        expected = {name: value.double() for name, value in copy.deepcopy(student.state_dict()).items()}
        options = TrainSettings(epochs=2, ema=0.8, keep=keep, lr=0.1)
        result = train(student, Data(train=batches(), val=batches(seed=1)), settings=options, callbacks=[Follow()])
        scores = []
        for step, state in enumerate(seen, start=1):
            decay = min(0.8, (1 + step) / (10 + step))
            expected = {name: decay * expected[name] + (1 - decay) * value.double() for name, value in state.items()}
            if step % 3 == 0:
                scores.append((copy.deepcopy(expected), step))
        mine = student.state_dict()
        for name, value in scores[result.kept][0].items():
            if value.is_floating_point() and "num_batches" not in name:
                torch.testing.assert_close(mine[name].double(), value, rtol=1e-4, atol=1e-5)
        if keep == "best":
            student.eval()
            inputs, targets = images(seed=1)
            found = float((student(inputs).argmax(1) == targets).double().mean())
            assert found == pytest.approx(result.epochs[result.kept].val_accuracy)


def test_accumulated_batches_are_one_large_batch():
    """Without batch statistics, and with a last group that is smaller."""

    def weights(size, accumulate):
        torch.manual_seed(0)
        student = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
        options = TrainSettings(epochs=2, lr=0.2, accumulate=accumulate, clip_norm=0.3)
        result = train(student, Data(train=batches(size, 40)), settings=options)
        return student[1].weight.detach(), result

    large, one = weights(16, 1)
    small, two = weights(8, 2)
    torch.testing.assert_close(small, large, rtol=1e-5, atol=1e-6)
    assert one.steps == two.steps == 6
    assert two.epochs[1].loss == pytest.approx(one.epochs[1].loss, rel=0.1)  # means over batches of unlike size


class TestPatience:
    def test_ends_without_progress(self):
        options = TrainSettings(epochs=30, lr=1e-9, patience=3)
        result = train(network(), Data(train=batches(), val=batches(seed=1)), settings=options)
        assert len(result.epochs) == 4
        assert result.steps == 12

    def test_needs_something_to_judge_by(self):
        with pytest.raises(OptionError, match=r"patience needs images to judge .*Data\(val=...\)"):
            train(network(), Data(train=batches()), settings=TrainSettings(patience=1))


class Counting(nn.Module):
    """A teacher that counts the images that it is asked about."""

    def __init__(self, chance: float = 0.0) -> None:
        super().__init__()
        self.inner, self.asked, self.chance = network(3), 0, chance

    def forward(self, x):
        self.asked += len(x)
        return self.inner(x) + self.chance * torch.rand(len(x), 3)


class TestTeacherCache:
    def loader(self, **options):
        return DataLoader(TensorDataset(*images(40)), batch_size=8, **options)

    def learn(self, loader, teacher, epochs=4, **options):
        student = network()
        options = TrainSettings(epochs=epochs, **{"cache_teacher": True, **options})
        result = train(
            student, Data(train=loader), objective=KnowledgeDistillation(), teacher=teacher, settings=options
        )
        return student, result

    def test_asks_once_per_image_and_learns_the_same(self):
        teacher = Counting()
        cached, result = self.learn(self.loader(sampler=EpochSampler(40, 1)), teacher)
        plain, other = self.learn(self.loader(sampler=EpochSampler(40, 1)), Counting(), cache_teacher=False)
        for name, value in cached.state_dict().items():
            torch.testing.assert_close(value, plain.state_dict()[name], rtol=1e-3, atol=1e-4)
        report = result.teacher_cache
        assert other.teacher_cache is None
        assert (report.images, report.asked, report.hits, report.full) == (40, 40, 120, False)
        assert report.size_bytes == 40 * (150 + 3 * 4)
        assert teacher.asked == 40 + 3 * 8  # one batch per later epoch is asked again, to compare

    def test_stops_growing_at_its_limit(self):
        teacher = Counting()
        _, result = self.learn(self.loader(), teacher, cache_limit_bytes=10 * 162 + 161)
        report = result.teacher_cache
        assert (report.images, report.full) == (10, True)
        assert report.size_bytes == 10 * 162
        assert report.hits == 3 * 10

    def test_inputs_that_change_are_an_error(self):
        class Changing:
            def __iter__(self):
                return iter([(x + torch.rand(()), y) for x, y in batches()])

        text = r"the same in every epoch: of the first 8 images of epoch 2, 8 were not there in epoch 1\. Take a loader"
        with pytest.raises(OptionError, match=text):
            self.learn(Changing(), Counting())

    def test_left_out_images_are_no_error(self):
        loader = DataLoader(TensorDataset(*images(46)), batch_size=8, drop_last=True, sampler=EpochSampler(46, 0))
        assert self.learn(loader, Counting(), epochs=6)[1].teacher_cache.images > 40

    def test_a_teacher_that_draws_random_numbers_is_an_error(self):
        with pytest.raises(OptionError, match="the teacher's outputs on the same images differ by"):
            self.learn(self.loader(), Counting(chance=1.0))

    def test_what_cannot_be_cached(self):
        from fxpress.runtime.training import Taps
        from fxpress.runtime.training.losses import AttentionTransfer

        options = TrainSettings(cache_teacher=True)
        with pytest.raises(OptionError, match="asks no teacher"):
            train(network(), Data(train=batches()), settings=options)
        with pytest.raises(OptionError, match="outputs and not its features"):
            train(
                network(), Data(train=batches()), objective=AttentionTransfer(), teacher=network(1), settings=options,
                taps=Taps(["2"], ["2"]),
            )  # fmt: skip
        with pytest.raises(OptionError, match="compares features and no places were given"):
            train(network(), Data(train=batches()), objective=AttentionTransfer(), teacher=network(1))

    @given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6), min_size=1, max_size=8), st.integers(1, 9))
    @settings(deadline=None, max_examples=30)
    def test_always_the_teachers_answer(self, asked, limit):
        cache = TeacherCache(limit * (150 + 4))
        for numbers in asked:
            inputs = torch.tensor(numbers, dtype=torch.float32)[:, None]
            outputs = cache.ask((inputs, inputs), lambda pair: 2 * pair[0] + pair[1], 0)
            assert torch.equal(outputs, 3 * inputs)
        assert len(cache.keys) == min(limit, len({number for numbers in asked for number in numbers}))
        again = TeacherCache(limit * (150 + 4))
        again.load_state_dict(cache.state_dict(), len(cache.keys))
        assert list(again.keys.items()) == list(cache.keys.items())
        assert torch.equal(again.values, cache.values[: len(cache.keys)])


class TestLog:
    def row(self, step, loss=1.0):
        return {"step": step, "epoch": step / 4, "lr": 0.1, "loss": loss, "accuracy": 0.5, "images_per_second": 9.0}

    def events(self, folder):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        found = EventAccumulator(str(folder))
        found.Reload()
        return {tag: [(e.step, round(e.value, 4)) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}

    def test_a_run(self, tmp_path):
        options = TrainSettings(epochs=3, log_every=2)
        result = train(network(), Data(train=batches(), val=batches(seed=1)), settings=options, log=tmp_path / "log")
        rows = list(csv.DictReader((tmp_path / "log" / "epochs.csv").open()))
        assert [int(row["step"]) for row in rows] == [3, 6, 9]
        for row, epoch in zip(rows, result.epochs, strict=True):
            numbers = (epoch.loss, epoch.accuracy, epoch.val_loss, epoch.val_accuracy)
            assert tuple(float(row[name]) for name in ("loss", "accuracy", "val_loss", "val_accuracy")) == numbers
        steps = list(csv.DictReader((tmp_path / "log" / "steps.csv").open()))
        assert [int(row["step"]) for row in steps] == [2, 4, 6, 8]
        assert float(steps[0]["lr"]) == pytest.approx(options.learning_rate(1.5 / 9))
        events = self.events(tmp_path / "log")
        assert [step for step, _ in events["train/loss"]] == [2, 4, 6, 8]
        assert events["val/accuracy"] == [(3 * k + 3, round(e.val_accuracy, 4)) for k, e in enumerate(result.epochs)]

    def test_goes_on_without_doubles(self, tmp_path):
        first = Log(tmp_path, 0, 0)
        for step in (1, 2, 3, 4):
            first.step(self.row(step))
        first.close()
        with (tmp_path / "steps.csv").open("a") as stream:
            stream.write("5,1.25,0.")  # killed while writing
        second_began = int(time.time())
        while int(time.time()) == second_began:  # TensorBoard orders files by the second in their names
            time.sleep(0.02)
        second = Log(tmp_path, 2, 0)
        second.step(self.row(3, loss=2.0))
        second.close()
        rows = list(csv.DictReader((tmp_path / "steps.csv").open()))
        assert [(int(row["step"]), float(row["loss"])) for row in rows] == [(1, 1.0), (2, 1.0), (3, 2.0)]
        assert self.events(tmp_path)["train/loss"] == [(1, 1.0), (2, 1.0), (3, 2.0)]
        Log(tmp_path, 0, 0).close()
        assert (tmp_path / "steps.csv").read_text().splitlines() == ["step,epoch,lr,loss,accuracy,images_per_second"]

    def test_a_folder_that_cannot_be_made(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(OptionError, match=r"the log folder .* cannot be made"):
            Log(tmp_path / "file", 0, 0)


def test_the_bar_says_where_a_run_was_taken_up(tmp_path):
    class Break(Callback):
        def after_step(self, lr, epoch):
            if epoch > 1:
                raise InterruptedError

    options, data = TrainSettings(epochs=2), Data(train=batches())
    with pytest.raises(InterruptedError):
        train(network(), data, settings=options, callbacks=[Break()], checkpoints=tmp_path)
    Break.after_step = Callback.after_step
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=120)
    train(network(), data, settings=options, callbacks=[Break()], checkpoints=tmp_path, console=console)
    assert "epoch 2/2" in stream.getvalue()
    assert "epoch 1/2" not in stream.getvalue()
