"""The operators `torch.ops.fxpress.pq_linear` and `pq_conv2d`: schemas, checks, and what the library reads."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...ir.errors import KernelError
from . import layout as layouts
from . import reference
from .bound import Bound, Output, Packed, image_form, pointer, register
from .window import Window, pooled

_TABLES = ("fp32", "int16", "int8")
_LINEAR = struct.Struct("3P7q3i")
_CONV = struct.Struct("3P26q5i")


class _BoundPQ(Bound):
    """Both operators: their arguments begin with codebook, layout, bias, number of outputs; the last have defaults."""

    _count: ClassVar[int]
    """Of arguments without a default: `relu` is the first that has one."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._codebook, self._layout, self._bias, self._outputs = arguments[:4]
        self._tables: str = arguments[self._count - 1]
        self._relu: bool = arguments[self._count] if len(arguments) > self._count else False

    def _check(self, x: Tensor, inputs: int) -> None:
        """Types and sizes; `inputs` are those of one group."""
        codebook, bias, outputs = self._codebook, self._bias, self._outputs
        if self._tables not in _TABLES:
            raise KernelError(f"tables is {self._tables!r}", hint=f"It is one of {', '.join(_TABLES)}")
        for name, tensor in (("x", x), ("codebook", codebook), ("bias", bias)):
            if tensor is not None and tensor.dtype != torch.float32:
                hint = "The kernels read float32; decode the layer for others"
                raise KernelError(f"{name} is {tensor.dtype}", hint=hint)
        if outputs < 1:
            raise KernelError(f"There are {outputs} outputs")
        if codebook.dim() != 3:
            raise KernelError(f"A codebook is (sub-spaces, code words, width), not {tuple(codebook.shape)}")
        subspaces, _, width = codebook.shape
        if not (subspaces - 1) * width < inputs <= subspaces * width:
            raise KernelError(f"{inputs} inputs do not fit {subspaces} sub-spaces of width {width}")
        if bias is not None and tuple(bias.shape) != (outputs,):
            raise KernelError(f"bias has shape {tuple(bias.shape)} where there are {outputs} outputs")
        layouts.check_tensor(self._layout)

    def _held(self) -> tuple[tuple[Tensor, Tensor, Tensor | None], bool]:
        """Codebook, layout and bias, and whether equal dimensions of code words are adjacent (`prepare_codebook`)."""
        dims_major = self._codebook.transpose(1, 2).is_contiguous()
        codebook = self._codebook if dims_major else self._codebook.contiguous()
        bias = self._bias if self._bias is None else self._bias.contiguous()
        return (codebook, self._layout.contiguous(), bias), dims_major


class BoundPQLinear(_BoundPQ):
    """pq_linear(x, codebook, layout, bias, out_features, tables, relu)."""

    name, function, _count = "pq_linear", "fxpress_pq_linear", 5

    def output(self, x: Tensor) -> Output:
        """(…, in) → (…, out)."""
        if not x.dim():
            raise KernelError("x is a scalar", hint="A linear layer reads (…, inputs)")
        self._check(x, x.shape[-1])
        return Output((*x.shape[:-1], self._outputs))

    def in_form(self, x: Tensor) -> torch.memory_format:  # noqa: ARG002
        """Contiguous."""
        return torch.contiguous_format

    def pack(self, x: Tensor, output: Output) -> Packed:
        """`FxpressPQLinear` in csrc/pq_linear.cpp."""
        held, dims_major = self._held()
        sizes = math.prod(output.shape[:-1]), x.shape[-1], *self._codebook.shape, self._layout.numel(), self._outputs
        flags = dims_major, _TABLES.index(self._tables), self._relu
        return _LINEAR.pack(*map(pointer, held), *sizes, *flags), held

    def reference(self, x: Tensor) -> Tensor:
        """In plain torch."""
        return reference.pq_linear(x, *self.arguments)


class BoundPQConv2d(_BoundPQ):
    """pq_conv2d(x, codebook, layout, bias, out_channels, kernel_size, stride, padding, dilation, groups, tables, relu,
    pool, channels_last).

    `pool` is empty, or kernel, stride and padding of a max pool of the rectified outputs, two numbers each. Outputs lie
    as x does, or `channels_last` whatever x does.
    """

    name, function, _count = "pq_conv2d", "fxpress_pq_conv2d", 10

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._pool: Sequence[int] = arguments[11] if len(arguments) > 11 else ()
        self._last: bool = arguments[12] if len(arguments) > 12 else False
        self._of = Window(*arguments[3:9])

    def output(self, x: Tensor) -> Output:
        """(N, C, H, W) → (N, out, H', W')."""
        shape = self._of.out_shape(x.shape)
        self._check(x, x.shape[1] // self._of.groups)
        if self._pool and not self._relu:
            raise KernelError(f"pool is {list(self._pool)} without relu", hint="Rectified outputs alone are pooled")
        form = torch.channels_last if self._last else image_form(x)
        return Output(pooled(shape, self._pool), form=form)

    def in_form(self, x: Tensor) -> torch.memory_format:
        """That of x."""
        return image_form(x)

    def pack(self, x: Tensor, output: Output) -> Packed:
        """`FxpressPQConv2d` in csrc/pq_conv.cpp."""
        held, dims_major = self._held()
        window = (number for pair in self._of[1:5] for number in pair)
        sizes = *x.shape, *self._of.out_shape(x.shape)[1:], *window, self._of.groups, *self._codebook.shape
        pool = self._pool or (0,) * 6
        last = image_form(x) == torch.channels_last, output.form == torch.channels_last
        flags = *last, dims_major, _TABLES.index(self._tables), self._relu
        return _CONV.pack(*map(pointer, held), self._layout.numel(), *sizes, *pool, *flags), held

    def reference(self, x: Tensor) -> Tensor:
        """In plain torch."""
        return reference.pq_conv2d(x, *self.arguments[:12])


register(
    "(Tensor x, Tensor codebook, Tensor layout, Tensor? bias, int out_features, str tables, bool relu=False) -> Tensor",
    BoundPQLinear,
)
register(
    "(Tensor x, Tensor codebook, Tensor layout, Tensor? bias, int out_channels, int[2] kernel_size, int[2] stride, "
    "int[2] padding, int[2] dilation, int groups, str tables, bool relu=False, int[] pool=[], "
    "bool channels_last=False) -> Tensor",
    BoundPQConv2d,
)
