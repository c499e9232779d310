"""Operators bound to their arguments: past torch's dispatcher for plain tensors, as operators where torch looks on."""

from __future__ import annotations

import pytest
import torch
from fxpress.ir.errors import KernelError
from fxpress.runtime import kernels
from fxpress.runtime.kernels import bound
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def linear(outputs: int = 40, tables: str = "fp32") -> kernels.BoundPQLinear:
    torch.manual_seed(0)
    layout = kernels.prepare_linear(torch.randint(0, 16, (1, 6, outputs), dtype=torch.uint8), 16, tables)
    return kernels.BoundPQLinear(torch.randn(6, 16, 4), layout, torch.randn(outputs), outputs, tables)


def conv2d(groups: int = 1) -> kernels.BoundPQConv2d:
    torch.manual_seed(0)
    layout = kernels.prepare_conv2d(torch.randint(0, 16, (9, 2, 8), dtype=torch.uint8), 16, "fp32", groups)
    window = [3, 3], [1, 1], [1, 1], [1, 1]
    return kernels.BoundPQConv2d(torch.randn(2, 16, 4), layout, None, 8, *window, groups, "fp32")


class Operators(TorchDispatchMode):
    """Names of the operators that torch's dispatcher sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_mode_of_torch_sees_the_operator() -> None:
    layer, x = linear(), torch.randn(3, 24)
    with Operators() as mode:
        y = layer(x)
    assert mode.seen == ["fxpress.pq_linear.default"]
    assert torch.equal(y, layer(x))


def test_a_profiler_sees_the_operator() -> None:
    layer, x = linear(), torch.randn(3, 24)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        layer(x)
    assert "fxpress::pq_linear" in {event.key for event in profile.key_averages()}


def test_plain_tensors_pass_by_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = linear(), torch.randn(3, 24)
    expected = layer(x)
    monkeypatch.setattr(torch.ops.fxpress, "pq_linear", None)
    assert torch.equal(layer(x), expected)


class Marked(Tensor):
    """A subclass of its own."""


@pytest.mark.filterwarnings("ignore:.*jit.trace")
def test_what_is_no_plain_tensor() -> None:
    x = torch.randn(3, 24)
    assert bound.is_plain(x)
    assert not bound.is_plain(x.as_subclass(Marked))
    assert not bound.is_plain(torch.empty(3, device="meta"))
    layer = linear()
    assert isinstance(layer(x.as_subclass(Marked)), Marked)
    assert layer(torch.empty(3, 24, device="meta")).shape == (3, 40)
    seen = []
    torch.func.vmap(lambda row: seen.append(bound.is_plain(row)) or row)(x)  # type: ignore[func-returns-value]
    torch.jit.trace(lambda row: seen.append(bound.is_plain(row)) or row + 1, x, check_trace=False)  # type: ignore[no-untyped-call, func-returns-value]
    assert seen == [False, False]


def test_every_shape_and_format_has_a_plan_of_its_own() -> None:
    layer = conv2d()
    for shape in ((1, 8, 5, 6), (2, 8, 5, 6), (1, 8, 7, 3), (0, 8, 5, 6)):
        x = torch.randn(shape)
        forms = [x, x.contiguous(memory_format=torch.channels_last), torch.stack([x, x], -1)[..., 0]]
        results = [layer(form) for form in forms]
        wanted = torch.ops.fxpress.pq_conv2d(x, *layer.arguments)
        for form, y in zip(forms, results, strict=True):
            torch.testing.assert_close(y, wanted)
            assert bound.image_form(y) == bound.image_form(form)
    assert 9 <= len(layer._plans) <= 12


def test_plans_are_bounded() -> None:
    layer = linear()
    for batch in range(1, 200):
        layer(torch.ones(batch, 24))
    assert len(layer._plans) <= bound._MOST_PLANS


def test_threads_and_instruction_set_are_those_of_the_call() -> None:
    layer, x = linear(300, "int8"), torch.randn(5, 24)
    expected = layer(x)
    for isa in kernels.isas():
        with kernels.using(isa):
            torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    torch.set_num_threads(2)
    try:
        assert torch.equal(layer(x), expected)
    finally:
        torch.set_num_threads(1)


def test_values_that_are_written_to_bound_tensors_count() -> None:
    layer, x = linear(), torch.randn(3, 24)
    before = layer(x)
    layer.arguments[2].add_(1)
    torch.testing.assert_close(layer(x), before + 1)


def test_plans_keep_copies_of_arguments_that_are_not_contiguous() -> None:
    """A plan points to them; another shape of x makes copies of its own."""
    layer = linear()
    codebook, layout, bias, *rest = layer.arguments
    loose = kernels.BoundPQLinear(torch.stack([codebook, codebook], -1)[..., 0], layout, bias, *rest)
    x = torch.randn(3, 24)
    assert torch.equal(loose(x), layer(x))
    kept = [tensor.data_ptr() for plan in loose._plans.values() for tensor in plan.held if tensor is not None]
    loose(torch.randn(5, 24))
    taken = [torch.full((6, 16, 4), float("nan")) for _ in range(50)]  # whatever was freed is written to
    assert torch.equal(loose(x), layer(x))
    assert not {tensor.data_ptr() for tensor in taken} & set(kept)


def test_errors_name_what_does_not_fit_and_leave_no_plan() -> None:
    layer = linear()
    for x, message in (
        (torch.randn(3, 25), "25 inputs"),
        (torch.randn(3, 24).double(), "float64"),
        (torch.tensor(1.0), "scalar"),
    ):
        with pytest.raises(KernelError, match=message):
            layer(x)
    assert not layer._plans
