"""Operators bound to everything but their input: how layers reach the library.

torch's dispatcher and the packing of arguments take longer than a small layer, and several times as long with cold
caches. A bound operator packs its arguments once for each shape of x, and where x is a plain tensor of the CPU and
nobody looks on, it calls the library itself. In all other cases (torch.export, torch.compile, fake tensors, modes of
torch, vmap, a profiler) it is the operator of `torch.ops.fxpress`, which is implemented by the same class.
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from . import library

_LIBRARY = torch.library.Library("fxpress", "FRAGMENT")  # type: ignore[no-untyped-call]
_HEAD = struct.Struct("PPii")
"""`FxpressCall` in csrc/common.h, with which the struct of every function begins: x, y, threads, instruction set."""
_MOST_PLANS = 64
# named here because looking them up takes as long as they do
_dispatch_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_transform, _tracing = torch._C._functorch.peek_interpreter_stack, torch._C._get_tracing_state
_profiling = torch._C._autograd._profiler_enabled


class Output(NamedTuple):
    """What y is, before it is there."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    form: torch.memory_format = torch.contiguous_format

    def empty(self, device: torch.device | None = None) -> Tensor:
        """y, not yet written."""
        return torch.empty(self.shape, dtype=self.dtype, device=device, memory_format=self.form)


class _Plan(NamedTuple):
    """What calls on inputs of one shape have in common.

    Args:
        strides: of y.
        in_form: memory format that x must be brought into; None where it lies right.
        constants: of the C struct, all behind its head; empty where y is.
        held: tensors to which these point.
    """

    output: Output
    strides: tuple[int, ...]
    in_form: torch.memory_format | None
    constants: bytes
    held: Sequence[Tensor | None]


Packed = tuple[bytes, Sequence[Tensor | None]]


class Bound(ABC):
    """An operator and all of its arguments but x.

    Args:
        arguments: of the operator behind x, in the order of its schema.

    Raises:
        KernelError: when it is called, for arguments that do not fit.
    """

    name: ClassVar[str]
    """Of the operator in `torch.ops.fxpress`."""
    function: ClassVar[str]
    """Of the library."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self._plans: dict[Any, _Plan] = {}

    @abstractmethod
    def output(self, x: Tensor) -> Output:
        """What y will be, from all that can be told without values (fake tensors pass through here as well).

        Raises:
            KernelError: names the argument and what it must be.
        """

    @abstractmethod
    def in_form(self, x: Tensor) -> torch.memory_format:
        """Memory format in which the library is to read x."""

    @abstractmethod
    def pack(self, x: Tensor, output: Output) -> Packed:
        """The C struct behind its head, and the tensors to which it points."""

    @abstractmethod
    def reference(self, x: Tensor) -> Tensor:
        """The same in plain torch; the format is free."""

    def __call__(self, x: Tensor) -> Tensor:
        """y, without a gradient."""
        if is_plain(x):
            return self.run(x)
        y: Tensor = getattr(torch.ops.fxpress, self.name).default(x, *self.arguments)
        return y

    def run(self, x: Tensor) -> Tensor:
        """y by the library, or by the reference where that is not in use."""
        found, isa = library.in_use()
        if found is None:
            return self.output(x).empty().copy_(self.reference(x))
        key = (x.shape, x.stride(), x.dtype)  # whether x lies channels-last is told from its strides
        output, strides, in_form, constants, _held = self._plans.get(key) or self._make_plan(key, x)
        y = torch.empty_strided(output.shape, strides, dtype=output.dtype)  # half the time of `empty` with a format
        if not constants:
            return y
        if in_form is not None:
            x = x.contiguous(memory_format=in_form)
        status = getattr(found, self.function)(
            _HEAD.pack(x.data_ptr(), y.data_ptr(), torch.get_num_threads(), isa) + constants
        )
        if status:
            library.check(status)
        return y

    def _make_plan(self, key: Any, x: Tensor) -> _Plan:
        output, form = self.output(x), self.in_form(x)
        constants, held = self.pack(x, output) if 0 not in output.shape else (b"", ())
        strides = output.empty(torch.device("meta")).stride()
        plan = _Plan(output, strides, None if x.is_contiguous(memory_format=form) else form, constants, held)
        if len(self._plans) >= _MOST_PLANS:
            self._plans.clear()
        self._plans[key] = plan
        return plan


def is_plain(x: Tensor) -> bool:
    """Whether torch's dispatcher would do nothing but pass x on: no subclass, mode, transform, tracing or profiler."""
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and x.is_cpu
        and not _dispatch_modes()
        and not _function_modes()
        and _transform() is None
        and _tracing() is None
        and not _profiling()
    )


def register(schema: str, bound: type[Bound]) -> None:
    """Make a class the operator `torch.ops.fxpress.NAME`; the schema is what follows the name."""
    # `Library.define` and `impl` rather than `torch.library.custom_op`: 6 microseconds per call instead of 11
    _LIBRARY.define(bound.name + schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    _LIBRARY.impl(bound.name, lambda x, *rest: bound(*rest).run(x), "CPU")  # type: ignore[no-untyped-call]
    torch.library.register_fake(
        f"fxpress::{bound.name}", lambda x, *rest: bound(*rest).output(x).empty(x.device), lib=_LIBRARY
    )


def pointer(tensor: Tensor | None) -> int:
    """Address of a tensor's numbers, 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def is_channels_last(x: Tensor) -> bool:
    """Whether x lies channels-last and not contiguous as well."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def image_form(x: Tensor) -> torch.memory_format:
    """Format of x, as torch's own convolutions see it."""
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format
