"""Statistics of filters against numpy, over checkpoints from every source, and recorded while a network trains."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from fxpress.ir.errors import ArtifactError, ModelError, OptionError
from fxpress.ir.trace import trace
from fxpress.passes.analyse.over_time import TimeStatistics, find_statistics, read_state, time_statistics
from fxpress.passes.analyse.recorder import WeightRecorder
from fxpress.passes.analyse.weights import FilterStatistics, filters_of, weight_statistics
from fxpress.passes.records import FILE, Records
from fxpress.runtime.data import Data
from fxpress.runtime.training import TrainSettings, train
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fxpress


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.ConvTranspose2d(3, 4, 2), nn.Flatten(), nn.LazyLinear(5))


@pytest.fixture
def net() -> nn.Sequential:
    net = network()
    net(torch.randn(1, 2, 4, 4))
    return net


@given(st.lists(st.lists(st.floats(-1e3, 1e3, width=16), min_size=4, max_size=4), min_size=1, max_size=5))
def test_against_numpy(rows: list[list[float]]) -> None:
    for dtype in (torch.float16, torch.float64):
        found = FilterStatistics.of(torch.tensor(rows, dtype=dtype))
        values = torch.tensor(rows, dtype=dtype).double().numpy()
        np.testing.assert_allclose(found.mean_abs, np.abs(values).mean(1), rtol=1e-12)
        np.testing.assert_allclose(found.std, values.std(1), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(found.mean, values.mean(1), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(found.l1, np.abs(values).sum(1), rtol=1e-12)
        np.testing.assert_allclose(found.l2, np.linalg.norm(values, axis=1), rtol=1e-12)
        assert (found.minimum == values.min(1)).all()
        assert (found.maximum == values.max(1)).all()
        assert (found.zeros == (values == 0).mean(1)).all()


def test_filters_lie_along_the_output_channels(net: nn.Sequential) -> None:
    found = filters_of(net)
    assert {name: tuple(rows.shape) for name, rows in found.items()} == {
        "0.weight": (3, 18),
        "2.weight": (4, 12),
        "4.weight": (5, 36),
    }
    assert torch.equal(found["2.weight"][1], net[2].weight[:, 1].flatten())
    assert list(weight_statistics(net)) == list(found)
    graph = trace(net, torch.randn(2, 2, 4, 4))
    np.testing.assert_array_equal(weight_statistics(graph)["0.weight"].l1, weight_statistics(net)["0.weight"].l1)
    depthwise = nn.ConvTranspose2d(4, 4, 3, groups=4)
    assert filters_of(depthwise)["weight"].shape == (4, 9)


def checkpoints(net: nn.Sequential, count: int) -> list[dict[str, Tensor]]:
    return [
        {name: value + i * torch.randn_like(value) for name, value in net.state_dict().items()} for i in range(count)
    ]


def expected(states: list[dict[str, Tensor]], name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """M, S and V from all checkpoints at once."""
    rows = np.stack([state[name].double().flatten(1).numpy() for state in states])
    size = np.abs(rows).mean(2)
    return size.mean(0), rows.std(2).mean(0), size.std(0) / size.mean(0)


def test_time_statistics_of_state_dicts_and_files(net: nn.Sequential, tmp_path: Path) -> None:
    states = checkpoints(net, 4)
    torch.save(states[1], tmp_path / "1.pt")
    safetensors.torch.save_file(states[2], tmp_path / "2.safetensors")
    torch.save({"epoch": 3, "state_dict": states[3]}, tmp_path / "3.pt")
    given = [states[0], tmp_path / "1.pt", str(tmp_path / "2.safetensors"), tmp_path / "3.pt"]
    found = time_statistics(net, given)
    assert found.checkpoints == 4
    for name in ("0.weight", "4.weight"):
        one = found.filters(name, len(states[0][name]))
        assert one is not None
        for ours, theirs in zip((one.mean, one.std, one.instability), expected(states, name), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-9)
    assert found.filters("no.weight", 3) is None


def test_a_single_checkpoint_has_no_instability(net: nn.Sequential) -> None:
    one = time_statistics(net, checkpoints(net, 1)).filters("0.weight", 3)
    assert one is not None
    assert one.instability is None
    np.testing.assert_allclose(one.mean, weight_statistics(net)["0.weight"].mean_abs)


def test_dead_filters_are_steady(net: nn.Sequential) -> None:
    states = checkpoints(net, 2)
    for state in states:
        state["0.weight"][1] = 0
    instability = time_statistics(net, states).history["0.weight"].instability
    assert instability is not None
    assert instability[1] == 0
    assert instability[0] > 0


def test_memory_is_three_sums_per_filter(net: nn.Sequential) -> None:
    sizes = [
        sum(value.numel() for value in time_statistics(net, checkpoints(net, n)).state_dict().values()) for n in (1, 5)
    ]
    assert sizes[0] == sizes[1] == 1 + 4 * (3 + 4 + 5)


def test_kept_in_a_file_and_read_again(net: nn.Sequential, tmp_path: Path) -> None:
    found, path = time_statistics(net, checkpoints(net, 3)), tmp_path / "record.safetensors"
    found.save(path)
    again = TimeStatistics.load(path)
    assert again.checkpoints == 3
    for name, one in found.history.items():
        assert np.array_equal(one.instability, again.history[name].instability)
        assert np.array_equal(one.std, again.history[name].std)
    again.add(filters_of(net))  # and goes on
    assert again.checkpoints == 4


def test_where_a_criterion_finds_them(net: nn.Sequential, tmp_path: Path) -> None:
    recorded, path = time_statistics(net, checkpoints(net, 2)), tmp_path / "record.safetensors"
    assert find_statistics(net, (), None) is None
    assert find_statistics(net, (), recorded) is recorded
    recorded.save(path)
    assert find_statistics(net, [path], None).checkpoints == 2
    safetensors.torch.save_file(net.state_dict(), tmp_path / "weights.safetensors")
    torch.save(net.state_dict(), tmp_path / "weights.pt")
    for file in ("weights.safetensors", "weights.pt"):
        assert find_statistics(net, [tmp_path / file], recorded).checkpoints == 1


def test_errors(net: nn.Sequential, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="at least one checkpoint"):
        time_statistics(net, [])
    with pytest.raises(ModelError, match=r"'0.weight' is missing in the checkpoint"):
        time_statistics(net, [{}])
    with pytest.raises(ModelError, match=r"'0.weight' has shape \(3, 2\)"):
        time_statistics(net, [{"0.weight": torch.zeros(3, 2)}])
    found = time_statistics(net, checkpoints(net, 2))
    with pytest.raises(OptionError, match="has 2 filters, its recorded statistics are of 3"):
        found.filters("0.weight", 2)
    with pytest.raises(OptionError, match=r"checkpoint 3 has 2 filters in '0.weight', those before it have 3"):
        found.add({"0.weight": torch.zeros(2, 18)})
    with pytest.raises(ArtifactError, match=r"cannot be read"):
        TimeStatistics.load(tmp_path / "none")
    safetensors.torch.save_file(net.state_dict(), tmp_path / "weights.safetensors")
    with pytest.raises(ArtifactError, match="holds no weight statistics"):
        TimeStatistics.load(tmp_path / "weights.safetensors")
    with pytest.raises(ArtifactError, match="'checkpoints' is missing"):
        TimeStatistics.from_state({})
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ArtifactError, match="holds a list, not a state dict"):
        read_state(tmp_path / "list.pt")
    (tmp_path / "bad.pt").write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match=r"bad.pt cannot be read"):
        read_state(tmp_path / "bad.pt")


class Learner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(x).relu())


def test_recorded_while_training() -> None:
    """What the recorder sees is what the network was after each epoch."""
    inputs = torch.randn(24, 4)
    data = Data(train=[(inputs, inputs[:, :3].argmax(1))])
    student, states = Learner(), []
    recorder = WeightRecorder(student, skip=1)

    class Keep(WeightRecorder):
        def after_epoch(self, result: object) -> bool:
            states.append({name: value.clone() for name, value in student.state_dict().items()})
            return False

    train(student, data, settings=TrainSettings(epochs=4, lr=0.5, keep="last"), callbacks=[recorder, Keep(student)])
    assert recorder.statistics.checkpoints == 3
    for name, count in (("hidden.weight", 6), ("head.weight", 3)):
        one = recorder.statistics.filters(name, count)
        for ours, theirs in zip((one.mean, one.std, one.instability), expected(states[1:], name), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-9)
        assert (one.instability > 0).all()


def test_a_recorder_goes_on_where_it_stopped() -> None:
    student = Learner()
    whole, first = WeightRecorder(student, skip=1), WeightRecorder(student, skip=1)
    for epoch in range(4):
        student.hidden.weight.data *= 1.5
        whole.after_epoch(None)
        if epoch < 2:
            first.after_epoch(None)
        else:
            second = WeightRecorder(student, skip=1)
            second.load_state_dict(first.state_dict())
            second.after_epoch(None)
            first = second
    ours, theirs = whole.statistics.history["hidden.weight"], first.statistics.history["hidden.weight"]
    assert whole.statistics.checkpoints == first.statistics.checkpoints == 3
    assert np.array_equal(ours.instability, theirs.instability)


def test_nothing_to_record() -> None:
    with pytest.raises(OptionError, match="no convolution or linear layer"):
        WeightRecorder(nn.ReLU())


def test_records_outlive_the_process_where_there_is_a_folder(net: nn.Sequential, tmp_path: Path) -> None:
    found = time_statistics(net, checkpoints(net, 2))
    for folder in (None, tmp_path):
        records = Records(folder)
        assert records.statistics is None
        records.statistics = found
        assert records.statistics is found
        again = Records(folder).statistics
        assert (again is None) if folder is None else (again.checkpoints == 2)
        records.clear()
        assert records.statistics is None
        assert Records(folder).statistics is None
    assert not (tmp_path / FILE).exists()


def test_a_pass_records_for_a_later_one(tmp_path: Path) -> None:
    """distill → prune-channels, in one pipeline and by a file; without a record one checkpoint is all there is."""
    inputs = torch.randn(24, 4)
    data = Data(train=[(inputs, inputs[:, :3].argmax(1))])
    file = tmp_path / "filters.safetensors"
    learn = {"epochs": 4, "loss": "cross-entropy", "lr": 0.5, "keep": "last"}
    prune = {"criterion": "statistics", "ratio": 0.5}

    def notes(*passes: object, **options: object) -> list[str]:
        return fxpress.compile(Learner(), list(passes), inputs[:2], data=data, **options).report["prune-channels"].notes

    recorded = {"distill": {**learn, "record": True}}
    assert "statistics over 2 checkpoints" in notes(recorded, {"prune-channels": prune})
    assert "statistics over 2 checkpoints" in notes(recorded, {"prune-channels": prune}, workdir=tmp_path / "run")
    assert (tmp_path / "run" / FILE).exists()
    notes({"distill": {**learn, "record": str(file)}}, {"prune-channels": prune})
    assert "statistics over 2 checkpoints" in notes({"prune-channels": {**prune, "history": [str(file)]}})
    assert not any("checkpoints" in note for note in notes({"distill": learn}, {"prune-channels": prune}))
