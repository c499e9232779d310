"""Reconstruction of whole networks: what it gains, what it promises, what it leaves alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fxpress.ir.cut import Cut
from fxpress.ir.errors import DataError, ModelError, OptionError
from fxpress.ir.graph import Graph
from fxpress.ir.groups import find_groups
from fxpress.ir.trace import trace
from fxpress.ir.verify import distance, run
from fxpress.passes.layerwise import streams
from fxpress.passes.prune.prune_channels import PruneChannels
from fxpress.passes.prune.reconstruct import Compensation, compensate, refit
from fxpress.passes.prune.reconstruct.consumers import find_consumers
from fxpress.runtime.data import Data
from torch import Tensor, nn

import fxpress

MODULE = sys.modules["fxpress.passes.prune.reconstruct.compensate"]


class Net(nn.Module):
    """A residual stream that two blocks add to, one grouped, a strided shortcut, a head."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.inner, self.outer = nn.Conv2d(width, 8, 3, padding=1, bias=False), nn.Conv2d(8, width, 1)
        self.inner_norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(width, 16, 3, stride=2, padding=1, groups=2)
        self.shortcut = nn.Conv2d(width, 16, 1, stride=2)
        self.head = nn.Linear(16 * 9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.outer(torch.relu(self.inner_norm(self.inner(x)))))
        x = torch.relu(self.grouped(x) + self.shortcut(x))
        return self.head(x.flatten(1))  # type: ignore[no-any-return]


def images(count: int = 32, parts: tuple[int, ...] = (), dtype: torch.dtype = torch.float64) -> list[Any]:
    x = torch.randn(count, 3, 6, 6, dtype=dtype, generator=torch.Generator().manual_seed(1))
    return [(part, torch.zeros(len(part), dtype=torch.int64)) for part in x.split(list(parts) or count)]


def traced(net: nn.Module, dtype: torch.dtype = torch.float64) -> Graph:
    return trace(net.to(dtype).eval(), torch.randn(2, 3, 6, 6, dtype=dtype))


def third(graph: Graph) -> Cut:
    """Every third class of every group goes."""
    groups = find_groups(graph)
    return Cut(groups, np.concatenate([group.classes[::3] for group in groups.groups if group.channels > 1]))


def compensated(graph: Graph, cut: Cut, batches: Any = None, **options: Any) -> tuple[Graph, Compensation]:
    after = cut.apply("cut")
    return after, compensate(cut, after, batches or images(), **options)


@pytest.fixture
def graph() -> Graph:
    torch.manual_seed(0)
    return traced(Net())


def test_every_layer_that_reads_a_removed_channel_is_found(graph: Graph) -> None:
    consumers, skips = find_consumers(third(graph))
    assert [c.layer for c in consumers] == ["inner", "outer", "grouped", "shortcut", "head"]
    assert not skips


@pytest.mark.parametrize("sequential", [False, True])
def test_no_layer_gets_worse_and_the_output_comes_nearer(graph: Graph, sequential: bool) -> None:
    after, result = compensated(graph, third(graph), sequential=sequential)
    assert len(result.changes) == 5
    for change in result.changes:
        assert change.after < change.before, change
    assert result.moved["least-squares"] < 0.7 * result.moved["plain"]
    assert result.moved["least-squares"] == distance(run(graph), run(after))
    after.lint()


def test_sequential_learning_makes_up_for_earlier_errors(graph: Graph) -> None:
    cut, batches = third(graph), images(200)
    moved = []
    for sequential in (False, True):
        after, _ = compensated(graph, cut, batches, sequential=sequential)
        x = batches[0][0]
        moved.append(float((after(x) - graph(x)).detach().norm()))
    assert moved[1] < moved[0]


def test_errors_are_those_of_the_layers_own_responses(graph: Graph) -> None:
    """Without `sequential`: rows of the uncut network, and what the new layer makes of them."""
    cut, ((x, _),) = third(graph), images()
    after, result = compensated(graph, cut, sequential=False)
    stem = torch.relu(graph.module.get_submodule("norm")(graph.module.get_submodule("stem")(x)))
    kept = torch.from_numpy(np.flatnonzero(find_consumers(cut)[0][0].inputs))
    outputs = torch.from_numpy(np.flatnonzero(find_consumers(cut)[0][0].outputs))
    wanted = graph.module.get_submodule("inner")(stem)[:, outputs]
    before = graph.module.get_submodule("inner_norm").running_mean[outputs]
    shift = before - after.module.get_submodule("inner_norm").running_mean  # the constant that went into the norm
    found = F.conv2d(stem[:, kept], after.tensor("inner.weight"), padding=1) + shift.view(1, -1, 1, 1)
    change = next(change for change in result.changes if change.layer == "inner")
    assert change.place == "running mean"
    assert change.after == pytest.approx(float(((found - wanted).norm() / wanted.norm()).detach()), rel=1e-6)


