"""8-bit kernels: every instruction set against numpy and float64; integers are exact, so nothing differs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fxpress.ir.errors import KernelError
from fxpress.runtime import kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

ops = torch.ops.fxpress


def expected(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, inverse: float, zero: int, **geometry: Any
) -> Tensor:
    """By the definition: bytes minus zero, convolved in double precision, then float32 operations one by one."""
    steps = np.rint(x.numpy() * np.float32(inverse))
    steps = np.nan_to_num(np.clip(steps, -zero, 255 - zero), nan=0.0)
    plain = weight if weight.dim() == 4 else weight[:, :, None, None]
    images = torch.from_numpy(steps).double()
    images = images if images.dim() == 4 else images.view(-1, images.shape[-1], 1, 1)
    sums = F.conv2d(images, plain.double(), **geometry).numpy().astype(np.int64).astype(np.float32)
    y = sums * scale.numpy()[:, None, None]
    y = y if bias is None else y + bias.numpy()[:, None, None]
    return torch.from_numpy(y)


def expected_of_images(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, inverse: float, zero: int, **geometry: Any
) -> Tensor:
    """The same where each image is rounded to 256 levels of what it spans, zero among them."""
    assert (inverse, zero) == (0.0, 1)
    found = [expected(x[:0], weight, scale, bias, 1.0, 0, **geometry)]
    for image in x.numpy():
        finite = np.append(image[np.isfinite(image)], np.float32(0))
        with np.errstate(over="ignore"):
            step = (finite.max() - finite.min()) / np.float32(255)
        step = step if np.finfo(np.float32).tiny <= step < np.inf else np.float32(1)
        byte = min(int(np.rint(-finite.min() / step)), 255)
        steps = torch.from_numpy(np.asarray(step)) * scale
        one = torch.from_numpy(image)[None]
        found.append(expected(one, weight, steps, bias, float(np.float32(1) / step), byte, **geometry))
    return torch.cat(found)


@st.composite
def convolutions(draw: Any) -> dict[str, Any]:
    kernel = [draw(st.integers(1, 5)), draw(st.integers(1, 5))]
    dilation = [draw(st.integers(1, 2)), draw(st.integers(1, 2))]
    padding = [draw(st.integers(0, 3)), draw(st.integers(0, 3))]
    least = [max(1, dilation[i] * (kernel[i] - 1) + 1 - 2 * padding[i]) for i in range(2)]
    return {
        "batch": draw(st.integers(0, 3)), "channels": draw(st.integers(1, 9)), "outputs": draw(st.integers(1, 80)),
        "size": [least[0] + draw(st.integers(0, 6)), least[1] + draw(st.integers(0, 20))],
        "kernel": kernel, "stride": [draw(st.integers(1, 3)), draw(st.integers(1, 3))], "padding": padding,
        "dilation": dilation, "zero": draw(st.sampled_from([0, 3, 128, 255, None])), "last": draw(st.booleans()),
        "bias": draw(st.booleans()), "relu": draw(st.booleans()), "threads": draw(st.integers(1, 2)),
        "pool": draw(st.none() | pools()), "seed": draw(st.integers(0, 2**31)),
    }  # fmt: skip


@st.composite
def pools(draw: Any) -> list[int]:
    kernel = [draw(st.integers(1, 4)), draw(st.integers(1, 4))]
    stride = [draw(st.integers(1, 3)), draw(st.integers(1, 3))]
    return [*kernel, *stride, *(draw(st.integers(0, size // 2)) for size in kernel)]


def sums_size(case: dict[str, Any]) -> list[int]:
    """Height and width of the convolution's outputs."""
    reach = [case["size"][i] + 2 * case["padding"][i] - case["dilation"][i] * (case["kernel"][i] - 1) for i in range(2)]
    return [(reach[i] - 1) // case["stride"][i] + 1 for i in range(2)]


@given(convolutions())
@settings(max_examples=120, deadline=None)
def test_convolutions_on_every_instruction_set(case: dict[str, Any]) -> None:
    torch.manual_seed(case["seed"])
    x = 3 * torch.randn(case["batch"], case["channels"], *case["size"])
    if x.numel() > 4 and case["seed"] % 3 == 0:
        x.view(-1)[:4] = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e30])
    x = x.contiguous(memory_format=torch.channels_last if case["last"] else torch.contiguous_format)
    weight = torch.randint(-127, 128, (case["outputs"], case["channels"], *case["kernel"]), dtype=torch.int8)
    scale, bias = torch.rand(case["outputs"]), torch.randn(case["outputs"]) if case["bias"] else None
    scale = scale - 0.3 if case["seed"] % 2 else scale
    pool = case["pool"] or []
    if pool and min(sums_size(case)[i] + 2 * pool[4 + i] - pool[i] for i in range(2)) < 0:
        pool = []
    geometry = {name: case[name] for name in ("stride", "padding", "dilation")}
    inverse, zero = (0.0, 1) if case["zero"] is None else (40.0, case["zero"])
    of = expected_of_images if case["zero"] is None else expected
    wanted = of(x, weight, scale, bias, inverse, zero, **geometry)
    if pool:
        wanted = F.max_pool2d(wanted, pool[:2], pool[2:4], pool[4:])
    wanted = wanted.relu() if case["relu"] else wanted
    layout, offset = kernels.prepare_int8(weight, zero, case["dilation"][1])
    before = torch.get_num_threads()
    torch.set_num_threads(case["threads"])
    try:
        for isa in kernels.isas():
            with kernels.using(isa):
                y = ops.int8_conv2d(
                    x, layout, offset, scale, bias, inverse, zero, case["outputs"], case["kernel"],
                    *geometry.values(), pool, case["relu"],
                )  # fmt: skip
            assert y.shape == wanted.shape
            assert torch.equal(y, wanted), isa
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("shape", "outputs"), [((5,), 3), ((7, 33), 10), ((2, 3, 130), 70), ((0, 8), 4)])
def test_linear_on_every_instruction_set(shape: tuple[int, ...], outputs: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape)
    weight = torch.randint(-127, 128, (outputs, shape[-1]), dtype=torch.int8)
    scale, bias = torch.rand(outputs), torch.randn(outputs)
    layout, offset = kernels.prepare_int8(weight, 100)
    wanted = expected(x, weight, scale, bias, 60.0, 100).flatten(1).view(*shape[:-1], outputs)
    for isa in kernels.isas():
        with kernels.using(isa):
            assert torch.equal(ops.int8_linear(x, layout, offset, scale, bias, 60.0, 100, outputs, False), wanted)


