"""Every task in a process of its own, a few at a time, forked from one that has imported and warmed up already.

A crash, a hang or a full memory in one network then costs that network alone, and importing torch, torchvision and timm
(five seconds) is not paid for each.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

T = TypeVar("T")
Facts = dict[str, Any]


@dataclass
class _Running:
    process: BaseProcess
    task: Any
    until: float


def run_forked(
    work: Callable[[T], Facts], tasks: Sequence[T], *, jobs: int, patience: float
) -> Iterator[tuple[T, Facts]]:
    """Results as they come in.

    Args:
        work: what a process does with its task; its return value is pickled.
        tasks: one process each, started in order.
        jobs: processes at a time.
        patience: seconds by the wall clock after which a process is killed.

    Yields:
        (task, facts); the facts of a process that died or was killed say so under `reason`.
    """
    context = multiprocessing.get_context("fork")
    waiting = list(reversed(tasks))
    running: dict[Connection, _Running] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            task = waiting.pop()
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(work, task, sender), daemon=True)
            process.start()
            sender.close()
            running[receiver] = _Running(process, task, time.monotonic() + patience)
        ready = wait(list(running), timeout=1.0)
        late = [pipe for pipe, one in running.items() if time.monotonic() > one.until and pipe not in ready]
        for pipe in (*ready, *late):
            assert isinstance(pipe, Connection)
            one = running.pop(pipe)
            yield one.task, _collect(pipe, one, killed=pipe in late, patience=patience)


def _collect(pipe: Connection, one: _Running, *, killed: bool, patience: float) -> Facts:
    if killed:
        one.process.kill()
        facts: Facts = {"cut": False, "reason": f"stopped after {patience:.0f} s by the wall clock"}
    else:
        try:
            facts = pipe.recv()
        except EOFError:
            facts = {}
    one.process.join()
    pipe.close()
    return facts or {"cut": False, "reason": f"the process died with status {one.process.exitcode}"}


def _child(work: Callable[[T], Facts], task: T, sender: Connection) -> None:
    """Do the work quietly: what models print is not ours to show."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    sender.send(work(task))
    sender.close()