def test_copies_of_channels_are_given_back_exactly(graph: Graph) -> None:
    """What is removed is a combination of what stays: nothing need be lost."""
    with torch.no_grad():
        for name in ("stem", "inner", "norm", "inner_norm"):
            layer: Any = graph.module.get_submodule(name)
            for tensor in (layer.weight, layer.bias, getattr(layer, "running_mean", None)):
                if tensor is not None:
                    tensor[1::2] = tensor[::2]
        outer: Any = graph.module.get_submodule("outer")
        outer.weight[1::2], outer.bias[1::2] = outer.weight[::2], outer.bias[::2]
    groups = find_groups(graph)
    doubled = [group for group in groups.groups if group.name in ("stem", "inner")]
    cut = Cut(groups, np.concatenate([group.classes[::2] for group in doubled]))
    before = distance(run(graph), run(cut.apply("cut")))
    after, result = compensated(graph, cut)
    assert before > 0.1
    assert distance(run(graph), run(after)) < 0.02
    assert all(change.after < 0.02 for change in result.changes)


def test_the_same_data_give_the_same_weights(graph: Graph) -> None:
    cut = third(graph)
    one, other = (compensated(graph, cut)[0].module.state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_ragged_batches_give_what_one_batch_gives(graph: Graph) -> None:
    cut = third(graph)
    one = compensated(graph, cut)[0].module.state_dict()
    other = compensated(graph, cut, images(parts=(1, 13, 18)))[0].module.state_dict()
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-8, atol=1e-8)


