"""OpenVINO as a peer: int8 by NNCF, in latency mode; what stays float in fp32 or in bf16."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .engines import Engine

Precision = Literal["f32", "bf16"]


def convert(module: nn.Module, images: Tensor, path: Path) -> Path:
    """The module as an OpenVINO file (`.xml` with `.bin` beside it) for exactly this batch, in fp32."""
    import openvino

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = openvino.convert_model(module.eval(), example_input=images, input=[tuple(images.shape)])
    openvino.save_model(model, path, compress_to_fp16=False)
    return path


def quantise(source: Path, images: Tensor, target: Path) -> Path:
    """An int8 version of a converted file, by `nncf.quantize` calibrated on the images."""
    import nncf
    import openvino

    logging.getLogger("nncf").setLevel(logging.ERROR)
    model = openvino.Core().read_model(source)
    with contextlib.redirect_stdout(io.StringIO()):  # its progress bars
        quantised = nncf.quantize(model, nncf.Dataset([images.numpy()]), subset_size=1)
    openvino.save_model(quantised, target, compress_to_fp16=False)
    return target


def engine(
    name: str, kind: Literal["float", "int8"], path: Path, images: Tensor, threads: int, precision: Precision
) -> Engine:
    """A file as something to time: input set once, output shared."""
    import openvino

    request = compile_file(path, threads, precision).create_infer_request()
    request.set_input_tensor(openvino.Tensor(images.numpy(), shared_memory=True))

    def output() -> Tensor:
        request.infer(share_outputs=True)
        return torch.from_numpy(request.get_output_tensor().data.copy())

    return Engine(name, kind, lambda: request.infer(share_outputs=True), output)


def compile_file(path: Path, threads: int, precision: Precision) -> Any:
    """The network compiled for latency on this many threads."""
    import openvino

    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
    return openvino.Core().compile_model(path, "CPU", {**settings, "INFERENCE_PRECISION_HINT": precision})
