"""Whole binarized networks: every instruction set against plain torch, programs as text, hostile input."""

from __future__ import annotations

import contextlib
import ctypes
from typing import Any

import pytest
import torch
from fxpress.ir.errors import KernelError
from fxpress.runtime import kernels
from fxpress.runtime.kernels import library, network_data, network_ops
from fxpress.runtime.kernels.network_program import CODES, FIELDS, Program, cuts_dtype, parse
from fxpress.runtime.kernels.network_reference import compute
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

WHOLE = """input channels=21
levels x=0 channels=21
conv_levels x=1 outputs=24 channels=21 kernel=3,3 padding=1,1
conv x=2 outputs=21 channels=8 kernel=3,3 padding=1,1 groups=3 added=0 added_relu=1
levels x=3 channels=21
conv_levels x=4 outputs=70 channels=21 kernel=3,2 stride=2,1 padding=1,0 dilation=1,2
max_pool x=5 kernel=3,3 stride=2,2 padding=1,1 ceil=1
cat x=5,5
relu x=3
shortcut x=8 stride=2,2 before=3 after=1
affine x=9 channels=25 relu=1
add x=10 y=10 y_relu=1 relu=1
average_pool x=11 kernel=2,2 stride=2,2
mean x=12
max_pool x=10 kernel=3,3 stride=2,2 padding=1,1
flatten x=6
conv x=15 outputs=10 channels=1400 linear=1 relu=1
decode x=7
output x=3
output x=13 dims=2
output x=16 dims=2
output x=17
output x=14"""


def tensors_for(program: Program) -> list[tuple[Tensor, ...]]:
    made = []
    for parts in program.parts():
        row: list[Tensor] = []
        for part in parts:
            if part.dtype is torch.bool:
                row.append(torch.rand(part.shape) < 0.5)
            elif part.name == "cuts":
                row.append(torch.randint(-40, 40, part.shape).sort(0).values.to(part.dtype))
            elif part.name == "thresholds":  # every third channel descends
                rising = torch.randn(part.shape).sort(0).values
                rising[:, ::3] = rising[:, ::3].flip(0)
                row.append(rising)
            else:
                row.append(torch.randn(part.shape))
        made.append(tuple(row))
    return made


def inputs_for(program: Program, *sizes: int) -> list[Tensor]:
    return [torch.randn(sizes[0], step["channels"], *sizes[1:]) for step in program.inputs]


def run(program: Program, tensors: list[tuple[Tensor, ...]], inputs: list[Tensor]) -> list[Tensor]:
    made: list[Tensor] = torch.ops.fxpress.binary_network(inputs, network_data.pack(program, tensors), str(program))
    return made


@pytest.mark.parametrize("isa", kernels.isas())
@pytest.mark.parametrize("threads", [1, 3])
def test_every_step_equals_torch(isa: str, threads: int) -> None:
    torch.manual_seed(0)
    program = parse(WHOLE)
    assert {step.kind for step in program.steps} | {"input", "output"} == set(FIELDS)
    tensors, inputs = tensors_for(program), inputs_for(program, 2, 13, 11)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with kernels.using(isa):
            made = run(program, tensors, inputs)
    finally:
        torch.set_num_threads(before)
    expected = compute(program, tensors, inputs)
    for step, y, wanted in zip(program.outputs, made, expected, strict=True):
        assert y.dim() == step["dims"]
        assert y.dim() == 2 or y.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(y, wanted.reshape(y.shape), rtol=1e-6, atol=1e-6 if step["x"] == 13 else 0)


