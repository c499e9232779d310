"""A run that is killed at any moment and taken up again ends with the very weights of one that was not."""

from __future__ import annotations

import csv
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from fxpress.ir.errors import ArtifactError, DataError, OptionError, TrainingError
from fxpress.runtime.data import Data
from fxpress.runtime.data.images import EpochSampler
from fxpress.runtime.training import Callback, CrossEntropy, KnowledgeDistillation, TrainSettings, train
from fxpress.runtime.training.log import Log
from torch import nn
from torch.utils.data import DataLoader, Dataset

SCRIPT = """
import random, sys, time
from pathlib import Path
import numpy as np, torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from fxpress.runtime.data import Data
from fxpress.runtime.training import KnowledgeDistillation, TrainSettings, train

class Augmented(Dataset):
    '''Draws from all three generators; slow enough to be killed in the middle.'''
    def __init__(self, pause):
        self.images = torch.randn(72, 1, 4, 4, generator=torch.Generator().manual_seed(0))
        self.pause = pause
    def __len__(self):
        return len(self.images)
    def __getitem__(self, index):
        time.sleep(self.pause)
        image = self.images[index]
        noise = torch.randn(()) + random.random() + float(np.random.rand())
        return image.roll(random.randrange(3), 1) + 0.1 * noise, int(image[0, 0, :3].argmax())

def network(seed):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(24, 3)]
    return nn.Sequential(*layers)

def run(folder, pause=0.0):
    torch.set_num_threads(1)
    student = network(1)
    # shuffled by the global generator, and a step of two batches
    data = Data(train=DataLoader(Augmented(pause), batch_size=8, shuffle=True))
    settings = TrainSettings(epochs=4, lr=0.1, accumulate=2, mixup=0.4, ema=0.9, checkpoint_every=2, log_every=1)
    result = train(student, data, objective=KnowledgeDistillation(), teacher=network(2), settings=settings, seed=5,
                   checkpoints=folder / "run", log=folder / "log")
    return student, result

if __name__ == "__main__":
    run(Path(sys.argv[1]), pause=0.002)
"""


def script() -> dict:
    names: dict = {"__name__": "script"}
    exec(SCRIPT, names)  # noqa: S102 - the text above
    return names


def same(one: nn.Module, two: nn.Module) -> None:
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), name


def kill_after_a_checkpoint(folder: Path, seconds: float) -> bool:
    """Start the script, kill it with SIGKILL; False if it was faster than that."""
    (folder / "script.py").write_text(SCRIPT)
    before = set(folder.glob("run/checkpoint*"))
    child = subprocess.Popen([sys.executable, str(folder / "script.py"), str(folder)], stderr=subprocess.PIPE)
    while child.poll() is None and set(folder.glob("run/checkpoint*")) <= before:
        time.sleep(0.005)
    time.sleep(seconds)
    child.kill()
    _, errors = child.communicate()
    assert child.returncode in (0, -9), errors.decode()
    return child.returncode == -9


def steps_of(table: Path) -> list[int]:
    return [int(row["step"]) for row in csv.DictReader(table.open())]


