"""What benchmarks in turns share: turns, rows, tables, parts, the other engines, peak memory, times of nodes."""

from __future__ import annotations

import json
import time

import pytest
import torch
from fxpress.tools.bench import timed_rows, timing
from fxpress.tools.bench.common import Row, header, read_rows, screen, write_rows
from fxpress.tools.bench.engines import Engine, relative_distance
from fxpress.tools.bench.node_times import profile
from fxpress.tools.bench.parts import Job, run_jobs
from fxpress.tools.bench.peak_memory import peak_memory
from torch import nn

import fxpress
from fxpress import FxpressError, trace


def busy(seconds):
    def run():
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass
        return torch.ones(1)

    return run


def engine(name, kind="float", seconds=2e-4):
    return Engine(name, kind, busy(seconds), busy(seconds))


def nothing():
    return None


@pytest.mark.parametrize("cache", ["warm", "cold"])
def test_turns_measure_each_engine_in_each_round(cache, monkeypatch):
    monkeypatch.setattr(timing, "LEAST_BUFFER", 1 << 20)
    monkeypatch.setattr(timing, "last_level_cache", lambda: 1 << 18)
    seen = []
    times = timing.take_turns([engine("slow", seconds=6e-4), engine("fast")], 5, cache, lambda: seen.append(1))
    assert len(seen) == 5
    assert times.cpu.shape == times.wall.shape == (2, 5)
    assert times.ms("slow", "cpu") == pytest.approx(0.6, rel=0.3)
    assert times.speedup("fast", "slow", "cpu") == pytest.approx(3, rel=0.3)
    assert times.speedup("slow", "fast", "cpu") == pytest.approx(1 / 3, rel=0.3)
    assert (times.wall >= times.cpu * 0.9).all()


def test_the_order_turns():
    order = []
    engines = [Engine(name, "float", lambda name=name: order.append(name), nothing) for name in "abc"]
    before = timing._calls
    timing._calls = lambda engine: 1
    try:
        timing.take_turns(engines, 3, "warm")
    finally:
        timing._calls = before
    assert "".join(order) == "aabbcc" + "bbccaa" + "ccaabb"  # each: one call that is not counted, one that is


def test_the_cold_buffer_is_larger_than_the_caches():
    assert timing.last_level_cache() >= 0
    flush = timing.CacheFlush()
    assert flush._buffer.numel() * 4 >= max(timing.LEAST_BUFFER, 4 * timing.last_level_cache())
    flush()


def rows_of_three(goal=2.0, threads=1):
    engines = [engine("ours", "fxpress", 1e-4), engine("torch fp32", seconds=8e-4)]
    engines += [engine("int8 a", "int8", 6e-4), engine("int8 b", "int8", 4e-4)]
    times = timing.take_turns(engines, 3, "warm")
    goals = {"ours": {timed_rows.INT8: goal, timed_rows.TORCH: 1e6}}
    return timed_rows.rows_of("case", engines, times, {e.name: 0.5 for e in engines}, goals, threads)


def test_rows_compare_with_the_better_int8_engine():
    rows = {row.metric: row for row in rows_of_three()}
    ours = rows["ours | times better int8"]
    assert ours.value == pytest.approx(4, rel=0.3)
    assert ours.unit == "against int8 b"
    assert (ours.goal, ours.met) == ("≥ 2", True)
    assert (rows["ours | times torch fp32"].goal, rows["ours | times torch fp32"].met) == ("≥ 1e+06", False)
    assert rows["int8 b | times better int8"].peer == pytest.approx(1)
    assert rows["int8 a | CPU ms"].value is None
    assert rows["int8 a | CPU ms"].peer == pytest.approx(0.6, rel=0.3)
    assert all(row.goal is None for row in rows.values() if not row.metric.startswith("ours"))


def test_the_table_has_a_line_per_engine():
    console = screen()
    with console.capture() as capture:
        console.print(timed_rows.table([header(0, "x"), *rows_of_three(goal=100.0)], "title"))
    text = capture.get()
    assert "better int8 ≥ 100, torch fp32 ≥ 1e+06" in text
    assert [name in text for name in ("ours", "int8 a", "int8 b", "header")] == [True, True, True, False]
    assert "no" in text


def test_a_later_run_replaces_its_cases_and_keeps_the_others():
    old = [header(0, "old"), Row("a", "m", 1), Row("b", "m", 1)]
    new = [header(0, "new"), Row("b", "m", 2), Row("c", "m", 2)]
    rows = timed_rows.merged(old, new)
    assert [(row.case, row.value) for row in rows[1:]] == [("a", 1), ("b", 2), ("c", 2)]
    assert rows[0].value["command"] == "new"


def test_the_profile_names_every_call():
    module = trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), torch.randn(2, 4)).module
    calls = []
    rows = profile("case", module, torch.randn(2, 4), 3, lambda: calls.append(1))
    assert len(calls) == 5
    assert [row.metric for row in rows] == ["_0 (0) | CPU ms", "relu (aten.relu.default) | CPU ms"]
    assert all(row.value > 0 for row in rows)


def test_each_part_is_written_when_it_is_done(tmp_path):
    file = tmp_path / "rows.json"
    write_rows(file, [header(0, "old"), Row("kept", "m", 1), Row("a", "m", 1)])
    jobs = [Job("a", lambda advance: [Row("a", "m", 2)], 1), Job("b", lambda advance: 1 / 0, 1)]
    with pytest.raises(ZeroDivisionError):
        run_jobs(jobs, [header(0, "new")], file)
    assert [(row.case, row.value) for row in read_rows(file)[1:]] == [("kept", 1), ("a", 2)]
    assert json.loads(file.read_text())[0]["value"]["command"] == "new"


def test_a_process_that_fails_says_why(tmp_path):
    with pytest.raises(FxpressError, match=r"openvino could not run none.xml: .*(No module|none.xml|Error)"):
        peak_memory("openvino", tmp_path / "none.xml", "alexnet")


@pytest.mark.slow
def test_peak_memory_of_a_file(tmp_path):
    network = fxpress.compile(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), ["emit"], torch.randn(1, 3, 32, 32))
    network.save(tmp_path / "net.fxp")
    peak = peak_memory("fxpress", tmp_path / "net.fxp", "", 32)
    assert 50e6 < peak.imported < peak.peak < 4e9


@pytest.mark.slow
def test_the_real_peers_compute_the_layer(tmp_path):
    for name in ("onnxruntime", "onnxscript", "openvino", "nncf"):
        pytest.importorskip(name)
    from fxpress.tools.bench.peer_engines import peer_engines, prepare_peers

    for layer, x in (
        (nn.Linear(64, 32), torch.randn(2, 64)),
        (nn.Conv2d(8, 16, 3, padding=1), torch.randn(1, 8, 9, 9)),
    ):
        files = prepare_peers(layer, x.relu(), tmp_path / type(layer).__name__)
        expected = layer(x.relu()).detach()
        found = list(peer_engines(files, x.relu(), 2))
        assert {engine.kind for engine in found} == {"float", "int8"}
        for one in found:
            limit = 1e-5 if one.kind == "float" else 0.1
            assert relative_distance(expected, one.output()) < limit, one.name