@st.composite
def chains(draw: Any) -> tuple[str, int, int]:
    """Programs in which each step reads any value of the right kind before it."""
    channels, size = draw(st.integers(1, 70)), draw(st.integers(5, 14))
    lines = [f"input channels={channels}"]
    values: list[tuple[bool, int, int]] = [(False, channels, size)]  # levels, channels, height and width
    for _ in range(draw(st.integers(1, 9))):
        x = draw(st.integers(0, len(values) - 1))
        levels, c, s = values[x]
        k, stride = draw(st.sampled_from([1, 2, 3])), draw(st.integers(1, 2))
        assume(s >= k)
        after = (s - k) // stride + 1
        window = f"kernel={k},{k} stride={stride},{stride}"
        same = [v for v, value in enumerate(values) if value == values[x]]
        kinds = ["max_pool", "cat", "shortcut", "flatten"]
        kinds += (
            ["conv", "conv_levels", "decode"] * 2 if levels else ["levels", "levels", "affine", "add", "relu", "mean"]
        )
        kind = draw(st.sampled_from(kinds))
        out, y = draw(st.integers(1, 40)), draw(st.sampled_from(same))
        made: dict[str, tuple[str, tuple[bool, int, int]]] = {
            "levels": (f"levels x={x} channels={c}", (True, c, s)),
            "conv_levels": (f"conv_levels x={x} outputs={out} channels={c} {window}", (True, out, after)),
            "conv": (f"conv x={x} outputs={out} channels={c} {window} relu={out % 2}", (False, out, after)),
            "affine": (f"affine x={x} channels={c} relu={out % 2}", (False, c, s)),
            "add": (f"add x={x} y={y} y_relu={out % 2} relu={out // 2 % 2}", (False, c, s)),
            "relu": (f"relu x={x}", (False, c, s)),
            "mean": (f"mean x={x}", (False, c, 1)),
            "max_pool": (f"max_pool x={x} {window}", (levels, c, after)),
            "cat": (f"cat x={x},{y},{x}", (levels, 3 * c, s)),
            "shortcut": (f"shortcut x={x} stride={stride},{stride} before={k}", (levels, c + k, (s - 1) // stride + 1)),
            "flatten": (f"flatten x={x}", (levels, c * s * s, 1)),
            "decode": (f"decode x={x}", (False, c, s)),
        }  # fmt: skip
        lines.append(made[kind][0])
        values.append(made[kind][1])
    floats = [number for number, value in enumerate(values) if not value[0] and number]
    assume(floats and max(value[1] for value in values) < 5000)
    lines += [f"output x={number}" for number in draw(st.sets(st.sampled_from(floats), min_size=1))]
    return "\n".join(lines), size, draw(st.integers(0, 2**20))


@settings(max_examples=60, deadline=None)
@given(case=chains())
def test_random_programs_equal_torch(case: tuple[str, int, int]) -> None:
    """Memory is shared between values that do not live at the same time: a wrong plan shows as wrong numbers."""
    text, size, seed = case
    torch.manual_seed(seed)
    program = parse(text)
    assert parse(str(program)) == program
    tensors, inputs = tensors_for(program), inputs_for(program, 2, size, size)
    for y, wanted in zip(run(program, tensors, inputs), compute(program, tensors, inputs), strict=True):
        torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)


def test_either_memory_format_and_empty_batches() -> None:
    program = parse(WHOLE)
    tensors, (x,) = tensors_for(program), inputs_for(program, 2, 13, 11)
    for one, other in zip(
        run(program, tensors, [x]),
        run(program, tensors, [x.contiguous(memory_format=torch.channels_last)]),
        strict=True,
    ):
        assert torch.equal(one, other)
    assert [tuple(y.shape)[:2] for y in run(program, tensors, [x[:0]])] == [
        (0, 21),
        (0, 25),
        (0, 10),
        (0, 140),
        (0, 25),
    ]


def test_stored_bytes_are_one_bit_for_each_weight() -> None:
    program = parse("input channels=5\nlevels x=0 channels=5\nconv_levels x=1 outputs=7 channels=5 kernel=3,3\n"
                    "decode x=2\noutput x=3")  # fmt: skip
    assert program.stored_bytes == 3 * 5 * 4 + -(-7 * 5 * 9 // 8) + 3 * 7 * 2 + 4
    tensors = tensors_for(program)
    back = network_data.unpack(program, network_data.pack(program, tensors))
    assert all(torch.equal(a, b) for one, two in zip(tensors, back, strict=True) for a, b in zip(one, two, strict=True))
    assert (cuts_dtype(10922), cuts_dtype(10923)) == (torch.int16, torch.int32)
    with pytest.raises(KernelError, match="ask for"):
        network_data.unpack(program, torch.zeros(3, dtype=torch.uint8))
    with pytest.raises(KernelError, match="weights have shape"):
        network_data.pack(program, [tensors[0], (tensors[1][0][:3], tensors[1][1]), tensors[2]])


def test_weights_are_prepared_once_for_each_state() -> None:
    program = parse(WHOLE)
    data = network_data.pack(program, tensors_for(program))
    first = network_ops.prepared(data, str(program))
    assert network_ops.prepared(data, str(program)) is first
    data.add_(0)
    assert network_ops.prepared(data, str(program)) is not first


HEAD = "input channels=4\nlevels x=0 channels=4\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no step"),
        ("levels x=0 channels=4", "inputs first"),
        ("input channels=4\noutput x=0", "reads a value that is not there"),
        (HEAD + "conv x=2 outputs=3 channels=4\noutput x=2", "reads a value that is not there"),
        (HEAD + "conv x=1 outputs=3 channels=4\noutput x=2\noutput x=2", "same value twice"),
        (HEAD + "conv x=1 channels=4\noutput x=2", "outputs is not right"),
        (HEAD + "conv x=1 outputs=99999999 channels=4\noutput x=2", "outputs is not right"),
        (HEAD + "conv x=1 outputs=3 channels=4 kernel=3\noutput x=2", "kernel is not right"),
        (HEAD + "conv x=1 outputs=3 channels=4 colour=3\noutput x=2", "colour is not right"),
        (HEAD + "relu x=0\noutput x=2 dims=3", "dims is not right"),
        (HEAD + "cat x=\noutput x=2", "is no step"),
        (HEAD + "import os\noutput x=2", "is no step"),
        ("\n".join(["input channels=1"] * 70000), "at most"),
    ],
)
def test_text_that_is_no_program(text: str, message: str) -> None:
    with pytest.raises(KernelError, match=message):
        parse(text)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ("relu x=1\noutput x=2", "cannot take"),
        ("conv x=0 outputs=3 channels=4\noutput x=2", "cannot take"),
        ("conv x=1 outputs=3 channels=5\noutput x=2", "cannot take"),
        ("conv x=1 outputs=3 channels=4 kernel=9,9\noutput x=2", "cannot take"),
        ("conv x=1 outputs=3 channels=4 added=0\noutput x=2", "adds"),
        ("max_pool x=0 kernel=2,2 padding=2,2\noutput x=2", "cannot take"),
        ("cat x=0,1\noutput x=2", "cannot take"),
        ("mean x=1\noutput x=2", "cannot take"),
        ("relu x=0\noutput x=1", "as an output"),
        ("relu x=0\noutput x=2 dims=2", "as an output"),
    ],
)
def test_steps_that_do_not_fit_what_they_read(steps: str, message: str) -> None:
    program = parse(HEAD + steps)
    data = network_data.pack(program, tensors_for(program))
    with pytest.raises(KernelError, match=message):
        torch.ops.fxpress.binary_network([torch.randn(1, 4, 6, 6)], data, str(program))