@pytest.mark.parametrize("values", [[0.0, 0.0], [5.0, 9.0], [-9.0, -5.0], [1e-40, -1e-41], [3e38, -3e38]])
def test_an_image_may_span_anything(values: list[float]) -> None:
    x = torch.tensor(values).repeat(2, 1, 3, 4)
    x[1] = 1
    weight = torch.tensor([[[[3]]], [[[-5]]]], dtype=torch.int8)
    layout, offset = kernels.prepare_int8(weight, 1)
    sizes: Any = (2, [1, 1], [1, 1], [0, 0], [1, 1], [], False)
    geometry = {"stride": 1, "padding": 0, "dilation": 1}
    wanted = expected_of_images(x, weight, torch.ones(2), None, 0.0, 1, **geometry)
    for isa in kernels.isas():
        with kernels.using(isa):
            assert torch.equal(ops.int8_conv2d(x, layout, offset, torch.ones(2), None, 0.0, 1, *sizes), wanted), isa


def test_a_linear_layer_has_one_grid() -> None:
    layout, offset = kernels.prepare_int8(torch.ones(4, 6, dtype=torch.int8), 1)
    with pytest.raises(KernelError, match="out of range"):
        ops.int8_linear(torch.randn(5, 6), layout, offset, torch.ones(4), None, 0.0, 1, 4, True)


def test_the_fake_kernels_know_shape_and_layout() -> None:
    layout, offset = kernels.prepare_int8(torch.ones(4, 3, 3, 3, dtype=torch.int8), 0)
    for pool in ([], [3, 2, 2, 2, 1, 0]):
        arguments = (layout, offset, torch.ones(4), None, 1.0, 0, 4, [3, 3], [2, 2], [1, 1], [1, 1], pool, False)
        torch.library.opcheck(ops.int8_conv2d.default, (torch.randn(2, 3, 9, 8), *arguments))
    layout, offset = kernels.prepare_int8(torch.ones(4, 6, dtype=torch.int8), 0)
    torch.library.opcheck(
        ops.int8_linear.default, (torch.randn(5, 6), layout, offset, torch.ones(4), None, 1.0, 0, 4, True)
    )


def call(**changes: Any) -> Tensor:
    weight = changes.pop("weight", torch.ones(4, 3, 3, 3, dtype=torch.int8))
    layout, offset = kernels.prepare_int8(weight, 0)
    given: dict[str, Any] = {
        "x": torch.randn(1, 3, 8, 8), "weights": layout, "offset": offset, "scale": torch.ones(4), "bias": None,
        "inverse": 1.0, "zero": 0, "out_channels": 4, "kernel_size": [3, 3], "stride": [1, 1], "padding": [0, 0],
        "dilation": [1, 1], "pool": [], "relu": False,
    }  # fmt: skip
    y: Tensor = ops.int8_conv2d(*(given | changes).values())
    return y


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"x": torch.randn(1, 3, 8, 8).double()}, "float64"),
        ({"x": torch.randn(3, 8, 8)}, "3 dimensions"),
        ({"x": torch.randn(1, 3, 2, 8)}, "too small"),
        ({"x": torch.randn(1, 7, 8, 8)}, "bytes"),
        ({"scale": torch.ones(5)}, "scale is"),
        ({"bias": torch.ones(4).double()}, "bias is"),
        ({"zero": 256}, "out of range"),
        ({"inverse": 0.0}, "out of range"),
        ({"inverse": 0.0, "zero": 2}, "out of range"),
        ({"stride": [0, 1]}, "out of range"),
        ({"weights": torch.zeros(4)}, "1-D int8"),
        ({"pool": [3, 3]}, "six numbers"),
        ({"pool": [3, 3, 1, 1, 2, 0]}, "six numbers"),
        ({"pool": [17, 3, 1, 1, 0, 0]}, "up to 16 pixels"),
        ({"pool": [3, 7, 1, 1, 0, 0]}, "too small"),
        ({"pool": [3, 3, 0, 1, 0, 0]}, "out of range"),
        ({"weight": torch.ones(4, 3, 3, 3)}, "int8"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], named: str) -> None:
    for isa in kernels.isas():
        with kernels.using(isa), pytest.raises(KernelError, match=named):
            call(**changes)
