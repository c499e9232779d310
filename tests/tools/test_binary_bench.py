"""The binary benchmark: layers small enough for a test, an engine in a process of its own, parts and goals."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fxpress.ir.errors import OptionError
from fxpress.tools.bench import binary, binary_layers, larq_engine, larq_worker, timing
from fxpress.tools.bench.binary_layers import Case, measure_layer
from fxpress.tools.bench.common import Row, read_rows
from fxpress.tools.bench.engines import Engine, torch_engine
from fxpress.tools.bench.larq_engine import Larq, running
from fxpress.tools.bench.loads import Load
from torch import nn
from torch.nn import functional

from fxpress import FxpressError

CONV = Case("conv 3x3 8, 6x6", nn.Conv2d(8, 8, 3, padding=1, bias=False), (8, 6, 6), {"warm": {"better int8": 1e-6}})
FULL = Case("FC 24x8", nn.Linear(24, 8, bias=False), (24,), {"cold": {"better int8": 1e6}})

# the other side of the pipe, with numpy in the place of Larq
WORKER = """
import os, runpy, sys
worker = runpy.run_path({path!r})
import numpy as np
def build(weight, images, threads):
    height, width = images.shape[1:3]
    padded = np.pad(np.where(images >= 0, 1.0, -1.0), ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=1)
    def convolve():
        taps = [(y, x) for y in range(3) for x in range(3)]
        return sum(padded[:, y : y + height, x : x + width] @ np.where(weight[y, x] >= 0, 1.0, -1.0) for y, x in taps)
    return {{"as shipped": convolve, "indirect": convolve}}
