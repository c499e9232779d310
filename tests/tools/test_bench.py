"""The benchmarks' common form, the networks they run on, and the coverage run on networks small enough for a test."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import torch
from fxpress.tools.bench import coverage_report, coverage_worker, zoo
from fxpress.tools.bench.common import Row, header, interleaved, read_rows, write_rows
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 32, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(32)
        nn.init.zeros_(self.bn2.weight)
        self.gamma = nn.Parameter(1e-6 * torch.ones(32))
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        x = x + self.gamma.view(-1, 1, 1) * self.bn2(self.conv2(x))
        return self.head(x.relu().mean((2, 3)))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        x = self.stem(x).flatten(2)
        return self.head((x @ (x.transpose(1, 2) @ x)).mean(2))


@pytest.fixture
def subject():
    torch.manual_seed(0)
    return zoo.prepare("test:block", Block(), torch.randn(1, 3, 8, 8))


def test_rows_survive_the_file(tmp_path):
    rows = [header(3, "cmd"), Row("resnet18", "latency", 1.5, "ms", 2.0, "≤ 2", True)]
    write_rows(tmp_path / "rows.json", rows)
    assert read_rows(tmp_path / "rows.json") == rows
    first, second = json.loads((tmp_path / "rows.json").read_text())
    assert first["value"]["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert first["value"]["seed"] == 3
    assert list(second) == ["case", "metric", "value", "unit", "peer", "goal", "met"]


def test_interleaved_takes_turns_and_medians():
    order, values = [], iter([5.0, 1.0, 2.0])
    tasks = {"a": lambda: order.append("a") or next(values), "b": lambda: order.append("b") or 7.0}
    assert interleaved(tasks, 3) == {"a": 2.0, "b": 7.0}
    assert order == ["a", "b"] * 3


def test_no_parameter_is_left_constant_and_statistics_fit_the_activations(subject):
    for name, parameter in subject.model.named_parameters():
        assert parameter.std() > 0.01, name
    seen = {}
    subject.model.bn1.register_forward_hook(lambda m, i, o: seen.update(out=o))
    with torch.no_grad():
        subject.model(subject.image)
    normalised = (seen["out"] - subject.model.bn1.bias.view(1, -1, 1, 1)) / subject.model.bn1.weight.view(1, -1, 1, 1)
    assert 0.5 < normalised.std() < 2.0
    assert normalised.mean((0, 2, 3)).abs().max() > 0.01  # shaken, not exact


def test_kinds(subject):
    assert subject.kind == "cnn"
    image = torch.randn(1, 3, 8, 8)
    assert zoo.prepare("x", Attention(), image).kind == "attention"
    patches = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.Flatten(), nn.Linear(32, 4))
    assert zoo.prepare("x", patches, image).kind == "mlp"


def test_names_by_pattern():
    assert zoo.names(("torchvision:resnet1?", "torchvision:resnet18")) == ["torchvision:resnet18"]
    assert len(zoo.names(("torchvision:classification",))) >= 80
    assert "torchvision:lraspp_mobilenet_v3_large" in zoo.names(("torchvision:segmentation",))
    with pytest.raises(SystemExit, match="torchvision:GLOB"):
        zoo.names(("keras:resnet50",))


def _burn(seconds):
    start = time.process_time()
    while time.process_time() < start + seconds:
        pass


def test_the_deadline_interrupts():
    with pytest.raises(TimeoutError, match="1 s of CPU time"), coverage_worker.deadline(1):
        _burn(5)


GOOD = {"cut": True, "macs_left": 0.5, "distance": 1e-7, "cuttable": 0.95, "reloaded": True, "kind": "cnn"}


def test_records_survive_rows_and_sides_do_not_overwrite_one_another(tmp_path):
    path = tmp_path / "coverage.json"
    peer = {"cut": False, "reason": "boom", "kind": "cnn"}
    coverage_report.put_record(path, header(0), "timm:a", "torch-pruning", peer)
    coverage_report.put_record(path, header(0), "timm:a", "fxpress", GOOD)
    assert coverage_report.load_records(path) == {"timm:a": {"fxpress": GOOD, "torch-pruning": peer}}


def test_summary_counts_a_wrong_cut_and_a_silent_refusal():
    wrong = GOOD | {"distance": 1e-2}
    exact_in_double = GOOD | {"distance": 2e-4, "distance_double": 1e-13}
    silent = {"cut": False, "kind": "cnn"}
    records = {
        name: {"fxpress": facts}
        for name, facts in {"timm:a": GOOD, "timm:b": wrong, "timm:c": exact_in_double, "timm:d": silent}.items()
    }
    rows = {(row.case, row.metric): row for row in coverage_report.summary(records)}
    assert rows["summary: timm, one per family", "50 % of MACs left, exact"].value == "2/4"
    assert rows["summary: all", "wrong cuts"].value == 1
    assert rows["summary: all", "wrong cuts"].met is False
    assert rows["summary: all", "refusals without a reason"].value == 1


def test_fxpress_side_measures_a_network(subject):
    from fxpress.tools.bench import coverage_fxpress

    facts = coverage_fxpress.measure(subject, lambda: coverage_worker.deadline(60), double=True)
    assert facts.get("reason") is None
    assert facts["cut"]
    assert facts["reloaded"]
    assert facts["distance"] < 1e-4
    assert facts["distance_double"] < 1e-9
    assert facts["cuttable"] > 0.9


class Shuffled(nn.Module):
    """Mixes channels in a way that an index map per layer gets wrong."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3)
        self.conv2 = nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        return self.head(self.conv2(self.conv1(x)).mean((2, 3)))


