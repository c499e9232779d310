"""Two processes under torchrun learn what one learns from the same batches, and share the work."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fxpress.ir.errors import DataError
from fxpress.runtime.training.feed import make_feed
from fxpress.runtime.training.share import shared_batches
from torch.utils.data import DataLoader, TensorDataset

import fxpress

SCRIPT = """
import os, sys
from pathlib import Path
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fxpress
from fxpress.runtime.data import Data
from fxpress.runtime.training import Callback, KnowledgeDistillation, Taps, TrainSettings, train
from fxpress.runtime.training.losses import Hint, Sum

torch.set_num_threads(1)
folder, rank = Path(sys.argv[1]), os.environ.get("RANK", "0")
inputs = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
targets = inputs[:, :3].argmax(1)
seen = []

def network(seed, width=8):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))

def normed():
    # convolutions with batch norm, one without factors, one with a cumulative mean
    torch.manual_seed(4)
    first = [nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU()]
    second = [nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6, affine=False), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*first, *second, nn.Linear(24, 3), nn.BatchNorm1d(3, momentum=None))

def learn(name, loader, objective=None, taps=None, callbacks=(), student=None, **options):
    student = student or network(1)
    student.register_forward_pre_hook(lambda layer, args: seen.append(len(args[0])) if layer.training else None)
    settings = TrainSettings(**{"epochs": 2, "lr": 0.1, "clip_norm": 1.0, **options})
    result = train(student, Data(train=loader, val=[(inputs[:5], targets[:5])]), objective=objective, settings=settings,
                   teacher=network(2, 6) if objective else None, taps=taps, callbacks=callbacks,
                   checkpoints=folder / name, log=folder / f"{name}-log")
    cache = result.teacher_cache
    epochs = [{k: v for k, v in vars(e).items()} for e in result.epochs]
    found[name] = {"state": {k: v.detach() for k, v in student.state_dict().items()}, "epochs": epochs,
                   "steps": result.steps, "seen": list(seen), "asked": cache.asked if cache else 0}
    seen.clear()

class Break(Callback):
    def __init__(self): self.left = 5
    def after_step(self, lr, epoch):
        self.left -= 1
        if not self.left: raise InterruptedError

def loader(**options):
    return DataLoader(TensorDataset(inputs, targets), batch_size=8, **options)

found = {}
learn("list", list(loader()))
learn("shuffled", loader(shuffle=True), KnowledgeDistillation(), ema=0.5, accumulate=2)
learn("ragged", loader(shuffle=True, generator=torch.Generator().manual_seed(1)), patience=1, epochs=6, lr=1e-9)
torch.manual_seed(3)
hints = Sum([KnowledgeDistillation(), Hint([8], [6], 1.0)])
learn("hint", loader(shuffle=True), hints, Taps(["1"], ["1"]), clip_norm=None)
learn("norms", loader(shuffle=True), KnowledgeDistillation(), student=normed())
learn("cached", loader(shuffle=True), KnowledgeDistillation(), cache_teacher=True, epochs=4)
try:
    learn("resumed", loader(shuffle=True), KnowledgeDistillation(), callbacks=[Break()], ema=0.5, checkpoint_every=1)
except InterruptedError:
    seen.clear()
Break.after_step = Callback.after_step
learn("resumed", loader(shuffle=True), KnowledgeDistillation(), callbacks=[Break()], ema=0.5, checkpoint_every=1)
learn("whole", loader(shuffle=True), KnowledgeDistillation(), callbacks=[Break()], ema=0.5)
student = network(1)
fxpress.distill(student, network(2, 6), Data(train=loader()), epochs=1, workdir=folder / "distill", loss="scale-factor",
                level="class")
