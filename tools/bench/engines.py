"""What can be timed: a network behind an engine, with its input in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

Kind = Literal["float", "int8", "binary", "fxpress"]


@dataclass(frozen=True)
class Engine:
    """A network on one input.

    Args:
        name: engine and settings, as the table shows them.
        kind: `fxpress`; of peers, what they compute with.
        run: one call, without gradients if the caller sees to it.
        output: one call, and what came out.
        clocked: calls → milliseconds of one, (CPU, wall), where it runs in a process of its own; None: in this one.
    """

    name: str
    kind: Kind
    run: Callable[[], Any]
    output: Callable[[], Tensor]
    clocked: Callable[[int], tuple[float, float]] | None = None


def torch_engine(name: str, kind: Kind, module: nn.Module, images: Tensor) -> Engine:
    """A module in torch as it is (eager)."""
    module.eval()

    def output() -> Tensor:
        with torch.inference_mode():
            result: Tensor = module(images)
        return result

    return Engine(name, kind, lambda: module(images), output)


def relative_distance(reference: Tensor, output: Tensor) -> float:
    """Largest difference over the reference's largest value."""
    return float((reference.double() - output.double()).abs().max() / reference.double().abs().max())


def double_distances(engines: Sequence[Engine], dense: nn.Module, images: Tensor) -> dict[str, float]:
    """Relative max-norm of each engine's output to that of a module in double precision."""
    with torch.inference_mode():
        expected = dense.double()(images.double())
        dense.float()
    return {engine.name: relative_distance(expected, engine.output()) for engine in engines}
