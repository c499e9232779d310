"""One layer on every engine: fxpress in its settings, torch, ONNX Runtime and OpenVINO in theirs."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from . import pq_onnxruntime, pq_openvino
from .common import Row
from .pq_cases import Case, Setting, dense_layer, random_layer
from .pq_engines import Engine, relative_distance, torch_engine
from .pq_rows import Goals, rows_of
from .pq_timing import Advance, Cache, take_turns

CACHES: tuple[Cache, ...] = ("warm", "cold")


@dataclass(frozen=True)
class Load:
    """What is asked of a network: `batch` images on `threads` threads."""

    batch: int
    threads: int

    def __str__(self) -> str:
        return f"batch {self.batch}, {self.threads} thread{'s' if self.threads > 1 else ''}"


LOADS = tuple(Load(batch, threads) for batch in (1, 8) for threads in (1, 2))


def measure_layer(case: Case, load: Load, folder: Path, rounds: int, advance: Advance) -> list[Row]:
    """Rows of one layer under one load, warm and cold.

    Args:
        folder: keeps the files of the other engines from one load to the next.
        rounds: of a warm measurement; a cold one takes half as many.
        advance: called after each round.
    """
    images = case.images(load.batch)
    torch.set_num_threads(load.threads)
    ours = {setting: random_layer(case.layer, setting) for setting in case.settings}
    dense = dense_layer(ours[case.settings[0]])
    peers = list(peer_engines(dense, images, load.threads, folder / f"{case.name}, batch {load.batch}"))
    engines = [torch_engine(name_of(setting), "pq", layer, images) for setting, layer in ours.items()]
    distances = _distances(peers, dense, images)
    for engine, layer in zip(engines, ours.values(), strict=True):
        distances |= _distances([engine], dense_layer(layer), images)
    rows = []
    for cache in CACHES:
        times = take_turns([*engines, *peers], rounds if cache == "warm" else -(-rounds // 2), cache, advance)
        goals = _goals(case.settings, load, cache)
        rows += rows_of(f"{case.name}, {load}, {cache}", [*engines, *peers], times, distances, goals, load.threads)
    gc.collect()
    return rows


def name_of(setting: Setting) -> str:
    """Name of a setting among the engines."""
    return f"fxpress {setting}"


def peer_engines(module: nn.Module, images: Tensor, threads: int, folder: Path) -> Iterator[Engine]:
    """The module in torch, ONNX Runtime (fp32, int8) and OpenVINO (fp32, int8), each in every sensible setting."""
    yield torch_engine("torch fp32", "float", module, images)
    folder.mkdir(parents=True, exist_ok=True)
    yield from _onnxruntime(module, images, threads, folder)
    yield from _openvino(module, images, threads, folder)


def _onnxruntime(module: nn.Module, images: Tensor, threads: int, folder: Path) -> Iterator[Engine]:
    source = folder / "model.onnx"
    if not source.exists():
        pq_onnxruntime.export(module, images, source)
    spins = (False, True) if threads > 1 else (False,)
    for spin in spins:
        label = ", spinning" if spin else ""
        yield pq_onnxruntime.engine(f"ONNX Runtime fp32{label}", "float", source, images, threads, spin)
        for how in pq_onnxruntime.ways(module):
            target = folder / f"{how}.onnx"
            if not target.exists():
                pq_onnxruntime.quantise(source, images, target, how)
            yield pq_onnxruntime.engine(f"ONNX Runtime int8 {how}{label}", "int8", target, images, threads, spin)


def _openvino(module: nn.Module, images: Tensor, threads: int, folder: Path) -> Iterator[Engine]:
    source, target = folder / "model.xml", folder / "int8.xml"
    if not target.exists():
        pq_openvino.convert(module, images, source)
        pq_openvino.quantise(source, images, target)
    yield pq_openvino.engine("OpenVINO fp32", "float", source, images, threads, "f32")
    yield pq_openvino.engine("OpenVINO int8", "int8", target, images, threads, "f32")
    yield pq_openvino.engine("OpenVINO int8, rest bf16", "int8", target, images, threads, "bf16")


def _distances(engines: Sequence[Engine], dense: nn.Module, images: Tensor) -> dict[str, float]:
    """Relative max-norm of each engine's output to that of the decoded layer in double precision."""
    with torch.inference_mode():
        expected = dense.double()(images.double())
        dense.float()
    return {engine.name: relative_distance(expected, engine.output()) for engine in engines}


def _goals(settings: Sequence[Setting], load: Load, cache: Cache) -> Goals:
    if load.threads > 1:
        return {}
    wanted = {name_of(setting): setting.goals.get((load.batch, cache)) for setting in settings}
    return {name: (goal, "better int8") for name, goal in wanted.items() if goal is not None}
