"""Passes that look at layers by their type meet product-quantized ones: exact, or left alone with the reason."""

from __future__ import annotations

import functools
from typing import Any, get_args

import pytest
import torch
from fxpress.ir.graph import Graph
from fxpress.ir.groups import find_groups
from fxpress.ir.trace import trace
from fxpress.ir.verify import distance, run
from fxpress.passes.analyse.weights import weight_statistics
from fxpress.passes.prune.criteria import Criterion, Source, score_classes
from fxpress.runtime.layers import ChannelMask, PQConv2d, PQLayer, PQLinear
from fxpress.tools.explain import explain
from fxpress.tools.view.kinds import detail_of, kind_of
from torch import Tensor, nn

import fxpress


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.conv2, self.conv3 = nn.Conv2d(12, 12, 3, padding=1, bias=False), nn.Conv2d(12, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.head(torch.relu(self.conv3(torch.relu(self.conv2(x)))).mean((2, 3)))  # type: ignore[no-any-return]


@functools.cache
def traced() -> Graph:
    torch.manual_seed(0)
    graph = trace(Small().eval(), torch.randn(4, 3, 6, 6))
    graph.module.get_submodule("bn1").running_mean.uniform_(-1, 1)
    return graph


def quantized(*paths: str, **options: Any) -> Graph:
    """The network with random codewords in these layers, or in all."""
    graph, numbers = traced().copy(), torch.Generator().manual_seed(1)
    with graph.edit("quantize"):
        for path in paths or ("conv1", "conv2", "conv3", "head"):
            layer: Any = graph.module.get_submodule(path)
            rows = layer.weight.flatten(2) if layer.weight.dim() == 4 else layer.weight.unsqueeze(2)
            outputs, inputs, taps = rows.shape
            codebook = torch.randn(-(-inputs // 2), 8, 2, generator=numbers) * 0.2
            indices = torch.randint(8, (taps, len(codebook), outputs), generator=numbers)
            kind: Any = PQConv2d if rows is not layer.weight and layer.weight.dim() == 4 else PQLinear
            graph.module.set_submodule(path, kind.from_weights(layer, codebook, indices, **options))
    graph.module.eval()
    return graph


def compiled(graph: Graph, *passes: Any) -> fxpress.Compiled:
    images, classes = torch.randn(24, 3, 6, 6), torch.randint(4, (24,))
    return fxpress.compile(graph, list(passes), None, data=fxpress.Data(calibration=[(images, classes)]))


def skips(result: fxpress.Compiled, name: str) -> list[str]:
    return [skip.reason for row in result.report.rows if row.name == name for skip in row.skips]


def test_a_batch_norm_behind_codewords_stays() -> None:
    graph = quantized()
    result = compiled(graph, "fold-batchnorm")
    (reason,) = skips(result, "fold-batchnorm")
    assert "product-quantized" in reason
    assert distance(run(graph), run(result.graph)) == 0
    assert not skips(compiled(quantized("conv2"), "fold-batchnorm"), "fold-batchnorm")


def test_masks_stand_behind_them_and_cut_them() -> None:
    graph = quantized()
    masked = compiled(graph, {"insert-masks": {"ratio": 0.5}})
    behind = [n.all_input_nodes[0].name for n in masked.graph.nodes if isinstance(masked.graph.layer(n), ChannelMask)]
    assert behind == ["bn1", "conv2", "conv3"]
    cut = compiled(masked.graph, {"prune-channels": {"masks": "given"}})
    widths = [layer.indices.shape[2] for _, layer in cut.module.named_modules() if isinstance(layer, PQLayer)]
    assert widths == [6, 6, 4, 4]
    assert distance(run(masked.graph), run(cut.graph)) < 1e-5
    emitted = compiled(cut.graph, "emit")
    assert distance(run(cut.graph), run(emitted.graph)) < 1e-5


@pytest.mark.parametrize("criterion", get_args(Criterion))
def test_criteria_read_their_decoded_weights(criterion: Criterion) -> None:
    """As they read a plain layer with the same weight."""
    graph = quantized()
    plain = graph.copy()
    for path, layer in list(plain.module.named_modules()):
        if isinstance(layer, PQLayer):
            plain.module.set_submodule(path, layer.dense())
    data = fxpress.Data(train=[(torch.randn(8, 3, 6, 6), torch.randint(4, (8,)))])
    if criterion == "slimming":
        graph, plain = quantized("conv2"), quantized("conv2")  # groups without a batch norm are refused in both
        with pytest.raises(fxpress.OptionError, match="slimming"):
            score_classes(graph, graph.analyse(find_groups), criterion, source=Source(data))
        return
    scores, expected = (
        score_classes(one, one.analyse(find_groups), criterion, source=Source(data)) for one in (graph, plain)
    )
    if criterion == "random":
        return
    found = [sorted(scores[g.classes].tolist()) for g in graph.analyse(find_groups).groups]
    wanted = [expected[g.classes] for g in plain.analyse(find_groups).groups]
    # a sub-space ties two channels of the plain network into one class, whose score is their mean or sum
    assert [len(one) for one in found] == [len(one) // 2 for one in wanted]
    assert all(len({round(value, 12) for value in one}) > 1 for one in found)


def test_pruning_with_reconstruction_leaves_them_alone() -> None:
    graph = quantized()
    options = {"ratio": 0.3, "criterion": "l1", "reconstruct": "least-squares"}
    result = compiled(graph, {"prune-channels": options})
    reasons = skips(result, "prune-channels")
    assert any("share codewords" in reason for reason in reasons)
    assert result.report.rows[-1].macs < result.report.rows[0].macs


def test_batch_norms_behind_them_are_estimated_anew() -> None:
    graph = quantized()
    before = graph.tensor("bn1.running_mean").clone()
    result = compiled(graph, "reestimate-batchnorm")
    assert not torch.equal(result.graph.tensor("bn1.running_mean"), before)
    assert torch.equal(result.graph.tensor("conv1.indices"), graph.tensor("conv1.indices"))


def test_statistics_of_filters_are_of_layers_with_filters() -> None:
    assert list(weight_statistics(quantized("conv1", "conv2"))) == ["conv3.weight", "head.weight"]


def test_they_are_explained_under_their_names() -> None:
    graph = quantized()
    text = str(explain(graph))
    assert "conv1" in text
    assert ".indices" not in text.split("\n")[0]
    groups = graph.analyse(find_groups)
    assert [group.name for group in groups.groups] == ["conv1", "conv2", "conv3"]


def test_the_drawing_tells_what_they_are() -> None:
    graph = quantized()
    conv, head = (next(n for n in graph.nodes if n.target == path) for path in ("conv2", "head"))
    assert (kind_of(conv, "PQConv2d"), kind_of(head, "PQLinear")) == ("conv", "linear")
    assert detail_of(graph.layer(conv)) == "3×3, 8 codewords of 2"  # noqa: RUF001
    assert detail_of(graph.layer(head)) == "8 codewords of 2"


@pytest.mark.parametrize("kernel", ["decode", "dense", "table"])
@pytest.mark.parametrize("training", [False, True])
def test_the_plain_layer_computes_the_same(kernel: Any, training: bool) -> None:
    graph = quantized(kernel=kernel)
    for path, shape in (("conv2", (2, 12, 5, 5)), ("head", (3, 8))):
        layer: Any = graph.module.get_submodule(path)
        layer.train(training)
        plain = layer.dense()
        x = torch.randn(shape)
        assert type(plain) in (nn.Conv2d, nn.Linear)
        assert plain.training == training
        with torch.no_grad():
            assert torch.allclose(plain(x), layer(x), atol=1e-5)