def test_the_peers_cut_is_checked_against_the_masked_network():
    peer = pytest.importorskip("fxpress.tools.bench.peer", exc_type=ImportError)
    torch.manual_seed(0)
    subject = zoo.prepare("x", Shuffled(), torch.randn(1, 3, 8, 8))
    facts = peer.measure(subject, lambda: coverage_worker.deadline(60))
    assert facts["cut"]
    assert facts["distance"] < 1e-5
    assert facts["macs_left"] < 0.6


def test_a_wrong_peer_cut_is_found():
    peer = pytest.importorskip("fxpress.tools.bench.peer", exc_type=ImportError)
    torch.manual_seed(0)
    subject = zoo.prepare("x", Shuffled(), torch.randn(1, 3, 8, 8))
    pruned = Shuffled().eval()
    pruned.load_state_dict(subject.model.state_dict())
    keep = torch.tensor([0, 2, 5, 7])
    pruned.conv1.weight = nn.Parameter(pruned.conv1.weight[keep])
    pruned.conv1.bias = nn.Parameter(pruned.conv1.bias[keep])
    record = peer.Record(
        {"conv1": peer.Positions(torch.arange(3), keep), "conv2": peer.Positions(keep, torch.arange(8))}
    )
    pruned.conv2.weight = nn.Parameter(subject.model.conv2.weight[:, keep].detach())
    assert not peer._check(subject, pruned, record)["wrong"]
    pruned.conv2.weight = nn.Parameter(subject.model.conv2.weight[:, keep.flip(0)].detach())
    assert peer._check(subject, pruned.float(), record)["wrong"]


@pytest.mark.slow
def test_quick_coverage_runs_as_a_command(tmp_path):
    path = tmp_path / "rows.json"
    command = [sys.executable, "-m", "fxpress.tools.bench.coverage", "torchvision:squeezenet1_1", "--size", "64"]
    done = subprocess.run([*command, "--json", str(path)], capture_output=True, text=True, timeout=600, check=True)
    assert "squeezenet1_1" in done.stdout
    rows = {(row.case, row.metric): row for row in read_rows(path)}
    assert rows["torchvision:squeezenet1_1", "cut"].value is True
    assert rows["torchvision:squeezenet1_1", "cut"].peer is True