@pytest.mark.parametrize("kills", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_killed_at_random_moments(tmp_path, kills):
    whole, result = script()["run"](tmp_path / "whole")
    folder, chance = tmp_path / "killed", random.Random()
    folder.mkdir()
    killed = [kill_after_a_checkpoint(folder, chance.uniform(0, 0.3)) for _ in range(kills)]
    assert any(killed), "the machine was too fast for the test"
    resumed, again = script()["run"](folder)
    same(whole, resumed)
    assert again.epochs == result.epochs
    assert (again.steps, again.kept) == (result.steps, result.kept)
    # the log goes on: every step once, and the numbers of the uninterrupted run
    for table, ignored in (("steps", "images_per_second"), ("epochs", "seconds")):
        files = [place / "log" / f"{table}.csv" for place in (tmp_path / "whole", folder)]
        assert steps_of(files[1]) == steps_of(files[0])
        rows = [list(csv.DictReader(file.open())) for file in files]
        for one, two in zip(*rows, strict=True):
            assert {k: v for k, v in one.items() if k != ignored} == {k: v for k, v in two.items() if k != ignored}


class Interrupt(Exception):
    pass


@pytest.mark.parametrize("moment", ["behind the row", "before the row"])
def test_killed_at_the_end_of_an_epoch(tmp_path, monkeypatch, moment):
    """The checkpoint of step 10, the last of epoch 2, is there, that of the epoch's end is not: they have one step."""
    script()["run"](tmp_path / "whole")
    write = Log.epoch

    def break_off(log, row):
        if row["epoch"] == 1 or moment == "behind the row":
            write(log, row)
        if row["epoch"] == 2:
            raise Interrupt

    with monkeypatch.context() as patch:
        patch.setattr(Log, "epoch", break_off)
        with pytest.raises(Interrupt):
            script()["run"](tmp_path / "killed")
    script()["run"](tmp_path / "killed")
    for table in ("steps", "epochs"):
        whole, resumed = (steps_of(tmp_path / place / "log" / f"{table}.csv") for place in ("whole", "killed"))
        assert resumed == whole


class StopAt(Callback):
    """Breaks off behind a step, as a kill would; counts what it is told, which is part of the checkpoint."""

    def __init__(self, step: int | None) -> None:
        self.step, self.calls = step, 0
        self.trace = torch.zeros(3)

    def before_epoch(self, epoch):
        self.trace[0] += random.random() + epoch

    def after_step(self, lr, epoch):
        self.calls += 1
        self.trace[1] += lr
        if self.calls == self.step:
            raise Interrupt

    def after_epoch(self, result):
        self.trace[2] += result.loss
        return False

    def state_dict(self):
        return {"calls": self.calls, "trace": self.trace, "nested": ({"a": None}, [1.5, "text"])}

    def load_state_dict(self, state):
        assert state["nested"] == ({"a": None}, [1.5, "text"])
        self.calls, self.trace = state["calls"], state["trace"]


class Drawing(Dataset):
    def __len__(self):
        return 22

    def __getitem__(self, index):
        image = torch.randn(5, generator=torch.Generator().manual_seed(index))
        return image + 0.1 * torch.rand(5) + float(np.random.rand()), int(image[:3].argmax())


class Restarting:
    """An iterable of no known length that draws from the global generator."""

    def __iter__(self):
        for _ in range(3):
            images = torch.randn(8, 5)
            yield images, images[:, :3].argmax(1)


LOADERS = {
    "shuffled": lambda: DataLoader(Drawing(), batch_size=8, shuffle=True),
    "own generator": lambda: DataLoader(
        Drawing(), batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(3)
    ),
    "epoch sampler": lambda: DataLoader(Drawing(), batch_size=8, sampler=EpochSampler(22, 4), drop_last=True),
    "list": lambda: FIXED,
    "iterable": Restarting,
}
FIXED = [(x, x[:, :3].argmax(1)) for x in torch.randn(24, 5, generator=torch.Generator().manual_seed(1)).split(8)]


def learn(folder, loader, step=None, *, objective=None, **options):
    torch.manual_seed(1)
    student = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 3))
    torch.manual_seed(2)
    teacher = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    callback = StopAt(step)
    settings = TrainSettings(**{"epochs": 3, "lr": 0.1, "checkpoint_every": 1, **options})
    torch.manual_seed(time.time_ns() % 1000)  # nothing outside may matter
    result = train(
        student,
        Data(train=loader, val=FIXED),
        objective=objective or KnowledgeDistillation(),
        teacher=teacher,
        settings=settings,
        seed=7,
        callbacks=[callback],
        checkpoints=folder,
    )
    return student, result, callback


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("step", [1, 3, 5])
def test_any_loader_any_place(tmp_path, kind, step):
    torch.manual_seed(0)
    whole, result, heard = learn(None, LOADERS[kind]())
    torch.manual_seed(0)
    with pytest.raises(Interrupt):
        learn(tmp_path, LOADERS[kind](), step + 1)
    torch.manual_seed(0)
    resumed, again, heard_again = learn(tmp_path, LOADERS[kind]())
    same(whole, resumed)
    assert again.epochs == result.epochs
    assert heard_again.calls == heard.calls == result.steps
    assert torch.equal(heard_again.trace, heard.trace)


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "adamw", "ema": 0.5, "precision": "bf16"},
        {"accumulate": 2, "checkpoint_every": None, "schedule": "step", "patience": 1},
        {"cache_teacher": True, "checkpoint_every": 2},
        {"keep": "last", "clip_norm": 0.1, "schedule": "constant"},
    ],
)
def test_any_options(tmp_path, options):
    whole, result, _ = learn(None, FIXED, **options)
    steps = len(FIXED) * 3 // options.get("accumulate", 1)
    with pytest.raises(Interrupt):
        learn(tmp_path, FIXED, min(5, steps - 1), **options)
    resumed, again, _ = learn(tmp_path, FIXED, **options)
    same(whole, resumed)
    assert (again.epochs, again.kept) == (result.epochs, result.kept)


def test_augmentation_does_not_depend_on_workers_or_on_what_was_drawn_outside(tmp_path):
    plain, _, _ = learn(None, DataLoader(Drawing(), batch_size=8, shuffle=True))
    loader = DataLoader(Drawing(), batch_size=8, shuffle=True, num_workers=2, persistent_workers=True)
    same(plain, learn(None, loader)[0])


