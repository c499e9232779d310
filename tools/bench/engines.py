"""What can be timed: a network behind an engine, with its input in place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

Kind = Literal["float", "int8", "fxpress"]


@dataclass(frozen=True)
class Engine:
    """A network on one input.

    Args:
        name: engine and settings, as the table shows them.
        kind: `float` and `int8` are peers.
        run: one call.
        output: one call, and what came out.
    """

    name: str
    kind: Kind
    run: Callable[[], Any]
    output: Callable[[], Tensor]


def torch_engine(name: str, kind: Kind, module: nn.Module, images: Tensor) -> Engine:
    """A module in torch as it is (eager)."""
    module.eval()

    def run() -> Tensor:
        with torch.inference_mode():
            result: Tensor = module(images)
        return result

    return Engine(name, kind, run, run)


def relative_distance(reference: Tensor, output: Tensor) -> float:
    """Largest difference over the reference's largest value."""
    return float((reference.double() - output.double()).abs().max() / reference.double().abs().max())
