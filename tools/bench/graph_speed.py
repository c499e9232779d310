"""How long it takes to understand a network and cut it, against Torch-Pruning, in turns in one run.

    python -m fxpress.tools.bench.graph_speed [--quick] [--rounds N] [--json FILE]

The same job on both sides, on one thread: half of the channels of every group, by L2 magnitude, without rounding.

    fxpress        trace   `fxpress.trace(model, image)`: torch.export, raising to layers
                   label   `find_groups`: labels, unions, groups
                   cut     `PruneChannels(ratio=0.5, scope="uniform", criterion="l2").run`, groups cached, without the
                           oracle: importance, choice, slicing, rewriting, lint
    Torch-Pruning  graph   `BasePruner(...)`: DependencyGraph, its groups, initial counts
                   prune   `pruner.step()`: importance, choice, slicing

The oracle (masked against cut) is no part of the comparison, for Torch-Pruning has none; its time is a row of its own.
Copies of the network are made outside the clock. Seconds are CPU time of the process.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...ir.graph import Graph
from ...ir.groups import find_groups
from ...ir.trace import trace
from ...passes.base import Context
from ...passes.prune.prune_channels import PruneChannels
from .common import Row, header, screen, show, write_rows
from .peer import ATTEMPTS, make_pruner
from .zoo import Subject, build

CASES = ("resnet18", "resnet50", "mobilenet_v3_large", "efficientnet_b0", "densenet121", "densenet169", "convnext_tiny")
QUICK = ("resnet18", "mobilenet_v3_large")

Times = dict[str, float]


def main() -> None:
    """Measure every case and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two networks, two rounds")
    parser.add_argument("--rounds", type=int, help="rounds of which the median counts (default 5)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rounds = options.rounds or (2 if options.quick else 5)
    rows = [header(options.seed)]
    for name in QUICK if options.quick else CASES:
        rows += compare(build(f"torchvision:{name}", seed=options.seed), rounds)
        if options.json:
            write_rows(options.json, rows)
    show(rows, f"Trace, label, cut: seconds, median of {rounds} rounds in turns", screen())


def compare(subject: Subject, rounds: int) -> list[Row]:
    """Rows of one network; both sides run once per round, after one round that only warms up."""
    ours, peer = [], []
    for _ in range(rounds + 1):
        ours.append(time_fxpress(subject))
        peer.append(time_torch_pruning(subject))
    return rows_of(subject, _medians(ours[1:]), _medians(peer[1:]))


def _medians(rounds: list[Times]) -> Times:
    return {phase: statistics.median(times[phase] for times in rounds) for phase in rounds[0]}


def time_fxpress(subject: Subject) -> Times:
    """Seconds of trace, label, cut and oracle, and of one forward pass of the graph on the same image."""
    graph, trace_seconds = timed(lambda: trace(subject.model, subject.image))
    forward_seconds = _forward_seconds(subject)
    _, label_seconds = timed(lambda: graph.analyse(find_groups))
    one, other = graph.copy(), graph.copy()
    _, cut_seconds = timed(lambda: _cut(one, graph, verify=False))
    _, proven_seconds = timed(lambda: _cut(other, graph, verify=True))
    return {
        "trace": trace_seconds,
        "label": label_seconds,
        "cut": cut_seconds,
        "oracle": max(0.0, proven_seconds - cut_seconds),
        "forward": forward_seconds,
    }


def _cut(graph: Graph, original: Graph, *, verify: bool) -> None:
    graph._analyses = dict(original._analyses)  # labels are timed by themselves
    PruneChannels(ratio=0.5, scope="uniform", criterion="l2").run(graph, Context(original=original, verify=verify))


def _forward_seconds(subject: Subject) -> float:
    """One forward pass of the same image, the fastest of two."""
    with torch.no_grad():
        return min(timed(lambda: subject.model(subject.image))[1] for _ in range(2))


def time_torch_pruning(subject: Subject) -> Times:
    """Seconds of graph building and of pruning."""
    model = copy.deepcopy(subject.model)
    with torch.no_grad():
        output = model(subject.image)
    pruner, graph_seconds = timed(lambda: make_pruner(model, subject.image, output, ATTEMPTS[1]))
    _, prune_seconds = timed(pruner.step)
    return {"graph": graph_seconds, "prune": prune_seconds}


def timed(task: Callable[[], Any]) -> tuple[Any, float]:
    """A task's result and its seconds of CPU time (one thread; the machine may be shared).

    As in `timeit`, the garbage of what ran before is collected first and the collector waits: a full collection of what
    an export leaves behind takes longer than most of these tasks, and would fall on whichever comes next.
    """
    gc.collect()
    gc.disable()
    start = time.process_time()
    try:
        result = task()
    finally:
        seconds = time.process_time() - start
        gc.enable()
    return result, seconds


def rows_of(subject: Subject, ours: Times, peer: Times) -> list[Row]:
    """Seconds of each phase, then what is wanted of their sums."""
    name = subject.name.partition(":")[2]
    label_cut, whole = ours["label"] + ours["cut"], ours["trace"] + ours["label"] + ours["cut"]
    theirs = peer["graph"] + peer["prune"]
    wanted = 10.0 if name.startswith("densenet") else 3.0
    rows = [Row(name, phase, ours[phase], "s") for phase in ("trace", "label", "cut", "oracle", "forward")]
    rows += [Row(name, phase, None, "s", peer[phase]) for phase in ("graph", "prune")]
    speedup = theirs / label_cut
    rows.append(Row(name, "label + cut", label_cut, "s", theirs))
    rows.append(Row(name, "label + cut, speed-up", speedup, "x", 1.0, f"≥ {wanted:.0f}x", speedup >= wanted))
    large = is_large(subject.model)
    goal, met = ("no slower (large)", whole <= theirs) if large else (None, None)
    rows.append(Row(name, "trace + label + cut", whole, "s", theirs, goal, met))
    cheap = ours["label"] < ours["forward"]
    rows.append(Row(name, "label / forward pass", ours["label"] / ours["forward"], "x", None, "< 1", cheap))
    return rows


def is_large(model: nn.Module) -> bool:
    """Over 20 M parameters or 100 layers, counted as in DenseNet-121: convolutions and linear layers."""
    layers = sum(isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)) for module in model.modules())
    return layers > 100 or sum(parameter.numel() for parameter in model.parameters()) > 20e6


if __name__ == "__main__":
    main()