worker["serve"](sys.stdin, os.fdopen(os.dup(1), "w"), build)
"""


def nothing():
    return None


@pytest.fixture
def peers(monkeypatch):
    """An int8 engine of known speed in place of those that may not be installed."""
    monkeypatch.setattr(binary_layers, "prepare_peers", lambda network, images, folder: network)
    monkeypatch.setattr(
        binary_layers, "peer_engines", lambda files, images, threads: [torch_engine("some int8", "int8", files, images)]
    )
    monkeypatch.setattr(timing, "CacheFlush", lambda: nothing)


@pytest.fixture
def worker(monkeypatch, tmp_path):
    file = tmp_path / "worker.py"
    file.write_text(WORKER.format(path=larq_worker.__file__))
    monkeypatch.setattr(larq_engine, "WORKER", file)
    return Path(sys.executable)


@pytest.mark.parametrize("case", [CONV, FULL], ids=["conv", "FC"])
def test_a_layer_is_measured_warm_and_cold(case, peers, tmp_path):
    rows = measure_layer(case, Load(1, 1), tmp_path, 3, None, nothing)
    assert {row.case for row in rows} == {f"{case.name}, batch 1, 1 thread, {cache}" for cache in ("warm", "cold")}
    assert {row.metric.partition(" | ")[0] for row in rows} == {"fxpress binary", "torch fp32", "some int8"}
    assert [(row.goal, row.met) for row in rows if row.goal] == [
        ("≥ 1e-06", True) if case is CONV else ("≥ 1e+06", False)
    ]
    distances = [row.value if row.peer is None else row.peer for row in rows if row.metric.endswith("distance")]
    assert max(distances) < 1e-5
    rows = measure_layer(case, Load(8, 2), tmp_path, 1, None, nothing)
    torch.set_num_threads(1)
    assert all(row.goal is None for row in rows)  # goals are for one image on one thread


def test_larq_takes_turns_where_it_can(peers, worker, tmp_path):
    with running(worker) as larq:
        rows = {case.name: measure_layer(case, Load(2, 1), tmp_path, 3, larq, nothing) for case in (CONV, FULL)}
    found = [row for row in rows[CONV.name] if row.metric.startswith("Larq")]
    assert {row.case for row in found} == {f"{CONV.name}, batch 2, 1 thread, warm"}
    assert {row.metric.partition(" | ")[0] for row in found} == {
        "Larq 1 bit x 1 bit, as shipped",
        "Larq 1 bit x 1 bit, indirect",
    }
    assert all(row.value is None and row.peer >= 0 for row in found)  # a peer's numbers
    assert [row.peer for row in found if row.metric.endswith("distance")] == [0, 0]
    assert all(row.peer > 0 for row in found if row.metric.endswith("ms"))
    assert not any(row.metric.startswith("Larq") for row in rows[FULL.name])


def test_larq_output_is_that_of_signs_with_ones_around(worker):
    layer, images = nn.Conv2d(5, 4, 3, padding=1, bias=False), torch.randn(2, 5, 7, 6)
    with running(worker) as larq:
        engines = larq.engines(layer, images, 1)
        expected = functional.conv2d(functional.pad(images.sign(), (1,) * 4, value=1.0), layer.weight.sign())
        assert all(torch.equal(engine.output().float(), expected) for engine in engines)
        assert larq_engine.distances(engines, layer, -images)[engines[0].name] > 0.1
        with pytest.raises(FxpressError, match=r"Larq Compute Engine failed: KeyError: 'no such'"):
            larq.ask(run="no such", calls=1)
        assert min(engines[0].clocked(3)) >= 0  # it still answers


def test_an_engine_in_a_process_of_its_own_clocks_itself():
    asked = []

    def clocked(calls):
        asked.append(calls)
        return 1.0, 2.0

    times = timing.take_turns([Engine("there", "binary", nothing, nothing, clocked)], 3, "warm")
    assert (times.ms("there", "cpu"), times.ms("there", "wall")) == (1.0, 2.0)
    assert asked[4:] == [1 + 2 // 4, 2] * 3  # two calls of 2 ms fill a turn of 4 ms


def test_an_environment_without_larq_is_told(tmp_path):
    with running(Path(sys.executable)) as larq, pytest.raises(FxpressError, match=r"larq"):
        larq.versions()
    with pytest.raises(OptionError, match=r"--larq .*python: No such file"), running(tmp_path / "python"):
        pass
    with running(None) as larq:
        assert larq is None


def test_a_process_that_ends_leaves_its_last_words(monkeypatch, tmp_path):
    file = tmp_path / "worker.py"
    file.write_text("raise SystemExit('no memory for this')")
    monkeypatch.setattr(larq_engine, "WORKER", file)
    with running(Path(sys.executable)) as larq, pytest.raises(FxpressError, match="no memory for this"):
        larq.versions()


def test_the_worker_answers_line_by_line(tmp_path):
    np.save(tmp_path / "weight.npy", np.ones((3, 3, 1, 1)))
    np.save(tmp_path / "images.npy", np.full((1, 2, 2, 1), 7.0))
    requests = [
        {"versions": ["numpy"]},
        {"prepare": str(tmp_path), "threads": 3},
        {"output": "k", "file": str(tmp_path / "out")},
        {"run": "k", "calls": 2},
        {"run": "other", "calls": 2},
    ]
    answers = io.StringIO()
    lines = map(json.dumps, requests)
    larq_worker.serve(lines, answers, lambda weight, images, threads: {"k": lambda: images * threads})
    found = [json.loads(line) for line in answers.getvalue().splitlines()]
    assert found[:3] == [{"numpy": np.__version__}, {}, {}]
    assert np.load(tmp_path / "out.npy").max() == 21
    assert set(found[3]) == {"cpu", "wall"}
    assert found[4] == {"error": "KeyError: 'other'"}


@pytest.mark.slow
@pytest.mark.skipif("FXPRESS_LARQ" not in os.environ, reason="FXPRESS_LARQ: python of an environment with Larq")
def test_larq_itself_computes_what_is_expected_of_it():
    layer, images = nn.Conv2d(64, 32, 3, padding=1, bias=False), torch.randn(2, 64, 9, 9)
    with running(Path(os.environ["FXPRESS_LARQ"])) as larq:
        assert larq.versions()["larq-compute-engine"]
        engines = larq.engines(layer, images, 1)
        assert set(larq_engine.distances(engines, layer, images).values()) == {0}


def test_the_mean_is_over_all_convolutions_or_not_there():
    rows = [
        Row(f"{case.name}, batch 1, 1 thread, warm", "fxpress binary | times better int8", value)
        for case, value in zip(binary.cases(), (2.0, 8.0, 4.0, 4.0, 100.0), strict=True)
    ]
    (mean,) = binary.mean_row(rows)
    assert (mean.value, mean.met) == (pytest.approx(4.0), mean.value >= 4)
    assert binary.mean_row(rows[1:]) == []


def test_the_command_writes_its_rows(peers, worker, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(binary, "cases", lambda *, quick=False: (CONV, FULL)[: 1 + quick])
    monkeypatch.setattr(Larq, "versions", lambda self: {"larq-compute-engine": "?"})
    file = tmp_path / "rows.json"
    arguments = ["binary", "--quick", "--rounds", "1", "--larq", str(worker), "--json", str(file), "--only", "conv"]
    monkeypatch.setattr("sys.argv", arguments)
    binary.main()
    rows = read_rows(file)
    assert [row.metric for row in rows if row.case == "header"] == ["environment", "settings", "larq"]
    monkeypatch.setattr("sys.argv", ["binary", "--quick", "--larq", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match=r"error: --larq .*none: No such file"):
        binary.main()
    assert "Larq 1 bit x 1 bit, indirect" in capsys.readouterr().out


def test_parts_by_name(tmp_path):
    names = [job.name for job in binary.jobs(tmp_path, 3, 0, None, quick=False)]
    assert len(names) == len(set(names)) == 5 * 4 + 3 * 6
    assert "conv 3x3 512, 7x7, batch 8, 2 threads" in names
