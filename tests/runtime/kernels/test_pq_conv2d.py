"""Convolutions by look-up: every instruction set against the reference, bit by bit, and against decode-and-compute."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from fxpress.ir.errors import KernelError
from fxpress.runtime import kernels
from fxpress.runtime.kernels import layout as layouts
from fxpress.runtime.kernels import reference, reference_conv
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F


@dataclass(frozen=True)
class Case:
    """Sizes of a convolution and of its codebooks; `seed` draws the numbers."""

    images: int = 1
    channels: int = 8
    outputs: int = 10
    size: tuple[int, int] = (5, 6)
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    codewords: int = 16
    subspace: int = 4
    tables: str = "int8"
    bias: bool = True
    last: bool = False
    relu: bool = False
    pool: tuple[int, ...] = ()
    seed: int = 0

    @property
    def subspaces(self) -> int:
        return -(-(self.channels // self.groups) // self.subspace)

    def fits(self) -> bool:
        """Whether the padded image holds the kernel, and its outputs the window of the pool."""
        window = zip(self.size, self.padding, self.dilation, self.kernel, self.stride, strict=True)
        sums = [(n + 2 * p - d * (k - 1) - 1) // step + 1 for n, p, d, k, step in window]
        pool = self.pool or (1,) * 4 + (0,) * 2
        return all(n > 0 and n + 2 * p >= k for n, k, p in zip(sums, pool[:2], pool[4:], strict=True))

    def but(self, **changes: Any) -> Case:
        return replace(self, **changes)


@dataclass(frozen=True)
class Tensors:
    """What a case's numbers are: x (N, C, H, W), codebook (M, K, d), indices (taps, M, out), bias or None."""

    case: Case
    x: Tensor
    codebook: Tensor
    indices: Tensor
    bias: Tensor | None

    def layout(self) -> Tensor:
        return kernels.prepare_conv2d(self.indices, self.case.codewords, self.case.tables, self.case.groups)

    def arguments(self, layout: Tensor | None = None) -> tuple[Any, ...]:
        """Those of the operator, and of the reference."""
        c = self.case
        geometry = tuple(map(list, (c.kernel, c.stride, c.padding, c.dilation)))
        return (self.x, self.codebook, self.layout() if layout is None else layout, self.bias, c.outputs, *geometry,
                c.groups, c.tables, c.relu, list(c.pool))  # fmt: skip

    def run(self, layout: Tensor | None = None) -> Tensor:
        result: Tensor = torch.ops.fxpress.pq_conv2d(*self.arguments(layout))
        return result

    def expected(self) -> Tensor:
        return reference.pq_conv2d(*self.arguments())

    def weight(self) -> Tensor:
        """The dense weight, made here from the definition alone."""
        c = self.case
        taps, _, outputs = self.indices.shape
        weight = torch.empty(outputs, c.channels // c.groups, taps)
        for channel in range(weight.shape[1]):
            m, j = divmod(channel, c.subspace)
            weight[:, channel] = self.codebook[m, self.indices[:, m].long(), j].T
        return weight.view(outputs, -1, *c.kernel)

    def dense(self) -> Tensor:
        """Decode and compute, in double precision."""
        c = self.case
        bias = None if self.bias is None else self.bias.double()
        y = F.conv2d(self.x.double(), self.weight().double(), bias, c.stride, c.padding, c.dilation, c.groups)
        return self.finished(y)

    def finished(self, y: Tensor) -> Tensor:
        """The ReLU and the pool by torch."""
        y, pool = y.relu() if self.case.relu else y, self.case.pool
        return F.max_pool2d(y, pool[:2], pool[2:4], pool[4:]) if pool else y


def make(case: Case) -> Tensors:
    """Draw a case's numbers."""
    generator = torch.Generator().manual_seed(case.seed)
    codebook = torch.randn(case.subspaces, case.codewords, case.subspace, generator=generator)
    codebook[-1, :, case.channels // case.groups - (case.subspaces - 1) * case.subspace :] = 0
    indices = torch.randint(
        0, case.codewords, (case.kernel[0] * case.kernel[1], case.subspaces, case.outputs), generator=generator
    ).to(torch.uint8)
    x = torch.randn(case.images, case.channels, *case.size, generator=generator)
    if case.last:
        x = x.contiguous(memory_format=torch.channels_last)
    return Tensors(case, x, codebook, indices, torch.randn(case.outputs, generator=generator) if case.bias else None)


def _pair(low: int, high: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(low, high), st.integers(low, high))


@st.composite
def cases(draw: st.DrawFn, tables: tuple[str, ...] = ("fp32", "int16", "int8"), fewest: int = 0) -> Case:
    """Odd shapes: padding beyond the kernel, strides beyond it, ragged sub-spaces, groups."""
    groups = draw(st.integers(1, 3))
    relu = draw(st.booleans())
    pools = [(), (2, 2, 2, 2, 0, 0), (3, 3, 2, 2, 1, 1), (3, 2, 1, 3, 1, 0), (1, 4, 3, 1, 0, 2)] if relu else [()]
    return draw(
        st.builds(
            Case,
            images=st.integers(fewest, 3),
            channels=st.integers(1, 14).map(lambda n: n * groups),
            outputs=st.sampled_from([1, 2, 15, 33, 64, 65, 130, 150]).map(lambda n: n * groups),
            size=st.tuples(st.integers(1, 9), st.integers(1, 19)),
            kernel=_pair(1, 4),
            stride=_pair(1, 4),
            padding=_pair(0, 5),
            dilation=_pair(1, 3),
            groups=st.just(groups),
            codewords=st.sampled_from([2, 4, 8, 16, 32, 64, 128, 256]),
            subspace=st.sampled_from([1, 2, 3, 4, 5, 8, 9, 17]),
            tables=st.sampled_from(tables),
            bias=st.booleans(),
            last=st.booleans(),
            relu=st.just(relu),
            pool=st.sampled_from(pools),
            seed=st.integers(0, 2**31),
        ).filter(Case.fits)
    )


ISAS = [name for name in kernels.isas() if name != "none"] or ["none"]
CONV = (layouts.CONV1, layouts.CONV2, layouts.CONV4)


def check(case: Case, isa: str) -> None:
    """The kernel gives the reference's bits."""
    tensors = make(case)
    with kernels.using(isa):
        y = tensors.run()
    torch.testing.assert_close(y, tensors.expected(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=40)
@given(case=cases())
def test_same_bits_as_the_reference(isa: str, case: Case) -> None:
    check(case, isa)


@settings(max_examples=30)
@given(case=cases(("fp32",)))
def test_exact_tables_are_the_dense_layer(case: Case) -> None:
    tensors = make(case)
    torch.testing.assert_close(tensors.run(), tensors.dense().float(), rtol=1e-4, atol=1e-4)


def bound(tensors: Tensors) -> float:
    """Largest error of an output, as the README states it: entries of a sum times the error of one."""
    case = tensors.case
    parts = F.pad(
        tensors.x.unflatten(1, (case.groups, -1)).movedim(2, -1),
        (0, case.subspaces * case.subspace - case.channels // case.groups),
    ).unflatten(-1, (case.subspaces, -1))
    most = torch.einsum("nghwmj,mkj->nghwmk", parts, tensors.codebook).abs().amax()
    tops = reference_conv.tops(case.subspace)
    rounding = case.subspace * tensors.codebook.abs().amax() * tensors.x.abs().amax() * sum(0.5 / top for top in tops)
    step = most / 124 if case.tables == "int8" else most / 16000
    return float((step + 1.1 * rounding) * len(tensors.indices) * case.subspaces) + 1e-5


@settings(max_examples=30)
@given(case=cases(("int16", "int8"), fewest=1))
def test_integer_tables_stay_within_their_bound(case: Case) -> None:
    tensors = make(case)
    assert float((tensors.run() - tensors.dense()).abs().max()) <= bound(tensors)


LONG = Case(channels=40, codewords=64, subspace=1, kernel=(5, 5), padding=(2, 2))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "case",
    [
        LONG,  # 1,000 terms: more than 16 bits hold
        LONG.but(codewords=128),
        LONG.but(codewords=256, tables="int16"),
        LONG.but(codewords=16),
        Case(channels=2, subspace=1, codewords=64, kernel=(1, 600), size=(2, 700), padding=(0, 0)),
        Case(channels=2, subspace=1, codewords=128, kernel=(1, 600), size=(2, 700), padding=(0, 0)),
        Case(channels=1, subspace=1, codewords=128, kernel=(40, 1), size=(50, 3), padding=(3, 0), tables="int16"),
        Case(channels=1, subspace=1, codewords=128, kernel=(30, 30), size=(8, 8), padding=(20, 20), dilation=(1, 1)),
        Case(size=(2, 2), padding=(9, 9), kernel=(2, 2)),  # pixels that no tap of the image reaches
        Case(size=(9, 40), kernel=(1, 1), stride=(4, 5), padding=(0, 0), channels=64, subspace=8, codewords=64),
        Case(size=(30, 31), kernel=(11, 11), stride=(4, 4), padding=(2, 2), channels=3, subspace=3, codewords=128),
        Case(channels=200, subspace=200, codewords=32),
        Case(images=8, channels=6, groups=3, outputs=6, subspace=1, codewords=2),
        Case(size=(0, 4), kernel=(1, 1)),
        Case(size=(23, 40), outputs=150, relu=True, pool=(3, 3, 2, 2, 0, 0), codewords=64, last=True),
        Case(size=(9, 20), relu=True, pool=(2, 2, 3, 3, 0, 0), codewords=64, tables="int16"),  # rows that no window has
    ],
    ids=lambda case: f"{case.kernel}-{case.codewords}-{case.tables}",
)
def test_shapes_that_reach_a_limit(case: Case, isa: str) -> None:
    check(case, isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("codewords", [32, 64, 128, 256])
@pytest.mark.parametrize("width", range(1, 11))
def test_any_width_of_a_tile(width: int, codewords: int, isa: str) -> None:
    """One block of outputs and three, an even number of look-ups and an odd one."""
    for outputs in (64, 150):
        for channels in (8, 12):
            check(Case(channels=channels, outputs=outputs, size=(4, width), codewords=codewords), isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("codewords", [2, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("channels", [1, 2, 3, 7])
def test_fewer_channels_than_a_sub_space_is_wide(channels: int, codewords: int, isa: str) -> None:
    """The first layer of a network: one sub-space, most of it empty; sizes at which three planes part in vectors."""
    case = Case(channels=channels, outputs=70, size=(13, 41), kernel=(5, 5), codewords=codewords, subspace=8)
    for tables in ("int8", "int16", "fp32"):
        for last in (False, True):
            check(case.but(tables=tables, last=last, stride=(2, 2) if last else (1, 1)), isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tables", ["fp32", "int16", "int8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e38, 1e-42])
@pytest.mark.parametrize("codewords", [16, 64, 128])
def test_numbers_without_a_scale_take_exact_tables(value: float, tables: str, codewords: int, isa: str) -> None:
    case = Case(images=3, codewords=codewords, tables=tables, channels=9, stride=(2, 1))
    tensors = make(case)
    if abs(value) < 1:
        tensors.x[1] = 0
    tensors.x[1, 3, 2, 2] = value
    with kernels.using(isa):
        y = tensors.run()
        alone = replace(tensors, x=tensors.x[:1]).run()
    dense = F.conv2d(tensors.x, tensors.weight(), tensors.bias, case.stride, case.padding)
    torch.testing.assert_close(y[1], dense[1], equal_nan=True, rtol=1e-4, atol=1e-4)
    assert torch.equal(y[:1], alone), "one image has nothing to do with another"
    torch.testing.assert_close(y, tensors.expected(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("pool", [(), (3, 3, 2, 2, 1, 1)])
@pytest.mark.parametrize("last", [False, True])
def test_nan_passes_the_relu_and_the_pool(last: bool, pool: tuple[int, ...], isa: str) -> None:
    tensors = make(Case(images=2, size=(9, 11), codewords=64, outputs=70, relu=True, pool=pool, last=last))
    tensors.x[0, 3, 4, 5], tensors.x[0, 1, 0, 0] = float("nan"), float("inf")
    assert tensors.bias is not None
    tensors.bias[1], tensors.bias[2], tensors.bias[3] = float("nan"), float("inf"), -float("inf")
    with kernels.using(isa):
        y = tensors.run()
    c = tensors.case
    dense = tensors.finished(F.conv2d(tensors.x, tensors.weight(), tensors.bias, c.stride, c.padding))
    assert torch.equal(y.isnan(), dense.isnan())
    torch.testing.assert_close(y, tensors.expected(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_code_words_without_a_scale(value: float, isa: str) -> None:
    tensors = make(Case(codewords=32, padding=(0, 0)))  # torch multiplies by the zeros of its padding, too
    tensors.codebook[0, 5, 1] = value
    with kernels.using(isa):
        y = tensors.run()
    dense = F.conv2d(tensors.x, tensors.weight(), tensors.bias)
    torch.testing.assert_close(y, dense, equal_nan=True, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("isa", ISAS)
def test_an_image_of_zeros_gives_the_bias(isa: str) -> None:
    tensors = make(Case(tables="int8"))
    tensors.x.zero_()
    with kernels.using(isa):
        y = tensors.run()
    assert tensors.bias is not None
    assert torch.equal(y, tensors.bias.view(1, -1, 1, 1).expand_as(y))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tables", ["fp32", "int8"])
def test_any_memory_order_of_the_images(tables: str, isa: str) -> None:
    tensors = make(Case(images=2, channels=20, outputs=70, codewords=64, subspace=8, tables=tables))
    with kernels.using(isa):
        y = tensors.run()
        last = replace(tensors, x=tensors.x.contiguous(memory_format=torch.channels_last)).run()
        gaps = torch.randn(2, 20, 5, 12)
        gaps[..., ::2] = tensors.x
        strided = replace(tensors, x=gaps[..., ::2]).run()
        turned = replace(tensors, x=tensors.x.transpose(2, 3).contiguous().transpose(2, 3)).run()
        forced = [
            torch.ops.fxpress.pq_conv2d(*replace(tensors, x=x).arguments(), True) for x in (tensors.x, gaps[..., ::2])
        ]
    assert all(image.is_contiguous() for image in (y, strided, turned))
    assert all(image.is_contiguous(memory_format=torch.channels_last) for image in (last, *forced))
    for other in (last, strided, turned, *forced):
        assert torch.equal(y, other)
    book = replace(tensors, codebook=kernels.prepare_codebook(tensors.codebook))
    assert torch.equal(y, book.run()), "the memory order of a codebook does not matter"


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("images", [1, 3, 8])
def test_threads_do_not_change_a_bit(images: int, isa: str, threads: None) -> None:
    tensors = make(Case(images=images, size=(13, 9), codewords=64, outputs=70, channels=16, subspace=8))
    broken = replace(tensors, x=tensors.x.clone())
    broken.x[0, 0, 0, 0] = float("nan")
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        with kernels.using(isa):
            results.append((tensors.run(), broken.run()))
    (one, one_broken), (two, two_broken) = results
    assert torch.equal(one, two)
    torch.testing.assert_close(one_broken, two_broken, rtol=0, atol=0, equal_nan=True)


@settings(max_examples=40)
@given(
    number=st.sampled_from(CONV), bits=st.integers(1, 8), taps=st.integers(1, 5), subspaces=st.integers(1, 9),
    outputs=st.integers(1, 150), groups=st.integers(1, 3), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_unpacking_gives_back_the_indices(
    number: int, bits: int, taps: int, subspaces: int, outputs: int, groups: int, seed: int
) -> None:
    codewords = 2 ** {layouts.CONV1: bits, layouts.CONV2: 6, layouts.CONV4: min(bits, 5)}[number]
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(0, codewords, (taps, subspaces, outputs * groups), generator=generator).to(torch.uint8)
    layout = layouts.pack(number, indices, codewords, groups)
    assert torch.equal(layouts.unpack(layout)[1], indices)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tables", ["fp32", "int8"])
@pytest.mark.parametrize("codewords", [8, 16, 32, 64, 128])
def test_every_layout_is_read(codewords: int, tables: str, isa: str) -> None:
    tensors = make(Case(codewords=codewords, groups=2, channels=18, outputs=140, tables=tables))
    expected = tensors.expected()
    numbers = [layouts.PLAIN, layouts.ROWS, layouts.CONV1]
    numbers += [layouts.CONV4] if codewords <= 32 else [layouts.CONV2] if codewords == 64 else []
    for number in numbers:
        layout = layouts.pack(number, tensors.indices, codewords, 2)
        with kernels.using(isa):
            assert torch.equal(tensors.run(layout), expected), layouts.LAYOUTS[number].name


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("number", [layouts.PLAIN, *CONV])
def test_corrupt_indices_read_no_other_memory(number: int, isa: str) -> None:
    """Run under AddressSanitizer: any payload gives some numbers, and finite ones."""
    codewords = {layouts.PLAIN: 16, layouts.CONV1: 128, layouts.CONV2: 64, layouts.CONV4: 16}[number]
    for tables in ("int8", "fp32"):
        tensors = make(Case(codewords=codewords, tables=tables, outputs=33))
        layout = layouts.pack(number, tensors.indices, codewords)
        layout[layouts.HEADER_BYTES :] = torch.randint(0, 256, (len(layout) - layouts.HEADER_BYTES,))
        with kernels.using(isa):
            assert tensors.run(layout).shape == (1, 33, 5, 6)


@pytest.mark.parametrize("isa", kernels.isas())
@pytest.mark.parametrize("number", CONV)
def test_a_damaged_layout_is_refused(number: int, isa: str) -> None:
    codewords = 64 if number == layouts.CONV2 else 16
    tensors = make(Case(codewords=codewords))
    good = layouts.pack(number, tensors.indices, codewords)
    for offset, value in ((0, 0), (8, 99), (12, 0), (12, 256 if number != layouts.CONV1 else 3), (16, 8), (20, 9),
                          (24, 70), (28, 2), (28, 3), (32, 1), (36, 1)):  # fmt: skip
        words = good.clone()
        words[offset : offset + 4] = torch.tensor([value], dtype=torch.int32).view(torch.uint8)
        with kernels.using(isa), pytest.raises(KernelError):
            tensors.run(words)
    for cut in (good[:0], good[:63], good[:-1], torch.cat([good, good[:1]])):
        with kernels.using(isa), pytest.raises(KernelError):
            tensors.run(cut)


@pytest.mark.parametrize("isa", kernels.isas())
def test_a_layout_of_another_layer_is_refused(isa: str) -> None:
    tensors = make(Case())
    others = (Case(kernel=(3, 2)), Case(outputs=12), Case(codewords=32), Case(channels=12), Case(outputs=10, groups=2))
    for other in others:
        with kernels.using(isa), pytest.raises(KernelError, match="does not fit"):
            tensors.run(make(other).layout())


def test_wrong_arguments_are_refused() -> None:
    tensors = make(Case())
    arguments = list(tensors.arguments())
    for position, value, message in (
        (0, tensors.x.double(), "float64"),
        (0, tensors.x[:, :3], "sub-spaces"),
        (3, torch.zeros(3), "bias"),
        (10, "int4", "tables"),
    ):
        changed = [*arguments[:position], value, *arguments[position + 1 :]]
        with pytest.raises(KernelError, match=message):
            torch.ops.fxpress.pq_conv2d(*changed)
    for relu, pool, message in (
        (False, [2, 2, 2, 2, 0, 0], "without relu"),
        (True, [2, 2], "six numbers"),
        (True, [2, 2, 2, 2, 2, 0], "six numbers"),
        (True, [99, 2, 2, 2, 0, 0], "too small"),
        (True, [2, 2, 0, 2, 0, 0], "out of range"),
    ):
        with pytest.raises(KernelError, match=message):
            torch.ops.fxpress.pq_conv2d(*arguments[:11], relu, pool)
    with pytest.raises(KernelError, match="too small"):
        replace(tensors, x=tensors.x[:, :, :1, :1], case=Case(padding=(0, 0))).run()


@pytest.mark.parametrize("last", [False, True])
def test_the_fake_kernel_gives_shape_and_memory_order(last: bool) -> None:
    tensors = make(Case(images=2, last=last, stride=(2, 1), dilation=(1, 2)))
    layout = tensors.layout()
    y = tensors.run(layout)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = replace(tensors, x=mode.from_tensor(tensors.x)).run(layout)
    assert (fake.shape, fake.stride(), fake.dtype) == (y.shape, y.stride(), y.dtype)