found["distill"] = {"state": student.state_dict()}
torch.save(found, folder / f"{rank}.pt")
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()  # its threads may abort a process that ends before them
"""


def run_script(folder: Path, processes: int) -> list[dict]:
    folder.mkdir()
    script = folder / "script.py"
    script.write_text(SCRIPT)
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *launch, str(script), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(processes)]


def test_two_processes_learn_what_one_learns(tmp_path):
    (alone,) = run_script(tmp_path / "one", 1)
    first, second = run_script(tmp_path / "two", 2)
    for name, one in alone.items():
        for key, value in one["state"].items():
            assert torch.equal(first[name]["state"][key], second[name]["state"][key]), name
            torch.testing.assert_close(first[name]["state"][key], value, rtol=1e-4, atol=1e-5, msg=f"{name} {key}")
    for name in alone.keys() - {"distill"}:
        one, two = alone[name], first[name]
        assert two["steps"] == one["steps"], name
        for mine, theirs in zip(two["epochs"], one["epochs"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-4), name
        assert two["epochs"] == second[name]["epochs"]
    # the work was shared, not done twice
    assert alone["list"]["seen"] == [8] * 8
    assert first["list"]["seen"] == second["list"]["seen"] == [4] * 8
    assert alone["cached"]["asked"] == 32
    assert first["cached"]["asked"] == second["cached"]["asked"] == 16
    # without progress, all stop together
    assert first["ragged"]["steps"] == 8
    # a resumed run is the whole run, to the bit
    for key, value in first["whole"]["state"].items():
        assert torch.equal(first["resumed"]["state"][key], value)
    # one process writes
    rows = list(csv.DictReader((tmp_path / "two" / "list-log" / "epochs.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert len(list((tmp_path / "two" / "list-log").glob("events*"))) == 1


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("kind", ["list", "loader"])
def test_a_batch_is_shared_evenly_and_wholly(world, kind):
    numbers = torch.arange(7.0)[:, None]
    batches = [((numbers, numbers), torch.arange(7))]
    if kind == "loader":
        dataset = TensorDataset(numbers, torch.arange(7))
        batches = DataLoader(dataset, batch_sampler=[list(range(7))])
    shares = []
    for rank in range(world):
        process = SimpleNamespace(num_processes=world, process_index=rank, device=torch.device("cpu"))
        ((mine, targets),) = shared_batches(process, batches, 0)
        mine = mine[0] if kind == "list" else mine
        assert torch.equal(mine.flatten().long(), targets)
        shares.append(targets.tolist())
    assert {len(share) for share in shares} == {-(-7 // world)}
    assert set().union(*shares) == set(range(7))


def test_processes_share_one_batch_also_where_it_is_random():
    class Noise:
        def __iter__(self):
            return ((torch.randn(4, 2), torch.zeros(4).long()) for _ in range(3))

    def read(rank, world):
        return [inputs for inputs, _ in make_feed(Noise(), 5, rank, world).epoch(1)]

    for whole, one, two in zip(read(0, 1), read(0, 2), read(1, 2), strict=True):
        assert torch.equal(torch.stack([one, two], 1).flatten(0, 1), whole)


def test_a_batch_that_cannot_be_shared():
    loader = DataLoader(TensorDataset(torch.zeros(9, 1), torch.zeros(9).long()), batch_size=9)
    with pytest.raises(DataError, match=r"batches of 9 cannot be shared by 2 processes\. Take a batch size"):
        make_feed(loader, 0, 0, 2)


NETS = """
import torch

def net(width=8):
    layers = [torch.nn.Conv2d(1, width, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(36 * width, 10)]
    return torch.nn.Sequential(*layers), torch.zeros(1, 1, 8, 8)
"""


@pytest.mark.slow
def test_the_command_line_under_torchrun(tmp_path):
    (tmp_path / "nets.py").write_text(NETS)
    (tmp_path / "kd.yaml").write_text("passes: [{distill: {epochs: 2, lr: 0.02, loss: scale-factor, ema: 0.9}}]\n")
    arguments = ["compile", "nets.py:net", "kd.yaml", "--data", "digits", "--teacher", "nets.py:net,width=12"]
    states, torchrun = {}, ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for name, launch in (("one", []), ("two", torchrun)):
        command = [*launch, "-m", "fxpress.tools.cli", *arguments, "--out", f"{name}.fxp", "--workdir", name]
        done = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, cwd=tmp_path, timeout=600, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("saved ") == 1
        states[name] = fxpress.load(tmp_path / f"{name}.fxp").module.state_dict()
        assert len(list((tmp_path / name / "01-distill" / "log").glob("events*"))) == 1
    assert states["one"].keys() == states["two"].keys()
    # the images are moved at random, by each process for its own
    same = [
        torch.nn.functional.cosine_similarity(*(states[n][key].flatten() for n in states), 0) for key in states["one"]
    ]
    assert min(same) > 0.9
