"""How many bytes a binarized network takes on disk, and which of its layers are what.

    python -m fxpress.tools.bench.binary_sizes [--json FILE]

Networks with random weights: sizes do not depend on their values. The whole file counts, with header and description
of the graph. `layers` is what their weights and one float32 scale per filter take, `packed` the same layers as `emit`
stores them: a bit a weight, and in place of scale, batch norm and quantizer three whole numbers per filter (or scale
and term where floats come out, and three thresholds per channel of a sum). The ratio is to float32 weights of
convolutions and linear layers, which is what the published numbers count: Zhang, Yan and Zhang 2021, "near 30".
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision.models import resnet18

from ...ir.graph import Graph
from ...ir.trace import trace
from ...passes.base import Context
from ...passes.binarize.binarize import Binarize
from ...passes.emit.emit import Emit
from ...passes.runner import run_pass
from ...runtime.artifact import save
from ...runtime.fxp.binary import stored_bytes
from ...runtime.layers import BinaryLayer, BinaryNetwork
from .accuracy_networks import vgg_small
from .common import Row, header, screen, show, write_rows


def vgg() -> nn.Module:
    """VGG-small as published: the linear layer reads all 4 x 4 positions, 4.657 million weights."""
    *body, _, _, _ = vgg_small(3, 1.0)
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(512 * 16, 10))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, dict[str, tuple[str, str, float]]]] = {
    "VGG-small": (vgg, 32, {
        "first and last layer float32": ("float", "float", 19.9),
        "first and last layer 8 bits": ("int8", "int8", 27.3),
        "first layer float32, last one binary": ("float", "binary", 30.0),
    }),
    "ResNet-18": (resnet18, 64, {
        "first and last layer float32": ("float", "float", 13.3),
        "first and last layer 8 bits": ("int8", "int8", 24.1),
        "first layer float32, last one binary": ("float", "binary", 0.0),
    }),
}  # fmt: skip
"""Builder, image size, and what the ends are: options `first` and `last` of `binarize`, and the ratio that weights and
scales alone would have (0: not known)."""
LAYERS_GOAL = 31.6
"""Of convolutions; a linear layer has a bias for each output as well."""


def main() -> None:
    """Make the files and print their sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the same: it takes seconds")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    rows = [header(0)]
    for name, (build, size, ends) in NETWORKS.items():
        for words, (first, last, goal) in ends.items():
            rows += sizes(
                f"{name}, {words}", trace(build().eval(), (torch.randn(1, 3, size, size),)), first, last, goal
            )
    if options.json:
        write_rows(options.json, rows)
    show(rows, "Bytes of binarized networks", screen())


def sizes(case: str, graph: Graph, first: Any, last: Any, goal: float) -> list[Row]:
    """Rows of one network, which is binarized and emitted here."""
    whole = 4 * sum(
        layer.weight.numel() for layer in graph.module.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))
    )
    context = Context(original=graph.copy(), verify=False)
    run_pass(Binarize(first=first, last=last), graph, context)
    layers: list[BinaryLayer] = [layer for layer in graph.module.modules() if isinstance(layer, BinaryLayer)]
    weights, alone = 4 * sum(layer.weight.numel() for layer in layers), sum(map(stored_bytes, layers))
    run_pass(Emit(layout="contiguous"), graph, context)
    packed = sum(layer.stored_bytes for layer in graph.module.modules() if isinstance(layer, BinaryNetwork))
    total = _file(graph)
    return [
        Row(case, "weights, float32", whole, "bytes"),
        Row(case, f"{len(layers)} binary layers: bits and scales", alone, "bytes"),
        _ratio(case, "layers | times smaller", weights / alone, LAYERS_GOAL if last != "binary" else 0.0),
        Row(case, "packed, with norms and quantizers", packed, "bytes"),
        Row(case, "packed | times smaller", weights / packed, "times"),
        Row(case, "whole file", total, "bytes"),
        _ratio(case, "whole file | times smaller", whole / total, goal),
    ]


def _ratio(case: str, metric: str, value: float, goal: float) -> Row:
    if not goal:
        return Row(case, metric, value, "times")
    return Row(case, metric, value, "times", goal=f"≥ {goal}", met=round(value, 1) >= goal)


def _file(graph: Graph) -> int:
    with tempfile.TemporaryDirectory(prefix="fxpress-") as folder:
        return save(Path(folder) / "size.fxp", graph)


if __name__ == "__main__":
    main()
