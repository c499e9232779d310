"""One layer on every engine: fxpress in its settings, torch, ONNX Runtime and OpenVINO in theirs."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path

import torch

from .common import Row
from .engines import double_distances, torch_engine
from .loads import Load
from .peer_engines import peer_engines, prepare_peers
from .pq_cases import Case, Setting, dense_layer, random_layer
from .timed_rows import INT8, TORCH, Goals, rows_of
from .timing import CACHES, Advance, Cache, take_turns


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
    files = prepare_peers(dense, images, folder / f"{case.name}, batch {load.batch}")
    peers = [torch_engine(TORCH, "float", dense, images), *peer_engines(files, images, load.threads)]
    engines = [torch_engine(name_of(setting), "fxpress", layer, images) for setting, layer in ours.items()]
    distances = double_distances(peers, dense, images)
    for engine, layer in zip(engines, ours.values(), strict=True):
        distances |= double_distances([engine], dense_layer(layer), images)
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


def _goals(settings: Sequence[Setting], load: Load, cache: Cache) -> Goals:
    if load.threads > 1:
        return {}
    wanted = {name_of(setting): setting.goals.get((load.batch, cache)) for setting in settings}
    return {name: {INT8: goal} for name, goal in wanted.items() if goal is not None}
