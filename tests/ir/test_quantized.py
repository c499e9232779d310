"""Channel labels of product-quantized layers: what ties what, what is refused, and masked equals cut."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from fxpress.ir.cost import measure_cost
from fxpress.ir.cut import Cut
from fxpress.ir.errors import GraphError
from fxpress.ir.graph import Graph
from fxpress.ir.groups import find_groups
from fxpress.ir.reasons import find_locked
from fxpress.ir.trace import trace
from fxpress.ir.verify import prove_cut, run
from fxpress.runtime.layers import PQConv2d, PQLayer, PQLinear
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn


def quantize(graph: Graph, subspace: int, seed: int = 0, every: int = 1, **options: Any) -> Graph:
    """Put random codewords in the place of (every n-th of) the convolutions and linear layers that can have them."""
    numbers = torch.Generator().manual_seed(seed)
    found = [node for node in graph.nodes if type(graph.layer(node)) in (nn.Conv2d, nn.Linear)]
    found = list({graph.layer(node): node for node in found}.values())
    with graph.edit("quantize"):
        for node in found[::every]:
            layer: Any = graph.layer(node)
            if getattr(layer, "groups", 1) > 1 and layer.groups == layer.in_channels:
                continue
            rows = layer.weight.flatten(2) if layer.weight.dim() == 4 else layer.weight.unsqueeze(2)
            outputs, inputs, taps = rows.shape
            count = -(-inputs // subspace)
            codebook = torch.randn(count, 8, subspace, generator=numbers)
            indices = torch.randint(8, (taps, count, outputs), generator=numbers)
            kind: Any = PQConv2d if isinstance(layer, nn.Conv2d) else PQLinear
            graph.module.set_submodule(str(node.target), kind.from_weights(layer, codebook, indices, **options))
    graph.module.eval()
    return graph


def random_cut(graph: Graph, seed: int) -> Cut:
    """A cut of some classes of every group; every tensor keeps one at least."""
    groups, numbers = graph.analyse(find_groups), np.random.default_rng(seed)
    dead = [numbers.permutation(g.classes)[: int(numbers.integers(0, g.channels))] for g in groups.groups]
    return Cut(groups, np.concatenate([*dead, np.zeros(0, np.int64)]).astype(np.int64))


class Chain(nn.Module):
    """Convolutions (strided, grouped, depthwise, 1x1), a shortcut, a concatenation, a head behind a flatten."""

    def __init__(self, widths: tuple[int, int], groups: int, size: int) -> None:
        super().__init__()
        a, b = widths
        self.stem, self.bn = nn.Conv2d(3, a, 3, padding=1), nn.BatchNorm2d(a)
        self.same = nn.Conv2d(a, a, 3, padding="same", groups=groups)
        self.depthwise = nn.Conv2d(a, a, 3, padding=1, groups=a)
        self.down = nn.Conv2d(2 * a, b, (3, 1), stride=2, padding=(1, 0), dilation=(1, 2), bias=False)
        self.hidden, self.head = nn.Linear(b * size * size, 12), nn.Linear(12, 5)
        self.pool = nn.AdaptiveAvgPool2d(size)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        y = torch.relu(self.same(x) + x)
        z = self.pool(self.down(torch.cat([self.depthwise(y), y], 1)))
        return self.head(torch.relu(self.hidden(z.flatten(1))))  # type: ignore[no-any-return]


@functools.cache
def traced(widths: tuple[int, int], groups: int, size: int) -> Graph:
    torch.manual_seed(0)
    return trace(Chain(widths, groups, size).eval(), torch.randn(2, 3, 8, 8))


def chain(widths: tuple[int, int] = (12, 8), groups: int = 2, size: int = 2) -> Graph:
    return traced(widths, groups, size).copy()


@settings(max_examples=25)
@given(
    st.sampled_from([(4, 9), (12, 7), (18, 4)]), st.sampled_from([1, 2]), st.sampled_from([1, 3]),
    st.integers(1, 5), st.integers(0, 999), st.integers(1, 2), st.sampled_from(["fp32", "fp16", "int8"]),
)  # fmt: skip
def test_masked_equals_cut(
    widths: tuple[int, int], groups: int, size: int, subspace: int, seed: int, every: int, precision: Any
) -> None:
    graph = quantize(chain(widths, groups, size), subspace, seed, every, codebook=precision)
    cut = random_cut(graph, seed)
    before = run(graph)
    candidate = cut.apply("cut")
    candidate.lint()
    assert prove_cut(cut, candidate) < 1e-4
    assert torch.equal(run(graph), before)  # the graph that was cut is as it was
    again = random_cut(candidate, seed + 1)  # what was cut can be cut again
    assert prove_cut(again, again.apply("cut")) < 1e-4


@pytest.mark.parametrize("kernel", ["dense", "table"])
def test_prepared_layers_are_cut(kernel: Any) -> None:
    graph = quantize(chain(), 2, kernel=kernel)
    run(graph)
    cut = random_cut(graph, 1)
    candidate = cut.apply("cut")
    exported = torch.export.export(candidate.module, graph.example_args).module()
    assert prove_cut(cut, candidate) < 1e-4
    with torch.no_grad():
        assert torch.allclose(exported(*graph.example_args), run(candidate), atol=1e-4)


def sizes(graph: Graph) -> dict[str, tuple[Any, ...]]:
    return {
        path: (layer.inputs, tuple(layer.codebook.shape), tuple(layer.indices.shape))
        for path, layer in graph.module.named_modules()
        if isinstance(layer, PQLayer)
    }


def test_a_cut_drops_whole_sub_spaces() -> None:
    graph = quantize(
        trace(nn.Sequential(nn.Conv2d(3, 10, 1), nn.ReLU(), nn.Conv2d(10, 6, 3)), torch.randn(2, 3, 5, 5)), 4
    )
    groups = graph.analyse(find_groups)
    (group,) = groups.groups
    assert (group.name, group.channels) == ("0", 3)  # channels 0-3, 4-7 and the ragged 8-9
    assert {tuple(slot) for slot in group.slots} == {
        ("0.indices", 2), ("0.bias", 0), ("2.codebook", 0), ("2.indices", 1)
    }  # fmt: skip
    whole, tail = (Cut(groups, group.classes[[index]]).apply("cut") for index in (0, 2))
    assert sizes(whole) == {"0": (3, (1, 8, 4), (1, 1, 6)), "2": (6, (2, 8, 4), (9, 2, 6))}
    assert sizes(tail) == {"0": (3, (1, 8, 4), (1, 1, 8)), "2": (8, (2, 8, 4), (9, 2, 6))}
    layer: Any = tail.module.get_submodule("2")
    assert (layer.in_channels, layer.out_channels) == (8, 6)


def test_groups_stay_equally_wide() -> None:
    model = nn.Sequential(nn.Conv2d(3, 12, 1), nn.Conv2d(12, 8, 3, groups=2), nn.Conv2d(8, 4, 1))
    graph = quantize(trace(model, torch.randn(2, 3, 5, 5)), 2)
    read, written = graph.analyse(find_groups).groups
    assert (read.channels, written.channels) == (3, 2)  # 6 inputs of a group in threes of 2; 4 outputs in twos
    cut = Cut(graph.analyse(find_groups), read.classes[:1])
    candidate = cut.apply("cut")
    layer: Any = candidate.module.get_submodule("1")
    assert (layer.in_channels, layer.groups, layer.inputs) == (8, 2, 4)
    assert prove_cut(cut, candidate) < 1e-5


@pytest.mark.parametrize(
    ("size", "subspace", "free"),
    [(2, 4, 6), (2, 2, 6), (2, 8, 3), (3, 4, 2), (3, 7, 0), (3, 3, 6), (1, 8, 0), (1, 4, 2)],
)
def test_behind_a_flatten(size: int, subspace: int, free: int) -> None:
    """size² inputs belong to a channel: sub-spaces that straddle channels tie them, and all of them may be one."""
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.AdaptiveMaxPool2d(size), nn.Flatten(), nn.Linear(6 * size**2, 4))
    graph = quantize(trace(model, torch.randn(2, 3, 6, 6)), subspace)
    groups = graph.analyse(find_groups)
    assert sum(group.channels for group in groups.groups) == free
    if free:
        cut = Cut(groups, groups.groups[0].classes[:1])
        assert prove_cut(cut, cut.apply("cut")) < 1e-5
        return
    reasons = [reason for locked in find_locked(groups) for reason in locked.reasons]
    (reason,) = [reason for reason in reasons if reason.op == "PQLinear" and "sub-spaces" in reason.text]
    why = "straddle its channels" if size > 1 else "hold all of its channels"
    assert reason.text == f"is read by a product-quantized layer, whose sub-spaces of {subspace} {why}"
    assert reason.hint.startswith("Cut channels before they are quantized")


def test_channels_along_another_dimension_pass() -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.mix, self.head = nn.Conv2d(3, 6, 1), nn.Linear(16, 16), nn.Conv2d(6, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.stem(x)
            return self.head(self.mix(y.flatten(2)).view(y.shape))  # type: ignore[no-any-return]

    graph = quantize(trace(Mixer().eval(), torch.randn(2, 3, 4, 4)), 2)
    cut = Cut(graph.analyse(find_groups), graph.analyse(find_groups).groups[0].classes[:2])
    assert sizes(cut.apply("cut"))["mix"] == sizes(graph)["mix"]
    assert prove_cut(cut, cut.apply("cut")) < 1e-5


def test_a_shared_layer_is_cut_once() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.twice, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.twice(torch.relu(self.twice(torch.relu(self.stem(x))))))  # type: ignore[no-any-return]

    graph = quantize(trace(Shared().eval(), torch.randn(2, 4)), 2)
    groups = graph.analyse(find_groups)
    cut = Cut(groups, groups.groups[0].classes[:1])
    candidate = cut.apply("cut")
    layer: Any = candidate.module.get_submodule("twice")
    assert (layer.in_features, layer.out_features) == (6, 6)
    assert prove_cut(cut, candidate) < 1e-5


def test_costs() -> None:
    """Tables: K for each input. Look-ups: one for each tap, sub-space and output."""
    model = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.Flatten(), nn.Linear(6 * 25, 7))
    graph = trace(model, torch.randn(2, 4, 5, 5))
    dense = measure_cost(graph).macs
    assert dense == 25 * 9 * 4 * 6 + 150 * 7
    pq = measure_cost(quantize(graph, 2, kernel="table"))
    assert pq.macs == 25 * 4 * 8 + 25 * 9 * 2 * 6 + 150 * 8 + 75 * 7
    assert pq.params == 2 * 8 * 2 + 6 + 75 * 8 * 2 + 7  # codewords and biases
    assert pq.bytes == 4 * pq.params + 9 * 2 * 6 * 3 // 8 + 1 + -(-75 * 7 * 3 // 8)  # and indices of 3 bits
    for node in graph.nodes:
        layer = graph.layer(node)
        if isinstance(layer, PQLayer):
            layer.kernel = "dense"
    graph.epoch += 1
    assert measure_cost(graph).macs == dense
    assert graph.analyse(find_groups).cost().macs == dense


def test_the_lint_reads_their_sizes() -> None:
    graph = quantize(chain(), 2)
    with pytest.raises(GraphError, match=r"'down' \(PQConv2d\) states 9 output channels"), graph.edit("break"):
        graph.module.get_submodule("down").out_channels = 9
