"""Does half of the MACs mean half of the time? Pruned ResNets against unpruned ones in the same engine.

    python -m fxpress.tools.bench.pruned_latency [--quick] [--json FILE]

Every variant is cut to 50 % of its MACs by `prune-channels` and emitted; the reference is the emitted network before
the cut. Both are timed in turns in one run (`runtime.measure.latency_ratio`). What counts is the speed-up divided by
the reduction of the MACs: 1 means that each multiplication that went took its time along. The sweep over `round_to` and
`scope` in torch eager says which widths the machine likes; the best of them is then timed in the other engines.

Weights are random, which is fair to latency at `scope: uniform`; at `scope: global` the widths are those that
magnitudes of random weights give, which is only an example of uneven widths.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...passes.compile import compile as compile_model
from ...passes.prune.prune_channels import PruneChannels
from ...runtime.measure import latency_ratio
from .common import Row, header, screen, show, write_rows
from .peer import count_macs
from .zoo import Subject, build

GOAL = 0.85
NETWORKS, QUICK = ("resnet18", "resnet50"), ("resnet18",)
ROUNDINGS, SCOPES, BATCHES = (1, 8, 16, 32), ("uniform", "global"), (1, 8)


@dataclass(frozen=True)
class Variant:
    """A pruned and emitted network."""

    scope: str
    round_to: int
    module: nn.Module
    macs_left: float

    def __str__(self) -> str:
        return f"{self.scope}, round_to {self.round_to}"


def main() -> None:
    """Sweep, then the other engines, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="ResNet-18, batch 1, uniform only")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [header(options.seed)]
    for name in QUICK if options.quick else NETWORKS:
        subject = build(f"torchvision:{name}", seed=options.seed)
        rows += measure(subject, quick=options.quick, rounds=options.rounds)
        if options.json:
            write_rows(options.json, rows)
    show(rows, "Speed-up over reduction of MACs, at 50 % of the MACs, one thread", screen())


def measure(subject: Subject, *, quick: bool, rounds: int) -> list[Row]:
    """Rows of one network: every variant in eager mode, the best in every engine."""
    reference = compile_model(subject.model, ["emit"], subject.image, verify=False).module
    scopes = SCOPES[:1] if quick else SCOPES
    variants = [make_variant(subject, scope, step) for scope in scopes for step in ROUNDINGS]
    rows = []
    for batch in BATCHES[:1] if quick else BATCHES:
        images = subject.image.repeat(batch, 1, 1, 1)
        case = f"{subject.name.partition(':')[2]}, batch {batch}"
        swept = {}
        for variant in variants:
            swept[variant] = _row(f"{case}, torch eager, {variant}", variant, reference, images, rounds)
        best = max(swept, key=lambda variant: float(swept[variant][-1].value))
        rows += [row for found in swept.values() for row in found]
        rows.append(_judged(f"{case}, torch eager", best, float(swept[best][-1].value)))
        for engine, prepare in engines():
            pair = prepare(best.module, images), prepare(reference, images)
            found = _row(f"{case}, {engine}, {best}", best, pair[1], images, rounds, pair[0])
            rows += [*found, _judged(f"{case}, {engine}", best, float(found[-1].value))]
    return rows


def make_variant(subject: Subject, scope: str, round_to: int) -> Variant:
    """Cut to half of the MACs, and emit."""
    prune = PruneChannels.model_validate({"budget": {"macs": 0.5}, "scope": scope, "round_to": round_to})
    module = compile_model(subject.model, [prune, "emit"], subject.image, verify=False).module
    return Variant(
        scope, round_to, module, count_macs(module, subject.image) / count_macs(subject.model, subject.image)
    )


def _row(
    case: str, variant: Variant, reference: nn.Module, images: Tensor, rounds: int, candidate: nn.Module | None = None
) -> list[Row]:
    latency = latency_ratio(variant.module if candidate is None else candidate, reference, images, rounds=rounds)
    return [
        Row(case, "MACs left", variant.macs_left, "share"),
        Row(case, "latency", latency.candidate_ms, "ms", latency.reference_ms),
        Row(case, "latency ratio", latency.ratio, f"share [{latency.ratio_low:.3f}, {latency.ratio_high:.3f}]"),
        Row(case, "speed-up / MAC reduction", variant.macs_left / latency.ratio, "ratio"),
    ]


def _judged(case: str, best: Variant, value: float) -> Row:
    return Row(f"summary: {case}", f"best: {best}", value, "ratio", None, f"≥ {GOAL}", value >= GOAL)


Prepare = Callable[[nn.Module, Tensor], nn.Module]


def engines() -> Iterator[tuple[str, Prepare]]:
    """Engines beside torch eager that are installed."""
    if shutil.which("c++") or shutil.which("g++"):
        yield "inductor, frozen", _inductor
    if importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnxscript"):
        yield "ONNX Runtime", _OnnxRuntime


def _inductor(module: nn.Module, images: Tensor) -> nn.Module:
    import torch._inductor.config as config

    config.freezing = True
    compiled: Any = torch.compile(module.eval())
    with torch.inference_mode():
        compiled(images)  # compiles here, outside the clock
    wrapped: nn.Module = compiled
    return wrapped


class _OnnxRuntime(nn.Module):
    """A module exported to ONNX, run on one thread."""

    def __init__(self, module: nn.Module, images: Tensor) -> None:
        import onnxruntime

        super().__init__()
        program = torch.onnx.export(module.eval(), (images,), dynamo=True, verbose=False)
        assert program is not None
        options: Any = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session: Any = onnxruntime.InferenceSession(
            program.model_proto.SerializeToString(), options, ["CPUExecutionProvider"]
        )
        self._input = self._session.get_inputs()[0].name

    def forward(self, images: Tensor) -> Tensor:
        """Logits of a batch of images."""
        return torch.from_numpy(self._session.run(None, {self._input: images.numpy()})[0])


if __name__ == "__main__":
    main()
