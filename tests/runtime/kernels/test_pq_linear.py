"""Fully connected layers by look-up: every instruction set and layout against the reference and decode-and-compute."""

from __future__ import annotations

import pytest
import torch
from fxpress.ir.errors import KernelError
from fxpress.runtime import kernels
from fxpress.runtime.kernels import layout as layouts
from fxpress.runtime.kernels import reference
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

TABLES = ("fp32", "int16", "int8")
CODEWORDS = (2, 4, 8, 16, 32, 64, 128, 256)
SIZES = (1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 300, 520)
pq_linear = torch.ops.fxpress.pq_linear


class Layer:
    """A random layer: ragged last sub-space where `ragged` > 0, whose unused dimensions are zero."""

    def __init__(self, subspaces: int, codewords: int, width: int, outputs: int, ragged: int = 0) -> None:
        self.inputs = subspaces * width - ragged
        self.codewords, self.outputs = codewords, outputs
        self.codebook = torch.randn(subspaces, codewords, width)
        if ragged:
            self.codebook[-1, :, -ragged:] = 0
        self.indices = torch.randint(0, codewords, (1, subspaces, outputs), dtype=torch.uint8)
        self.bias = torch.randn(outputs)

    def decoded(self) -> Tensor:
        parts = [book[index.long()] for book, index in zip(self.codebook, self.indices[0], strict=True)]
        return torch.cat(parts, 1)[:, : self.inputs]

    def layouts(self) -> list[Tensor]:
        """In every layout that a linear layer of so many code words can have."""
        numbers = [layouts.PLAIN, layouts.ROWS]
        numbers += [layouts.LANES] * (self.codewords <= 32) + [layouts.PAIRS] * (self.codewords <= 16)
        return [layouts.pack(number, self.indices, self.codewords) for number in numbers]

    def run(self, x: Tensor, tables: str, layout: Tensor | None = None, bias: bool = True) -> Tensor:
        layout = kernels.prepare_linear(self.indices, self.codewords, tables) if layout is None else layout
        y: Tensor = pq_linear(x, self.codebook, layout, self.bias if bias else None, self.outputs, tables)
        return y


def close(y: Tensor, expected: Tensor, subspaces: int) -> None:
    """Integer sums agree exactly; what is left are float32 roundings of one product and of the order of the sums."""
    torch.testing.assert_close(y, expected, rtol=2e-5, atol=2e-6 * subspaces, equal_nan=True)


@given(
    st.sampled_from(CODEWORDS),
    st.one_of(st.integers(1, 30), st.sampled_from([64, 65, 257, 300])),
    st.sampled_from([1, 2, 3, 4, 5, 8]),
    st.sampled_from(SIZES),
    st.sampled_from([0, 1, 2, 3, 7, 9]),
    st.data(),
)
def test_every_isa_and_layout_equals_the_reference(
    codewords: int, subspaces: int, width: int, outputs: int, batch: int, data: st.DataObject
) -> None:
    layer = Layer(subspaces, codewords, width, outputs, data.draw(st.integers(0, width - 1)))
    x, tables, bias = torch.randn(batch, layer.inputs), data.draw(st.sampled_from(TABLES)), data.draw(st.booleans())
    layout = data.draw(st.sampled_from(layer.layouts()))
    expected = reference.pq_linear(x, layer.codebook, layout, layer.bias if bias else None, outputs, tables)
    for isa in kernels.isas()[:-1]:
        with kernels.using(isa):
            close(layer.run(x, tables, layout, bias), expected, subspaces)


@pytest.mark.parametrize("isa", kernels.isas())
@pytest.mark.parametrize("tables", TABLES)
def test_rectified_outputs(tables: str, isa: str) -> None:
    layer = Layer(21, 16, 3, 300)
    x = torch.randn(9, layer.inputs)
    x[3, 5] = float("nan")
    layer.bias[7] = float("nan")
    layout = kernels.prepare_linear(layer.indices, layer.codewords, tables)
    with kernels.using(isa):
        y = pq_linear(x, layer.codebook, layout, layer.bias, layer.outputs, tables, True)
        plain = layer.run(x, tables)
    assert torch.equal(y.nan_to_num(-1), plain.relu().nan_to_num(-1))
    assert y.isnan().any()


