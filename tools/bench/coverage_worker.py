"""One network, one side: build it, measure it, give the facts.

python -m fxpress.tools.bench.coverage_worker fxpress torchvision:resnet18      prints the facts of one network
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import signal
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .zoo import Subject, build, prepare

SIDES = ("fxpress", "torch-pruning")


@contextlib.contextmanager
def deadline(seconds: int) -> Iterator[None]:
    """Raise TimeoutError inside the body when it takes more than `seconds` of CPU time (the machine may be shared)."""

    def expire(*_: Any) -> None:
        raise TimeoutError(f"took more than {seconds} s of CPU time")

    previous = signal.signal(signal.SIGPROF, expire)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)


def measure(name: str, side: str, *, size: int | None, seed: int, limit: int, double: bool) -> dict[str, Any]:
    """Facts about one network on one side, and its kind."""
    subject = build(name, size=size, seed=seed)
    return _measure(subject, side, limit, double=double) | {"kind": subject.kind}


def _measure(subject: Subject, side: str, limit: int, *, double: bool) -> dict[str, Any]:
    timed = functools.partial(deadline, limit)
    if side == "torch-pruning":
        from . import peer

        return peer.measure(subject, timed)
    from . import coverage_fxpress

    return coverage_fxpress.measure(subject, timed, double=double)


def measure_task(task: tuple[str, str], **settings: Any) -> dict[str, Any]:
    """`measure` of a (network, side) pair; what cannot even be built says so."""
    warnings.simplefilter("ignore")
    try:
        return measure(*task, **settings)
    except Exception as error:  # reported as the network's result, the run goes on
        return {"cut": False, "reason": f"crash while building, {type(error).__name__}: {str(error)[:300]}"}


def warm_up(side: str) -> None:
    """Import what a side needs and run it once on a tiny network, so that no network pays for first-time imports."""
    layers = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(256, 8)]
    subject = prepare("warm-up", nn.Sequential(*layers), torch.randn(1, 3, 8, 8))
    facts = _measure(subject, side, 120, double=False)
    if not facts["cut"]:
        raise RuntimeError(f"{side} does not work at all: {facts['reason']}")


def main() -> None:
    """Measure one network and print its facts as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("name")
    parser.add_argument("--size", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, default=120)
    parser.add_argument("--double", action="store_true")
    options = vars(parser.parse_args())
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    facts = measure(options.pop("name"), options.pop("side"), **options)
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
