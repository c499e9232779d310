"""The product quantization benchmark: layers and networks small enough for a test, its parts and goals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fxpress.tools.bench import pq, pq_cases, pq_layers, pq_networks, timing
from fxpress.tools.bench.common import header
from fxpress.tools.bench.engines import relative_distance, torch_engine
from fxpress.tools.bench.loads import Load
from fxpress.tools.bench.parts import wanted
from torch import nn

SMALL = pq_cases.Setting(16, 4, "fp32", {(1, "warm"): 1e-6, (8, "cold"): 1e6})


def nothing():
    return None


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
    monkeypatch.setattr(timing, "CacheFlush", lambda: nothing)


def test_a_layer_is_measured_warm_and_cold(peers, tmp_path):
    case = pq_cases.Case("FC 24x8", nn.Linear(24, 8), (24,), (SMALL, pq_cases.Setting(16, 4, "int8")))
    rows = pq_layers.measure_layer(case, Load(1, 1), tmp_path, 3, nothing)
    found = {(row.case, row.metric): row for row in rows}
    assert {row.case for row in rows} == {"FC 24x8, batch 1, 1 thread, warm", "FC 24x8, batch 1, 1 thread, cold"}
    goal = found["FC 24x8, batch 1, 1 thread, warm", "fxpress K=16 d=4 fp32 | times better int8"]
    assert (goal.goal, goal.met) == ("≥ 1e-06", True)
    exact = found["FC 24x8, batch 1, 1 thread, cold", "fxpress K=16 d=4 fp32 | distance"].value
    rough = found["FC 24x8, batch 1, 1 thread, cold", "fxpress K=16 d=4 int8 | distance"].value
    assert exact < 1e-5 < rough < 0.2
    rows = pq_layers.measure_layer(case, Load(8, 2), tmp_path, 1, nothing)
    torch.set_num_threads(1)
    assert all(row.goal is None for row in rows)  # goals are for one thread


class Tiny(pq_networks.Network):
    def build(self, seed, *, laplace=False):
        torch.manual_seed(seed)
        parts = (nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 32), nn.ReLU(), nn.Linear(32, 10))
        return nn.Sequential(*parts).eval(), torch.randn(1, 3, 8, 8)


def test_a_network_is_measured(peers, tmp_path, monkeypatch):
    small = {"codewords": 16, "linear": {"subspace": 4, "codewords": 16}}
    for name in ("PUBLISHED", "RATED", "HEAVY", "HEAVY_RATED", "FAST"):
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
    rated = [row for row in sizes if "rate weight 1" in row.case]
    assert all("entropy coded" in row.metric for row in rated[:-1])
    errors = [row.value for row in sizes if row.metric == "weight error"]
    assert len(errors) == 5
    assert all(0 < error < 1 for error in errors)

    rows = pq_networks.measure_network(network, Load(1, 1), tmp_path, 0, 2, nothing)
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


def test_parts_by_name(capsys, monkeypatch, tmp_path):
    names = [job.name for job in pq.jobs(tmp_path, 3, 0, quick=False)]
    assert len(names) == len(set(names)) == 4 * 4 + 2 * 5
    assert "FC 9216x4096, batch 8, 2 threads" in names
    picked = [job.name for job in pq.jobs(tmp_path, 3, 0, quick=True) if wanted(job, ["alexnet, f*", "conv"])]
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