@pytest.mark.parametrize("isa", kernels.isas())
@pytest.mark.parametrize("codewords", CODEWORDS)
def test_float32_tables_equal_decode_and_compute(isa: str, codewords: int) -> None:
    layer = Layer(21, codewords, 3, 130, ragged=2)
    x = torch.randn(5, layer.inputs)
    with kernels.using(isa):
        y = layer.run(x, "fp32")
    torch.testing.assert_close(y, F.linear(x, layer.decoded(), layer.bias), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("isa", kernels.isas())
@pytest.mark.parametrize(("tables", "levels"), [("int8", 127), ("int16", 32767)])
def test_rounded_tables_are_as_near_as_their_levels_allow(isa: str, tables: str, levels: int) -> None:
    layer = Layer(40, 16, 4, 200)
    x = torch.randn(6, layer.inputs)
    table = reference.tables_of(x, layer.codebook)
    step = ((table.amax(2) - table.amin(2)) / 2 / levels).amax(1)
    with kernels.using(isa):
        distance = (layer.run(x, tables) - F.linear(x, layer.decoded(), layer.bias)).abs().amax(1)
    assert (distance <= 40 * step / 2 + 1e-4).all()
    assert tables == "int16" or (distance > step / 10).all()  # really rounded


@pytest.mark.parametrize("isa", kernels.isas())
@pytest.mark.parametrize("tables", TABLES)
@pytest.mark.parametrize("codewords", [8, 16, 32, 64, 128, 256])
def test_infinite_and_nan_inputs_give_what_decode_and_compute_gives(isa: str, tables: str, codewords: int) -> None:
    layer = Layer(9, codewords, 4, 70)
    layer.codebook[0, 0] = 0  # times infinity: NaN for those outputs that use it
    x = torch.randn(8, layer.inputs)
    x[1, 0], x[2, 5], x[4, 35], x[6, 1] = torch.inf, -torch.inf, torch.nan, 3e38
    x[5] = 0
    x[7] = 1e-38
    expected = F.linear(x, layer.decoded(), layer.bias)
    with kernels.using(isa):
        y = layer.run(x, tables)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())
    assert torch.equal(y[y.isinf()], expected[expected.isinf()])
    torch.testing.assert_close(y[5], layer.bias)
    if tables == "fp32":
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("tables", TABLES)
@pytest.mark.parametrize("batch", [1, 3, 64])
def test_threads_change_no_bit(tables: str, batch: int) -> None:
    layer = Layer(150, 16, 4, 1000)
    x = torch.randn(batch, layer.inputs)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        try:
            results.append(layer.run(x, tables))
        finally:
            torch.set_num_threads(1)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("isa", kernels.isas())
