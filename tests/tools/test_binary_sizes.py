"""Sizes of binarized networks: bytes by hand, and the form of the command."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from fxpress.ir.trace import trace
from fxpress.tools.bench import binary_sizes
from torch import nn


def tiny() -> nn.Module:
    """One layer between the ends, of 64 x 32 x 9 weights."""
    first = (nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
    middle = (nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
    return nn.Sequential(*first, *middle, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5))


def test_bytes_of_weights_and_layers() -> None:
    rows = binary_sizes.sizes("tiny", trace(tiny().eval(), (torch.randn(1, 3, 12, 12),)), "float", "float", 1.5)
    found = {row.metric: row for row in rows}
    middle = 64 * 32 * 9
    assert found["weights, float32"].value == 4 * (3 * 32 * 9 + middle + 64 * 5)
    layers = found["1 binary layers: bits and scales"].value
    assert layers == middle / 8 + 4 * 64
    assert found["layers | times smaller"].value == 4 * middle / layers
    assert layers < found["packed, with norms and quantizers"].value < 2 * layers
    whole = found["whole file | times smaller"]
    assert whole.value == found["weights, float32"].value / found["whole file"].value
    assert (whole.goal, whole.met) == ("≥ 1.5", round(whole.value, 1) >= 1.5)


def test_smaller_ends_make_smaller_files() -> None:
    files = []
    for first, last in (("float", "float"), ("int8", "int8"), ("binary", "binary")):
        graph = trace(tiny().eval(), (torch.randn(1, 3, 12, 12),))
        files.append({row.metric: row for row in binary_sizes.sizes("tiny", graph, first, last, 0)}["whole file"].value)
    assert files == sorted(files, reverse=True)
    assert len(set(files)) == 3


def test_the_command_writes_a_row_per_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binary_sizes, "NETWORKS", {"tiny": (tiny, 12, {"as it is": ("float", "float", 0.0)})})
    monkeypatch.setattr(sys, "argv", ["binary_sizes", "--json", str(tmp_path / "sizes.json")])
    binary_sizes.main()
    head, *rows = json.loads((tmp_path / "sizes.json").read_text())
    assert head["case"] == "header"
    assert {row["case"] for row in rows} == {"tiny, as it is"}
    assert len(rows) == 7