def test_inputs_that_do_not_fit() -> None:
    program = parse(HEAD + "relu x=0\noutput x=2")
    data, x = network_data.pack(program, tensors_for(program)), torch.randn(1, 4, 6, 6)
    for inputs, message in (
        ([x.double()], "float64"),
        ([x, x], "given 2"),
        ([x[:, :3]], "reads 4"),
        ([x[0]], "reads 4"),
    ):
        with pytest.raises(KernelError, match=message):
            torch.ops.fxpress.binary_network(inputs, data, str(program))
    with pytest.raises(KernelError, match="1-D uint8"):
        torch.ops.fxpress.binary_network([x], data.int(), str(program))


# -- the library itself, past all that Python checks ---------------------------------------------------------------


def call_library(numbers: list[int], data: Tensor, sizes: tuple[int, ...] = (1, 21, 13, 11)) -> None:
    found = library.in_use()[0]
    assert found is not None
    program = parse(WHOLE)
    made = [torch.zeros(size.n * size.c * size.h * size.w) for size in _outputs(program)]
    x = torch.randn(max(1, sizes[0] * sizes[1] * sizes[2] * sizes[3]))
    room = [n for size in _outputs(program) for n in (size.n, size.c, size.h, size.w)]
    library.check(
        found.fxpress_binary_network(
            (ctypes.c_int64 * len(numbers))(*numbers), len(numbers), data.data_ptr(), data.numel(),
            (ctypes.c_void_p * 1)(x.data_ptr()), (ctypes.c_int64 * 4)(*sizes), 1,
            (ctypes.c_void_p * len(made))(*(y.data_ptr() for y in made)), (ctypes.c_int64 * len(room))(*room),
            len(made), 1, library.in_use()[1],
        )
    )  # fmt: skip


def _outputs(program: Program) -> list[Any]:
    sizes = program.sizes([(1, 21, 13, 11)])
    return [sizes[step["x"]] for step in program.outputs]


@pytest.fixture(scope="module")
def prepared() -> tuple[list[int], Tensor]:
    if not kernels.available():
        pytest.skip("no compiled library")
    program = parse(WHOLE)
    return program.numbers(), network_data.prepare(program, tensors_for(program))


