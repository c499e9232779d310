"""The other engines: their files, made once, and what runs them, in every setting that may be the best one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from . import onnxruntime_engine, openvino_engine
from .engines import Engine


@dataclass(frozen=True)
class Files:
    """One network for the other engines.

    Args:
        onnx: ONNX, fp32.
        onnx_int8: way of quantising → ONNX, int8.
        openvino: OpenVINO, fp32.
        openvino_int8: OpenVINO, int8.
    """

    onnx: Path
    onnx_int8: dict[onnxruntime_engine.Int8, Path]
    openvino: Path
    openvino_int8: Path


def prepare_peers(module: nn.Module, images: Tensor, folder: Path) -> Files:
    """Export and quantise the module for this batch; files that the folder holds already are taken."""
    folder.mkdir(parents=True, exist_ok=True)
    ways = {how: folder / f"{how}.onnx" for how in onnxruntime_engine.ways(module)}
    files = Files(folder / "model.onnx", ways, folder / "model.xml", folder / "int8.xml")
    if not files.openvino_int8.exists():  # made last
        onnxruntime_engine.export(module, images, files.onnx)
        for how, target in ways.items():
            onnxruntime_engine.quantise(files.onnx, images, target, how)
        openvino_engine.convert(module, images, files.openvino)
        openvino_engine.quantise(files.openvino, images, files.openvino_int8)
    return files


def peer_engines(files: Files, images: Tensor, threads: int) -> Iterator[Engine]:
    """ONNX Runtime and OpenVINO on these files; with more threads than one, ONNX Runtime also with spinning ones."""
    for spin in (False, True) if threads > 1 else (False,):
        label = ", spinning" if spin else ""
        yield onnxruntime_engine.engine(f"ONNX Runtime fp32{label}", "float", files.onnx, images, threads, spin)
        for how, path in files.onnx_int8.items():
            yield onnxruntime_engine.engine(f"ONNX Runtime int8 {how}{label}", "int8", path, images, threads, spin)
    yield openvino_engine.engine("OpenVINO fp32", "float", files.openvino, images, threads, "f32")
    yield openvino_engine.engine("OpenVINO int8", "int8", files.openvino_int8, images, threads, "f32")
    yield openvino_engine.engine("OpenVINO int8, rest bf16", "int8", files.openvino_int8, images, threads, "bf16")
