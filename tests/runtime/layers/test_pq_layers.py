"""PQLinear and PQConv2d: values against a loop over the formula, gradients, sizes, what they refuse."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fxpress.ir import dialect
from fxpress.ir.verify import distance
from fxpress.runtime.layers import PQConv2d, PQLayer, PQLinear
from fxpress.runtime.layers.pq_codebook import as_stored, bits
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fxpress import OptionError

PRECISIONS = ["fp32", "fp16", "int8"]


def dense_by_loops(layer: PQLayer, taps: int) -> np.ndarray:
    """The weight `(out, inputs, taps)`, one number after another."""
    codebook, indices = layer.codebook.detach().numpy(), layer.indices.numpy()
    weight = np.zeros((indices.shape[2], layer.inputs, taps), np.float32)
    for o, i, t in np.ndindex(weight.shape):
        m, j = divmod(i, layer.subspace)
        weight[o, i, t] = codebook[m, indices[t, m, o], j]
    return weight


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[PQConv2d, Tensor]:
    groups, inputs = draw(st.integers(1, 3)), draw(st.integers(2, 9))
    size = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    layer = PQConv2d(
        groups * inputs, groups * draw(st.integers(1, 4)), size, stride=draw(st.integers(1, 2)),
        padding=draw(st.sampled_from([0, (1, 2)])), dilation=draw(st.integers(1, 2)), groups=groups,
        bias=draw(st.booleans()), subspace=draw(st.integers(1, 5)), codewords=2 ** draw(st.integers(1, 8)),
    )  # fmt: skip
    return layer, torch.randn(draw(st.integers(0, 2)), groups * inputs, 7, 6)


@given(convolutions())
def test_convolution_is_the_formula(case: tuple[PQConv2d, Tensor]) -> None:
    layer, x = case
    weight = torch.from_numpy(dense_by_loops(layer, layer.indices.shape[0])).unflatten(2, layer.kernel_size)
    assert torch.equal(layer.decoded(), weight)
    expected = F.conv2d(x, weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)
    for mode in (True, False):
        assert torch.allclose(layer.train(mode)(x), expected, atol=1e-5)  # strides of size 1 choose another kernel


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")  # of torch.nn.Conv2d
@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("size", [(2, 3), (3, 4), (2, 2), (5, 1)])
def test_padding_by_name(padding: str, size: tuple[int, int]) -> None:
    plain = nn.Conv2d(4, 6, size, padding=padding, dilation=(1, 3))
    layer = PQConv2d(4, 6, size, padding=padding, dilation=(1, 3), subspace=2, codewords=4)
    plain.load_state_dict({"weight": layer.decoded().detach(), "bias": layer.bias.detach()})
    for x in (torch.randn(2, 4, 9, 12), torch.randn(4, 9, 12)):
        assert torch.allclose(layer(x), plain(x), atol=1e-6)


@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 5), st.booleans(), st.sampled_from([(), (3,), (2, 3)]))
def test_linear_is_the_formula(inputs: int, outputs: int, width: int, bias: bool, batch: tuple[int, ...]) -> None:
    layer = PQLinear(inputs, outputs, bias, subspace=width, codewords=8)
    weight = torch.from_numpy(dense_by_loops(layer, 1)).squeeze(2)
    x = torch.randn(*batch, inputs)
    assert torch.equal(layer.decoded(), weight)
    assert torch.equal(layer(x), F.linear(x, weight, layer.bias))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_gradients_reach_the_codewords(precision: Any) -> None:
    """Straight through the rounding: the gradient of a codeword is the sum over the weights that are made of it."""
    layer = PQConv2d(6, 4, 3, subspace=4, codewords=4, codebook=precision)
    weight = layer.decoded().detach().requires_grad_()
    x = torch.randn(2, 6, 5, 5)
    F.conv2d(x, weight, layer.bias.detach()).square().sum().backward()
    layer(x).square().sum().backward()
    expected = torch.zeros_like(layer.codebook)
    for o, i, t in np.ndindex(4, 6, 9):
        m, j = divmod(i, 4)
        expected[m, int(layer.indices[t, m, o]), j] += weight.grad.flatten(2)[o, i, t]
    assert torch.allclose(layer.codebook.grad, expected, rtol=1e-5, atol=1e-5)
    assert layer.bias.grad is not None
    assert bool((layer.codebook.grad[-1, :, 2:] == 0).all())


@given(st.sampled_from(PRECISIONS), st.integers(0, 2**31), st.sampled_from([1e-30, 1e-6, 1.0, 3.7, 1e5]))
def test_stored_values_are_stored_as_they_are(precision: Any, seed: int, size: float) -> None:
    codebook = torch.randn(3, 8, 2, generator=torch.Generator().manual_seed(seed)) * size
    codebook[1] = 0
    once = as_stored(codebook, precision)
    assert torch.equal(as_stored(once, precision), once)
    assert once.dtype == torch.float32
    error = {"fp32": 0.0, "fp16": 2**-11, "int8": 0.5 / 127 * 1.01}[precision]
    bound = codebook.abs() * error if precision == "fp16" else codebook.abs().amax((1, 2), True) * error
    inside = codebook.abs() < (65504 if precision == "fp16" else float("inf"))
    assert bool(((once - codebook).abs() <= bound + (2**-25 if precision == "fp16" else 1e-29))[inside].all())


def test_straight_through_is_exact() -> None:
    codebook = torch.randn(2, 16, 4).mul(100).requires_grad_()
    for precision in PRECISIONS:
        assert torch.equal(as_stored(codebook, precision).detach(), as_stored(codebook.detach(), precision))


LAYERS: dict[str, nn.Module] = {
    "linear": nn.Linear(10, 6),
    "linear without bias": nn.Linear(10, 6, bias=False),
    "double": nn.Linear(10, 6).double().eval(),
    "conv": nn.Conv2d(10, 6, (3, 2), stride=2, padding=1, dilation=(1, 2), groups=2),
    "same": nn.Conv2d(10, 6, 3, padding="same", bias=False),
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_takes_the_place_of_a_layer(layer: Any) -> None:
    """With one codeword per output the weight is exactly that of the layer."""
    weight = layer.weight.detach()
    rows = weight.flatten(2) if weight.dim() == 4 else weight.unsqueeze(2)  # (out, in, taps)
    outputs, inputs, taps = rows.shape
    padded = F.pad(rows, (0, 0, 0, -inputs % 4)).unflatten(1, (-1, 4))  # (out, M, d, taps)
    codebook = padded.permute(1, 0, 3, 2).flatten(1, 2)  # (M, out * taps, d)
    words = 1 << (outputs * taps - 1).bit_length()
    codebook = F.pad(codebook, (0, 0, 0, words - outputs * taps), value=7.0)
    indices = (torch.arange(outputs) * taps + torch.arange(taps)[:, None])[:, None].expand(taps, len(codebook), outputs)
    kind = PQConv2d if isinstance(layer, nn.Conv2d) else PQLinear
    made = kind.from_weights(layer, codebook, indices, kernel="decode")
    assert torch.equal(made.decoded(), weight)
    x = torch.randn(2, 10, 9, 9, dtype=weight.dtype) if kind is PQConv2d else torch.randn(3, 10, dtype=weight.dtype)
    assert torch.equal(made(x), layer(x))
    assert made.training == layer.training
    assert bool((made.codebook[-1, :, made.last_width :] == 0).all())


def test_is_rebuilt_from_its_configuration() -> None:
    options: dict[str, Any] = {"subspace": 4, "codewords": 16, "codebook": "int8", "entropy": True}
    options |= {"kernel": "table", "tables": "int8"}
    for layer in (
        PQLinear(10, 7, False, **options),
        PQLinear(10, 7, False, **options, relu=True),
        PQConv2d(12, 20, (3, 1), 2, "valid", 2, 2, True, **options),
        PQConv2d(12, 20, 3, relu=True, pool=(3, 2, 2, 2, 1, 0), channels_last=True, **options),
        PQConv2d(12, 20, 3, **{**options, "kernel": "dense-int8"}),
    ):
        config = dialect.config(layer)
        twin = dialect.build(type(layer).__name__, config)
        assert dialect.config(twin) == config
        assert repr(twin) == repr(layer)
        assert {n: t.shape for n, t in twin.state_dict().items()} == {n: t.shape for n, t in layer.state_dict().items()}
        assert twin.codebook.is_meta


@pytest.mark.parametrize("kernel", ["decode", "dense", "table"])
def test_relu_and_pool_are_those_of_torch(kernel: Any) -> None:
    options: dict[str, Any] = {"subspace": 2, "codewords": 16, "kernel": kernel}
    pool = (3, 2, 2, 1, 1, 0)
    conv = PQConv2d(6, 8, 3, padding="same", relu=True, pool=pool, **options).eval()
    last = PQConv2d(6, 8, 3, channels_last=True, **options).eval().requires_grad_(False)
    assert last(torch.randn(2, 6, 9, 8)).is_contiguous(memory_format=torch.channels_last)
    head = PQLinear(8, 5, relu=True, **options).eval()
    x = torch.randn(2, 6, 9, 8)
    for layer, inputs in ((conv, x), (conv, x[0]), (head, torch.randn(3, 4, 8))):
        expected = layer.dense()(inputs).relu()
        if layer is conv:
            expected = F.max_pool2d(expected, pool[:2], pool[2:4], pool[4:])
        wanted = torch.autograd.grad(layer._weighted(inputs, layer.decoded()).square().sum(), layer.codebook)[0]
        for training in (False, True):
            y = layer.train(training)(inputs)
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
            found = torch.autograd.grad(y.square().sum(), layer.codebook)[0]
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    assert conv.sums_shape((2, 6, 9, 8)) == (2, 8, 9, 8)
    with torch.no_grad():
        inputs = torch.randn(3, 8)
        rectified = head.eval()(inputs)
        head.relu = False
        assert not torch.equal(head(inputs), rectified), "what was prepared is not kept"


@given(convolutions(), st.booleans(), st.booleans())
def test_decoded_weights_of_8_bits(case: tuple[PQConv2d, Tensor], last: bool, asked: bool) -> None:
    """Weights are rounded for each output, each image by itself; outputs lie as those of the other kernels."""
    layer, x = case[0].eval().requires_grad_(False), case[1] - 0.3
    if layer.groups > 1:
        return
    layer.channels_last, layer.kernel = asked, "dense-int8"
    x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    weight = layer.decoded()
    steps = (weight.flatten(1).abs().amax(1) / 127).view(-1, 1, 1, 1)
    weight = (weight / steps).round() * steps
    images = []
    for image in x:
        low, high = image.min().clamp(max=0), image.max().clamp(min=0)
        step = (high - low) / 255
        zero = torch.round(-low / step)
        images.append(((image * step.reciprocal()).round().clamp(-zero, 255 - zero)) * step)
    y = layer(x)
    if images:
        images = torch.stack(images)
        expected = F.conv2d(images, weight, layer.bias, layer.stride, layer.padding, layer.dilation)
        assert torch.allclose(y, expected, atol=1e-4)
        assert torch.allclose(layer(x[0]), expected[0], atol=1e-4)
    form = torch.channels_last if asked or not x.is_contiguous() else torch.contiguous_format
    assert y.is_contiguous(memory_format=form)


def test_a_large_layer_of_8_bits_is_close() -> None:
    torch.manual_seed(0)
    layer = PQConv2d(3, 64, 11, stride=4, padding=2, subspace=3, codewords=128).eval().requires_grad_(False)
    x = torch.randn(2, 3, 96, 80)
    expected = layer(x)
    layer.relu, layer.pool, layer.kernel = True, (3, 3, 2, 2, 0, 0), "dense-int8"
    y = layer(x)
    assert y.shape == (2, 64, 11, 9)
    assert distance(F.max_pool2d(expected.relu(), 3, 2), y) < 0.02
    with torch.no_grad():
        layer.codebook.mul_(2)
        assert distance(2 * (y - layer.bias.view(-1, 1, 1)), layer(x) - layer.bias.view(-1, 1, 1)) < 0.02


def test_copies() -> None:
    layer = PQLinear(9, 4, subspace=2, codewords=4, kernel="dense").eval()
    x = torch.randn(2, 9)
    with torch.no_grad():
        y = layer(x)
        twin = copy.deepcopy(layer)
        other = PQLinear(9, 4, subspace=2, codewords=4, kernel="dense").eval()
        other(x)
        other.load_state_dict(layer.state_dict())
        assert torch.equal(twin(x), y)
        assert torch.equal(other(x), y)
        twin.codebook.mul_(2)
        assert torch.equal(layer(x), y)
        assert not torch.equal(twin(x), y)


def test_dense_weights_follow_what_they_are_made_of() -> None:
    layer = PQConv2d(4, 6, 3, subspace=2, codewords=4, kernel="dense").eval()
    x = torch.randn(1, 4, 5, 5)

    def same() -> bool:
        with torch.no_grad():
            weight = layer.decoded()
            return torch.equal(layer(x), F.conv2d(x, weight, layer.bias)) and torch.equal(
                layer(x), F.conv2d(x, weight, layer.bias)
            )

    assert same()
    with torch.no_grad():
        layer.codebook.add_(1)
    assert same()
    layer.indices.zero_()
    assert same()
    layer.codebook = nn.Parameter(torch.randn_like(layer.codebook))
    assert same()
    layer.precision = "int8"
    assert same()
    layer.double().float()
    assert same()


def test_dense_weights_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = PQLinear(8, 4, subspace=2, codewords=4, kernel="dense").eval().requires_grad_(False)
    x = torch.randn(2, 8)
    y = layer(x)
    monkeypatch.setattr(layer, "decoded", lambda: pytest.fail("decoded again"))
    assert torch.equal(layer(x), y)


def test_convolutions_of_8_bits_export_and_learn() -> None:
    options: dict[str, Any] = {"subspace": 2, "codewords": 16, "kernel": "dense-int8", "relu": True}
    layer, x = PQConv2d(6, 8, 3, padding="same", pool=(2, 2, 2, 2, 0, 0), **options).eval(), torch.randn(2, 6, 7, 7)
    layer.prepare()
    y = layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x), y)
        exported = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        assert "fxpress.int8_conv2d.default" in {str(node.target) for node in exported.graph.nodes}
        assert torch.equal(exported.module()(x), y)
        torch._dynamo.reset()
        assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), y)
    found = torch.autograd.grad(y.sum(), layer.codebook)[0]
    wanted = torch.autograd.grad(layer._weighted(x, layer.decoded()).sum(), layer.codebook)[0]
    assert torch.allclose(found, wanted, atol=1e-5)
    other = copy.deepcopy(layer).double()
    assert torch.allclose(other(x.double()), other._weighted(x.double(), other.decoded()))


@pytest.mark.parametrize("kernel", ["dense", "table"])
def test_what_learns_is_decoded(kernel: Any) -> None:
    layer = PQLinear(8, 4, subspace=2, codewords=4, kernel=kernel).eval()
    layer(torch.randn(2, 8)).sum().backward()
    assert bool((layer.codebook.grad != 0).any())


class Pair(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.conv = PQConv2d(6, 8, (3, 2), padding="same", groups=2, subspace=2, codewords=16, **options)
        self.pooled = PQConv2d(8, 8, 3, subspace=2, codewords=16, relu=True, pool=(2, 2, 2, 2, 0, 0), **options)
        self.head = PQLinear(8, 5, subspace=3, codewords=8, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pooled(torch.relu(self.conv(x))).mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kernel", "prepared"), [("decode", False), ("dense", True), ("table", False), ("table", True)]
)
def test_exports_and_compiles(kernel: Any, prepared: bool) -> None:
    """Prepared, a layer goes through as it runs; not prepared, decoded."""
    model, x = Pair(kernel=kernel, codebook="int8").eval().requires_grad_(False), torch.randn(2, 6, 7, 7)
    if prepared:
        model.conv.prepare()
        model.pooled.prepare()
        model.head.prepare()
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    operations = {str(node.target) for node in exported.graph.nodes}
    assert ("fxpress.pq_conv2d.default" in operations) == (prepared and kernel == "table")
    assert ("aten.embedding.default" in operations) == (not prepared or kernel == "decode")
    torch._dynamo.reset()
    fast = torch.compile(model, backend="aot_eager", fullgraph=True)
    for batch in (2, 5):
        x = torch.randn(batch, 6, 7, 7)
        assert torch.allclose(exported.module()(x), model(x), atol=1e-5)
        assert torch.allclose(fast(x), model(x), atol=1e-5)


def test_trains_under_compile() -> None:
    model, x = Pair(codebook="fp16"), torch.randn(2, 6, 7, 7)
    torch._dynamo.reset()
    fast = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    model(x).square().sum().backward()
    fast(x).square().sum().backward()
    assert torch.allclose(fast.conv.codebook.grad, model.conv.codebook.grad, atol=1e-6)


def test_what_inference_mode_prepares_serves_gradients() -> None:
    layer = PQLinear(8, 4, subspace=2, codewords=4, kernel="dense").eval().requires_grad_(False)
    with torch.inference_mode():
        layer(torch.randn(2, 8))
    x = torch.randn(2, 8, requires_grad=True)
    layer(x).sum().backward()
    assert torch.allclose(x.grad, layer.decoded().sum(0).expand(2, 8), atol=1e-6)
    with torch.inference_mode():
        made = PQLinear(8, 4, subspace=2, codewords=4, kernel="table").eval()
        assert torch.allclose(made(x), F.linear(x, made.decoded(), made.bias), atol=1e-5)


@pytest.mark.parametrize("tables", ["fp32", "int8"])
@pytest.mark.parametrize("kernel", ["decode", "dense", "table"])
def test_gradients_in_evaluation_are_those_of_the_decoded_weight(kernel: Any, tables: Any) -> None:
    """The values are those without gradients: outside of inference mode nothing else is computed."""
    model = Pair(kernel=kernel, tables=tables).eval()
    twin = copy.deepcopy(model)
    twin.conv.kernel = twin.head.kernel = "decode"
    for layer, shape in ((model.conv, (2, 6, 7, 7)), (model.head, (3, 8))):
        own: Any = twin.conv if layer is model.conv else twin.head
        x, weight = torch.randn(shape, requires_grad=True), torch.randn(own(torch.zeros(shape)).shape)
        with torch.inference_mode():
            expected = layer(x)
        y = layer(x)
        assert torch.equal(y, expected)
        sources, others = [x, *layer.parameters()], [x, *own.parameters()]
        found = torch.autograd.grad((y * weight).sum(), sources)
        wanted = torch.autograd.grad((own(x) * weight).sum(), others)
        for one, other in zip(found, wanted, strict=True):
            assert torch.allclose(one, other, atol=1e-5)


def test_gradients_in_evaluation_only_of_what_asks_for_them() -> None:
    layer = PQLinear(8, 4, subspace=2, codewords=4, kernel="table").eval()
    layer.codebook.requires_grad_(False)
    layer(torch.randn(2, 8)).sum().backward()
    assert layer.codebook.grad is None
    assert torch.equal(layer.bias.grad, torch.full((4,), 2.0))
    y = layer(torch.randn(2, 8))
    with torch.no_grad():
        layer.codebook.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_exports_what_runs_also_where_gradients_are_on() -> None:
    layer, x = PQLinear(8, 4, subspace=2, codewords=4, kernel="table").eval(), torch.randn(2, 8)
    layer.prepare()
    exported = torch.export.export(layer, (x,))
    assert "fxpress.pq_linear.default" in {str(node.target) for node in exported.graph.nodes}
    assert torch.equal(exported.module()(x), layer(x))


WRONG: dict[str, tuple[Any, str]] = {
    "codewords": (lambda: PQLinear(8, 4, subspace=2, codewords=12), "codewords is 12; allowed: 2, 4, 8"),
    "too many": (lambda: PQLinear(8, 4, subspace=2, codewords=512), "codewords is 512"),
    "one": (lambda: PQLinear(8, 4, subspace=2, codewords=1), "codewords is 1"),
    "subspace": (lambda: PQLinear(8, 4, subspace=0, codewords=4), "subspace is 0"),
    "codebook": (lambda: PQLinear(8, 4, subspace=2, codewords=4, codebook="fp8"), "codebook is 'fp8'; allowed: fp32"),
    "kernel": (lambda: PQLinear(8, 4, subspace=2, codewords=4, kernel="fast"), "kernel is 'fast'"),
    "tables": (lambda: PQLinear(8, 4, subspace=2, codewords=4, tables="fp16"), "tables is 'fp16'"),
    "depthwise": (lambda: PQConv2d(8, 16, 3, groups=8, subspace=1, codewords=4), "a depthwise convolution"),
    "linear": (lambda: PQLinear(8, 4, subspace=2, codewords=4, kernel="dense-int8"), "which is of convolutions"),
    "8 bits in groups": (
        lambda: PQConv2d(8, 8, 3, groups=2, subspace=2, codewords=4, kernel="dense-int8"),
        "kernel is 'dense-int8'; there are 2 groups",
    ),
    "8 bits of many weights": (
        lambda: PQConv2d(8192, 1, 3, subspace=8192, codewords=2, kernel="dense-int8"),
        "an output has 73728 weights",
    ),
    "8 bits and a large pool": (
        lambda: PQConv2d(8, 8, 3, subspace=2, codewords=4, kernel="dense-int8", relu=True, pool=(17, 1, 1, 1, 0, 0)),
        "the pool is",
    ),
    "groups": (lambda: PQConv2d(8, 9, 3, groups=2, subspace=1, codewords=4), "do not make 2 groups"),
    "padding": (lambda: PQConv2d(8, 8, 3, padding="all", subspace=1, codewords=4), "padding is 'all'"),
    "pool": (lambda: PQConv2d(8, 8, 3, subspace=1, codewords=4, relu=True, pool=(2, 2, 2, 2, 2, 0)), "pool is"),
    "pool of negative numbers": (
        lambda: PQConv2d(8, 8, 3, subspace=1, codewords=4, pool=(2, 2, 2, 2, 0, 0)),
        "pool asks for relu",
    ),
    "mode": (
        lambda: PQConv2d.from_weights(
            nn.Conv2d(4, 4, 1, padding_mode="circular"), torch.zeros(2, 4, 2), torch.zeros(1, 2, 4)
        ),
        "padding_mode is 'circular'",
    ),
    "shapes": (
        lambda: PQLinear.from_weights(nn.Linear(4, 4), torch.zeros(3, 4, 2), torch.zeros(1, 2, 4)),
        r"codebook and indices are \(\(3, 4, 2\), \(1, 2, 4\)\)",
    ),
    "indices": (
        lambda: PQLinear.from_weights(nn.Linear(4, 4), torch.zeros(2, 4, 2), torch.full((1, 2, 4), 4)),
        "indices name codewords from 4 to 4; there are 4",
    ),
}


@pytest.mark.parametrize(("make", "message"), WRONG.values(), ids=WRONG)
def test_what_is_refused(make: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make()


def test_bits() -> None:
    assert [bits(2**n) for n in range(1, 9)] == list(range(1, 9))
