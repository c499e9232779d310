"""Whole networks of torchvision: every layer that can be binarized is, behind a batch norm and a quantizer."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torchvision
from fxpress.ir.cost import measure_cost
from fxpress.ir.graph import Graph
from fxpress.ir.trace import trace
from fxpress.passes.base import Context, PassResult
from fxpress.passes.binarize.binarize import Binarize
from fxpress.passes.binarize.sources import is_ready, trace_back
from fxpress.passes.runner import run_pass
from fxpress.runtime.layers import BinaryLayer
from torch import nn


def rewritten(name: str, size: int) -> tuple[Graph, PassResult]:
    model = getattr(torchvision.models, name)(weights=None, num_classes=10).eval()
    graph = trace(model, torch.randn(2, 3, size, size))
    before = measure_cost(graph)
    result, _ = run_pass(Binarize(), graph, Context(graph.copy()))
    assert measure_cost(graph).macs == before.macs
    binary = [node for node in graph.nodes if isinstance(graph.layer(node), BinaryLayer)]
    for node in binary:
        assert is_ready(trace_back(graph, node.all_input_nodes[0])), node.name
    assert len(binary) == len(result.metrics["binary_layers"])
    with torch.no_grad():
        assert graph(torch.randn(3, 3, size, size)).shape == (3, 10)
    return graph, result


def plain(graph: Graph) -> int:
    """Batch norms without factors."""
    return sum(isinstance(m, nn.BatchNorm2d) and not m.affine for m in graph.module.modules())


def reasons(result: PassResult) -> Counter[str]:
    return Counter(skip.reason.partition(":")[0].partition(" (")[0] for skip in result.skips)


def test_squeezenet() -> None:
    """Fires: squeeze, two expands that are joined; max pools between; the last layer is a convolution."""
    graph, result = rewritten("squeezenet1_1", 64)
    assert len(result.metrics["binary_layers"]) == 24
    assert (result.metrics["quantizers"], plain(graph)) == (23, 23)
    assert {skip.node for skip in result.skips} == {"features.0", "classifier.1"}


@pytest.mark.slow
def test_resnet18() -> None:
    graph, result = rewritten("resnet18", 64)
    layers = result.metrics["binary_layers"]
    assert len(layers) == 19  # all but conv1 and fc, shortcuts too
    assert {"layer2.0.downsample.0", "layer4.1.conv2"} <= set(layers)
    assert (result.metrics["quantizers"], result.metrics["new_norms"]) == (16, 7)  # 7 of the 8 sums are read by layers
    affine = {path for path, m in graph.module.named_modules() if isinstance(m, nn.BatchNorm2d) and m.affine}
    assert len(affine) == 12  # in front of the sums: 8 and 3 shortcuts; bn1, whose ReLU the first sum reads


@pytest.mark.slow
def test_densenet121() -> None:
    graph, result = rewritten("densenet121", 64)
    assert (len(result.metrics["binary_layers"]), plain(graph)) == (119, 119)
    assert result.metrics["replaced"] == {"relu": 119}


@pytest.mark.slow
def test_mobilenet_v2() -> None:
    _, result = rewritten("mobilenet_v2", 64)
    assert len(result.metrics["binary_layers"]) == 34
    assert reasons(result)["depthwise"] == 17
    assert len(result.skips) == 19  # these, and the two ends


@pytest.mark.slow
def test_vgg11() -> None:
    graph, result = rewritten("vgg11", 32)
    assert len(result.metrics["binary_layers"]) == 9
    assert result.metrics["replaced"] == {"relu": 8}
    assert any("1 inputs that no such activation gave" in note for note in result.notes)  # behind the average pool
    layer: Any = graph.module.get_submodule("classifier.0")
    assert layer.in_features == 512 * 7 * 7


@pytest.mark.slow
def test_mobilenet_v3() -> None:
    _, result = rewritten("mobilenet_v3_small", 64)
    found = reasons(result)
    assert found["it reads one position"] == 18
    assert found["depthwise"] == 11
