"""BinaryNetwork: a binarized network, or a piece of one, packed: one bit a weight, norms as integers, one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...ir.dialect import register_layer
from ...ir.errors import ModelError
from .. import kernels
from ..kernels.network_data import pack, unpack
from ..kernels.network_program import Program, parse


class BinaryNetwork(nn.Module):
    """Steps of a binarized network that run as one call of `torch.ops.fxpress.binary_network`.

    It is what `emit` makes of convolutions with one-bit weights, batch norms, quantizers, pools and residual sums:
    the latent weights are gone, so that it computes in evaluation mode alone.

    Args:
        program: its lines, see `runtime/kernels/network_program.py`.

    Attributes:
        data: the tensors of all steps, uint8 `(bytes,)`, as a file keeps them (`network_data.py`).

    Raises:
        KernelError: lines that make no program.
    """

    data: Tensor

    def __init__(self, program: Sequence[str]) -> None:
        super().__init__()
        self.program = tuple(program)
        self._text = "\n".join(self.program)
        self.register_buffer("data", torch.zeros(self.parsed.stored_bytes, dtype=torch.uint8))
        self.eval()

    @classmethod
    def from_tensors(cls, program: Program, tensors: Sequence[tuple[Tensor, ...]]) -> BinaryNetwork:
        """The network of a program whose tensors are given, those of each step as `Program.parts` lists them."""
        made = cls(str(program).split("\n"))
        made.data = pack(made.parsed, tensors)
        return made

    @property
    def parsed(self) -> Program:
        """The program as data."""
        return parse(self._text)

    @property
    def stored_bytes(self) -> int:
        """Bytes of its tensors in a file."""
        return self.data.numel()

    def tensors(self) -> list[tuple[Tensor, ...]]:
        """The tensors of each step, signs as bool."""
        return unpack(self.parsed, self.data)

    def macs(self, inputs: Sequence[Sequence[int]]) -> int:
        """Multiply-accumulates for inputs of given shapes."""
        return self.parsed.macs(inputs)

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Outputs, a tuple where there are several.

        Raises:
            ModelError: it is in training mode.
            KernelError: inputs that do not fit.
        """
        if self.training:
            raise ModelError("A packed binary network cannot be trained: its latent weights are gone", hint=_HINT)
        learns = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
        if learns and not torch.compiler.is_compiling():
            outputs: Any = _Evaluation.apply(self, *inputs)
        else:
            outputs = kernels.binary_network(list(inputs), self.data, self._text)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def extra_repr(self) -> str:
        """A summary, as `repr` shows it."""
        steps = self.parsed.steps
        layers = sum(step.kind.startswith("conv") for step in steps)
        return f"{len(steps)} steps, {layers} layers, {self.stored_bytes} bytes"


class _Evaluation(torch.autograd.Function):
    """Outputs without a gradient, which is said when one is asked for: most who call a network never do."""

    @staticmethod
    def forward(ctx: Any, network: BinaryNetwork, *inputs: Tensor) -> tuple[Tensor, ...]:  # noqa: ARG004
        return tuple(kernels.binary_network(list(inputs), network.data, network._text))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:  # noqa: ARG004
        raise ModelError("A packed binary network has no gradients", hint=_HINT)


_HINT = "Keep the network from before `emit`, train that one, and emit it again"

register_layer(BinaryNetwork, ("program",))
