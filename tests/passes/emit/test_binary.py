"""Packing: cuts against double precision, random networks and real ones step by step, what is left out and why."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fxpress.ir.errors import VerifyError
from fxpress.ir.graph import submodule
from fxpress.ir.verify import distance, run
from fxpress.passes.base import Context, PassResult
from fxpress.passes.binarize.binarize import Binarize
from fxpress.passes.emit import binary, binary_lowering
from fxpress.passes.emit import emit as emit_pass
from fxpress.passes.emit.binary_folding import Affine, fold_cuts, fold_thresholds
from fxpress.passes.emit.emit import Emit
from fxpress.passes.runner import run_pass
from fxpress.runtime import kernels
from fxpress.runtime.kernels.binary_reference import levels_of
from fxpress.runtime.layers import BinaryConv2d, BinaryLinear, BinaryNetwork, HalfWaveQuantizer, Int8Conv2d
from fxpress.tools.bench.accuracy_networks import CifarResNet, vgg_small
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.models import DenseNet, squeezenet1_1
from torchvision.models.resnet import BasicBlock, ResNet

import fxpress
from fxpress import Graph, trace

# -- the algebra ---------------------------------------------------------------------------------------------------

numbers = st.floats(-8, 8, width=32).map(lambda x: x if abs(x) > 1e-3 else 0.0)
factors = st.lists(numbers, min_size=4, max_size=4)
quantizers = st.builds(HalfWaveQuantizer, st.integers(1, 2), st.just(value=True), st.sampled_from(["strict", "round"]))


@settings(max_examples=100, deadline=None)
@given(factor=factors, term=factors, quantizer=quantizers, terms=st.integers(1, 30))
def test_cuts_equal_the_quantizer_on_every_sum(
    factor: list[float], term: list[float], quantizer: HalfWaveQuantizer, terms: int
) -> None:
    """All sums there can be, in double precision: not one level differs, whatever the signs of the factors."""
    of = Affine(torch.tensor(factor).double(), torch.tensor(term).double())
    flip, cuts = fold_cuts(of, quantizer.thresholds, terms)
    sums = torch.arange(-3 * terms, 3 * terms + 1)[:, None]
    levels = sum(torch.where(flip, -sums, sums) >= row for row in cuts)
    values = sums.double() * of.factor.abs() * torch.where(flip, -1.0, 1.0) + of.term
    expected = (quantizer(values) / quantizer.levels[0]).round()
    assert torch.equal(levels.double(), expected)
    assert int(cuts.min()) >= -3 * terms
    assert int(cuts.max()) <= 3 * terms + 1


def test_a_sum_on_the_threshold_is_below_it() -> None:
    """Ties: v(S) = θ is not above θ."""
    flip, cuts = fold_cuts(Affine(torch.tensor([0.5, -0.5, 0.0]).double(), torch.zeros(3).double()), (0.0, 1.0, 2.0), 9)
    assert flip.tolist() == [False, True, False]
    assert cuts.tolist() == [[1, 1, 28], [3, 3, 28], [5, 5, 28]]


@settings(max_examples=100, deadline=None)
@given(factor=factors, term=factors, quantizer=quantizers, seed=st.integers(0, 999))
def test_thresholds_of_floats(factor: list[float], term: list[float], quantizer: HalfWaveQuantizer, seed: int) -> None:
    """Float32 values, many of them right at the bounds, against the quantizer in double precision."""
    of = Affine(torch.tensor(factor).double(), torch.tensor(term).double())
    bounds = fold_thresholds(of, quantizer.thresholds)
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(seed))
    finite = torch.where(bounds.isfinite(), bounds, 0.0)
    near = torch.cat([finite, finite.nextafter(torch.tensor(9e9)), finite.nextafter(torch.tensor(-9e9))])
    x = torch.cat([x, near])
    exact = x.double() * of.factor + of.term
    gap = (exact[..., None] - torch.tensor(quantizer.thresholds).double()).abs().amin(-1)
    clear = gap > 1e-12 * (1 + exact.abs())  # the double itself is rounded
    expected = (quantizer(exact) / quantizer.levels[0]).round()
    assert torch.equal(levels_of(x, bounds, 1).double()[clear], expected[clear])


# -- networks ------------------------------------------------------------------------------------------------------


def binarized(model: nn.Module, x: Tensor, **options: Any) -> Graph:
    """A network with binary layers, and batch norms of which some factors are negative."""
    torch.manual_seed(1)
    graph = trace(model.eval(), (x,))
    run_pass(Binarize(**options), graph, Context(original=graph.copy()))
    for layer in graph.module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            layer.running_mean.normal_(0, 0.5)
            layer.running_var.uniform_(0.5, 2)
            if layer.affine:
                nn.init.uniform_(layer.weight, -0.7, 1.5)
                nn.init.normal_(layer.bias)
    return graph


def emit(graph: Graph, **options: Any) -> PassResult:
    return run_pass(Emit(layout="contiguous", **options), graph, Context(original=graph.copy()))[0]


def packed(graph: Graph) -> list[BinaryNetwork]:
    return [layer for layer in graph.module.modules() if isinstance(layer, BinaryNetwork)]


NETWORKS: dict[str, tuple[Any, tuple[int, ...], int]] = {
    "vgg": (lambda: vgg_small(3, 0.1), (2, 3, 32, 32), 5),
    "cifar resnet, padded shortcuts": (lambda: CifarResNet(1), (2, 3, 16, 16), 6),
    "resnet, downsampling": (lambda: ResNet(BasicBlock, [1, 1, 1, 1], num_classes=7), (2, 3, 48, 48), 11),
    "densenet": (lambda: DenseNet(8, (2, 2), 16, num_classes=10), (2, 3, 32, 32), 9),
    "squeezenet": (lambda: squeezenet1_1(num_classes=10), (2, 3, 48, 48), 24),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_become_one_call(name: str) -> None:
    build, shape, layers = NETWORKS[name]
    torch.manual_seed(0)
    graph = binarized(build(), torch.randn(*shape))
    before = graph.copy()
    result = emit(graph)  # proves each step in double precision
    (network,) = packed(graph)
    assert len(result.metrics["packed"]["layers"]) == layers
    assert result.metrics["packed"]["levels"] > 0
    assert result.metrics["packed"]["ties"] == 0
    assert not any(isinstance(layer, (BinaryConv2d, HalfWaveQuantizer)) for layer in graph.module.modules())
    assert result.metrics["output_distance"] < 0.3  # levels at thresholds fall on either side in single precision
    x = graph.example_args[0]
    with kernels.using("none"):
        expected = graph(x)
    torch.testing.assert_close(graph(x), expected, rtol=1e-4, atol=1e-4)
    assert run(before).shape == run(graph).shape
    assert network.stored_bytes < 0.06 * 4 * sum(p.numel() for p in before.module.parameters()) + 12000


def test_a_changed_cut_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof proves something: a cut that is one too high is found, and the graph stays."""

    def wrong(of: Affine, thresholds: tuple[float, ...], terms: int) -> tuple[Tensor, Tensor]:
        flip, cuts = fold_cuts(of, thresholds, terms)
        return flip, cuts + 1

    graph = binarized(vgg_small(3, 0.1), torch.randn(2, 3, 32, 32))
    monkeypatch.setattr(binary_lowering, "fold_cuts", wrong)
    with pytest.raises(VerifyError, match=r"levels that differ and lie on no threshold"):
        emit(graph)
    assert not packed(graph)


