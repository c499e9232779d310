"""Two processes under torchrun share the images and learn what one learns; both hold the same network."""

from __future__ import annotations

import subprocess
import sys

import torch

SCRIPT = """
import os, sys
import torch
from torch import nn
from fxpress.ir.trace import trace
from fxpress.passes.base import Context
from fxpress.passes.quantize import learning
from fxpress.passes.quantize.product_quantize import ProductQuantize
from fxpress.passes.runner import run_pass
from fxpress.runtime.data import Data

torch.set_num_threads(1)
torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(2, 16, 3), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 32))
net = net.double().eval()
batches = [(torch.randn(n, 2, 6, 6, dtype=torch.float64), torch.zeros(n).long()) for n in (17, 16, 1)]
seen = []
real = learning.rows
learning.rows = lambda layer, x, *rest: seen.append(len(x)) or real(layer, x, *rest)
graph = trace(net, batches[0][0][:1])
one = ProductQuantize(subspace=4, codewords=8, last=None, linear={"codewords": 8}, sweeps=2)
result, _ = run_pass(one, graph, Context(graph, Data(calibration=batches)))
state = {name: tensor.detach() for name, tensor in graph.module.state_dict().items()}
torch.save({"state": state, "notes": result.notes, "seen": seen, "metrics": result.metrics},
           f"{sys.argv[1]}/{os.environ.get('RANK', '0')}.pt")
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()  # its threads may abort a process that ends before them
"""


def learned(folder, processes):
    folder.mkdir()
    (folder / "script.py").write_text(SCRIPT)
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *launch, str(folder / "script.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(processes)]


def test_two_processes_learn_what_one_learns(tmp_path):
    (alone,) = learned(tmp_path / "one", 1)
    first, second = learned(tmp_path / "two", 2)
    for name, tensor in first["state"].items():
        assert torch.equal(tensor, second["state"][name]), name
        torch.testing.assert_close(tensor, alone["state"][name], rtol=1e-6, atol=1e-8, msg=name)
    assert first["notes"] == second["notes"] == alone["notes"]
    assert "34 images" in alone["notes"][1]
    assert sum(first["seen"]) + sum(second["seen"]) == sum(alone["seen"]) == 3 * 34, "the work was shared"
    assert max(first["seen"]) == 9