def test_a_finished_run_is_not_run_again(tmp_path):
    whole, result, _ = learn(tmp_path, FIXED)
    resumed, again, heard = learn(tmp_path, FIXED, step=1)
    same(whole, resumed)
    assert again.epochs == result.epochs
    assert heard.calls == result.steps


def test_only_the_last_two_are_kept_and_a_damaged_one_is_passed_over(tmp_path):
    whole, _, _ = learn(None, FIXED)
    with pytest.raises(Interrupt):
        learn(tmp_path, FIXED, 6)
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == [f"checkpoint-{step:09d}.safetensors" for step in (4, 5)]
    kept = [file.read_bytes() for file in files]
    content = kept[-1]
    for damage in (content[: len(content) // 2], b"", b"\x08" + bytes(20), content[:8] + b"x" + content[9:]):
        files[-1].write_bytes(damage)
        with pytest.warns(RuntimeWarning, match=r"checkpoint .*5\.safetensors is passed over: .* damaged"):
            resumed, _, _ = learn(tmp_path, FIXED)
        same(whole, resumed)
        for file in tmp_path.iterdir():
            file.unlink()
        for file, whole_file in zip(files, kept, strict=True):
            file.write_bytes(whole_file)


def test_another_run_is_refused(tmp_path):
    with pytest.raises(Interrupt):
        learn(tmp_path, FIXED, 5)
    for options, words in (
        ({"epochs": 4}, "epochs: 3, not 4"),
        ({"lr": 0.2}, "lr: 0.1, not 0.2"),
        ({"objective": KnowledgeDistillation(temperature=2.0)}, "objective: .*temperature=4.0"),
        ({"objective": CrossEntropy()}, "teacher: .*, not None"),
    ):
        with pytest.raises(OptionError, match=f"cannot resume: .* belongs to another run .*{words}"):
            learn(tmp_path, FIXED, **options)
    learn(tmp_path, FIXED, checkpoint_every=3)  # how often is nobody's business


def test_other_data_are_noticed(tmp_path):
    other = [(x + 1, y) for x, y in FIXED]
    with pytest.raises(Interrupt):
        learn(tmp_path / "list", FIXED, 5)
    with pytest.raises(DataError, match="other batches than before"):
        learn(tmp_path / "list", other)
    torch.manual_seed(0)
    sampler = torch.utils.data.RandomSampler(Drawing())
    with pytest.raises(Interrupt):
        learn(tmp_path / "loader", DataLoader(Drawing(), batch_size=8, sampler=sampler), 5)
    with pytest.raises(DataError, match="other batches than before"):
        learn(tmp_path / "loader", DataLoader(Drawing(), batch_size=8))


def test_a_loss_that_is_not_finite_names_the_last_good_checkpoint(tmp_path):
    class Breaking(KnowledgeDistillation):
        def forward(self, lesson):
            return super().forward(lesson) * (float("inf") if lesson.epoch > 1.5 else 1.0)

    text = (
        r"the loss is inf at step 6 \(epoch 2, learning rate 0\.0\d+\); .*after epoch 1; the last good checkpoint is "
    )
    with pytest.raises(TrainingError, match=text + r".*checkpoint-000000005\.safetensors"):
        learn(tmp_path, FIXED, objective=Breaking())


def test_what_a_checkpoint_cannot_hold(tmp_path):
    class Odd(Callback):
        def state_dict(self):
            return {"inner": [object()]}

    settings = TrainSettings(epochs=1)
    with pytest.raises(ArtifactError, match=r"cannot hold .*callbacks/0/inner/0: a object"):
        train(nn.Linear(5, 3), Data(train=FIXED), settings=settings, callbacks=[Odd()], checkpoints=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="cannot be made"):
        train(nn.Linear(5, 3), Data(train=FIXED), settings=settings, checkpoints=tmp_path / "file")


def test_weights_that_are_not_finite_are_not_kept(tmp_path):
    settings = TrainSettings(epochs=1, lr=1e38, warmup=0.0, schedule="constant", momentum=0.0, weight_decay=0.0)
    images = 1e38 * torch.ones(2, 5)
    student = nn.Linear(5, 3)
    data = Data(train=[(images, torch.tensor([0, 1]))])

    class Linear(CrossEntropy):
        def forward(self, lesson):
            return (lesson.outputs * 1e-20).sum()

    with pytest.raises(TrainingError, match=r"a weight is NaN or infinite behind step 1 .*before training"):
        train(student, data, objective=Linear(), settings=settings, checkpoints=tmp_path)
    assert not list(tmp_path.iterdir())
    assert all(bool(value.isfinite().all()) for value in student.parameters())