def test_a_changed_scale_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = binarized(CifarResNet(1), torch.randn(2, 3, 16, 16))
    stacked = Affine.stacked
    monkeypatch.setattr(Affine, "stacked", lambda of: stacked(of) * 1.001)
    with pytest.raises(VerifyError, match="differs by"):
        emit(graph)


class Blocks(nn.Module):
    """Layers after one another, given as a function of the input."""

    def __init__(self, layers: dict[str, nn.Module], forward: Any) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.run(self, x)
        return y


def norm(channels: int, *, negative: bool = True) -> nn.BatchNorm2d:
    made = nn.BatchNorm2d(channels)
    nn.init.uniform_(made.weight, -1.0 if negative else 0.2, 1.0)
    nn.init.normal_(made.bias)
    assert made.running_mean is not None
    made.running_mean.normal_()
    return made


def proven(layers: dict[str, nn.Module], forward: Any, x: Tensor) -> tuple[Graph, PassResult]:
    """A graph of these layers, which tracing would take apart: plain ones stand for them meanwhile."""
    layers = copy.deepcopy(layers)
    graph = trace(Blocks({name: stand_in(layer) for name, layer in layers.items()}, forward).eval(), (x,))
    for name, layer in layers.items():
        graph.module.set_submodule(name, layer.eval())
    return graph, emit(graph)


def stand_in(layer: nn.Module) -> nn.Module:
    if isinstance(layer, HalfWaveQuantizer):
        return nn.Dropout()
    if isinstance(layer, BinaryConv2d):
        sizes = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding)
        return nn.Conv2d(*sizes, bias=layer.bias is not None)
    if isinstance(layer, BinaryLinear):
        return nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    return layer


