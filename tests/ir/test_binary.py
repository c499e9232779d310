"""Channel labels of layers with one-bit weights: a cut keeps their factors, and masked equals cut."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from fxpress.ir.cost import measure_cost
from fxpress.ir.cut import Cut
from fxpress.ir.errors import FxpressError
from fxpress.ir.graph import Graph
from fxpress.ir.groups import find_groups
from fxpress.ir.trace import trace
from fxpress.ir.verify import prove_cut, run
from fxpress.runtime.layers import BinaryConv2d, BinaryLayer, BinaryLinear, HalfWaveQuantizer
from fxpress.runtime.layers.binary import binarize, latent_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn


class Net(nn.Module):
    """Convolutions (plain, grouped, depthwise, strided), a residual sum, a flatten and two linear layers."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        conv: Any = lambda *args, **kw: BinaryConv2d(*args, **kw, **options)  # noqa: E731
        self.stem, self.norm = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12, affine=False)
        self.same, self.grouped = conv(12, 12, 3, padding=1), conv(12, 12, 3, padding=1, groups=2)
        self.depthwise, self.down = conv(12, 12, 3, padding=1, groups=12), conv(12, 8, (3, 1), stride=2, bias=False)
        self.hidden, self.head = BinaryLinear(8 * 3 * 4, 10, **options), BinaryLinear(10, 5, **options)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(4)  # large enough for all levels of the quantizers

    def forward(self, x: Tensor) -> Tensor:
        # clamping stands for the quantizer, which a trace would take apart
        x = self.norm(self.stem(x)).clamp(0, 1)
        x = self.grouped(self.same(x).clamp(0, 1)) + x
        return self.head(self.hidden(self.down(self.depthwise(x)).clamp(0, 1).flatten(1)).relu())  # type: ignore[no-any-return]


def quantized(model: nn.Module, x: Tensor) -> Graph:
    """A traced network with plain layers, in whose place binary ones are put, behind quantizers."""
    graph = trace(plain(model).eval(), x)
    layers = dict(model.named_modules())
    with graph.edit("test") as nodes:
        for node in graph.nodes:
            if isinstance(layers.get(str(node.target)), BinaryLayer):
                graph.module.set_submodule(str(node.target), layers[str(node.target)])
            if node.op == "call_function" and "clamp" in str(node.target):
                graph.module.add_module(node.name, HalfWaveQuantizer())
                with nodes.inserting_before(node):
                    fresh = nodes.call_module(node.name, (node.args[0],))
                fresh.meta = dict(node.meta)
                node.replace_all_uses_with(fresh)
    return graph


def plain(model: nn.Module) -> nn.Module:
    """The same network with torch's own layers."""
    twin = Net()
    for name, layer in model.named_children():
        if isinstance(layer, BinaryConv2d):
            sizes = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding)
            setattr(twin, name, nn.Conv2d(*sizes, groups=layer.groups, bias=layer.bias is not None))
        elif isinstance(layer, BinaryLinear):
            setattr(twin, name, nn.Linear(layer.in_features, layer.out_features))
        else:
            setattr(twin, name, layer)
    return twin


def net(seed: int = 0, **options: Any) -> Graph:
    torch.manual_seed(seed)
    return quantized(Net(**options), torch.randn(2, 3, 8, 8))


def random_cut(graph: Graph, seed: int) -> Cut:
    groups, numbers = graph.analyse(find_groups), np.random.default_rng(seed)
    dead = [numbers.permutation(g.classes)[: int(numbers.integers(0, g.channels))] for g in groups.groups]
    return Cut(groups, np.concatenate([*dead, np.zeros(0, np.int64)]).astype(np.int64))


@settings(max_examples=8)
@given(st.sampled_from(["binary", "ternary"]), st.sampled_from(["filter", "layer", "none"]), st.integers(0, 999))
def test_masked_equals_cut(weights: Any, scale: Any, seed: int) -> None:
    graph = net(seed, weights=weights, scale=scale)
    before, cut = run(graph), random_cut(graph, seed)
    candidate = cut.apply("cut")
    candidate.lint()
    assert prove_cut(cut, candidate) < 1e-4
    assert torch.equal(run(graph), before)  # the graph that was cut is as it was
    again = random_cut(candidate, seed + 1)
    assert prove_cut(again, again.apply("cut")) < 1e-4


def test_without_keeping_the_factors_a_cut_is_another_network(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = net()
    groups = graph.analyse(find_groups)
    cut = Cut(groups, groups.groups[0].classes[:3])
    assert prove_cut(cut, cut.apply("cut")) < 1e-4
    monkeypatch.setattr(BinaryLayer, "keep", lambda *_: None)
    with pytest.raises(FxpressError):
        prove_cut(cut, cut.apply("cut"))


def test_sizes_and_signs_after_a_cut() -> None:
    graph = net()
    groups = graph.analyse(find_groups)
    stream = next(group for group in groups.groups if group.channels == 6)  # tied by the groups of `grouped`
    candidate = Cut(groups, stream.classes[:2]).apply("cut")
    old: Any = graph.module.get_submodule("same")
    new: Any = candidate.module.get_submodule("same")
    assert (new.in_channels, tuple(new.weight.shape)) == (
        new.weight.shape[1],
        (new.out_channels, new.in_channels, 3, 3),
    )
    factors = old.binary_weight.detach().abs()[:, 0, 0, 0]
    for value in new.binary_weight.detach().abs()[:, 0, 0, 0]:
        assert float((factors - value).abs().min()) < 1e-6


def test_all_channels_can_go_as_those_of_plain_layers() -> None:
    torch.manual_seed(0)
    model = Net()
    binary, dense = quantized(model, torch.randn(2, 3, 8, 8)), trace(plain(model).eval(), torch.randn(2, 3, 8, 8))
    counts = [sorted(g.channels for g in graph.analyse(find_groups).groups) for graph in (binary, dense)]
    assert counts[0] == counts[1]
    costs = [measure_cost(graph) for graph in (binary, dense)]
    assert (costs[0].macs, costs[0].params) == (costs[1].macs, costs[1].params)
    assert costs[0].macs > 0


@given(st.sampled_from(["binary", "ternary"]), st.sampled_from(["filter", "layer", "none"]), st.integers(0, 999))
def test_latent_weights_of_wanted_values(weights: Any, scale: Any, seed: int) -> None:
    latent = torch.randn(4, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    values = binarize(latent, weights, scale)[:, :5]
    found = binarize(latent_of(values, latent[:, :5], weights, scale), weights, scale)
    assert torch.allclose(found, values, atol=1e-12)


def test_latent_weights_that_are_all_zero() -> None:
    values = torch.full((1, 3), 0.5)
    assert torch.equal(binarize(latent_of(values, torch.zeros(1, 3))), values)
