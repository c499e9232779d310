"""The operator `torch.ops.fxpress.binary_network`: a whole binarized network, or a piece of one, in one call.

    binary_network(inputs, data, program) -> outputs

`program` is text (`network_program.py`), `data` its tensors as a file keeps them (`network_data.pack`), uint8. Inputs
are float32, (N, C, H, W) or (N, C); outputs likewise, images channels-last.

The library reads the weights in another order. They are brought into it at the first call and kept for as long as the
tensor `data` lives: so a network that goes through torch.export or torch.compile holds one bit for each weight.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ...ir.errors import KernelError
from . import library
from .bound import is_plain
from .network_data import prepare, unpack
from .network_program import Program, Size, parse
from .network_reference import compute

_LIBRARY = torch.library.Library("fxpress", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "binary_network(Tensor[] inputs, Tensor data, str program) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,)
)

Shapes = tuple[tuple[int, ...], ...]
_PREPARED = WeakIdKeyDictionary()
"""Tensor of stored data → for which program and state of it, and what the library reads."""


@dataclass(frozen=True)
class _Plan:
    """What a call of a program on inputs of given shapes needs, made once."""

    program: Program
    numbers: ctypes.Array[ctypes.c_int64]
    input_sizes: ctypes.Array[ctypes.c_int64]
    output_sizes: ctypes.Array[ctypes.c_int64]
    output_shapes: Shapes


@lru_cache(maxsize=256)
def _plan(text: str, shapes: Shapes) -> _Plan:
    program = parse(text)
    values = program.sizes(shapes)
    given, made = values[: len(shapes)], [values[step["x"]] for step in program.outputs]
    numbers = program.numbers()
    return _Plan(
        program, (ctypes.c_int64 * len(numbers))(*numbers), _sizes(given), _sizes(made), _output_shapes(program, values)
    )


def _sizes(values: list[Size]) -> ctypes.Array[ctypes.c_int64]:
    numbers = [n for size in values for n in (size.n, size.c, size.h, size.w)]
    return (ctypes.c_int64 * len(numbers))(*numbers)


def _output_shapes(program: Program, values: list[Size]) -> Shapes:
    shapes = []
    for step in program.outputs:
        size = values[step["x"]]
        if size.levels or (step["dims"] == 2 and (size.h, size.w) != (1, 1)):
            raise KernelError(f"A binary network cannot give {size} as an output: {step}")
        shapes.append((size.n, size.c, size.h, size.w)[: step["dims"]])
    return tuple(shapes)


def _check(inputs: list[Tensor], data: Tensor) -> None:
    for x in inputs:
        if x.dtype != torch.float32:
            raise KernelError(f"x is {x.dtype}", hint="Binary networks read float32")
    if data.dtype != torch.uint8 or data.dim() != 1:
        raise KernelError(f"data of a binary network are 1-D uint8, not {data.dtype} {tuple(data.shape)}")


def _empty(shapes: Shapes, device: torch.device) -> list[Tensor]:
    forms = {2: torch.contiguous_format, 4: torch.channels_last}
    return [torch.empty(shape, dtype=torch.float32, device=device, memory_format=forms[len(shape)]) for shape in shapes]


def binary_network(inputs: list[Tensor], data: Tensor, program: str) -> list[Tensor]:
    """Outputs; by the library itself where all inputs are plain tensors, as `bound.py` does it for single layers."""
    if all(is_plain(x) for x in inputs):
        return _run(inputs, data, program)
    outputs: list[Tensor] = torch.ops.fxpress.binary_network(inputs, data, program)
    return outputs


def _run(inputs: list[Tensor], data: Tensor, program: str) -> list[Tensor]:
    _check(inputs, data)
    plan = _plan(program, tuple(tuple(x.shape) for x in inputs))
    outputs = _empty(plan.output_shapes, torch.device("cpu"))
    if not inputs[0].shape[0]:
        return outputs
    found, isa = library.in_use()
    if found is None:
        made = compute(plan.program, unpack(plan.program, data), [_image(x) for x in inputs])
        return [y.copy_(value.reshape(y.shape)) for y, value in zip(outputs, made, strict=True)]
    held = [x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.contiguous() for x in inputs]
    read = prepared(data, program)
    status = found.fxpress_binary_network(
        plan.numbers, len(plan.numbers), read.data_ptr(), read.numel(),
        _pointers(held), plan.input_sizes, len(held), _pointers(outputs), plan.output_sizes, len(outputs),
        torch.get_num_threads(), isa,
    )  # fmt: skip
    library.check(status)
    return outputs


def prepared(data: Tensor, program: str) -> Tensor:
    """What the library reads for stored data, made once for each tensor and state of it."""
    state = (program, data.data_ptr(), -1 if data.is_inference() else data._version)
    known = _PREPARED.get(data)  # type: ignore[no-untyped-call]
    if known is None or known[0] != state:
        found = parse(program)
        known = _PREPARED[data] = (state, prepare(found, unpack(found, data)))
    made: Tensor = known[1]
    return made


def _image(x: Tensor) -> Tensor:
    return x if x.dim() == 4 else x[:, :, None, None]


def _pointers(tensors: list[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def _fake(inputs: list[Tensor], data: Tensor, program: str) -> list[Tensor]:
    _check(inputs, data)
    found = parse(program)
    return _empty(_output_shapes(found, found.sizes([x.shape for x in inputs])), inputs[0].device)


_LIBRARY.impl("binary_network", _run, "CPU")  # type: ignore[no-untyped-call]
torch.library.register_fake("fxpress::binary_network", _fake, lib=_LIBRARY)
