"""PQLayer: what PQLinear and PQConv2d have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ...ir.errors import OptionError
from .. import kernels
from .pq_codebook import SIZES, as_stored, bits, check_choice, check_sizes, decode, subspaces
from .pq_codebook import Precision as Precision
from .snapshot import Snapshot

Kernel = Literal["decode", "dense", "dense-int8", "table"]
Tables = Literal["fp32", "int16", "int8"]


class PQLayer(nn.Module):
    """A layer whose weight is made of a codebook and indices; all taps and groups share the codebook.

    Args:
        inputs: inputs of one group.
        outputs: outputs of all groups.
        taps: positions of the kernel.
        bias: whether there is one.
        subspace: width d of a sub-space.
        codewords: number K of codewords per sub-space, a power of two in 2..256.
        codebook: what a file keeps of the codewords; the forward pass uses them with the same values.
        entropy: whether a file holds the indices entropy coded, where that is smaller.
        kernel: how the layer computes in evaluation mode: `decode` makes the weight anew for each call, `dense` once,
            `dense-int8` (convolutions of one group) makes it once and rounds it to 8 bits, with a step for each output,
            and every image to 256 levels of what it spans, `table` looks products of inputs and codewords up in tables
            and makes no weight at all. In training mode the weight is decoded; gradients in evaluation mode are those
            of the decoded weight.
        tables: numbers in these tables; fp32 is exact but for rounding.
        relu: whether negative outputs become 0: a ReLU behind the layer costs nothing where its sums are written.

    Raises:
        OptionError: a value out of its range.
    """

    codebook: nn.Parameter
    """Codewords, float `(M, K, d)`; what the last sub-space does not use of its width is zero and never read."""
    indices: Tensor
    """Codeword of every tap, sub-space and output, uint8 `(taps, M, out)`."""

    def __init__(
        self, inputs: int, outputs: int, taps: int, bias: bool, *, subspace: int, codewords: int,
        codebook: Precision = "fp32", entropy: bool = False, kernel: Kernel = "decode", tables: Tables = "fp32",
        relu: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        check_sizes(inputs, subspace, codewords)
        check_choice("codebook", codebook, Precision)
        check_choice("kernel", kernel, Kernel)
        check_choice("tables", tables, Tables)
        self.subspace, self.codewords, self.entropy = subspace, codewords, entropy
        self.precision: Precision = codebook
        self.kernel: Kernel = kernel
        self.tables: Tables = tables
        self.relu = relu
        self._prepared: _Prepared | None = None
        count = subspaces(inputs, subspace)
        self.codebook = nn.Parameter(torch.empty(count, codewords, subspace))
        self.register_buffer("indices", torch.empty(taps, count, outputs, dtype=torch.uint8))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None
        self._reset(inputs, taps)

    def _reset(self, inputs: int, taps: int) -> None:
        """Values of the scale that torch.nn gives to linear layers and convolutions; the indices are random."""
        if self.codebook.is_meta:  # there are no numbers; asking torch for them all the same would import its compiler
            return
        self.indices.random_(self.codewords)
        bound = (inputs * taps) ** -0.5
        with torch.no_grad():
            self.codebook.uniform_(-bound, bound)
            self.codebook[-1, :, inputs - (len(self.codebook) - 1) * self.subspace :] = 0
            if self.bias is not None:
                self.bias.uniform_(-bound, bound)

    # -- shapes ---------------------------------------------------------------------------------------------

    @property
    def inputs(self) -> int:
        """Inputs of one group."""
        raise NotImplementedError

    @property
    def last_width(self) -> int:
        """Inputs that the last sub-space covers, 1..d."""
        return self.inputs - (self.codebook.shape[0] - 1) * self.subspace

    @property
    def stored_bytes(self) -> int:
        """Bytes in a file, without entropy coding: codewords (4, 2 or 1 bytes each), scales, indices, bias.

            size · M K d + [int8] 4 M + ceil(taps · M · out · log2(K) / 8) + 4 out

        Wu et al. 2016 with `size` = 4. The indices count with exactly log2(K) bits.
        """
        scales = 4 * len(self.codebook) if self.precision == "int8" else 0
        indices = -(-self.indices.numel() * bits(self.codewords) // 8)
        bias = 0 if self.bias is None else 4 * self.bias.numel()
        return SIZES[self.precision] * self.codebook.numel() + scales + indices + bias

    def dense(self) -> nn.Module:
        """The plain torch layer that computes the same before `finish`, with a weight of its own."""
        raise NotImplementedError

    def _take_over(self, plain: nn.Module) -> nn.Module:
        """Give a plain layer on the `meta` device the decoded weight, and bias and mode of this one."""
        plain.weight = nn.Parameter(self.decoded().detach(), requires_grad=self.codebook.requires_grad)
        if self.bias is not None:
            plain.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        return plain.train(self.training)

    def fit(self, inputs: int, outputs: int) -> None:
        """State the sizes of tensors that were cut: inputs of one group, outputs of all."""
        raise NotImplementedError

    def finish(self, y: Tensor) -> Tensor:
        """What follows the sums: the ReLU, if the layer has one."""
        return y.relu() if self.relu else y

    # -- weights --------------------------------------------------------------------------------------------

    def stored_codebook(self) -> Tensor:
        """The codewords with the values that a file keeps, `(M, K, d)`; the gradient passes straight through."""
        return as_stored(self.codebook, self.precision)

    def decoded(self) -> Tensor:
        """The dense weight, differentiable in the codebook."""
        return decode(self.stored_codebook(), self.indices, self.inputs)

    # -- what evaluation prepares ---------------------------------------------------------------------------

    def prepare(self) -> None:
        """Make now what the first call in evaluation mode would make: the dense weight, or what the kernels read.

        A layer that was prepared goes through torch.compile and torch.export as it runs; one that was not, decoded.
        """
        if self.kernel != "decode":
            self._prepare()

    def forget(self) -> None:
        """Drop what evaluation has prepared."""
        self._prepared = None

    @property
    def by_kernel(self) -> bool:
        """Whether a kernel of fxpress computes the outputs in evaluation mode, and so can end them as well."""
        return self.kernel in ("dense-int8", "table")

    def _bind(self) -> kernels.Bound:
        """The kernel of this layer, `by_kernel`."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Inputs to outputs; see the class for how it is computed."""
        if self.training or self.kernel == "decode":
            return self._weighted(x, self.decoded())
        learns = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *self.parameters()))
        if torch.compiler.is_compiling():
            # what is there is taken as it is: compilers cannot see versions
            ready = self._prepared is not None and (not learns or torch.compiler.is_exporting())
            return self._evaluated(x) if ready else self._weighted(x, self.decoded())
        if learns:
            y: Tensor = _Evaluation.apply(self, x, *self.parameters())
            return y
        return self._evaluated(x)

    def _weighted(self, x: Tensor, weight: Tensor) -> Tensor:
        """Outputs by a dense weight."""
        raise NotImplementedError

    def _computed(self, x: Tensor, kernel: kernels.Bound) -> Tensor:
        """Outputs by a kernel of fxpress."""
        return kernel(x)

    def _evaluated(self, x: Tensor) -> Tensor:
        """Outputs without gradients, in the way that was chosen for evaluation."""
        known = self._prepared
        if known is None or not (torch.compiler.is_compiling() or known.snapshot.is_of(self._sources())):
            known = self._prepare()
        if known.weight is not None:
            return self._weighted(x, known.weight)
        if known.kernel is not None and x.dtype == torch.float32:
            return self._computed(x, known.kernel)
        return self._weighted(x, self.decoded())

    def _prepare(self) -> _Prepared:
        """The dense weight, or the kernel with what it reads; made once for these tensors and options."""
        with torch.inference_mode(False), torch.no_grad():  # an inference tensor could serve no gradient later
            weight = self.decoded() if self.kernel == "dense" else None
            kernel = self._bind() if self.by_kernel and self.codebook.dtype == torch.float32 else None
        self._prepared = _Prepared(weight, kernel, Snapshot(self._sources()))
        return self._prepared

    def _sources(self) -> tuple[Tensor | None, ...]:
        """All tensors; past `Module.__getattr__`, which takes longer than the rest of a call."""
        parameters = self._parameters
        return parameters["codebook"], self._buffers["indices"], parameters.get("bias")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("codebook", "indices", "bias", "kernel", "tables", "precision", "relu", "pool", "channels_last"):
            self._prepared = None
        super().__setattr__(name, value)

    def train(self, mode: bool = True) -> PQLayer:
        """As torch; training drops what evaluation has prepared."""
        self._prepared = None if mode else self._prepared
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PQLayer:
        self._prepared = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        self._prepared = None
        super()._load_from_state_dict(*args)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": None}  # a copy prepares its own

    # -- building -------------------------------------------------------------------------------------------

    def _put(self, layer: nn.Linear | nn.Conv2d, codebook: Tensor, indices: Tensor) -> None:
        """Take over codewords and indices, and bias, dtype, device and mode of the layer that is replaced."""
        if codebook.shape != self.codebook.shape or indices.shape != self.indices.shape:
            found, wanted = (tuple(codebook.shape), tuple(indices.shape)), (self.codebook.shape, self.indices.shape)
            raise OptionError(f"codebook and indices are {found}; this layer needs {tuple(map(tuple, wanted))}")
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < self.codewords:
            named = f"{int(indices.min())} to {int(indices.max())}"
            raise OptionError(f"indices name codewords from {named}; there are {self.codewords}")
        self.to(layer.weight.device, layer.weight.dtype).train(layer.training)
        with torch.no_grad():
            self.codebook.copy_(codebook)
            self.codebook[-1, :, self.last_width :] = 0
            self.indices.copy_(indices)
            if self.bias is not None and layer.bias is not None:
                self.bias.copy_(layer.bias)

    def _options_repr(self) -> str:
        shown = f"subspace={self.subspace}, codewords={self.codewords}, codebook={self.precision!r}"
        table = f", tables={self.tables!r}" if self.kernel == "table" else ""
        relu = ", relu=True" if self.relu else ""
        return f"{shown}{', entropy=True' if self.entropy else ''}, kernel={self.kernel!r}{table}{relu}"


class _Evaluation(torch.autograd.Function):
    """A layer in evaluation mode: values as without gradients, gradients those of the decoded weight.

    The weight is decoded when gradients are asked for and not before: most who call a network outside of
    `torch.inference_mode` never do.
    """

    @staticmethod
    def forward(ctx: Any, layer: PQLayer, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x, *parameters)  # the parameters, so that torch notices a change before the backward pass
        return layer._evaluated(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, layer = ctx.saved_tensors[0], ctx.layer
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = layer._weighted(x, layer.decoded())
        sources = (x, *layer.parameters())
        needed = [source for source, wanted in zip(sources, ctx.needs_input_grad[1:], strict=True) if wanted]
        found = iter(torch.autograd.grad(y, needed, gradients))
        return None, *(next(found) if wanted else None for wanted in ctx.needs_input_grad[1:])


class _Prepared(NamedTuple):
    """What evaluation has prepared: the dense weight, a kernel of fxpress, or neither; and of which tensors."""

    weight: Tensor | None
    kernel: kernels.Bound | None
    snapshot: Snapshot


OPTIONS = ("subspace", "codewords", "codebook", "entropy", "kernel", "tables", "relu")
ATTRIBUTES = {"codebook": "precision"}  # `layer.codebook` is the parameter
