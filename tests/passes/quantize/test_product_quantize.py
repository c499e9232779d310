"""`product-quantize` on whole networks: what it makes, what it leaves alone, what it refuses."""

from __future__ import annotations

import io
import math

import pytest
import torch
from fxpress.ir.errors import DataError, ModelError, OptionError
from fxpress.ir.trace import trace
from fxpress.passes.base import Context
from fxpress.passes.compile import compile as compile_model
from fxpress.passes.quantize.product_quantize import ProductQuantize
from fxpress.passes.runner import run_pass
from fxpress.runtime.data import Data
from fxpress.runtime.layers.pq_conv2d import PQConv2d
from fxpress.runtime.layers.pq_linear import PQLinear
from rich.console import Console
from torch import nn

import fxpress


class Net(nn.Module):
    """Convolutions with and without groups, bias, batch norm and stride; two linear layers."""

    def __init__(self, width=32):
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.middle = nn.Conv2d(width, width, 3, stride=2, padding=1, groups=2)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.point = nn.Conv2d(width, width, 1)
        self.hidden = nn.Linear(width * 4, 64)
        self.last = nn.Linear(64, 48)

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)))
        x = torch.relu(self.middle(x))
        x = torch.relu(x + self.point(self.depthwise(x)))
        x = torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
        return self.last(torch.relu(self.hidden(x)))


OPTIONS = {
    "subspace": 4,
    "codewords": 8,
    "linear": {"codewords": 8},
    "last": {"subspace": 2, "codewords": 8},
    "sweeps": 2,
}


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    net = Net().eval()
    with torch.no_grad():  # inputs whose neighbours agree, and weights that are not all of one size
        for layer in (net.middle, net.point, net.hidden):
            layer.weight.mul_(torch.rand(len(layer.weight), *[1] * (layer.weight.dim() - 1)) * 2)
        net.norm.running_mean.normal_()
    return net


@pytest.fixture(scope="module")
def batches():
    torch.manual_seed(1)
    made = [nn.functional.interpolate(torch.randn(n, 3, 4, 4), size=8, mode="bilinear") for n in (24, 24, 16)]
    return [(images, torch.zeros(len(images), dtype=torch.long)) for images in made]


def quantized(net, batches, **options):
    graph = trace(net, batches[0][0][:1])
    before = graph.copy()
    one = ProductQuantize(**{**OPTIONS, **options})
    result, _ = run_pass(one, graph, Context(before, Data(calibration=batches)))
    return graph, result


def distance(net, graph, seed=5):
    images = nn.functional.interpolate(torch.randn(64, 3, 4, 4, generator=torch.Generator().manual_seed(seed)), size=8)
    with torch.no_grad():
        wanted = net(images)
        return float((graph.module(images) - wanted).norm() / (wanted - wanted.mean(0)).norm())


# -- what it makes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("correction", ["none", "layer", "accumulated"])
def test_layers_become_quantised_ones(net, batches, correction):
    graph, result = quantized(net, batches, correction=correction)
    layers = {name: type(layer) for name, layer in graph.module.named_modules() if name}
    assert layers["middle"] is layers["first"] is layers["point"] is PQConv2d
    assert layers["hidden"] is layers["last"] is PQLinear
    assert layers["depthwise"] is nn.Conv2d
    assert [skip.node for skip in result.skips] == ["depthwise"]
    assert "depthwise" in result.skips[0].reason
    middle = graph.module.middle
    assert (middle.groups, middle.stride, middle.padding, middle.subspace, middle.codewords) == (
        2,
        (2, 2),
        (1, 1),
        4,
        8,
    )
    assert graph.module.first.subspace == 3, "no wider than the inputs"
    assert (graph.module.last.subspace, graph.module.last.codewords) == (2, 8)
    rows = result.metrics["layers"]
    assert [row["layer"] for row in rows] == ["first", "middle", "point", "hidden", "last"]
    for row in rows:
        assert (row["after"] is None) == (correction == "none")
        assert row["errors"] == sorted(row["errors"], reverse=True)
        assert len(row["errors"]) == (0 if correction == "none" else 3)
        if row["after"] is not None:
            assert row["after"] < row["before"]
    assert result.distance > 0
    assert not graph.module.training


