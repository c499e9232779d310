"""How long does `product-quantize` take, and is its k-means any better than scikit-learn's or faiss's?

    python -m fxpress.tools.bench.pq_learner [--quick] [--json FILE] [--threads N]

*k-means.* Sub-spaces of AlexNet's layers in the paper's settings (Wu et al. 2016), so many problems of one size that a
library which takes one at a time needs a loop. All begin from vectors drawn at random; libraries may take 25
iterations, ours 40 of which most see a quarter of the vectors; each stops by its own rule. Time is that of the process
(all its threads), and the distortion is told as a share of scikit-learn's on the same vectors.

*AlexNet.* All 61 M parameters of torchvision's AlexNet through the whole pass, from the graph to the graph: plain
k-means, error correction with the original inputs, and with accumulated error. Weights are random (nothing is
downloaded) and so are the images (blurred noise): the time depends on sizes alone, the errors say only that they fall.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from rich.console import Console
from torch import Tensor, nn

from ...ir.trace import trace
from ...passes.base import Context
from ...passes.progress import make_console
from ...passes.quantize.kmeans import kmeans
from ...passes.quantize.product_quantize import ProductQuantize
from ...passes.quantize.recipe import Kind
from ...passes.runner import run_pass
from ...runtime.data import Data
from .common import Row, header, screen, show, write_rows

ITERATIONS = 25
"""Of each library; ours takes most of its 40 on a quarter of the vectors."""
LIMIT = 600.0
"""Seconds that all of AlexNet may take."""


@dataclass(frozen=True)
class Problem:
    """k-means problems of one layer: so many sub-spaces of so many vectors of so many numbers, K codewords."""

    layer: str
    subspaces: int
    vectors: int
    width: int
    words: int

    def __str__(self) -> str:
        return f"{self.layer}: {self.subspaces} x {self.vectors} vectors of {self.width}, K={self.words}"


PROBLEMS = (
    Problem("fc6", 2304, 4096, 4, 32),
    Problem("fc8", 4096, 1000, 1, 16),
    Problem("conv3", 24, 9 * 384, 8, 128),
)


def main() -> None:
    """k-means, then AlexNet, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few sub-spaces, small images")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--images", type=int, default=512, help="calibration images of AlexNet")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [header(options.seed)]
    for problem in PROBLEMS:
        rows += compare(problem, limit=16 if options.quick else 128, seed=options.seed, threads=options.threads)
    kinds: tuple[Kind, ...] = ("accumulated",) if options.quick else ("none", "layer", "accumulated")
    for kind in kinds:
        images = 16 if options.quick else options.images
        rows += learn_alexnet(kind, images, options.seed, make_console())
        if options.json:
            write_rows(options.json, rows)
    show(rows, f"The learner of product-quantize, {options.threads} threads", screen())


# -- k-means --------------------------------------------------------------------------------------------------


def compare(problem: Problem, *, limit: int, seed: int, threads: int) -> list[Row]:
    """CPU seconds for the whole layer, and distortion, of ours and of each library that is installed.

    Args:
        problem: sizes.
        limit: measure on so many sub-spaces, and count for all of them.
        seed: of the vectors, which are normal, and of where all begin.
        threads: that libraries may use.
    """
    count = min(limit, problem.subspaces)
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(count, problem.vectors, problem.width, generator=generator)

    def ours(some: Tensor) -> float:
        drawn = torch.Generator().manual_seed(seed + 1)  # another seed: the vectors come from that one
        found = kmeans(some, problem.words, generator=drawn)
        return float(found.distortion.sum())

    tasks: dict[str, Callable[[Tensor], float]] = {"fxpress": ours}
    tasks["scikit-learn"] = lambda some: _sklearn(some, problem.words, seed)
    faiss = _find_faiss(threads)
    if faiss is not None:
        tasks["faiss"] = lambda some: _faiss(faiss, some, problem.words, seed)
    seconds, distortions = {}, {}
    for name, task in tasks.items():
        task(points[:1])  # what is loaded and compiled at first is not counted
        start = time.process_time()
        distortions[name] = task(points)
        seconds[name] = (time.process_time() - start) * problem.subspaces / count
    rows = []
    base = distortions["scikit-learn"]
    for name in list(tasks)[1:]:
        case = f"{problem}, {name}"
        rows.append(Row(case, "CPU time", seconds["fxpress"], "s", seconds[name]))
        mine, theirs = (round(distortions[who] / base, 4) for who in ("fxpress", name))
        rows.append(Row(case, "distortion", mine, "of scikit-learn's", theirs))
    return rows


