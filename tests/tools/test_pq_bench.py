"""The product quantization benchmark: turns, rows, goals, tables; layers and networks small enough for a test."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest
import torch
from fxpress.tools.bench import pq, pq_cases, pq_layers, pq_networks, pq_rows, pq_timing
from fxpress.tools.bench.common import Row, header, read_rows, screen, write_rows
from fxpress.tools.bench.pq_engines import Engine, relative_distance, torch_engine
from fxpress.tools.bench.pq_memory import peak_memory
from fxpress.tools.bench.pq_profile import profile
from torch import nn

import fxpress
from fxpress import FxpressError, trace

SMALL = pq_cases.Setting(16, 4, "fp32", {(1, "warm"): 1e-6, (8, "cold"): 1e6})


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
    monkeypatch.setattr(pq_timing, "LEAST_BUFFER", 1 << 20)
    monkeypatch.setattr(pq_timing, "last_level_cache", lambda: 1 << 18)
    seen = []
    times = pq_timing.take_turns([engine("slow", seconds=6e-4), engine("fast")], 5, cache, lambda: seen.append(1))
    assert len(seen) == 5
    assert times.cpu.shape == times.wall.shape == (2, 5)
    assert times.ms("slow", "cpu") == pytest.approx(0.6, rel=0.3)
    assert times.speedup("fast", "slow", "cpu") == pytest.approx(3, rel=0.3)
    assert times.speedup("slow", "fast", "cpu") == pytest.approx(1 / 3, rel=0.3)
    assert (times.wall >= times.cpu * 0.9).all()


def test_the_order_turns():
    order = []
    engines = [Engine(name, "float", lambda name=name: order.append(name), nothing) for name in "abc"]
    before = pq_timing._calls
    pq_timing._calls = lambda engine: 1
    try:
        pq_timing.take_turns(engines, 3, "warm")
    finally:
        pq_timing._calls = before
    assert "".join(order) == "aabbcc" + "bbccaa" + "ccaabb"  # each: one call that is not counted, one that is


def test_the_cold_buffer_is_larger_than_the_caches():
    assert pq_timing.last_level_cache() >= 0
    flush = pq_timing.CacheFlush()
    assert flush._buffer.numel() * 4 >= max(pq_timing.LEAST_BUFFER, 4 * pq_timing.last_level_cache())
    flush()


def rows_of_three(goal=2.0, threads=1):
    engines = [engine("ours", "pq", 1e-4), engine("torch fp32", seconds=8e-4)]
    engines += [engine("int8 a", "int8", 6e-4), engine("int8 b", "int8", 4e-4)]
    times = pq_timing.take_turns(engines, 3, "warm")
    goals = {"ours": {pq_rows.INT8: goal, pq_rows.TORCH: 1e6}}
    return pq_rows.rows_of("case", engines, times, {e.name: 0.5 for e in engines}, goals, threads)


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
        console.print(pq_rows.table([header(0, "x"), *rows_of_three(goal=100.0)], "title"))
    text = capture.get()
    assert "better int8 ≥ 100, torch fp32 ≥ 1e+06" in text
    assert [name in text for name in ("ours", "int8 a", "int8 b", "header")] == [True, True, True, False]
    assert "no" in text


def test_a_later_run_replaces_its_cases_and_keeps_the_others():
    old = [header(0, "old"), Row("a", "m", 1), Row("b", "m", 1)]
    new = [header(0, "new"), Row("b", "m", 2), Row("c", "m", 2)]
    rows = pq_rows.merged(old, new)
    assert [(row.case, row.value) for row in rows[1:]] == [("a", 1), ("b", 2), ("c", 2)]
    assert rows[0].value["command"] == "new"


@pytest.mark.parametrize("layer", [nn.Linear(30, 7), nn.Linear(8, 3, bias=False), nn.Conv2d(6, 5, 3, 2, 1, groups=1)])
def test_the_dense_layer_computes_what_the_quantised_one_does(layer):
    quantised = pq_cases.random_layer(layer, SMALL)
    x = torch.randn(2, 30) if layer.weight.shape[1] == 30 else torch.randn(2, layer.weight.shape[1], 9, 9)
    x = x if layer.weight.dim() == 4 else torch.randn(2, layer.weight.shape[1])
    with torch.inference_mode():
        assert relative_distance(pq_cases.dense_layer(quantised)(x), quantised(x)) < 1e-5


def test_the_cases_are_those_that_were_asked_for():
    shapes = {case.name: tuple(case.layer.weight.shape) for case in pq_cases.cases()}
    assert list(shapes.values()) == [(4096, 9216), (4096, 4096), (1000, 4096), (384, 256, 3, 3)]
    wanted = {
        str(s): s.goals for case in pq_cases.cases() for s in case.settings if s.goals and case.name == "FC 9216x4096"
    }
    assert wanted == {
        "K=16 d=4 int8": {(1, "warm"): 15, (1, "cold"): 5, (8, "warm"): 3},
        "K=32 d=8 fp32": {(1, "warm"): 10},
    }


@pytest.fixture
def peers(monkeypatch):
    """Two int8 engines of known speed in place of those that may not be installed."""
    for module in (pq_layers, pq_networks):
        monkeypatch.setattr(module, "prepare_peers", lambda network, images, folder: network)
        monkeypatch.setattr(
            module, "peer_engines", lambda files, images, threads: [torch_engine("some int8", "int8", files, images)]
        )
    monkeypatch.setattr(pq_timing, "CacheFlush", lambda: nothing)


def test_a_layer_is_measured_warm_and_cold(peers, tmp_path):
    case = pq_cases.Case("FC 24x8", nn.Linear(24, 8), (24,), (SMALL, pq_cases.Setting(16, 4, "int8")))
    rows = pq_layers.measure_layer(case, pq_layers.Load(1, 1), tmp_path, 3, nothing)
    found = {(row.case, row.metric): row for row in rows}
    assert {row.case for row in rows} == {"FC 24x8, batch 1, 1 thread, warm", "FC 24x8, batch 1, 1 thread, cold"}
    goal = found["FC 24x8, batch 1, 1 thread, warm", "fxpress K=16 d=4 fp32 | times better int8"]
    assert (goal.goal, goal.met) == ("≥ 1e-06", True)
    exact = found["FC 24x8, batch 1, 1 thread, cold", "fxpress K=16 d=4 fp32 | distance"].value
    rough = found["FC 24x8, batch 1, 1 thread, cold", "fxpress K=16 d=4 int8 | distance"].value
    assert exact < 1e-5 < rough < 0.2
    rows = pq_layers.measure_layer(case, pq_layers.Load(8, 2), tmp_path, 1, nothing)
    torch.set_num_threads(1)
    assert all(row.goal is None for row in rows)  # goals are for one thread


class Tiny(pq_networks.Network):
    def build(self, seed):
        torch.manual_seed(seed)
        parts = (nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 32), nn.ReLU(), nn.Linear(32, 10))
        return nn.Sequential(*parts).eval(), torch.randn(1, 3, 8, 8)


def test_a_network_is_measured(peers, tmp_path, monkeypatch):
    small = {"codewords": 16, "linear": {"subspace": 4, "codewords": 16}}
    for name in ("PUBLISHED", "HEAVY", "FAST"):
        recipe = getattr(pq_networks, name)
        changed = replace(recipe, options={**recipe.options, **small})
        monkeypatch.setattr(pq_networks, name, changed)
    network = Tiny("tiny", 1.0, 1e-6, {"better int8": 1e-6})
    sizes = pq_networks.measure_size(network, tmp_path, 0, nothing)
    judged = {row.metric: row.met for row in sizes if row.goal}
    assert judged == {
        f"codewords {dtype}{coded}": not coded
        for dtype in ("fp32", "fp16", "int8")
        for coded in ("", ", entropy coded")
    }
    assert sizes[0].peer == pytest.approx((3 * 9 * 16 + 16 + 576 * 32 + 32 + 320 + 10) * 4 / 1e6)
    assert 0 < sizes[0].value < sizes[0].peer

    rows = pq_networks.measure_network(network, pq_layers.Load(1, 1), tmp_path, 0, 2, nothing)
    names = {row.metric.partition(" | ")[0] for row in rows if row.case.endswith("warm")}
    ours = {f"fxpress {r}, {t} tables" for r in ("published", "fast") for t in ("fp32", "int8")}
    assert names == {*ours, "torch fp32", "some int8"}
    for row in rows:
        if row.metric.endswith("distance"):
            assert (row.value if row.peer is None else row.peer) < 0.2
    assert [row.met for row in rows if row.goal] == [True] * 2

    nodes = pq_networks.measure_nodes(network, tmp_path, 0, 2, nothing)
    assert {row.metric.split(" ")[0] for row in nodes} >= {"_0", "_3", "_5"}
    pq.show_tables([header(0, "x"), *sizes, *rows, *nodes])


def test_the_profile_names_every_call():
    module = trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), torch.randn(2, 4)).module
    calls = []
    rows = profile("case", module, torch.randn(2, 4), 3, lambda: calls.append(1))
    assert len(calls) == 5
    assert [row.metric for row in rows] == ["_0 (0) | CPU ms", "relu (aten.relu.default) | CPU ms"]
    assert all(row.value > 0 for row in rows)


def test_parts_by_name(capsys, monkeypatch, tmp_path):
    names = [job.name for job in pq.jobs(tmp_path, 3, 0, quick=False)]
    assert len(names) == len(set(names)) == 4 * 4 + 2 * 5
    assert "FC 9216x4096, batch 8, 2 threads" in names
    picked = [job.name for job in pq.jobs(tmp_path, 3, 0, quick=True) if pq.wanted(job, ["alexnet, f*", "conv"])]
    assert picked == ["conv 3x3 256-384, 13x13, batch 1, 1 thread", "alexnet, file"]
    monkeypatch.setattr("sys.argv", ["pq", "--only", "resnet", "--quick"])
    with pytest.raises(
        SystemExit, match="--only resnet: no such part; there are FC 4096x1000, batch 1, 1 thread; conv"
    ):
        pq.main()
    monkeypatch.setattr("sys.argv", ["pq", "--rounds", "0"])
    with pytest.raises(SystemExit):
        pq.main()
    assert "--rounds 0: at least 1" in capsys.readouterr().err


def test_each_part_is_written_when_it_is_done(tmp_path):
    file = tmp_path / "rows.json"
    write_rows(file, [header(0, "old"), Row("kept", "m", 1), Row("a", "m", 1)])
    jobs = [pq.Job("a", lambda advance: [Row("a", "m", 2)], 1), pq.Job("b", lambda advance: 1 / 0, 1)]
    with pytest.raises(ZeroDivisionError):
        pq.run_jobs(jobs, [header(0, "new")], file)
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
    from fxpress.tools.bench.pq_peers import peer_engines, prepare_peers

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
