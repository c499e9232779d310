"""Whole networks of the binary benchmark: parts and goals, and a network small enough for a test."""

from __future__ import annotations

import pytest
import torch
from fxpress.tools.bench import binary, binary_networks
from fxpress.tools.bench.binary_networks import Network, Recipe
from fxpress.tools.bench.common import header, screen
from fxpress.tools.bench.engines import torch_engine
from fxpress.tools.bench.loads import Load
from fxpress.tools.bench.parts import wanted
from torch import nn

import fxpress

FLOAT, SMALL = Recipe("ends fp32", {}), Recipe("ends int8", {"first": "int8", "last": "int8"})


def nothing():
    return None


def tiny():
    """One layer in the middle, of 16 x 32 x 9 weights."""
    first = (nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    middle = (nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
    return nn.Sequential(*first, *middle, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5))


@pytest.fixture
def peers(monkeypatch):
    """One int8 engine of known speed in place of those that may not be installed."""
    monkeypatch.setattr(binary_networks, "prepare_peers", lambda network, images, folder: network)
    monkeypatch.setattr(
        binary_networks,
        "peer_engines",
        lambda files, images, threads: iter([torch_engine("some int8", "int8", files, images)]),
    )


def test_a_network_is_measured(peers, tmp_path, monkeypatch):
    monkeypatch.setattr(binary_networks, "RECIPES", (FLOAT, SMALL))
    network = Network("tiny", tiny, 12, {"better int8": 1e-6, "torch fp32": 1e6})
    sizes = binary_networks.measure_size(network, tmp_path, 0, nothing)
    found = {row.metric: row for row in sizes}
    file = tmp_path / "tiny, ends fp32, emitted for batch 1.fxp"
    assert found["ends fp32"].value == file.stat().st_size / 1e6
    assert found["ends fp32"].peer == (tmp_path / "tiny, float.fxp").stat().st_size / 1e6
    smaller = found["ends fp32: times smaller"]
    assert smaller.value == pytest.approx(found["ends fp32"].peer / found["ends fp32"].value)
    assert found["ends fp32: weights"].value == 16 * 32 * 9
    assert "0: the first layer keeps its precision" in found["ends fp32: weights"].unit
    assert "0: 8 bits; 8: 8 bits" in found["ends int8: weights"].unit
    assert found["ends int8: times smaller"].value > smaller.value

    rows = binary_networks.measure_network(network, Load(1, 1), tmp_path, 0, 2, nothing)
    names = {row.metric.partition(" | ")[0] for row in rows if " | " in row.metric}
    assert names == {"ends fp32", "ends int8", "torch fp32", "torch fp32, channels-last", "some int8"}
    assert {row.metric: row.met for row in rows if row.goal} == {
        f"ends {ends} | times {rival}": rival == "better int8"
        for ends in ("fp32", "int8")
        for rival in ("better int8", "torch fp32")
    }
    far = {row.metric: row.value if row.peer is None else row.peer for row in rows if row.metric.endswith("distance")}
    assert all(distance < 1e-4 for distance in far.values()), far

    rows = binary_networks.measure_network(network, Load(8, 2), tmp_path, 0, 1, nothing)
    torch.set_num_threads(1)
    assert all(row.goal is None for row in rows)  # goals are for one image on one thread
    assert fxpress.load(tmp_path / "tiny, ends fp32, emitted for batch 8.fxp")(torch.zeros(8, 3, 12, 12)).shape == (
        8,
        5,
    )

    console = screen()
    with console.capture() as capture:
        monkeypatch.setattr(binary, "screen", lambda: console)
        binary.show_tables([header(0, "x"), *sizes, *rows])
    assert [name in capture.get() for name in ("some int8", "times smaller", "0: 8 bits")] == [True] * 3


def test_memory_is_that_of_each_file(peers, monkeypatch, tmp_path):
    """In the place of other engines' files stand float networks: their processes are those of peak_memory's tests."""
    monkeypatch.setattr(binary_networks, "RECIPES", (FLOAT,))
    monkeypatch.setattr(binary_networks, "peer_files", lambda files: {})
    seen = []
    rows = binary_networks.measure_memory(Network("tiny", tiny, 12), tmp_path, 0, lambda: seen.append(1))
    assert len(seen) == 2
    found = {row.metric: row.value for row in rows}
    for name in ("ends fp32", "fxpress, float network"):
        assert 50 < found[f"{name} | of it before loading MB"] < found[f"{name} | peak MB"] < 4000
    assert {row.case for row in rows} == {"tiny, memory"}


def test_the_networks_are_those_that_were_asked_for():
    counts = {network.name: sum(p.numel() for p in network.make().parameters()) for network in binary_networks.NETWORKS}
    assert counts == {"vgg-small": 4_660_106, "resnet18": 11_689_512, "resnet56": 853_018}
    assert {network.name: network.faster for network in binary_networks.NETWORKS} == {
        "vgg-small": {"better int8": 2.5},
        "resnet18": {"better int8": 2.0, "torch fp32": 12.0},
        "resnet56": {},
    }


def test_parts_by_name(tmp_path):
    names = [job.name for job in binary.jobs(tmp_path, 3, 0, None, quick=False)]
    assert len(names) == len(set(names)) == 5 * 4 + 3 * 6
    picked = [job.name for job in binary.jobs(tmp_path, 3, 0, None, quick=True) if wanted(job, ["vgg", "FC"])]
    assert picked == ["FC 4096x4096, batch 1, 1 thread", "vgg-small, file", "vgg-small, batch 1, 1 thread"]
