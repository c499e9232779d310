"""ONNX Runtime as a peer: fp32, and int8 in the settings that are fastest on x86.

`quantize_static` with unsigned activations and signed per-channel weights (u8s8): the default, s8s8, takes two to three
times as long on x86. `reduce_range` (7-bit weights) is what CPUs without VNNI need. `quantize_dynamic` takes the range
of the activations at run time; its kernels exist for matrix products alone, so it is tried on linear layers only.
Sessions run without spinning threads by default: a spinning pool would take the core of whoever is measured next.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from .engines import Engine

Int8 = Literal["static", "static, 7 bit", "dynamic"]


def export(module: nn.Module, images: Tensor, path: Path) -> Path:
    """The module as an ONNX file for exactly this batch; weights inside the file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(module.eval(), (images,), dynamo=True, verbose=False, external_data=False)
    assert program is not None
    program.save(str(path))
    return path


def ways(module: nn.Module) -> tuple[Int8, ...]:
    """How a module may be quantised with hope of being fast."""
    convolves = any(isinstance(layer, nn.Conv2d) for layer in module.modules())
    return ("static", "static, 7 bit") if convolves else ("static", "static, 7 bit", "dynamic")


def quantise(source: Path, images: Tensor, target: Path, how: Int8) -> Path:
    """An int8 version of an exported file, calibrated on the images where that is needed."""
    from onnxruntime import quantization as quant

    logging.getLogger().setLevel(logging.ERROR)  # it asks for shape inference, which torch's exporter has done
    if how == "dynamic":
        quant.quantize_dynamic(
            _without_shapes(source), str(target), per_channel=True, weight_type=quant.QuantType.QInt8
        )
    else:
        quant.quantize_static(
            str(source),
            str(target),
            _calibration(source, images),
            activation_type=quant.QuantType.QUInt8,
            weight_type=quant.QuantType.QInt8,
            per_channel=True,
            reduce_range=how == "static, 7 bit",
        )
    return target


def engine(name: str, kind: Literal["float", "int8"], path: Path, images: Tensor, threads: int, spin: bool) -> Engine:
    """A file as something to time; inputs and outputs are bound, so that a call costs its kernels alone."""
    import onnxruntime

    session: Any = onnxruntime.InferenceSession(str(path), session_options(threads, spin), ["CPUExecutionProvider"])
    binding: Any = session.io_binding()
    value = onnxruntime.OrtValue.ortvalue_from_numpy(images.numpy())
    binding.bind_ortvalue_input(session.get_inputs()[0].name, value)
    binding.bind_output(session.get_outputs()[0].name)

    def run() -> None:
        session.run_with_iobinding(binding)

    def output() -> Tensor:
        run()
        return torch.from_numpy(np.array(binding.get_outputs()[0].numpy()))

    return Engine(name, kind, run, output)


def session_options(threads: int, spin: bool) -> Any:
    """Options of a session; with `spin` its threads wait actively inside a call and stop when it ends."""
    import onnxruntime

    options: Any = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spin)))
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def _calibration(source: Path, images: Tensor) -> Any:
    import onnx
    from onnxruntime.quantization import CalibrationDataReader

    name = onnx.load(str(source)).graph.input[0].name

    class Reader(CalibrationDataReader):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            self.batches: Iterator[dict[str, Any]] = iter([{name: images.numpy()}])

        def get_next(self) -> dict[str, Any] | None:
            return next(self.batches, None)

    return Reader()


def _without_shapes(source: Path) -> Any:
    """The model without the shapes of inner values, which `quantize_dynamic` would find contradicted by its own."""
    import onnx

    model = onnx.load(str(source))
    del model.graph.value_info[:]
    return model