def test_a_pool_before_a_negative_factor_runs_on_floats() -> None:
    torch.manual_seed(0)
    layers = {"q": HalfWaveQuantizer(), "a": BinaryConv2d(4, 6, 3), "n": norm(6), "r": HalfWaveQuantizer(),
              "b": BinaryConv2d(6, 5, 3)}  # fmt: skip
    x = torch.randn(2, 4, 14, 14)
    graph, result = proven(layers, lambda m, x: m.b(m.r(m.n(F.max_pool2d(m.a(m.q(x)), 2)))), x)
    assert any("negative factor" in note for note in result.notes)
    kinds = [step.kind for step in packed(graph)[0].parsed.steps]
    assert kinds == ["levels", "conv", "max_pool", "levels", "conv"]
    # behind the batch norm the pool can wait until values are bytes, whatever the signs
    graph, _ = proven(layers, lambda m, x: m.b(m.r(F.max_pool2d(m.n(m.a(m.q(x))), 3, 2, 1))), x)
    kinds = [step.kind for step in packed(graph)[0].parsed.steps]
    assert kinds == ["levels", "conv_levels", "max_pool", "conv"]


def test_levels_that_leave_a_network_are_floats_outside() -> None:
    torch.manual_seed(0)
    layers = {"q": HalfWaveQuantizer(1), "a": BinaryConv2d(4, 4, 3, padding=1), "c": nn.Conv2d(4, 4, 1)}

    def forward(m: Any, x: Tensor) -> Tensor:
        levels = m.q(x)
        y: Tensor = m.c(levels) * m.a(levels)
        return y

    graph, _ = proven(layers, forward, torch.randn(2, 4, 6, 6))
    assert [step.kind for step in packed(graph)[0].parsed.steps] == ["levels", "decode", "conv"]
    assert not any(isinstance(layer, HalfWaveQuantizer) for layer in graph.module.modules())


def test_levels_that_come_from_outside_are_found_again() -> None:
    """The sum reads the layer and what another makes of the levels: it is in no call with the quantizer."""
    torch.manual_seed(0)
    layers = {"q": HalfWaveQuantizer(1), "a": BinaryConv2d(4, 4, 3, padding=1), "c": nn.Conv2d(4, 4, 1)}

    def forward(m: Any, x: Tensor) -> Tensor:
        levels = m.q(x)
        y: Tensor = m.c(levels) + m.a(levels)
        return y

    graph, _ = proven(layers, forward, torch.randn(2, 4, 6, 6))
    assert [step.kind for step in packed(graph)[0].parsed.steps] == ["levels", "conv"]
    assert isinstance(submodule(graph.module, "q"), HalfWaveQuantizer)


def test_a_layer_behind_something_unknown_stays() -> None:
    """Levels that passed through what no packed network can hold are none any more; the layer behind is packed."""
    torch.manual_seed(0)
    layers = {
        "q": HalfWaveQuantizer(),
        "a": BinaryConv2d(4, 4, 3),
        "b": BinaryConv2d(4, 4, 3),
        "r": HalfWaveQuantizer(),
    }
    forward = lambda m, x: m.b(m.r(m.a(torch.sin(m.q(x)))))  # noqa: E731
    graph, result = proven(layers, forward, torch.randn(2, 4, 9, 9))
    assert [skip.node for skip in result.skips] == ["a"]
    assert "not quantised" in result.skips[0].reason
    assert isinstance(submodule(graph.module, "a"), BinaryConv2d)
    assert len(packed(graph)) == 1


def test_linear_layers_behind_a_flattening() -> None:
    torch.manual_seed(0)
    layers = {"q": HalfWaveQuantizer(), "a": BinaryConv2d(4, 6, 3, bias=False), "n": norm(6), "r": HalfWaveQuantizer(),
              "f": BinaryLinear(6 * 16, 9), "s": HalfWaveQuantizer(), "g": BinaryLinear(9, 3, bias=False)}  # fmt: skip
    forward = lambda m, x: m.g(m.s(m.f(m.r(m.n(m.a(m.q(x)))).flatten(1))))  # noqa: E731
    graph, _ = proven(layers, forward, torch.randn(2, 4, 6, 6))
    assert [step.kind for step in packed(graph)[0].parsed.steps] == [
        "levels",
        "conv_levels",
        "flatten",
        "conv_levels",
        "conv",
    ]
    assert run(graph).shape == (2, 3)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"weights": "ternary"}, "three values"),
        ({"bits": 3}, "not quantised"),
        ({"uniform": False}, "not quantised"),
        ({"first": "binary"}, "not quantised"),
    ],
)
def test_what_is_not_packed_says_why(options: dict[str, Any], reason: str) -> None:
    x = torch.randn(2, 3, 16, 16)
    graph = binarized(CifarResNet(1), x, **options)
    result = emit(graph)
    reasons = [skip.reason for skip in result.skips if skip.reason.startswith("not packed")]
    assert reasons
    assert all(reason in text for text in reasons)
    assert result.metrics["output_distance"] < 0.3