def test_the_library_takes_what_it_should(prepared: tuple[list[int], Tensor]) -> None:
    call_library(*prepared)


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_no_program_makes_the_library_read_elsewhere(prepared: tuple[list[int], Tensor], data: st.DataObject) -> None:
    """A changed number is refused, or gives another network that fits: `make asan` would see a wrong address."""
    numbers, raw = list(prepared[0]), prepared[1].clone()
    for _ in range(data.draw(st.integers(1, 3))):
        wild = st.one_of(st.integers(-3, 40), st.sampled_from([2**24, 2**31, 2**40, 2**62, -(2**62)]))
        if data.draw(st.booleans()):
            numbers[data.draw(st.integers(0, len(numbers) - 1))] = data.draw(wild)
        else:  # the table of sections, or the header of a layout behind it
            raw[data.draw(st.integers(0, 8 + 16 * 14))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        numbers = numbers[: data.draw(st.integers(0, len(numbers)))]
    with contextlib.suppress(KernelError):
        call_library(numbers, raw)


@pytest.mark.parametrize("sizes", [(0, 21, 13, 11), (1, 20, 13, 11), (1, 21, 2, 11), (2**30, 21, 13, 11)])
def test_the_library_refuses_sizes(prepared: tuple[list[int], Tensor], sizes: tuple[int, ...]) -> None:
    found = library.in_use()[0]
    assert found is not None
    numbers, data = prepared
    x, room = torch.zeros(16), [0] * 20
    status = found.fxpress_binary_network(
        (ctypes.c_int64 * len(numbers))(*numbers), len(numbers), data.data_ptr(), data.numel(),
        (ctypes.c_void_p * 1)(x.data_ptr()), (ctypes.c_int64 * 4)(*sizes), 1,
        (ctypes.c_void_p * 5)(*[x.data_ptr()] * 5), (ctypes.c_int64 * 20)(*room), 5, 1, library.in_use()[1],
    )  # fmt: skip
    assert status
    with pytest.raises(KernelError, match="binary network"):
        library.check(status)


def test_python_and_library_number_the_steps_alike() -> None:
    assert [CODES[kind] for kind in ("levels", "conv", "max_pool", "decode")] == [0, 2, 6, 12]


def test_nan_is_level_zero_and_stays_in_floats() -> None:
    program = parse("input channels=2\nlevels x=0 channels=2\ndecode x=1\nrelu x=0\nmax_pool x=0 kernel=2,1\n"
                    "output x=2\noutput x=3\noutput x=4")  # fmt: skip
    x = torch.tensor([float("nan"), 5.0, 1.0, float("nan")]).view(1, 2, 2, 1)
    thresholds = torch.tensor([[0.0], [1.5], [2.5]]).expand(3, 2)
    for isa in kernels.isas():
        with kernels.using(isa):
            levels, rectified, pooled = run(program, [(thresholds,), (torch.ones(1),), (), ()], [x])
        assert levels.flatten().tolist() == [0, 3, 1, 0]
        assert rectified.isnan().flatten().tolist() == [True, False, False, True]
        assert pooled.isnan().all()


@pytest.mark.parametrize("channels", [64, 70, 128])
@pytest.mark.parametrize("descending", [False, True])
def test_levels_and_max_pools_of_whole_vectors(channels: int, descending: bool) -> None:
    """Every instruction set, with blocks of 64 channels and a rest, one and three pixels of padding, NaN."""
    torch.manual_seed(0)
    window = "kernel=3,3 stride=2,2 padding=1,1"
    program = parse(
        f"input channels={channels}\nlevels x=0 channels={channels}\ndecode x=1\nmax_pool x=1 {window}\n"
        f"decode x=3\nmax_pool x=0 {window}\nmax_pool x=0 kernel=2,3 dilation=2,1 ceil=1 stride=2,3\n"
        "flatten x=0\nflatten x=5\noutput x=2\noutput x=4\noutput x=5\noutput x=6\noutput x=7\noutput x=8 dims=2"
    )
    x = torch.randn(2, channels, 9, 8)
    x[0, ::3, 2, 2], x[1, ::5, 0] = float("nan"), -float("inf")
    thresholds = torch.randn(3, channels).sort(0).values
    thresholds[:, 1::2] = thresholds[:, 1::2].flip(0) if descending else thresholds[:, 1::2]
    x[:, :, 4, 4] = thresholds[1]  # on a threshold
    step = (torch.ones(1),)
    tensors: list[tuple[Tensor, ...]] = [(thresholds,), step, (), step, (), (), (), ()]
    wanted = compute(program, tensors, [x])
    for isa in kernels.isas():
        with kernels.using(isa):
            for y, expected in zip(run(program, tensors, [x]), wanted, strict=True):
                torch.testing.assert_close(y, expected.reshape(y.shape), rtol=0, atol=0, equal_nan=True)
