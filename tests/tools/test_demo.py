"""The demo from end to end: small here, whole among the slow tests."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
import torch
from fxpress.ir.errors import FxpressError, OptionError
from fxpress.tools import demo
from fxpress.tools.demo_model import ResidualBlock, ResidualNet
from rich.console import Console

import fxpress


def test_the_network_has_identity_and_projection_shortcuts():
    network = ResidualNet(channels=3, classes=7, widths=(8, 16), blocks=2)
    assert network(torch.randn(2, 3, 16, 16)).shape == (2, 7)
    blocks = [block for block in network.blocks if isinstance(block, ResidualBlock)]
    assert [len(list(block.shortcut.parameters())) for block in blocks] == [0, 0, 3, 0]
    assert network.blocks(network.stem(torch.randn(2, 3, 16, 16))).shape == (2, 16, 8, 8)


def test_a_small_demo(tmp_path):
    pipeline = tmp_path / "small.yaml"
    pipeline.write_text(
        "passes:\n  - fold-batchnorm\n  - prune-channels: {budget: {macs: 0.5}, round_to: 8}\n"
        "  - distill: {epochs: 1, keep: last}\n  - emit\n"
    )
    out, text = tmp_path / "demo.fxp", io.StringIO()
    console = Console(file=text, width=120)
    compiled = demo.run_demo(out, epochs=1, limit=256, pipeline=pipeline, console=console)
    before, after = compiled.report.rows[0], compiled.report.rows[-1]
    assert 0.48 < after.macs / before.macs <= 0.5
    assert after.parameters < before.parameters
    assert after.size_bytes < 0.75 * before.size_bytes
    assert after.latency_ratio is not None
    loaded = fxpress.load(out)
    inputs = torch.randn(3, 1, 16, 16)
    assert torch.equal(loaded(inputs), compiled(inputs))
    written = text.getvalue()
    for words in ("1. Train", "2. Compile", "3. Saved", "4. Load", "test accuracy", "latency, ms", "MACs per image"):
        assert words in written
    assert f"accuracy {after.accuracy:.2%}, the same as before saving" in written


def test_what_may_go_wrong(tmp_path):
    with pytest.raises(OptionError, match=r"no plan for data 'imagenet'. Data sets: digits, mnist"):
        demo.run_demo(tmp_path / "demo.fxp", data="imagenet")
    (tmp_path / "broken.fxp").write_bytes(b"not a network")
    with pytest.raises(FxpressError, match=r"evaluate .*broken.fxp.* failed: .*broken.fxp"):
        demo.evaluate_elsewhere(tmp_path / "broken.fxp", "digits")


@pytest.mark.slow
def test_the_whole_demo(tmp_path):
    out = tmp_path / "demo.fxp"
    command = [sys.executable, "-m", "fxpress.tools.cli", "demo", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    before, after = (fxpress.load(out).report.rows[index] for index in (0, -1))
    assert before.accuracy > 0.97
    assert after.accuracy > before.accuracy - 0.015
    assert 0.48 < after.macs / before.macs <= 0.5
    assert after.latency_ratio < 0.75
    assert f"accuracy {after.accuracy:.2%}, the same as before saving" in done.stdout
