"""Int8Layer: what Int8Conv2d and Int8Linear have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import kernels
from .int8_rounding import input_grid, input_values, weight_numbers, weight_steps, weight_values
from .snapshot import Snapshot

MOMENTUM = 0.01
"""Share of a training batch in the span of the inputs."""


class _Prepared(NamedTuple):
    """What computes with integers, and of which tensors it was made."""

    integers: kernels.Bound
    snapshot: Snapshot
    ends: tuple[Any, ...]


class Int8Layer(nn.Module):
    """Base of the layers with weights and inputs of 8 bits; see `int8_rounding`.

    Training keeps float32 weights and rounds them in every forward pass; the grid of the weights follows them, that of
    the inputs a moving average of what the layer reads. In evaluation mode both stay as they are, and sums of bytes are
    computed as integers where the compiled kernels are, which gives what the rounded weights give in float32, up to
    rounding. A layer that has not seen any input yet rounds each batch by its own least and largest value.

    Args:
        plain: a layer of the same sizes, whose weight and bias become this one's.
        relu: whether negative outputs become 0: a ReLU behind the layer costs nothing where its sums are written.

    Attributes:
        weight: float32 weights, (out, ...), which are what is trained.
        bias: (out,) or None.
        weight_scale: steps of the weights' grids, (out,).
        input_range: least and largest input, (2,); infinite and in the wrong order before the layer has seen any.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    weight_scale: Tensor
    input_range: Tensor

    def __init__(self, plain: nn.Linear | nn.Conv2d, relu: bool = False) -> None:
        super().__init__()
        self.relu = relu
        self._prepared: _Prepared | None = None
        self.register_buffer("weight_scale", None)
        self.register_buffer("input_range", None)
        self._put(plain)

    def _put(self, plain: nn.Linear | nn.Conv2d) -> None:
        """Take over the parameters and the mode of a plain layer."""
        parameters: Any = plain.weight, plain.bias  # torch declares them as tensors
        self.weight, self.bias = parameters
        self.weight_scale = weight_steps(self.weight)
        self.input_range = self.weight_scale.new_tensor([float("inf"), -float("inf")])
        self.train(plain.training)

    @property
    def int8_weight(self) -> Tensor:
        """The rounded weights, int8 of the shape of `weight`."""
        return weight_numbers(self.weight.detach(), self.weight_scale).to(torch.int8)

    @property
    def stored_bytes(self) -> int:
        """Bytes in a file: one for each weight, a float32 step for each output, two for the inputs, the bias.

        weights + 4 out + 8 + 4 out
        """
        bias = 0 if self.bias is None else self.bias.numel()
        return self.weight.numel() + 4 * (self.weight_scale.numel() + 2 + bias)

    def observe(self, x: Tensor, momentum: float = 1.0) -> None:
        """Widen the span of the inputs to a batch, or move it there by a share; what is not finite does not count."""
        values = x.detach()[x.detach().isfinite()]
        if not values.numel():
            return
        found = torch.stack(torch.aminmax(values)).to(self.input_range.dtype)
        known = self.input_range
        if bool(known[0] > known[1]):
            span = found
        elif momentum == 1.0:
            span = torch.stack([torch.minimum(known[0], found[0]), torch.maximum(known[1], found[1])])
        else:
            span = torch.lerp(known, found, momentum)
        self.input_range = span

    def forward(self, x: Tensor) -> Tensor:
        """Inputs to outputs."""
        if self.training and not torch.compiler.is_compiling():
            self.observe(x, MOMENTUM)
            self.weight_scale = weight_steps(self.weight)
        prepared = self._prepare() if self._by_integers(x) else None
        if prepared is not None:
            return prepared.integers(x)
        seen = self.input_range[0] <= self.input_range[1]
        own = torch.stack(torch.aminmax(x.detach().nan_to_num(0, 0, 0))) if x.numel() else self.input_range
        values = input_values(x, *input_grid(torch.where(seen, self.input_range, own)))
        y = self._weighted(values, weight_values(self.weight, self.weight_scale))
        return y.relu() if self.relu else y

    def _by_integers(self, x: Tensor) -> bool:
        if torch.compiler.is_compiling():  # what is there is taken as it is
            return self._prepared is not None and not self.training
        learns = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *self.parameters()))
        floats = x.dtype == self.weight.dtype == torch.float32
        return not self.training and not learns and floats and kernels.available()

    def _weighted(self, x: Tensor, weight: Tensor) -> Tensor:
        """Outputs by the layer's own operation in float32, not rectified."""
        raise NotImplementedError

    def _bind(self, *numbers: Any) -> kernels.Bound:
        """The kernel of the layer; `numbers` as its operator takes them behind x, up to `zero`."""
        raise NotImplementedError

    def _ends(self) -> tuple[Any, ...]:
        """What becomes of the sums, which `emit` changes."""
        return (self.relu,)

    def _dilation(self) -> int:
        """Along the width."""
        return 1

    # -- what evaluation prepares ---------------------------------------------------------------------------

    def prepare(self) -> None:
        """Make now what the first call in evaluation mode would make, so that export and compile see the kernels."""
        if kernels.available() and self.weight.dtype == torch.float32:
            self._prepare()

    def _prepare(self) -> _Prepared | None:
        """What computes with integers, made once for these tensors; None before the layer has seen any input."""
        known = self._prepared
        if torch.compiler.is_compiling():
            return known
        if known is None or known.ends != self._ends() or not known.snapshot.is_of(self._sources()):
            known = self._prepared = self._made()
        return known

    def _sources(self) -> tuple[Tensor | None, ...]:
        """All tensors; past `Module.__getattr__`, which takes longer than the rest of a call."""
        parameters, buffers = self._parameters, self._buffers
        return parameters["weight"], parameters.get("bias"), buffers["weight_scale"], buffers["input_range"]

    @torch.no_grad()
    def _made(self) -> _Prepared | None:
        if bool(self.input_range[0] > self.input_range[1]):
            return None
        step, zero = input_grid(self.input_range)
        weights, offset = kernels.prepare_int8(self.int8_weight, int(zero), self._dilation())
        scale, inverse = step * self.weight_scale, float(step.reciprocal())
        integers = self._bind(weights, offset, scale, self.bias, inverse, int(zero))
        return _Prepared(integers, Snapshot(self._sources()), self._ends())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Layer:
        self._prepared = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": None}  # a copy prepares its own
