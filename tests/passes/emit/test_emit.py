"""emit: what runs is the same function in fewer nodes, and still trains, exports, compiles and freezes."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from fxpress.ir.verify import distance, run
from fxpress.passes.base import Context, PassResult
from fxpress.passes.emit import layout
from fxpress.passes.emit.emit import Emit
from fxpress.passes.fuse.fold_masks import fold_masks
from fxpress.passes.prune.insert_masks import InsertMasks
from fxpress.passes.runner import run_pass
from fxpress.runtime.layers.channel_mask import ChannelMask
from fxpress.runtime.measure import Latency
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxpress import Graph, OptionError, trace


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm2 = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(8 * 16, 4)
        for norm in (self.norm1, self.norm2):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
            norm.running_mean.normal_()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(x)).relu()
        x = torch.nn.functional.max_pool2d(self.norm2(self.conv2(x)) + x, 2)
        return self.fc(self.drop(x.view(-1, 8 * 16)))  # type: ignore[no-any-return]


@pytest.fixture
def graph() -> Graph:
    return trace(Net().eval(), torch.randn(2, 3, 8, 8))


def emit(graph: Graph, **options: Any) -> PassResult:
    return run_pass(Emit(**options), graph, Context(original=graph.copy()))[0]


def layers(graph: Graph) -> list[str]:
    return [type(graph.layer(node)).__name__ for node in graph.nodes if node.op == "call_module"]


@pytest.mark.parametrize("wish", ["contiguous", "channels-last"])
def test_folds_and_drops(graph: Graph, wish: str) -> None:
    outputs = run(graph)
    run_pass(InsertMasks(masks={"conv1": [0.5, 2, 1, 1, 1, 1, 1, 0]}), graph, Context(original=graph.copy()))
    masked = run(graph)
    assert distance(outputs, masked) > 0.01
    result = emit(graph, layout=wish)
    assert layers(graph) == ["Conv2d", "Conv2d", "Linear"]
    assert distance(masked, run(graph)) < 1e-6
    assert result.distance is not None
    assert result.distance < 1e-6
    assert result.notes == ["folded 2 of 2 batch norms", "folded 2 masks", "removed 1 dropout layers",
                            f"engine torch, {wish} as asked for"]  # fmt: skip
    assert not graph.module.training
    weight = graph.tensor("conv1.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last) == (wish == "channels-last")
    for batch in (1, 5):  # dynamic as before
        assert graph(torch.randn(batch, 3, 8, 8)).shape == (batch, 4)
    assert emit(graph, layout=wish).notes == [f"engine torch, {wish} as asked for"]


@pytest.mark.parametrize(("ratio", "expected"), [(0.5, "channels-last"), (0.98, "contiguous"), (1.4, "contiguous")])
def test_the_layout_is_the_faster_one(
    graph: Graph, monkeypatch: pytest.MonkeyPatch, ratio: float, expected: str
) -> None:
    def timed(candidate: Graph, reference: Graph, inputs: Any, **options: Any) -> Latency:
        assert candidate.tensor("conv1.weight").is_contiguous(memory_format=torch.channels_last)
        assert reference.tensor("conv1.weight").is_contiguous()
        assert inputs[0].shape == (2, 3, 8, 8)
        values: dict[str, Any] = dict.fromkeys(Latency.__dataclass_fields__, 1)
        return Latency(**{**values, "ratio": ratio})

    monkeypatch.setattr(layout, "latency_ratio", timed)
    result = emit(graph)
    assert result.metrics == {"engine": "torch", "layout": expected, "channels_last_ratio": ratio, "folded": 2}
    assert f"{expected}: channels-last takes {ratio:.2f} of the contiguous time" in result.notes[-1]


def test_the_layout_is_really_measured(graph: Graph) -> None:
    result = emit(graph)
    assert result.metrics["channels_last_ratio"] > 0


def test_nothing_to_measure_without_image_weights() -> None:
    graph = trace(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval(), torch.randn(2, 3))
    result = emit(graph)
    assert result.notes == ["folded 1 of 1 batch norms", "engine torch, contiguous: no weight has an image layout"]


@pytest.mark.parametrize("engine", ["tpu", "TORCH", "", None])
def test_unknown_engines_are_refused(engine: Any) -> None:
    with pytest.raises(OptionError, match=r"pass 'emit', option 'engine': given .*, allowed: 'auto' or 'torch'"):
        Emit(engine=engine)


@pytest.mark.parametrize("wish", ["contiguous", "channels-last"])
def test_trains_exports_and_compiles(graph: Graph, wish: str) -> None:
    emit(graph, layout=wish)
    x = torch.randn(3, 3, 8, 8)
    expected = graph(x).detach()
    module = graph.module

    exported = torch.export.export(module, (x,)).module()
    assert torch.allclose(exported(x), expected, atol=1e-5)
    assert torch.allclose(torch.compile(module, backend="aot_eager")(x), expected, atol=1e-5)

    module.train()
    module(x).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in module.parameters())
    torch.optim.SGD(module.parameters(), 0.1).step()
    assert not torch.allclose(module.eval()(x), expected)


@pytest.mark.slow
def test_freezes(graph: Graph) -> None:
    import torch._inductor.config as inductor

    emit(graph, layout="channels-last")
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad(), inductor.patch(freezing=True):
        assert torch.allclose(torch.compile(graph.module)(x), graph(x), atol=1e-5)


def test_can_be_traced_again(graph: Graph) -> None:
    emit(graph, layout="channels-last")
    again = trace(graph.module, torch.randn(2, 3, 8, 8))
    assert layers(again) == layers(graph)


def with_masks(before: nn.Module, x: Tensor, dim: int = 1) -> Graph:
    """The graph of `before` followed by a mask layer that stays one layer."""
    graph = trace(nn.Sequential(before).double().eval(), x.double())
    (last,) = [node for node in graph.nodes if node.op == "output"]
    source = last.all_input_nodes[0]
    layer = ChannelMask(4, dim).double()
    with torch.no_grad():
        layer.mask.copy_(torch.tensor([0.0, 1.0, -2.0, 0.5]))
    graph.module.add_submodule("mask", layer)
    with graph.edit("test") as nodes:
        with nodes.inserting_before(last):
            mask = nodes.call_module("mask", (source,))
        mask.meta = dict(source.meta)
        last.replace_input_with(source, mask)
    return graph


@pytest.mark.parametrize(
    ("before", "shape", "dim"),
    [
        (nn.Conv2d(3, 4, 3), (2, 3, 5, 5), 1),
        (nn.Conv2d(4, 4, 3, groups=4, bias=False), (2, 4, 5, 5), -3),
        (nn.ConvTranspose2d(4, 4, 3, groups=2), (2, 4, 5, 5), 1),
        (nn.Linear(3, 4), (2, 3), 1),
        (nn.Linear(3, 4), (2, 5, 3), -1),
        (nn.BatchNorm2d(4), (2, 4, 5, 5), 1),
        (nn.GroupNorm(2, 4), (2, 4, 5, 5), 1),
        (nn.LayerNorm(4), (2, 5, 4), 2),
    ],
)
def test_masks_fold_into_what_is_before(before: nn.Module, shape: tuple[int, ...], dim: int) -> None:
    graph = with_masks(before, torch.randn(shape), dim)
    outputs = run(graph)
    assert fold_masks(graph, "test") == (1, [])
    assert "ChannelMask" not in layers(graph)
    assert distance(outputs, run(graph)) < 1e-12


@pytest.mark.parametrize(
    ("before", "shape", "dim", "reason"),
    [
        (nn.ReLU(), (2, 4, 5, 5), 1, "its input .* is no convolution, linear layer or norm"),
        (nn.Linear(3, 4), (2, 4, 3), 1, "the channels of .* are dimension 2 of 3, not dimension 1"),
        (nn.BatchNorm2d(4, affine=False), (2, 4, 5, 5), 1, ".* has no factors of its own"),
        (nn.LayerNorm((5, 4)), (2, 5, 4), 2, ".* normalises over more than its channels"),
    ],
)
def test_masks_that_stay(before: nn.Module, shape: tuple[int, ...], dim: int, reason: str) -> None:
    graph = with_masks(before, torch.randn(shape), dim)
    outputs = run(graph)
    folded, (skip,) = fold_masks(graph, "test")
    assert folded == 0
    assert skip.node == "mask"
    assert re.fullmatch(reason, skip.reason)
    assert torch.equal(outputs, run(graph))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_torchvision_models_compute_the_same(name: str) -> None:
    from torchvision.models import get_model

    model = get_model(name, weights=None)
    for norm in model.modules():
        if isinstance(norm, _BatchNorm):
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.5, 1.5)
    x = torch.randn(2, 3, 96, 96)
    model.eval()
    graph = trace(model, x)
    result = emit(graph)
    assert not any("BatchNorm" in layer or "Dropout" in layer for layer in layers(graph))
    assert result.notes[0] == f"folded {'20 of 20' if name == 'resnet18' else '52 of 52'} batch norms"
    with torch.no_grad():
        assert distance(model(x), graph(x)) < 1e-5


class Pools(nn.Module):
    """Pools to a size that is there already, and those that change something."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        pool = nn.functional.adaptive_avg_pool2d
        y = pool(self.conv(x).relu() + x.mean(1, keepdim=True), (6, 5))  # a mean is no operation that is followed
        z = pool(pool(self.conv(x).relu(), (6, 5)), 3)
        one = nn.functional.avg_pool2d(nn.functional.max_pool2d(z, 1), 1, 1)
        return y.sum((1, 2, 3)) + one.sum((1, 2, 3))  # type: ignore[no-any-return]


def test_pools_that_give_what_they_read_go() -> None:
    x = torch.randn(2, 3, 6, 5)
    graph = trace(Pools().eval(), x)
    expected = graph(x)
    result = run_pass(Emit(), graph, Context(original=graph.copy()))[0]
    assert "removed 3 pools that give what they read" in result.notes
    assert graph.dynamic_batch
    assert sum("pool" in str(node.target) for node in graph.nodes) == 2
    torch.testing.assert_close(graph(x), expected)
    assert graph(torch.randn(4, 3, 6, 5)).shape == (4,)