def _sklearn(points: Tensor, words: int, seed: int) -> float:
    from sklearn.cluster import KMeans

    total = 0.0
    for number, some in enumerate(points.numpy()):
        found = KMeans(words, init="random", n_init=1, max_iter=ITERATIONS, random_state=seed + number).fit(some)
        total += float(found.inertia_)
    return total


def _find_faiss(threads: int) -> Any:
    try:
        import faiss
    except ImportError:
        return None
    faiss.omp_set_num_threads(threads)
    return faiss


def _faiss(faiss: Any, points: Tensor, words: int, seed: int) -> float:
    total = 0.0
    for number, some in enumerate(points.numpy()):
        options = {"niter": ITERATIONS, "seed": seed + number}
        options |= {"min_points_per_centroid": 1, "max_points_per_centroid": len(some)}  # no warning, no sampling
        learner = faiss.Kmeans(some.shape[1], words, **options)
        learner.train(some)
        distances, _ = learner.index.search(some, 1)
        total += float(distances.sum())
    return total


# -- AlexNet --------------------------------------------------------------------------------------------------


def learn_alexnet(correction: Kind, images: int, seed: int, console: Console) -> list[Row]:
    """Wall and CPU seconds of the pass on AlexNet in the paper's settings, and what it did to the error.

    Args:
        correction: `none`, `layer` or `accumulated`.
        images: of 224 x 224 for calibration.
        seed: of weights and images.
        console: shows progress.
    """
    graph = trace(_alexnet(seed), torch.zeros(1, 3, 224, 224))
    data = Data(calibration=_blurred_noise(images, seed))
    wall, cpu = time.perf_counter(), time.process_time()
    one = ProductQuantize(correction=correction, images=images)
    result, _ = run_pass(one, graph, Context(graph, data, console=console, verify=False))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    case = f"AlexNet, {correction}" + (f", {images} images" if correction != "none" else "")
    goal = f"below {LIMIT / 60:.0f} minutes" if correction != "none" else None
    bytes_ = result.metrics["weight_bytes"]
    rows = [
        Row(case, "wall time", wall, "s", goal=goal, met=None if goal is None else wall < LIMIT),
        Row(case, "CPU time", cpu, "s"),
        Row(case, "weights, times smaller", bytes_["before"] / bytes_["after"]),
    ]
    what = "response error, k-means → corrected"
    corrected = [layer for layer in result.metrics["layers"] if layer["after"] is not None]
    rows += [Row(f"{case}, {layer['layer']}", what, layer["after"], "", layer["before"]) for layer in corrected]
    return rows


def _alexnet(seed: int) -> nn.Module:
    from torchvision.models import alexnet

    torch.manual_seed(seed)
    network: nn.Module = alexnet(weights=None).eval()
    return network


def _blurred_noise(images: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of 32 images whose neighbouring pixels are alike, of unit variance."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for first in range(0, images, 32):
        count = min(32, images - first)
        small = torch.randn(count, 3, 28, 28, generator=generator)
        pixels = F.interpolate(small, size=224, mode="bilinear")
        batches.append((pixels / pixels.std(), torch.zeros(count, dtype=torch.long)))
    return batches


if __name__ == "__main__":
    main()
