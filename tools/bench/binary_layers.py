"""Binary layers of the benchmark: shapes, goals, and the engines on them."""

from __future__ import annotations

import copy
import gc
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ...runtime import kernels
from ...runtime.layers import HalfWaveQuantizer
from . import larq_engine
from .common import Row
from .engines import Engine, double_distances, torch_engine
from .larq_engine import Larq
from .layer_case import LayerCase
from .loads import Load
from .peer_engines import peer_engines, prepare_peers
from .timed_rows import INT8, TORCH, Goals, rows_of
from .timing import CACHES, Advance, take_turns

OURS = "fxpress binary"


@dataclass(frozen=True)
class Case(LayerCase):
    """A layer, its input, and what is wanted.

    Args:
        goals: cache → rival → how many times faster is wanted at batch 1 on one thread.
    """

    goals: dict[str, dict[str, float]]


def cases(*, quick: bool = False) -> tuple[Case, ...]:
    """3×3 convolutions 64 channels on 56² to 512 on 7², and FC 4096²; `quick`: 256 channels and the FC."""
    wanted = {64: 3.0, 128: 4.0, 256: 5.0, 512: 5.0}
    made = [
        Case(
            f"conv 3x3 {width}, {size}x{size}",
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            (width, size, size),
            {"warm": {INT8: wanted[width], TORCH: 10.0}},
        )
        for width, size in ((64, 56), (128, 28), (256, 14), (512, 7))
    ]
    full = Case(
        "FC 4096x4096",
        nn.Linear(4096, 4096, bias=False),
        (4096,),
        {"warm": {INT8: 25.0, TORCH: 10.0}, "cold": {INT8: 5.0}},
    )
    return (made[2], full) if quick else (*made, full)


class Kernel(nn.Module):
    """float32 → levels → sums → float32: one call of the operator, bound as layers bind theirs.

    Args:
        weight: ±1, (out, in) or (out, in, kh, kw).
        scale: α Δ per output.
        quantizer: whose levels the input takes.
    """

    def __init__(self, weight: Tensor, scale: Tensor, quantizer: HalfWaveQuantizer) -> None:
        super().__init__()
        linear = weight.dim() == 2
        layout = (kernels.prepare_binary_linear if linear else kernels.prepare_binary_conv2d)(weight > 0)
        thresholds, outputs, kernel = torch.tensor(quantizer.thresholds), len(weight), list(weight.shape[2:])
        self.bound: kernels.Bound
        if linear:
            self.bound = kernels.BoundBinaryLinear(layout, scale, None, thresholds, outputs)
        else:
            window = kernel, [1, 1], [size // 2 for size in kernel], [1, 1]
            self.bound = kernels.BoundBinaryConv2d(layout, scale, None, thresholds, outputs, *window, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) or (N, C, H, W) → the layer's output."""
        return self.bound(x)


def measure_layer(case: Case, load: Load, folder: Path, rounds: int, larq: Larq | None, advance: Advance) -> list[Row]:
    """Rows of one layer under one load, warm and cold; the peers run the layer with the weights ±α, dense.

    Args:
        folder: keeps the files of the other engines from one load to the next.
        rounds: of a warm measurement; a cold one takes half as many.
        larq: runs convolutions too, warm, if it is there.
        advance: called after each round.
    """
    torch.manual_seed(load.batch)
    torch.set_num_threads(load.threads)
    quantizer, layer = HalfWaveQuantizer(), copy.deepcopy(case.layer)  # the case is measured under other loads as well
    images = torch.randn(load.batch, *case.shape)
    sign = torch.where(layer.weight >= 0, 1.0, -1.0)
    alpha = layer.weight.detach().abs().flatten(1).mean(1)
    with torch.no_grad():
        layer.weight.copy_(sign * alpha.view(-1, *[1] * (sign.dim() - 1)))
    ours = torch_engine(OURS, "fxpress", Kernel(sign, alpha * quantizer.levels[0], quantizer), images)
    files = prepare_peers(layer, quantizer(images), folder / f"{case.name}, batch {load.batch}")
    levels = quantizer(images)
    peers = [torch_engine(TORCH, "float", layer, levels), *peer_engines(files, levels, load.threads)]
    engines = [ours, *peers]
    distances = double_distances(engines, layer, levels)
    apart: list[Engine] = []
    if larq is not None and isinstance(layer, nn.Conv2d):
        apart = larq.engines(layer, levels, load.threads)
        distances |= larq_engine.distances(apart, layer, levels)
    rows = []
    for cache in CACHES:
        timed = [*engines, *apart] if cache == "warm" else engines
        times = take_turns(timed, rounds if cache == "warm" else -(-rounds // 2), cache, advance)
        goals: Goals = {OURS: case.goals.get(cache, {})} if (load.batch, load.threads) == (1, 1) else {}
        rows += rows_of(f"{case.name}, {load}, {cache}", timed, times, distances, goals, load.threads)
    gc.collect()
    return rows
