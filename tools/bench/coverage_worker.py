"""One network, one side, one process: builds it, measures it, prints the facts as the last line of standard output."""

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

from .zoo import build

MARK = "facts: "
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
    timed = functools.partial(deadline, limit)
    if side == "torch-pruning":
        from . import peer

        facts = peer.measure(subject, timed)
    else:
        from . import coverage_fxpress

        facts = coverage_fxpress.measure(subject, timed, double=double)
    return facts | {"kind": subject.kind}


def main() -> None:
    """Entry point of the process that `coverage.py` starts."""
    parser = argparse.ArgumentParser(description=__doc__)
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
    print(MARK + json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
