"""Snapshots: what is kept, what is refused, and what a damaged one leads to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from fxpress.passes.report import Report, Row
from fxpress.passes.workdir import Workdir, fingerprint
from torch import nn

from fxpress import Graph, OptionError, Pipeline, trace

PIPELINE = Pipeline(["fold-batchnorm", "insert-masks", "emit"])


@pytest.fixture(scope="module")
def graph() -> Graph:
    return trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval(), torch.randn(2, 3, 4, 4))


def report(finished: int) -> Report:
    return Report([Row(name, "exact") for name in ("trace", "fold-batchnorm", "insert-masks", "emit")[: finished + 1]])


def a_workdir(path: Path, finished: int, graph: Graph, pipeline: Pipeline = PIPELINE, seed: int = 0) -> Workdir:
    workdir = Workdir(path, pipeline, "model", seed)
    workdir.start()
    for index in range(1, finished + 1):
        workdir.save(index, graph, report(index))
    return workdir


def test_files(tmp_path: Path, graph: Graph) -> None:
    a_workdir(tmp_path / "new" / "folder", 2, graph)
    assert sorted(file.name for file in (tmp_path / "new" / "folder").iterdir()) == [
        "01-fold-batchnorm.fxp",
        "02-insert-masks.fxp",
        "state.json",
    ]
    state = json.loads((tmp_path / "new" / "folder" / "state.json").read_text())
    assert state["finished"] == ["01-fold-batchnorm", "02-insert-masks"]


def test_resume_gives_the_last_one(tmp_path: Path, graph: Graph) -> None:
    snapshot = a_workdir(tmp_path, 2, graph).resume()
    assert snapshot is not None
    assert snapshot.finished == 2
    assert snapshot.report == report(2)
    assert fingerprint(snapshot.graph) == fingerprint(graph)


def test_nothing_to_resume(tmp_path: Path, graph: Graph) -> None:
    assert Workdir(tmp_path / "a", PIPELINE, "model", 0).resume() is None
    assert a_workdir(tmp_path / "b", 0, graph).resume() is None


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "empty"])
def test_a_damaged_snapshot_is_passed_over_with_a_warning(tmp_path: Path, graph: Graph, damage: str) -> None:
    workdir = a_workdir(tmp_path, 3, graph)
    file = tmp_path / "03-emit.fxp"
    content = bytearray(file.read_bytes())
    content[-20] ^= 1
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes({"truncated": content[:-30], "flipped": content, "empty": b""}[damage])
    with pytest.warns(RuntimeWarning, match=r"snapshot .*03-emit\.fxp is passed over: .*"):
        snapshot = workdir.resume()
    assert snapshot is not None
    assert snapshot.finished == 2


def test_all_damaged_begins_at_the_beginning(tmp_path: Path, graph: Graph) -> None:
    workdir = a_workdir(tmp_path, 2, graph)
    for file in tmp_path.glob("*.fxp"):
        file.write_bytes(b"nothing")
    with pytest.warns(RuntimeWarning) as warned:
        assert workdir.resume() is None
    assert len(warned) == 2


def test_a_snapshot_of_another_place_in_the_pipeline_is_not_taken(tmp_path: Path, graph: Graph) -> None:
    workdir = a_workdir(tmp_path, 3, graph)
    (tmp_path / "01-fold-batchnorm.fxp").replace(tmp_path / "03-emit.fxp")
    with pytest.warns(RuntimeWarning, match="its report has 2 rows instead of 4"):
        snapshot = workdir.resume()
    assert snapshot is not None
    assert snapshot.finished == 2


def test_another_pipeline_model_or_seed_is_refused(tmp_path: Path, graph: Graph) -> None:
    a_workdir(tmp_path, 1, graph)
    with pytest.raises(OptionError, match=r"cannot resume: .* was made with another pipeline\. .*resume=False"):
        Workdir(tmp_path, Pipeline(["emit"]), "model", 0).resume()
    with pytest.raises(OptionError, match="another model"):
        Workdir(tmp_path, PIPELINE, "other", 0).resume()
    with pytest.raises(OptionError, match="another seed"):
        Workdir(tmp_path, PIPELINE, "model", 1).resume()
    with pytest.raises(OptionError, match="another model and another seed"):
        Workdir(tmp_path, PIPELINE, "other", 1).resume()


def test_starting_over_removes_the_old_snapshots_and_nothing_else(tmp_path: Path, graph: Graph) -> None:
    a_workdir(tmp_path, 3, graph)
    (tmp_path / "mine.fxp").write_bytes(b"mine")
    state = tmp_path / "state.json"
    content = json.loads(state.read_text())
    state.write_text(json.dumps({**content, "finished": [*content["finished"], "../outside"]}))
    (tmp_path.parent / "outside.fxp").write_bytes(b"outside")
    Workdir(tmp_path, PIPELINE, "model", 0).start()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["mine.fxp", "state.json"]
    assert (tmp_path.parent / "outside.fxp").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 2, "finished": []}', '{"format": 1}', "\x00"])
def test_an_unreadable_state_says_what_to_do(tmp_path: Path, text: str) -> None:
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(OptionError, match=r"state\.json cannot be read .*Delete it to start over"):
        Workdir(tmp_path, PIPELINE, "model", 0).resume()


def test_a_workdir_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match=r"workdir .* cannot be made"):
        Workdir(tmp_path / "file", PIPELINE, "model", 0)


def test_fingerprint_sees_weights_and_structure(graph: Graph) -> None:
    twin = graph.copy()
    assert fingerprint(twin) == fingerprint(graph)
    weight = twin.tensor("0.weight").detach().clone()
    weight[0, 0] += 1e-6
    twin.set_tensor("0.weight", weight)
    assert fingerprint(twin) != fingerprint(graph)
    half = trace(nn.Linear(2, 2).to(torch.bfloat16).eval(), torch.randn(2, 2).to(torch.bfloat16))
    assert fingerprint(half) == fingerprint(half.copy())