def test_any_memory(isa: str) -> None:
    """Strided and shifted inputs, a codebook of either order, and a layout at an odd address."""
    layer = Layer(13, 32, 4, 77)
    x = torch.randn(layer.inputs, 6).t()
    expected = layer.run(x.contiguous(), "int8")
    shifted = torch.empty(1 + x.numel())[1:].view_as(x).copy_(x)
    layout = kernels.prepare_linear(layer.indices, 32, "int8")
    odd = torch.empty(3 + len(layout), dtype=torch.uint8)[3:].copy_(layout)
    gaps = torch.zeros(2 * len(layout), dtype=torch.uint8)[::2].copy_(layout)
    book = kernels.prepare_codebook(layer.codebook)
    assert torch.equal(book, layer.codebook)
    with kernels.using(isa):
        for inputs, words, codebook in ((x, odd, book), (shifted, gaps, layer.codebook[:, :, :])):
            y = pq_linear(inputs, codebook, words, layer.bias, 77, "int8")
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        apart = torch.randn(13, 64, 4)[:, ::2].copy_(layer.codebook)
        torch.testing.assert_close(pq_linear(x, apart, layout, layer.bias, 77, "int8"), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("isa", kernels.isas())
@pytest.mark.parametrize("width", [3, 4, 8])
@pytest.mark.parametrize("codewords", [16, 32, 64])
def test_prepared_codebooks_change_no_bit(isa: str, codewords: int, width: int) -> None:
    """Adjacent code words are read by code of its own, but for a ragged last sub-space; few images and many."""
    layer = Layer(150, codewords, width, 300, ragged=1)
    book, layout = kernels.prepare_codebook(layer.codebook), kernels.prepare_linear(layer.indices, codewords, "int8")
    for batch in (1, 5):
        x = torch.randn(batch, layer.inputs)
        with kernels.using(isa):
            for tables in TABLES:
                y = pq_linear(x, book, layout, layer.bias, 300, tables)
                assert torch.equal(y, layer.run(x, tables, layout))
                assert torch.equal(y[:1], pq_linear(x[:1], book, layout, layer.bias, 300, tables))


def test_leading_dimensions() -> None:
    layer = Layer(4, 16, 4, 10)
    x = torch.randn(2, 3, 16)
    torch.testing.assert_close(layer.run(x, "fp32"), F.linear(x, layer.decoded(), layer.bias), rtol=1e-4, atol=1e-5)
    assert layer.run(x[0, 0], "fp32").shape == (10,)
    assert layer.run(x[:, :0], "fp32").shape == (2, 0, 10)


@pytest.mark.parametrize("isa", kernels.isas())
def test_what_does_not_fit_is_refused(isa: str) -> None:
    layer = Layer(4, 16, 4, 10)
    layout = kernels.prepare_linear(layer.indices, 16)
    x = torch.randn(2, 16)
    with kernels.using(isa):
        with pytest.raises(KernelError, match="12 inputs do not fit 4 sub-spaces of width 4"):
            pq_linear(x[:, :12], layer.codebook, layout, None, 10, "fp32")
        with pytest.raises(KernelError, match=r"x is torch\.float64"):
            pq_linear(x.double(), layer.codebook, layout, None, 10, "fp32")
        with pytest.raises(KernelError, match="tables is 'int4'"):
            pq_linear(x, layer.codebook, layout, None, 10, "int4")
        with pytest.raises(KernelError, match=r"bias has shape \(9,\) where there are 10 outputs"):
            pq_linear(x, layer.codebook, layout, torch.zeros(9), 10, "fp32")
        with pytest.raises(KernelError, match="does not fit a codebook of 4 sub-spaces"):
            pq_linear(x, layer.codebook, layout, None, 11, "fp32")
        with pytest.raises(KernelError, match="does not fit a codebook"):
            pq_linear(x, layer.codebook[:, :8].contiguous(), layout, None, 10, "fp32")
        nine = layouts.pack(layouts.PLAIN, layer.indices.expand(9, -1, -1), 16)
        with pytest.raises(KernelError, match="9 taps"):
            pq_linear(x, layer.codebook, nine, None, 10, "fp32")
        with pytest.raises(KernelError, match="x is a scalar"):
            pq_linear(x[0, 0], layer.codebook, layout, None, 10, "fp32")


def test_exports_and_compiles() -> None:
    layer = Layer(6, 16, 4, 20)
    layout = kernels.prepare_linear(layer.indices, 16, "int8")

    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(pq_linear(x, layer.codebook, layout, layer.bias, 20, "int8"))

    x = torch.randn(3, 24)
    batch = torch.export.Dim("batch", min=1, max=1024)
    program = torch.export.export(Module(), (x,), dynamic_shapes=({0: batch},))
    assert any(node.target is torch.ops.fxpress.pq_linear.default for node in program.graph.nodes)
    assert torch.equal(program.module()(torch.cat([x, x])), Module()(torch.cat([x, x])))
    compiled = torch.compile(Module(), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), Module()(x))
    torch.library.opcheck(
        torch.ops.fxpress.pq_linear.default, (x, layer.codebook, layout, layer.bias, 20, "int8"),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip
