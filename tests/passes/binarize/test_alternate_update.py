"""`alternate-update`: layer by layer from the front, monotone, kept or undone."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fxpress.ir.errors import DataError, OptionError
from fxpress.ir.graph import Graph
from fxpress.ir.trace import trace
from fxpress.passes.base import Context, PassResult
from fxpress.passes.binarize.alternate_update import AlternateUpdate
from fxpress.passes.binarize.binarize import Binarize
from fxpress.passes.binarize.judging import Judge
from fxpress.passes.binarize.responses import Responses, is_normalised
from fxpress.passes.binarize.signs import best_factor
from fxpress.passes.clone import clone_graph
from fxpress.passes.layerwise.patches import weight_rows
from fxpress.passes.runner import run_pass
from fxpress.runtime.layers import BinaryLayer
from torch import Tensor, nn

import fxpress


def images(count: int, seed: int) -> list[Any]:
    x = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return list(zip(x.split(32), x.mean((1, 2, 3)).gt(0).long().split(32), strict=True))


CALIBRATION = images(320, 1)
DATA = fxpress.Data(calibration=CALIBRATION)


class Net(nn.Sequential):
    """Two convolutions with batch norms, one of them in groups, a linear layer with a bias in front of the last."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 12, 3, padding=1, stride=2), nn.BatchNorm2d(12), nn.ReLU(),
            nn.Conv2d(12, 8, 3, groups=2, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Flatten(), nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 4),
        )  # fmt: skip


def binary(data: Any = DATA, **options: Any) -> tuple[Graph, Context]:
    """A binarized network, and the context that knows the original."""
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        for _ in range(20):
            model(CALIBRATION[0][0])
    graph = trace(model.eval(), CALIBRATION[0][0][:2])
    context = Context(clone_graph(graph), data=data)
    run_pass(Binarize(**options), graph, context)
    return graph, context


def run(graph: Graph, context: Context, **options: Any) -> PassResult:
    return run_pass(AlternateUpdate(**options), graph, context)[0]


def divergence(graph: Graph, context: Context) -> float:
    total = 0.0
    with torch.no_grad():
        for x, _ in images(128, 9):
            p, q = context.original(x).log_softmax(1), graph(x).log_softmax(1)
            total += float((p.exp() * (p - q)).sum())
    return total


@pytest.mark.parametrize("target", ["original", "latent"])
def test_errors_fall_and_what_does_not_help_is_undone(target: Any) -> None:
    graph, context = binary()
    before = divergence(graph, context)
    result = run(graph, context, target=target)
    updates = result.metrics["layers"]
    assert [u["layer"] for u in updates] == ["3", "6", "11"]
    for update in updates:
        errors = update["errors"]
        assert all(behind <= start + 1e-9 for start, behind in pairwise(errors))
        assert 0 <= errors[-1] < errors[0]
        assert update["kept"] == (update["loss_behind"] <= update["loss_before"])
    first, last = result.metrics["loss"]
    assert last <= first
    undone = {skip.node for skip in result.skips}
    assert undone == {u["layer"] for u in updates if not u["kept"]}
    if target == "original":
        assert divergence(graph, context) < before


@pytest.mark.parametrize("scale", ["filter", "layer"])
def test_latent_weights_say_how_far_signs_are_from_turning(scale: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the first layer: that with the smallest |W| costs least to turn, and α is the fitted one."""
    graph, context = binary(scale=scale)
    node = next(node for node in graph.nodes if node.target == "3")
    layer: Any = graph.module.get_submodule("3")
    factor = layer.weight.detach().abs().mean()
    monkeypatch.setattr(Judge, "loss", lambda *_: 0.0)  # keep it
    run(graph, context, ignore=("6", "11"))
    gathered = Responses(graph, context.original, node, 64)
    gathered.collect(Judge(DATA, 1024, context.original.module, "test").learned, 10, None, "test")
    (problem,) = gathered.problems(centred=True)
    latent = weight_rows(gathered.plain, layer.weight.detach())[0].double().T
    signs = torch.where(latent >= 0, 1.0, -1.0).double()
    alpha = best_factor(signs, problem.cross, problem.gram @ signs)
    if scale == "filter":
        assert torch.allclose(latent.abs().mean(0), alpha, rtol=1e-5)
    else:
        assert float(latent.abs().mean()) == pytest.approx(float(factor), rel=1e-5)

    def missed(b: Tensor) -> Tensor:
        return (alpha.square() * (b * (problem.gram @ b)).sum(0)) - 2 * alpha * (b * problem.cross).sum(0)

    costs = []
    for i in range(len(signs)):
        turned = signs.clone()
        turned[i] *= -1
        costs.append((missed(turned) - missed(signs)) / problem.gram[i, i] / alpha / 4)
    cost, sizes = torch.stack(costs), latent.abs() / latent.abs().mean(0)
    assert float(cost.min()) > -1e-9
    assert torch.allclose(sizes, cost / cost.mean(0), atol=0.01)


def test_the_error_is_that_of_the_responses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the first layer, whose inputs do not change: computed from its outputs on the same images, centred."""
    graph, context = binary()
    reads: dict[str, Tensor] = {}
    node = next(node for node in graph.nodes if node.target == "3")
    twin: Any = context.original.module.get_submodule("3")
    inner: Any = context.original.module
    monkeypatch.setattr(Judge, "loss", lambda *_: 0.0)  # keep it
    result = run(graph, context, ignore=("6", "11"), positions=16)
    learned = torch.cat([x for index, (x, _) in enumerate(CALIBRATION) if index % 5 != 1])
    layer: Any = graph.module.get_submodule("3")
    layer.register_forward_hook(lambda _m, _i, y: reads.update(found=y))
    twin.register_forward_hook(lambda _m, _i, y: reads.update(wanted=y))
    with torch.no_grad():
        graph(learned)
        inner(learned)
    assert is_normalised(graph, node)
    found, wanted = (reads[k].double() for k in ("found", "wanted"))
    found, wanted = (t - t.mean((0, 2, 3), keepdim=True) for t in (found, wanted))
    share = float((wanted - found).square().sum() / wanted.square().sum())
    assert share == pytest.approx(result.metrics["layers"][0]["errors"][-1], rel=1e-4)


def test_rolled_back_where_the_loss_would_rise(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, context = binary()
    before = {name: value.clone() for name, value in graph.module.state_dict().items()}
    losses = iter([1.0, 2.0, 3.0, 4.0])
    monkeypatch.setattr(Judge, "loss", lambda *_: next(losses))
    result = run(graph, context)
    assert [skip.reason for skip in result.skips] == [
        f"undone: divergence from the teacher on held-out images would rise from 1.0000 to {n}.0000" for n in (2, 3, 4)
    ]
    assert result.notes[0] == "0 of 3 layers updated"
    assert all(torch.equal(value, before[name]) for name, value in graph.module.state_dict().items())


def test_layers_behind_are_tuned_and_those_before_are_not() -> None:
    data = fxpress.Data(train=images(128, 3), val=images(64, 4), calibration=CALIBRATION)
    graph, context = binary(data)
    stem = graph.module.get_submodule("0").weight.clone()  # type: ignore[operator, union-attr]
    head = graph.module.get_submodule("13").weight.clone()  # type: ignore[operator, union-attr]
    result = run(graph, context, tune=2, lr=0.01, precision="bf16")
    assert "validation loss" in result.notes[-1]
    assert result.metrics["loss"][1] <= result.metrics["loss"][0]
    assert any(u["kept"] for u in result.metrics["layers"])
    assert torch.equal(graph.module.get_submodule("0").weight, stem)  # type: ignore[arg-type]
    assert not torch.equal(graph.module.get_submodule("13").weight, head)  # type: ignore[arg-type]
    assert all(parameter.requires_grad for parameter in graph.module.parameters())


def test_a_layer_with_a_bias_gets_the_mean_right() -> None:
    graph, context = binary(first="float", last="binary")
    result = run(graph, context, ignore=("3", "6", "11"))
    (update,) = result.metrics["layers"]
    assert update["layer"] == "13"
    if update["kept"]:
        learned = torch.cat([x for index, (x, _) in enumerate(CALIBRATION) if index % 5 != 1])
        with torch.no_grad():
            assert torch.allclose(graph(learned).mean(0), context.original(learned).mean(0), atol=1e-3)


def test_one_factor_per_layer_fits_signs_where_a_norm_follows() -> None:
    graph, context = binary(scale="layer", last="binary")
    result = run(graph, context)
    reasons = {skip.node: skip.reason for skip in result.skips}
    assert "scale is 'layer', and no batch norm" in reasons["13"]
    assert [u["layer"] for u in result.metrics["layers"]] == ["3", "6", "11"]


def test_what_it_refuses() -> None:
    graph, context = binary(weights="ternary")
    result = run(graph, context)
    assert result.notes == ["no binary layer to update"]
    assert all("ternary" in skip.reason for skip in result.skips)
    graph, context = binary()
    with pytest.raises(OptionError, match="no binary layer 'conv': binary layers: 3, 6, 11"):
        run(graph, context, ignore=("conv",))
    with pytest.raises(DataError, match="calibration is a single batch"):
        run(graph, Context(context.original, data=fxpress.Data(calibration=CALIBRATION[:1])))
    with pytest.raises(DataError, match="needs data to calibrate"):
        run(graph, Context(context.original))
    ready = Context(clone_graph(graph), data=DATA)  # the original is binary itself
    result = run(graph, ready)
    assert all("'target: latent' needs none" in skip.reason for skip in result.skips)
    assert run(graph, ready, target="latent").metrics["layers"]
    narrow = trace(nn.Sequential(*list(Net())[:3], nn.Conv2d(8, 5, 3)).eval(), CALIBRATION[0][0][:2])
    result = run(graph, Context(narrow, teacher=context.original.module, data=DATA))
    assert "in the original network (2, 5, 6, 6)" in {s.node: s.reason for s in result.skips}["3"]


def test_responses_of_latent_weights_in_closed_form() -> None:
    graph, _ = binary()
    node = next(node for node in graph.nodes if node.target == "6")
    gathered = Responses(graph, None, node, 10**6)
    gathered.collect(CALIBRATION, len(CALIBRATION), None, "test")
    x = torch.cat([x for x, _ in CALIBRATION])
    layer: Any = graph.module.get_submodule("6")
    read: dict[str, Tensor] = {}
    layer.register_forward_hook(lambda _m, inputs, _y: read.update(x=inputs[0]))
    with torch.no_grad():
        graph(x)
        y = F.conv2d(read["x"], layer.weight, groups=2)
    for centred in (True, False):
        for group, problem in enumerate(gathered.problems(centred=centred)):
            wanted = y[:, 4 * group : 4 * group + 4].double()
            wanted = wanted - wanted.mean((0, 2, 3), keepdim=True) if centred else wanted
            assert problem.energy == pytest.approx(float(wanted.square().sum()), rel=1e-4)
            assert torch.allclose(problem.mean_y, y[:, 4 * group : 4 * group + 4].double().mean((0, 2, 3)), atol=1e-5)


def test_the_pipeline_that_comes_with_the_package(repository: Path) -> None:
    pipeline = fxpress.Pipeline.load(repository / "passes/pipelines/half-wave.yaml")
    assert [one.name for one in pipeline.passes] == ["binarize", "alternate-update", "distill", "emit"]


def test_a_network_of_binary_layers_alone_is_left_with_them() -> None:
    graph, context = binary()
    run(graph, context)
    assert sum(isinstance(m, BinaryLayer) for m in graph.module.modules()) == 3
    graph.lint()
