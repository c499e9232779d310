"""Peak memory of a process that loads a network's file and runs one image.

Each engine has a fresh interpreter that imports that engine alone. `peak` is the high-water mark of its resident memory
(VmHWM) at the end; `imported` is what it was before the file was opened: the engine's own code, not the network.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ...ir.errors import FxpressError
from .common import Row
from .peer_engines import Files
from .timed_rows import MEMORY
from .timing import Advance

Runner = Literal["fxpress", "torch", "onnxruntime", "openvino"]

_HEAD = """
import json, sys
def peak():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))
file, name, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
"""
_TAIL = """
print(json.dumps({"imported": imported, "peak": peak()}))
"""
_BODIES: dict[Runner, str] = {
    "fxpress": """
import torch, fxpress, fxpress.runtime.kernels
torch.set_num_threads(1)
imported = peak()
network = fxpress.load(file)
with torch.inference_mode():
    network(torch.ones(1, 3, size, size))
""",
    "torch": """
import torch, torchvision
from safetensors.torch import load_file
torch.set_num_threads(1)
imported = peak()
with torch.device("meta"):
    network = getattr(torchvision.models, name)(weights=None).eval()
network.load_state_dict(load_file(file), assign=True)
with torch.inference_mode():
    network(torch.ones(1, 3, size, size))
""",
    "onnxruntime": """
import numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
imported = peak()
session = onnxruntime.InferenceSession(file, options, ["CPUExecutionProvider"])
session.run(None, {session.get_inputs()[0].name: numpy.ones((1, 3, size, size), "float32")})
""",
    "openvino": """
import numpy, openvino
imported = peak()
settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
network = openvino.Core().compile_model(file, "CPU", settings)
network(numpy.ones((1, 3, size, size), "float32"))
""",
}


@dataclass(frozen=True)
class Peak:
    """High-water marks of one process in bytes.

    Args:
        imported: before the file was opened.
        peak: after the image.
    """

    imported: int
    peak: int


def peak_memory(runner: Runner, file: Path, network: str, size: int = 224) -> Peak:
    """Run one image of `size` in a fresh process.

    Args:
        runner: what loads the file.
        file: `.fxp`, `.safetensors`, `.onnx` or `.xml`.
        network: name in torchvision (for `torch`, whose file has no structure).

    Raises:
        FxpressError: the process failed; with the last line that it wrote.
    """
    program = _HEAD + _BODIES[runner] + _TAIL
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", program, str(file), network, str(size)],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["it wrote nothing"]
        raise FxpressError(f"{runner} could not run {file.name}: {last[0]}")
    return Peak(**json.loads(done.stdout.splitlines()[-1]))


def peer_files(files: Files) -> dict[str, tuple[Runner, Path]]:
    """Of the other engines' files of one image those whose memory is looked at, by the engine's name."""
    return {
        "ONNX Runtime fp32": ("onnxruntime", files.onnx),
        "ONNX Runtime int8 static": ("onnxruntime", files.onnx_int8["static"]),
        "OpenVINO int8": ("openvino", files.openvino_int8),
    }


def memory_rows(network: str, files: dict[str, tuple[Runner, Path]], size: int, advance: Advance) -> list[Row]:
    """Two rows per file: high-water marks of a process that loads it and runs one image, on one thread.

    Args:
        network: name, which for `torch` is that in torchvision.
        files: engine → what runs its file, and the file.
        size: of the image.
        advance: called after each file.
    """
    rows = []
    for name, (runner, path) in files.items():
        found = peak_memory(runner, path, network, size)
        for measure, number in zip(MEMORY, (found.peak, found.imported), strict=True):
            value, peer = (number / 1e6, None) if runner == "fxpress" else (None, number / 1e6)
            rows.append(Row(f"{network}, memory", f"{name} | {measure}", value, "MB (1e6 bytes)", peer))
        advance()
    return rows