def test_large_batches_run_in_parts(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    cut, sizes, check = third(graph), [], streams._check
    one = compensated(graph, cut, sequential=False)[0].module.state_dict()
    monkeypatch.setattr(streams, "HELD", 15_000)
    monkeypatch.setattr(streams, "_check", lambda found, i: (sizes.append(len(found[0]["inner"])), check(found, i)))
    other = compensated(graph, cut, sequential=False)[0].module.state_dict()
    assert len(sizes) > 2
    assert sum(sizes) == 32
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("method", ["bias", "least-squares"])
def test_the_network_before_keeps_its_tensors(graph: Graph, method: Any) -> None:
    tensors = {name: tensor.clone() for name, tensor in graph.module.state_dict().items()}
    compensated(graph, third(graph), method=method)
    for name, tensor in graph.module.state_dict().items():
        assert torch.equal(tensor, tensors[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("method", ["bias", "least-squares"])
def test_other_precisions(dtype: torch.dtype, method: Any) -> None:
    graph = traced(Net(), dtype)
    after, result = compensated(graph, third(graph), images(dtype=torch.float32), method=method)
    assert {p.dtype for p in after.module.parameters()} == {dtype}
    assert all(change.after < change.before for change in result.changes)
    assert result.moved[method] < result.moved["plain"]


def test_fewer_images_than_unknowns() -> None:
    graph = traced(nn.Sequential(nn.Flatten(), nn.Linear(108, 60), nn.ReLU(), nn.Linear(60, 5)))
    after, result = compensated(graph, third(graph), images(3))
    (change,) = result.changes
    assert change.after < 0.1 * change.before
    new, old = after.tensor("3.weight"), graph.tensor("3.weight")
    assert float(new.detach().norm()) < 2 * float(old.detach().norm())


def test_layers_too_large_for_a_gram_matrix_get_their_bias(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 8 * 60 * 80
    monkeypatch.setattr(refit, "MEMORY", limit)
    monkeypatch.setattr(MODULE, "MEMORY", limit)
    _, result = compensated(graph, third(graph))
    assert {change.method for change in result.changes} == {"bias", "least-squares"}
    assert {c.layer for c in result.changes if c.method == "bias"} == {"inner", "head"}
    assert any("2 layers too large for least squares" in note for note in result.notes)


def test_stages_hold_layers_that_do_not_wait_for_each_other(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = third(graph)
    after, consumers = cut.apply("cut"), find_consumers(cut)[0]
    names = [[c.layer for c in stage] for stage in refit.stages(after, consumers, sequential=True)]
    assert names == [["inner"], ["outer"], ["grouped", "shortcut"], ["head"]]
    assert len(refit.stages(after, consumers, sequential=False)) == 1
    monkeypatch.setattr(refit, "MEMORY", 0)
    assert [len(stage) for stage in refit.stages(after, consumers, sequential=False)] == [1] * 5


class Odd(nn.Module):
    """What mixes removed channels and cannot be compensated."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
        self.one, self.two = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)
        self.two.weight = self.one.weight
        self.last, self.head = nn.Conv2d(4, 6, 1), nn.Linear(36, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(torch.relu(self.twice(torch.relu(self.first(x)))))
        y = self.last(torch.relu(self.one(x) + self.two(x))).flatten(2)
        gram = y.transpose(1, 2) @ y
        return self.head(gram).mean(1)  # type: ignore[no-any-return]


def test_what_cannot_be_compensated_is_skipped_with_its_reason() -> None:
    graph = traced(Odd())
    _, result = compensated(graph, third(graph), method="bias")
    reasons = {skip.node: skip.reason for skip in result.skips}
    assert [change.layer for change in result.changes] == ["last"]
    assert "called 2 times" in reasons["twice"]
    assert "shared with another layer" in reasons["one"]
    assert "without weights of its own" in reasons["matmul"]


def test_nan_activations_are_named() -> None:
    class Log(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.log(self.first(x))).mean((2, 3))  # type: ignore[no-any-return]

    graph = traced(Log())
    with pytest.raises(ModelError, match=r"activations at 'log.*' of shape \(32, 5, 4, 4\) are NaN .* batch 0"):
        compensated(graph, third(graph))


def test_images_of_another_shape_are_named(graph: Graph) -> None:
    wrong = [(torch.zeros(2, 1, 6, 6, dtype=torch.float64), torch.zeros(2, dtype=torch.int64))]
    with pytest.raises(DataError, match=r"cannot take batch 0 of calibration \(inputs \(2, 1, 6, 6\)\)"):
        compensated(graph, third(graph), wrong)


def test_a_cut_of_nothing_says_so(graph: Graph) -> None:
    _, result = compensated(graph, Cut(find_groups(graph), np.zeros(0, np.int64)))
    assert result.notes == ["no layer reads removed channels: nothing to reconstruct"]


# -- as an option of prune-channels -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["bias", "least-squares"])
def test_the_report_of_a_compiled_network_tells_before_and_after(method: str) -> None:
    torch.manual_seed(0)
    data = Data(calibration=images(dtype=torch.float32), val=images(dtype=torch.float32))
    passes = [{"prune-channels": {"ratio": 0.4, "reconstruct": method}}]
    compiled = fxpress.compile(Net().eval(), passes, images(2, dtype=torch.float32)[0][0], data=data)
    row = compiled.report["prune-channels"]
    told = row.metrics["reconstruct"]
    assert list(told["accuracy"]) == ["before", "plain", method]
    assert told["accuracy"][method] == row.accuracy
    assert len(told["layers"]) == 5
    assert row.distance is not None
    assert row.distance < 1e-4  # the proof, which is of the cut alone
    assert row.metrics["output_distance"] == pytest.approx(told["output_distance"][method])
    assert any(note.startswith("validation accuracy") for note in row.notes)
    assert row.metrics["params"] == row.parameters


def test_missing_calibration_data_is_told_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = [{"prune-channels": {"ratio": 0.4, "reconstruct": "bias"}}]
    monkeypatch.setattr("fxpress.passes.compile.open_model", lambda *_, **__: pytest.fail("the model was traced"))
    with pytest.raises(DataError, match="'prune-channels' needs data to calibrate with"):
        fxpress.compile(Net().eval(), passes, images(2, dtype=torch.float32)[0][0])


def test_masks_leave_nothing_to_reconstruct() -> None:
    with pytest.raises(OptionError, match="'reconstruct': given 'bias' with 'masks'"):
        PruneChannels(masks="learned", reconstruct="bias")


SCRIPT = """
import os, sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[2])
from test_compensate import Net, compensated, images, third, traced
from fxpress.passes.layerwise import streams
seen = []
check = streams._check
streams._check = lambda found, index: (seen.append(len(next(iter(found[0].values())))), check(found, index))
torch.manual_seed(0)
graph = traced(Net())
states = {m: compensated(graph, third(graph), images(parts=(1, 16, 15)), method=m)[0].module.state_dict()
          for m in ("bias", "least-squares")}
torch.save({"states": states, "seen": seen}, f"{sys.argv[1]}/{os.environ.get('RANK', '0')}.pt")
"""


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path: Path, graph: Graph) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *launch, str(script), str(tmp_path), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first["seen"][:3] == [1, 8, 8]  # the work was shared
    assert second["seen"][:2] == [8, 7]  # ... and nothing was done twice
    for method, state in first["states"].items():
        alone = compensated(graph, third(graph), images(parts=(1, 16, 15)), method=method)[0].module.state_dict()
        for name, tensor in state.items():
            assert torch.equal(second["states"][method][name], tensor)
            torch.testing.assert_close(tensor, alone[name], rtol=1e-8, atol=1e-8)