def test_off_leaves_the_layers() -> None:
    graph = binarized(CifarResNet(1), torch.randn(2, 3, 16, 16))
    before = graph.copy()
    emit(graph, binary="off")
    assert not packed(graph)
    assert sum(isinstance(layer, BinaryConv2d) for layer in graph.module.modules()) == 6
    assert distance(run(before), run(graph)) < 0.3


def test_several_regions_with_several_outputs_keep_their_order() -> None:
    """A layer in full precision in between, and values that pass around it."""
    torch.manual_seed(0)
    layers = {"q": HalfWaveQuantizer(), "a": BinaryConv2d(4, 4, 1), "n": norm(4), "d": nn.Conv2d(4, 4, 1, groups=4),
              "r": HalfWaveQuantizer(), "b": BinaryConv2d(4, 4, 1)}  # fmt: skip

    def forward(m: Any, x: Tensor) -> Tensor:
        s = m.n(m.a(m.q(x)))
        y: Tensor = m.b(m.r(torch.sin(m.d(s)))) + s
        return y

    graph, result = proven(layers, forward, torch.randn(2, 4, 6, 6))
    assert len(packed(graph)) == 2
    assert len(result.metrics["packed"]["networks"]) == 2
    graph.lint()


def test_names_that_are_taken() -> None:
    torch.manual_seed(0)
    layers = {"binary_network": HalfWaveQuantizer(), "a": BinaryConv2d(4, 4, 1), "c": nn.Conv2d(4, 4, 1)}
    layers["d"] = nn.Conv2d(4, 4, 1)
    forward = lambda m, x: m.d(m.binary_network(m.c(x))) + m.a(m.binary_network(m.c(x)))  # noqa: E731
    _, result = proven(layers, forward, torch.randn(2, 4, 6, 6))
    assert result.metrics["packed"]["networks"] == ["binary_network_1"]
    assert binary.NAME == "binary_network"


def test_an_emitted_network_exports_compiles_and_is_stored(tmp_path: Any) -> None:
    x = torch.randn(2, 3, 16, 16)
    graph = binarized(CifarResNet(1), x)
    before = graph.copy()
    compiled = fxpress.compile(before, ["emit"], (x,))
    compiled.save(tmp_path / "n.fxp")
    loaded = fxpress.load(tmp_path / "n.fxp")
    y = compiled(x).detach()
    assert torch.equal(loaded(x), y)
    assert torch.equal(torch.export.export(compiled.module, (x,)).module()(x), y)
    fast: Any = torch.compile(compiled.module, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(fast(x), y)
    assert (tmp_path / "n.fxp").stat().st_size < 30_000


def test_an_8_bit_stem_takes_its_pool_out_of_the_packed_network(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=7).eval()
    x = torch.randn(1, 3, 64, 64)
    trained = fxpress.compile(model, [{"binarize": {"first": "int8", "last": "int8"}}], x)
    compiled = fxpress.compile(trained, ["emit"], x)
    layers = dict(compiled.module.named_children())
    stem = next(layer for layer in layers.values() if isinstance(layer, Int8Conv2d))
    packed = next(layer for layer in layers.values() if isinstance(layer, BinaryNetwork))
    assert stem.pool == (3, 3, 2, 2, 1, 1)
    assert not any(line.startswith("max_pool") for line in packed.program)
    assert "1 max pools became parts of the layers before them" in compiled.report["emit"].notes
    monkeypatch.setattr(emit_pass, "fuse_packed_pools", lambda graph, author: 0)
    apart = fxpress.compile(trained, ["emit"], x)
    packed = next(layer for layer in apart.module.children() if isinstance(layer, BinaryNetwork))
    assert any(line.startswith("max_pool") for line in packed.program)
    with torch.no_grad():
        for images in (x, torch.randn(3, 3, 70, 50)):
            assert torch.equal(compiled(images), apart(images))
