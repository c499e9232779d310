"""Binary kernels: every instruction set against float64 over odd shapes; integers are exact, so nothing may differ."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fxpress.ir.errors import KernelError
from fxpress.runtime import kernels
from fxpress.runtime.kernels import binary_choice
from fxpress.runtime.kernels import binary_layout as layouts
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

STEP = 0.538
THRESHOLDS = torch.tensor([0.0, 1.5 * STEP, 2.5 * STEP])
ops = torch.ops.fxpress


def quantized(x: Tensor, thresholds: Tensor = THRESHOLDS, dim: int = 1) -> Tensor:
    """Levels in double precision, by sorting rather than by comparing: an implementation of its own."""
    if thresholds.dim() == 1:
        return torch.bucketize(x, thresholds, right=False).double()
    descends = thresholds[0] > thresholds[-1]
    planes = [
        torch.bucketize((-plane if flip else plane).contiguous(), (-edges if flip else edges).contiguous())
        for plane, edges, flip in zip(x.unbind(dim), thresholds.unbind(1), descends, strict=True)
    ]
    return torch.stack(planes, dim).double()


def folded(channels: int) -> Tensor:
    """Thresholds (3, channels) such as a batch norm leaves behind: some of its scales are negative."""
    factor = torch.randn(channels).clamp(-3, 3)
    return (THRESHOLDS[:, None] - torch.randn(channels)) / torch.where(factor.abs() < 0.1, 0.1, factor)


def signs(*shape: int) -> Tensor:
    return torch.rand(shape) < 0.5


@st.composite
def convolutions(draw: Any) -> dict[str, Any]:
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    kernel = [draw(st.integers(1, 5)), draw(st.integers(1, 5))]
    dilation = [draw(st.integers(1, 2)), draw(st.integers(1, 2))]
    padding = [draw(st.integers(0, 3)), draw(st.integers(0, 3))]
    size = [
        max(1, dilation[i] * (kernel[i] - 1) + 1 - 2 * padding[i]) + draw(st.integers(0, 20 if i else 6))
        for i in range(2)
    ]
    return {
        "batch": draw(st.integers(0, 3)),
        "channels": groups * draw(st.integers(1, 150 // groups)),
        "outputs": groups * draw(st.integers(1, 150 // groups)),
        "size": size,
        "geometry": (kernel, [draw(st.integers(1, 3)), draw(st.integers(1, 3))], padding, dilation, groups),
        "layout": draw(st.sampled_from([layouts.SIX, layouts.PLANES])),
        "last": draw(st.booleans()),
        "input": draw(st.sampled_from(["float", "levels"])),
        "folded": draw(st.booleans()),
        "residual": draw(st.sampled_from([None, "contiguous", "last"])),
        "relus": (draw(st.booleans()), draw(st.booleans())),
        "threads": draw(st.integers(1, 3)),
        "seed": draw(st.integers(0, 2**20)),
    }


def end_of(case: dict[str, Any], shape: torch.Size) -> tuple[Tensor | None, bool, bool]:
    """Residual of that shape, and which rectifiers there are."""
    if case["residual"] is None:
        return None, False, case["relus"][1]
    residual = torch.randn(shape)
    form = torch.channels_last if case["residual"] == "last" and residual.dim() == 4 else torch.contiguous_format
    return residual.contiguous(memory_format=form), *case["relus"]


def finished(y: Tensor, residual: Tensor | None, residual_relu: bool, relu: bool) -> Tensor:
    if residual is not None:
        y = y + (residual.clamp(min=0) if residual_relu else residual)
    return y.clamp(min=0) if relu else y


@pytest.mark.parametrize("isa", kernels.isas())
@settings(max_examples=60, deadline=None)
@given(case=convolutions())
def test_convolution_equals_float64(isa: str, case: dict[str, Any]) -> None:
    torch.manual_seed(case["seed"])
    kernel, stride, padding, dilation, groups = case["geometry"]
    x = torch.randn(case["batch"], case["channels"], *case["size"])
    plus = signs(case["outputs"], case["channels"] // groups, *kernel)
    scale, bias = torch.randn(case["outputs"]), torch.randn(case["outputs"])
    thresholds = folded(case["channels"]) if case["folded"] else THRESHOLDS
    given_x, given_thresholds = x.contiguous(memory_format=torch.channels_last) if case["last"] else x, thresholds
    if case["input"] == "levels":
        given_x, given_thresholds = quantized(x, thresholds).to(torch.uint8), None
    layout = layouts.pack(layouts.PLANES if groups > 1 else case["layout"], plus, groups)
    sums = F.conv2d(quantized(x, thresholds), plus.double() * 2 - 1, None, stride, padding, dilation, groups)
    expected = sums.float() * scale[:, None, None] + bias[:, None, None]
    ended = end_of(case, expected.shape)
    rest = (case["outputs"], kernel, stride, padding, dilation, groups)
    cuts = torch.randint(-40, 40, (3, case["outputs"]), dtype=torch.int32).sort(0).values
    threads = torch.get_num_threads()
    torch.set_num_threads(case["threads"])
    try:
        with kernels.using(isa):
            y = ops.binary_conv2d(given_x, layout, scale, bias, given_thresholds, *rest, *ended)
            levels = ops.binary_conv2d_levels(given_x, layout, cuts, given_thresholds, *rest)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(y, finished(expected, *ended))
    assert torch.equal(levels, sum((sums >= cut[:, None, None]).to(torch.uint8) for cut in cuts))
    assert levels.numel() == 0 or levels.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    ("channels", "outputs", "size", "kernel", "stride", "dilation"),
    [
        (150, 600, (12, 40), 3, 1, 1),  # strips of columns, chunks of groups, sums of some rows
        (150, 70, (9, 61), 3, 2, 1),
        (150, 70, (11, 61), 5, 1, 2),
        (300, 70, (9, 61), 1, 2, 1),
        (20, 10, (40, 61), 3, 1, 1),
    ],
)
def test_large_images_are_taken_in_parts(
    last: bool, channels: int, outputs: int, size: tuple[int, int], kernel: int, stride: int, dilation: int
) -> None:
    torch.manual_seed(0)
    form = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(1, channels, *size).contiguous(memory_format=form)
    plus, padding = signs(outputs, channels, kernel, kernel), [kernel // 2] * 2
    ends = [stride] * 2, padding, [dilation] * 2
    y = ops.binary_conv2d(
        x, layouts.pack(layouts.SIX, plus), torch.ones(outputs), None, THRESHOLDS, outputs, [kernel] * 2, *ends, 1
    )
    assert torch.equal(y.double(), F.conv2d(quantized(x.contiguous()), plus.double() * 2 - 1, None, *ends))


@pytest.mark.parametrize("isa", kernels.isas())
@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.integers(0, 5), max_size=2), inputs=st.integers(1, 700), outputs=st.integers(1, 600),
    bits=st.integers(1, 2), per_channel=st.booleans(), seed=st.integers(0, 2**20), threads=st.integers(1, 2),
    end=st.fixed_dictionaries(
        {"residual": st.sampled_from([None, "contiguous"]), "relus": st.tuples(st.booleans(), st.booleans())}
    ),
)  # fmt: skip
def test_linear_equals_float64(
    isa: str, rows: list[int], inputs: int, outputs: int, bits: int, per_channel: bool, seed: int, threads: int,
    end: dict[str, Any],
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    thresholds = (folded(inputs) if per_channel else THRESHOLDS)[: 2**bits - 1]
    x, plus = torch.randn(*rows, inputs), signs(outputs, inputs)
    scale, cuts = torch.randn(outputs), torch.randint(-9, 9, (3, outputs), dtype=torch.int32)
    layout = kernels.prepare_binary_linear(plus)
    level = quantized(x, thresholds, -1)
    sums = level @ (plus.double() * 2 - 1).T
    ended = end_of(end, sums.shape)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with kernels.using(isa):
            y = ops.binary_linear(x, layout, scale, None, thresholds, outputs, *ended)
            levels = ops.binary_linear_levels(level.to(torch.uint8), layout, cuts, None, outputs)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(y, finished(sums.float() * scale, *ended))
    assert torch.equal(levels, sum((sums >= cut).to(torch.uint8) for cut in cuts))


@pytest.mark.parametrize("isa", kernels.isas())
def test_sums_of_the_largest_levels_do_not_wrap(isa: str) -> None:
    """All weights and all levels at their ends, as many terms as the 16-bit kernel takes, and more."""
    for channels, layout in ((1213, layouts.SIX), (3 * 1213, layouts.PLANES)):
        plus = torch.ones(70, channels, 3, 3, dtype=torch.bool)
        plus[1::2] = False
        x = torch.full((1, channels, 3, 3), 9.0)
        with kernels.using(isa):
            packed = layouts.pack(layout, plus)
            one = torch.ones(70)
            y = ops.binary_conv2d(x, packed, one, None, THRESHOLDS, 70, [3, 3], [1, 1], [0, 0], [1, 1], 1)
        assert torch.equal(y[0, ::2, 0, 0], torch.full((35,), 27.0 * channels))
        assert torch.equal(y[0, 1::2, 0, 0], torch.full((35,), -27.0 * channels))


@pytest.mark.parametrize("share", [0.5, 0.6, 0.75, 1.0])
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (3, 2), (5, 1)])
def test_sums_that_overflow_a_byte_are_found_again(share: float, kernel: int, stride: int) -> None:
    """Usual levels add up in bytes far more often than all levels would; only a part of this image is bright."""
    torch.manual_seed(0)
    channels, outputs, window = 100, 70, ([kernel] * 2, [stride] * 2, [kernel // 2] * 2, [1, 1], 1)
    plus = torch.rand(outputs, channels, kernel, kernel) < share
    x = torch.randint(0, 3, (2, channels, 23, 25))
    x[0, :, 4:9, 3:12], x[1, :, 13:, 8:] = 3, 3
    y = ops.binary_conv2d(
        x.to(torch.uint8), layouts.pack(layouts.SIX, plus), torch.ones(outputs), None, None, outputs, *window
    )
    assert torch.equal(y.double(), F.conv2d(x.double(), plus.double() * 2 - 1, None, *window[1:3]))


@pytest.mark.parametrize("isa", kernels.isas())
@pytest.mark.parametrize("layout", [layouts.SIX, layouts.PLANES])
def test_nan_is_level_zero_and_infinity_the_largest(isa: str, layout: int) -> None:
    plus = signs(20, 5, 1, 1)
    x = torch.randn(1, 5, 3, 3)
    x[0, 0, 0, 0], x[0, 1, 1, 1], x[0, 2, 2, 2] = float("nan"), float("inf"), -float("inf")
    same = x.nan_to_num(nan=0.0, posinf=100.0, neginf=-100.0)
    rest = (torch.ones(20), None, THRESHOLDS, 20, [1, 1], [1, 1], [0, 0], [1, 1], 1)
    with kernels.using(isa):
        packed = layouts.pack(layout, plus)
        assert torch.equal(ops.binary_conv2d(x, packed, *rest), ops.binary_conv2d(same, packed, *rest))


@pytest.mark.parametrize("isa", kernels.isas())
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    "edges", [[0.0, 0.8, 1.3], [-0.0, 1e-40, 3e38], [-1.3, -1e-40, 0.8], [0.3, 0.7], [0.5], [-0.5]]
)
@pytest.mark.parametrize("size", [(7, 7), (8, 11), (14, 14)])
def test_values_at_thresholds_and_beside_them(isa: str, last: bool, edges: list[float], size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    at = torch.tensor(edges)
    infinity = torch.tensor([float("inf")])
    beside = [at, -at, torch.nextafter(at, infinity), torch.nextafter(at, -infinity), infinity, -infinity]
    values = torch.cat([*beside, torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e38, -1e38])])
    x = values[torch.randint(len(values), (2, 20, *size))]
    plus = signs(35, 20, 1, 1)
    sums = F.conv2d(quantized(x, at), plus.double() * 2 - 1)
    given_x = x.contiguous(memory_format=torch.channels_last) if last else x
    with kernels.using(isa):
        layout, window = layouts.pack(layouts.SIX, plus), ([1, 1], [1, 1], [0, 0], [1, 1], 1)
        y = ops.binary_conv2d(given_x, layout, torch.ones(35), None, at, 35, *window)
    assert torch.equal(y.double(), sums)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("levels", [False, True])
@pytest.mark.parametrize("channels", [8, 16, 20, 32, 60, 64, 128])
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (7, 7), (24, 25)])
def test_pixels_are_taken_together(threads: int, levels: bool, channels: int, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, channels, *size).contiguous(memory_format=torch.channels_last)
    plus, window = signs(35, channels, 3, 3), ([3, 3], [1, 1], [1, 1], [1, 1], 1)
    found = quantized(x.contiguous(), THRESHOLDS)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        given_x = found.to(torch.uint8) if levels else x
        y = ops.binary_conv2d(given_x, layouts.pack(layouts.SIX, plus), torch.ones(35), None, THRESHOLDS, 35, *window)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(y.double(), F.conv2d(found, plus.double() * 2 - 1, None, *window[1:]))


@pytest.mark.parametrize("isa", kernels.isas())
@pytest.mark.parametrize("layout", [layouts.SIX, layouts.PLANES])
def test_rectifiers_keep_nan_as_torch_does(isa: str, layout: int) -> None:
    packed, residual = layouts.pack(layout, signs(20, 5, 1, 1)), torch.randn(1, 20, 3, 3)
    residual[0, ::2] = float("nan")
    with kernels.using(isa):
        y = ops.binary_conv2d(
            torch.randn(1, 5, 3, 3), packed, torch.ones(20), None, THRESHOLDS, 20, [1, 1], [1, 1], [0, 0], [1, 1], 1,
            residual, True, True,
        )  # fmt: skip
    assert torch.equal(y.isnan(), residual.isnan())


@given(
    outputs=st.integers(1, 140), channels=st.integers(1, 140), kh=st.integers(1, 4), kw=st.integers(1, 9),
    layout=st.sampled_from([layouts.SIX, layouts.PLANES]),
)  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_layouts_come_back(outputs: int, channels: int, kh: int, kw: int, layout: int) -> None:
    plus = signs(outputs, channels, kh, kw)
    header, found = layouts.unpack(layouts.pack(layout, plus))
    assert torch.equal(found, plus)
    assert (header.outputs, header.channels) == (outputs, channels)


@pytest.mark.skipif(kernels.isas()[0] != "avx512", reason="one kernel only")
def test_the_layout_is_chosen_by_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = {
        "channels": [8, 64], "outputs": [8, 64], "pixels": [49, 784],
        "speedup": {
            "1x1": {"49": [[0.1, 0.2], [0.3, 0.4]], "784": [[0.5, 0.6], [0.7, 1.8]]},
            "3x3": {"49": [[1.0, 2.0], [0.9, 3.0]], "784": [[1.1, 1.1], [1.1, 1.1]]},
            "3x3, stride 2": {"49": [[0.0, 0.0], [0.0, 0.0]], "784": [[0.0, 0.0], [0.0, 0.0]]},
        },
    }  # fmt: skip
    monkeypatch.setattr(binary_choice, "_measured", lambda: fake)
    assert binary_choice.table_speedup(70, 50, 3, 1, 30) == 3.0

    def chosen(plus: Tensor, **given: int) -> int:
        return layouts.Header.read(kernels.prepare_binary_conv2d(plus, **given)).layout

    assert chosen(signs(8, 64, 3, 3), pixels=49) == layouts.PLANES
    assert chosen(signs(64, 8, 3, 3), pixels=49) == layouts.SIX
    assert chosen(signs(64, 64, 1, 1), pixels=600) == layouts.SIX
    assert chosen(signs(64, 64, 3, 3), stride=2) == layouts.PLANES
    assert chosen(signs(64, 64, 3, 3), groups=2) == layouts.PLANES
    assert chosen(signs(64, 1300, 3, 3)) == layouts.PLANES  # more than 16-bit sums hold


def test_the_measured_choice_covers_all_sizes() -> None:
    measured = json.loads(binary_choice.FILE.read_text())
    assert set(measured["speedup"]) == {"1x1", "3x3", "3x3, stride 2"}
    for by_pixels in measured["speedup"].values():
        assert list(by_pixels) == [str(pixels) for pixels in measured["pixels"]]
        for rows in by_pixels.values():
            assert len(rows) == len(measured["channels"])
            assert all(len(row) == len(measured["outputs"]) and min(row) > 0 for row in rows)
    assert binary_choice.table_speedup(512, 512, 5, 1) > binary_choice.LEAST_SPEEDUP


def convolve(layout: Tensor, **changed: Any) -> Tensor:
    given = {"x": torch.randn(1, 8, 4, 4), "scale": torch.ones(6), "thresholds": THRESHOLDS, "outputs": 6}
    given |= {"residual": None} | changed
    geometry = ([3, 3], [1, 1], [1, 1], [1, 1], 1)
    y: Tensor = ops.binary_conv2d(
        given["x"], layout, given["scale"], None, given["thresholds"], given["outputs"], *geometry, given["residual"]
    )
    return y


@pytest.mark.parametrize("isa", kernels.isas())
@pytest.mark.parametrize("layout", [layouts.SIX, layouts.PLANES])
def test_a_corrupt_header_is_refused(isa: str, layout: int) -> None:
    whole = layouts.pack(layout, signs(6, 8, 3, 3))
    with kernels.using(isa):
        convolve(whole)
        for byte in range(8 + 6 * 4):
            if (byte - 8) % 4 == 3 or byte < 32:
                broken = whole.clone()
                broken[byte] ^= 0x55
                with pytest.raises(KernelError):
                    convolve(broken)
        for part in (whole[:10], whole[:-1], torch.cat([whole, whole[:1]]), whole.float()):
            with pytest.raises(KernelError):
                convolve(part)


def test_a_corrupt_payload_gives_some_numbers() -> None:
    whole = layouts.pack(layouts.SIX, signs(6, 8, 3, 3))
    whole[64:] = 255
    assert convolve(whole).isfinite().all()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.randn(1, 8, 4, 4).double()}, "float64"),
        ({"x": torch.randn(1, 9, 4, 4)}, "9"),
        ({"x": torch.randn(8, 4, 4)}, "dimensions"),
        ({"scale": torch.ones(5)}, "scale"),
        ({"thresholds": torch.tensor([1.0, 0.0])}, "must ascend"),
        ({"thresholds": torch.tensor([0.0, float("nan")])}, "must ascend"),
        ({"thresholds": torch.tensor([[2.0], [0.0], [1.0]]).repeat(1, 8)}, "must ascend"),
        ({"thresholds": torch.tensor([])}, "thresholds"),
        ({"thresholds": torch.arange(4.0)}, "thresholds"),
        ({"thresholds": torch.zeros(3, 7)}, "thresholds"),
        ({"thresholds": torch.zeros(3).double()}, "thresholds"),
        ({"thresholds": None}, "without thresholds"),
        ({"residual": torch.zeros(1, 6, 4, 5)}, "residual"),
    ],
)
@pytest.mark.parametrize("isa", ["none", *kernels.isas()[:1]])
def test_wrong_arguments_are_named(isa: str, changed: dict[str, Any], message: str) -> None:
    with kernels.using(isa), pytest.raises(KernelError, match=message):
        convolve(layouts.pack(layouts.PLANES, signs(6, 8, 3, 3)), **changed)


def test_operators_pass_the_checks_of_torch() -> None:
    """Schema and fake kernels, as torch itself tests them."""
    layout, cuts = layouts.pack(layouts.PLANES, signs(6, 8, 3, 3)), torch.zeros(3, 6, dtype=torch.int32)
    geometry = (6, [3, 3], [2, 1], [1, 1], [1, 1], 1)
    x = torch.randn(2, 8, 5, 4)
    tests = ("test_schema", "test_faketensor")
    end = (torch.randn(2, 6, 3, 4), True, True)
    given = (x, layout, torch.ones(6), None, folded(8), *geometry)
    torch.library.opcheck(ops.binary_conv2d, given, test_utils=tests)
    torch.library.opcheck(ops.binary_conv2d, (*given, *end), test_utils=tests)
    torch.library.opcheck(ops.binary_conv2d_levels, (x, layout, cuts, THRESHOLDS, *geometry), test_utils=tests)
    flat = kernels.prepare_binary_linear(signs(6, 8))
    torch.library.opcheck(
        ops.binary_linear, (torch.randn(3, 8), flat, torch.ones(6), None, THRESHOLDS, 6), test_utils=tests
    )
    torch.library.opcheck(ops.binary_linear_levels, (torch.randn(3, 8), flat, cuts, THRESHOLDS, 6), test_utils=tests)