def test_the_size_is_that_of_the_formula(net, batches):
    _, result = quantized(net, batches, correction="none", codebook="int8")
    row = next(row for row in result.metrics["layers"] if row["layer"] == "middle")
    m, taps, d, k, out = 16 // 4, 9, 4, 8, 32
    assert row["bytes"] == m * k * d + 4 * m + math.ceil(taps * m * out * math.log2(k) / 8)
    assert row["dense_bytes"] == 4 * net.middle.weight.numel()
    sums = result.metrics["weight_bytes"]
    assert sums["after"] == sum(row["bytes"] for row in result.metrics["layers"])
    assert f"{sums['before'] / sums['after']:.1f} times smaller" in result.notes[0]


def test_correction_is_better_than_none_and_accumulated_better_than_layer(net, batches):
    far = {
        kind: distance(net, quantized(net, batches, correction=kind)[0]) for kind in ("none", "layer", "accumulated")
    }
    assert far["accumulated"] < far["layer"] < far["none"]


def test_accumulated_error_in_a_deep_network():
    torch.manual_seed(0)
    deep = nn.Sequential(*[layer for _ in range(8) for layer in (nn.Linear(48, 48), nn.ReLU())]).eval()
    for layer in deep[::2]:
        nn.init.kaiming_normal_(layer.weight)
    batches = [(torch.randn(400, 48), torch.zeros(400, dtype=torch.long))]
    fresh, far = torch.randn(400, 48), {}
    for kind in ("none", "layer", "accumulated"):
        graph = trace(deep, torch.zeros(1, 48))
        options = {"linear": {"subspace": 2, "codewords": 16}, "last": None, "correction": kind, "sweeps": 2}
        run_pass(ProductQuantize(**options), graph, Context(graph, Data(calibration=batches), verify=False))
        with torch.no_grad():
            far[kind] = float((graph.module(fresh) - deep(fresh)).norm() / deep(fresh).norm())
    assert far["accumulated"] < 0.95 * far["layer"]
    assert far["layer"] < far["none"]


def test_biases(net, batches):
    kept, _ = quantized(net, batches, bias="keep")
    fitted, result = quantized(net, batches, bias="refit")
    assert torch.equal(kept.module.middle.bias, net.middle.bias)
    assert not torch.equal(fitted.module.middle.bias, net.middle.bias)
    assert kept.module.first.bias is fitted.module.first.bias is None
    places = {row["layer"]: row["place"] for row in result.metrics["layers"]}
    assert places == {"first": "running mean", "middle": "bias", "point": "bias", "hidden": "bias", "last": "bias"}
    assert torch.equal(kept.module.norm.running_mean, net.norm.running_mean)
    # with its bias, each output of the last layer has the original's mean over the calibration images
    images = torch.cat([images for images, _ in batches])
    with torch.no_grad():
        torch.testing.assert_close(fitted.module(images).mean(0), net(images).mean(0), rtol=1e-3, atol=1e-4)
        assert not torch.allclose(kept.module(images).mean(0), net(images).mean(0), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_codewords_have_the_values_that_are_stored(net, batches, precision, tmp_path):
    compiled = compile_model(
        net, [{"product-quantize": {**OPTIONS, "codebook": precision, "entropy": True}}], batches[0][0][:1],
        data=Data(calibration=batches),
    )  # fmt: skip
    layer = compiled.module.middle
    assert torch.equal(layer.stored_codebook(), layer.codebook)
    compiled.save(tmp_path / "net.fxp")
    again = fxpress.load(tmp_path / "net.fxp")
    with torch.no_grad():
        assert torch.equal(again(batches[0][0]), compiled(batches[0][0]))


def test_the_network_before_is_left_alone_and_double_precision_stays(net, batches):
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    quantized(net, batches)
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    twin = Net().double().eval()
    graph, _ = quantized(twin, [(images.double(), targets) for images, targets in batches])
    assert graph.module.middle.codebook.dtype == torch.float64


def test_the_same_seed_gives_the_same_network(net, batches):
    first, second = (quantized(net, batches)[0].module.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_fewer_images_and_positions_are_looked_at(net, batches):
    _, result = quantized(net, batches, images=30, positions=4)
    assert "on 30 images" in result.notes[1]


def test_progress_is_shown(net, batches):
    graph = trace(net, batches[0][0][:1])
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    run_pass(ProductQuantize(**OPTIONS), graph, Context(graph, Data(calibration=batches), console=console))
    assert "product-quantize" in console.file.getvalue()
    assert "sweep 2 of 2" in console.file.getvalue()


# -- with a weight on the rate ----------------------------------------------------------------------------------


@pytest.mark.parametrize("correction", ["none", "layer", "accumulated"])
def test_a_weight_on_the_rate_makes_indices_shorter(net, batches, correction):
    """With and without error correction, which reports what it minimises: the rate is part of it."""
    bits, errors = [], []
    for weight in (0.0, 1.0, 2.5):
        _, result = quantized(net, batches, correction=correction, entropy=True, rate_weight=weight)
        rows = result.metrics["layers"]
        assert all(row["errors"] == sorted(row["errors"], reverse=True) for row in rows)
        assert "bits of entropy, 3.00 bits packed" in result.notes[1]
        assert ("with rate weight" in result.notes[1]) == (weight > 0)
        bits.append([row["index_bits"] for row in rows])
        errors.append(sum(row["weight_error" if correction == "none" else "after"] for row in rows))
    assert max(bits[0]) <= 3
    assert sum(bits[0]) > sum(bits[1]) > 1.2 * sum(bits[2])
    assert errors[0] < errors[1] < errors[2]


def test_without_a_weight_on_the_rate_all_is_as_without_entropy_coding(net, batches):
    plain, result = quantized(net, batches)
    coded, _ = quantized(net, batches, entropy=True, rate_weight=0.0)
    state = coded.module.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in plain.module.state_dict().items())
    assert not any("entropy" in note for note in result.notes)
    assert all(0 < row["index_bits"] <= 3 for row in result.metrics["layers"])


def test_a_file_with_shorter_indices_is_smaller_and_loads_to_the_same(net, batches, tmp_path):
    sizes = []
    for weight in (0.0, 2.0):
        one = ProductQuantize(**{**OPTIONS, "linear": {"codewords": 32}}, entropy=True, rate_weight=weight)
        compiled = compile_model(net, [one], batches[0][0][:1], data=Data(calibration=batches))
        compiled.save(tmp_path / "net.fxp")
        sizes.append((tmp_path / "net.fxp").stat().st_size)
        again = fxpress.load(tmp_path / "net.fxp")
        with torch.no_grad():
            assert torch.equal(again(batches[0][0]), compiled(batches[0][0]))
    assert sizes[1] < sizes[0]


# -- which layers -----------------------------------------------------------------------------------------------


def test_exceptions_apply_in_order(net, batches):
    table = {"*i*": {"codewords": 4}, "middle": {"subspace": 8, "codebook": "fp16"}, "first": {"skip": True},
             "hidden": {"skip": True}, "hid*": {"skip": False}}  # fmt: skip
    graph, result = quantized(net, batches, correction="none", layers=table, ignore=["last"])
    module = graph.module
    assert (module.middle.codewords, module.middle.subspace, module.middle.precision) == (4, 8, "fp16")
    assert (module.point.codewords, module.hidden.codewords) == (4, 4)
    assert {skip.node: skip.reason for skip in result.skips if skip.node != "depthwise"} == {
        "first": "ignored by option",
        "last": "ignored by option",
    }


def test_layers_that_would_not_shrink_or_cannot_be_quantised():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.wrapped = nn.Conv2d(8, 8, 3, padding=1)
            self.twice = nn.Conv2d(8, 8, 3, padding=1)
            self.up = nn.ConvTranspose2d(8, 8, 2)
            self.tied, self.tie = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
            self.tie.weight = self.tied.weight
            self.tiny = nn.Linear(8, 4)

        def forward(self, x):
            x = self.tie(self.tied(self.up(self.twice(self.twice(self.wrapped(x))))))
            return self.tiny(x.mean((2, 3)))

    graph = trace(Odd().eval(), torch.randn(1, 8, 9, 9))
    graph.module.wrapped.padding_mode = "circular"
    result, _ = run_pass(ProductQuantize(correction="none", subspace=2, codewords=4), graph, Context(graph))
    reasons = {skip.node: skip.reason for skip in result.skips}
    assert "pads with 'circular'" in reasons["wrapped"]
    assert reasons["twice"] == "it is called 2 times"
    assert "ConvTranspose2d" in reasons["up"]
    assert "shared" in reasons["tied"]
    assert reasons["tiny"] == "codebook and indices would take 528 bytes, its weight takes 128"
    assert result.notes == ["no layer was quantised"]


# -- what it refuses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codewords": 100}, "codewords.*power of two"),
        ({"codewords": 512}, "'codewords': given 512"),
        ({"subspace": 0}, "'subspace': given 0"),
        ({"linear": {"codewords": 12}}, "power of two"),
        ({"layers": {"a": {"codeword": 4}}}, "codeword"),
        ({"correction": "sometimes"}, "'none' or 'layer' or 'accumulated'"),
        ({"ridge": 0}, "'ridge': given 0"),
        ({"word": 4}, "has no option 'word'"),
        ({"rate_weight": -1, "entropy": True}, "'rate_weight': given -1, allowed: number >= 0 and <= 4"),
        ({"rate_weight": 5, "entropy": True}, "'rate_weight': given 5"),
        ({"rate_weight": float("nan"), "entropy": True}, "'rate_weight': given nan"),
        ({"rate_weight": 1}, "'rate_weight' is 1, which makes indices shorter with 'entropy: true' alone"),
    ],
)
def test_options_that_are_not_allowed(options, message):
    with pytest.raises(OptionError, match=message):
        ProductQuantize(**options)


@pytest.mark.parametrize(("option", "value"), [("layers", {"midle": {"codewords": 4}}), ("ignore", ["midle"])])
def test_a_pattern_that_fits_nothing(net, batches, option, value):
    with pytest.raises(
        OptionError, match=f"'product-quantize', option '{option}': no .* layer 'midle': did you mean 'middle'"
    ):
        quantized(net, batches, **{option: value})


def test_no_data_an_empty_loader_and_wrong_images(net, batches):
    graph = trace(net, batches[0][0][:1])
    one, state = ProductQuantize(**OPTIONS), graph.module.state_dict()
    with pytest.raises(DataError, match="'product-quantize' needs data to calibrate with"):
        fxpress.compile(net, [one], batches[0][0][:1])
    with pytest.raises(DataError, match="calibration"):
        run_pass(one, graph, Context(graph, Data(calibration=[])))
    wrong = [(torch.randn(4, 5, 8, 8), torch.zeros(4).long())]
    with pytest.raises(DataError, match=r"at node 'first' with tensors \(4, 5, 8, 8\)"):
        run_pass(one, graph, Context(graph, Data(calibration=wrong)))
    assert graph.module.state_dict().keys() == state.keys(), "the graph is as it was"


def test_weights_and_activations_that_are_no_numbers(net, batches):
    graph = trace(net, batches[0][0][:1])
    with torch.no_grad():
        graph.module.point.weight = nn.Parameter(torch.full_like(graph.module.point.weight, float("nan")))
    for kind in ("none", "accumulated"):
        with pytest.raises(ModelError, match=r"'point.weight'.*NaN"):
            run_pass(ProductQuantize(**OPTIONS, correction=kind), graph, Context(graph, Data(calibration=batches)))
    graph = trace(net, batches[0][0][:1])
    graph.module.point.weight = nn.Parameter(torch.full_like(net.point.weight.detach(), 3e38))
    with pytest.raises(ModelError, match=r"activations at 'point' of shape .* are NaN or infinite"):
        run_pass(ProductQuantize(**OPTIONS), graph, Context(graph, Data(calibration=batches)))
