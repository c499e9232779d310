"""`fxpress demo`: train a small residual network on real images, halve its cost, save it, and load it elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..ir.errors import FxpressError, OptionError
from ..passes.compile import Compiled, compile  # noqa: A004
from ..passes.report import Row
from ..runtime.data import Data, load_data
from ..runtime.measure import evaluate
from ..runtime.training import TrainSettings, train
from .demo_model import ResidualNet


@dataclass(frozen=True)
class Plan:
    """How the demo treats a data set so that it ends within minutes on a small machine.

    Args:
        image_size: height and width of the images.
        epochs: of the first training.
        limit: training images to use; None for all.
    """

    image_size: int
    epochs: int
    limit: int | None = None


PLANS = {
    "digits": Plan(16, 8),
    "mnist": Plan(28, 3, 8_000),
    "fashion-mnist": Plan(28, 4, 8_000),
    "cifar10": Plan(32, 5, 8_000),
    "folder": Plan(64, 5, 4_000),
}
"""By the name of the data set."""


def run_demo(
    out: Path,
    *,
    data: str = "digits",
    epochs: int | None = None,
    limit: int | None = None,
    pipeline: Path | None = None,
    seed: int = 0,
    console: Console | None = None,
) -> Compiled:
    """Train, compile, report, save, and evaluate the file in a fresh process.

    All on one thread: layers this small gain little from more, and where other programs want the cores, threads that
    wait for each other made it ten times slower.

    Args:
        out: the `.fxp` file to write.
        data: DATA as `load_data` takes it.
        epochs: of the first training; None takes the plan's.
        limit: training images to use; None takes the plan's.
        pipeline: a pipeline file; None takes the packaged `passes/pipelines/demo.yaml`.
        seed: of weights, order and training.
        console: where to print; standard output if None.

    Raises:
        DataError: the data cannot be read.
        FxpressError: the saved file does not give the same accuracy in the fresh process.
    """
    console, start = console or _console(), time.perf_counter()
    torch.set_num_threads(1)
    plan = _plan(data)
    images = load_data(data, image_size=plan.image_size, limit=limit or plan.limit, seed=seed)
    example, classes = _look_at(images)

    console.print(f"[bold]1. Train[/] a residual network on {data}, images {tuple(example.shape[1:])}")
    network = _train(images, example.shape[1], classes, epochs or plan.epochs, seed, console)

    console.print("\n[bold]2. Compile[/] it: fold batch norms, prune to half the MACs, distil, emit")
    with as_file(files("fxpress.passes") / "pipelines" / "demo.yaml") as packaged:
        compiled = compile(network, pipeline or packaged, example, data=images, seed=seed)
    console.print(compiled.report)
    console.print()
    console.print(_before_and_after(compiled.report.rows[0], compiled.report.rows[-1]))

    compiled.save(out)
    console.print(f"\n[bold]3. Saved[/] {out}, {out.stat().st_size:,} bytes")
    console.print(f"\n[bold]4. Load[/] it in a fresh process: fxpress evaluate {out} --data {data}")
    _compare(compiled.report.rows[-1].accuracy, evaluate_elsewhere(out, data), console)
    console.print(f"\nThe demo took {time.perf_counter() - start:.0f} s. Next: fxpress view {out} --out view.html")
    return compiled


def evaluate_elsewhere(path: Path, data: str) -> float:
    """Accuracy, 0-1, of a saved network as a process finds it that knows the file alone.

    Raises:
        FxpressError: the process fails; with what it wrote.
    """
    command = [sys.executable, "-m", "fxpress.tools.cli", "evaluate", str(path), "--data", data, "--json", "-"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        raise FxpressError(f"`{' '.join(command[2:])}` failed: {done.stderr.strip() or done.stdout.strip()}")
    return float(json.loads(done.stdout)["accuracy"])


def _before_and_after(before: Row, after: Row) -> Table:
    """What the compilation changed, in five lines."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    for title in ("", "before", "after", "ratio"):
        table.add_column(title, justify="right" if title else "left")
    counts = {"parameters": "parameters", "MACs per image": "macs", "bytes on disk": "size_bytes"}
    for title, field in counts.items():
        old, new = getattr(before, field), getattr(after, field)
        table.add_row(title, f"{old:,}", f"{new:,}", f"{new / old:.3f}")
    if before.accuracy is not None and after.accuracy is not None:
        table.add_row("test accuracy", f"{before.accuracy:.2%}", f"{after.accuracy:.2%}", "")
    if after.latency_ms is not None and after.latency_ratio is not None:
        old_ms = after.latency_ms / after.latency_ratio
        table.add_row("latency, ms", f"{old_ms:.2f}", f"{after.latency_ms:.2f}", f"{after.latency_ratio:.3f}")
    return table


def _console() -> Console:
    """Standard output, as wide as the report where it is no terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=110)


def _plan(data: str) -> Plan:
    name = data.partition(":")[0]
    if name not in PLANS:
        raise OptionError(f"the demo has no plan for data {data!r}", hint=f"Data sets: {', '.join(PLANS)}.")
    return PLANS[name]


def _look_at(images: Data) -> tuple[Tensor, int]:
    """The first validation image as a batch of one, and the number of classes."""
    batches = list(images.need("val", who="the demo"))
    return batches[0][0][:1], max(int(targets.max()) for _, targets in batches) + 1


def _train(images: Data, channels: int, classes: int, epochs: int, seed: int, console: Console) -> ResidualNet:
    """The network to compile. The test images judge it afterwards, they do not choose the epoch."""
    torch.manual_seed(seed)
    network = ResidualNet(channels, classes)
    settings = TrainSettings(epochs=epochs, lr=0.1, keep="last")
    result = train(network, images, settings=settings, seed=seed, console=console, title="training")
    found = evaluate(network, images.need("val", who="the demo"))
    console.print(
        f"   {epochs} epochs in {result.seconds:.0f} s ({result.images_per_second:.0f} images/s): "
        f"{found.accuracy:.2%} of {found.images} test images right"
    )
    return network.eval()


def _compare(here: float | None, there: float, console: Console) -> None:
    if here != there:
        raise FxpressError(f"the saved file gives accuracy {there}, the compiled network {here}")
    console.print(f"   accuracy {there:.2%}, the same as before saving")
