"""Bias folding: the mean of what is removed goes into the constant of who reads it."""

from __future__ import annotations

from functools import partial
from math import prod

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ...layerwise.patches import Reading, weight_rows
from .changes import Change
from .consumers import Consumer, kept


class MissingResponse:
    """What the removed inputs of one layer gave to its outputs, from sums over the data.

    With removed channels D, their means E[a_c] over images and positions, and weights w, the layer loses

        m(p) = Σ_{c ∈ D} Σ_k w[o, c, k] a_c(p + k)        and gets back    β[o] = Σ_{c ∈ D} Σ_k w[o, c, k] E[a_c]

    which is exact for channels that are constant, wherever the kernel lies inside the image. At borders padded with
    zeros some taps of k are missing from m; how much is measured. A transposed convolution of stride s > 1 lets every
    output see only some taps; there β is the mean over the outputs, the sum above divided by the strides' product.
    A linear layer behind a flatten has features of its own for each position, and so means of its own.

    Source: H. Hu et al., Network Trimming, 2016 (dead neurons); A. Yang et al., 2018 (system of kernel statistics).

    Args:
        layer: the layer before the cut.
        consumer: what stays of its inputs and outputs.
    """

    def __init__(self, layer: Reading, consumer: Consumer) -> None:
        self.layer, self.consumer = layer, consumer
        device = layer.weight.device
        self._dead, self._outputs = kept(~consumer.inputs, device), kept(consumer.outputs, device)
        self.weight = _part(layer, consumer)
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        self.inputs = zeros(len(self._dead))  # Σ a_c
        self.sums = zeros(2, len(self._outputs))  # Σ m and Σ m² of every output channel
        self.counts = zeros(3)  # input positions, output positions, Σ Y²
        self._space: tuple[int, ...] = ()

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add a batch of the layer's inputs and outputs, both before the cut."""
        x = x.index_select(self.consumer.dim, self._dead).to(self.weight.dtype)
        channel = -1 if isinstance(self.layer, nn.Linear) else 1
        rows = x.movedim(channel, -1).reshape(-1, x.shape[channel]).double()
        missing = self._respond(x).movedim(channel, -1).reshape(-1, len(self._outputs)).double()
        wanted = y.index_select(channel, self._outputs).double()
        self.inputs += rows.sum(0)
        self.sums += torch.stack([missing.sum(0), missing.square().sum(0)])
        self.counts += self.counts.new_tensor([len(rows), len(missing), float(wanted.square().sum())])
        self._space = tuple(x.shape[2:])

    @property
    def tensors(self) -> list[Tensor]:
        """The sums, to be added up over processes."""
        return [self.inputs, self.sums, self.counts]

    def adopt(self, tensors: list[Tensor]) -> None:
        """Take over such sums."""
        self.inputs, self.sums, self.counts = tensors

    def constant(self) -> Tensor:
        """β, shape (kept outputs,), in double precision; the mean of m where β would make the error larger.

        That happens where maps are so small that hardly a kernel lies inside.
        """
        inside = self._inside()
        return inside if self._gap(inside) <= float(self.sums[1].sum()) else self.sums[0] / self.counts[1]

    def _gap(self, constant: Tensor) -> float:
        """Σ (m − constant)² over rows and outputs."""
        first, second = self.sums
        gap = (second - 2 * constant * first + self.counts[1] * constant.square()).sum()
        return max(float(gap), 0.0)

    def _inside(self) -> Tensor:
        """β as defined above."""
        mean = self.inputs / self.counts[0]
        if isinstance(self.layer, nn.Linear):
            return self.weight.double() @ mean
        taps = weight_rows(self.layer, self.weight).double()
        summed = taps.reshape(*taps.shape[:2], -1, prod(self.layer.kernel_size)).sum(3)  # (groups, out, in)
        response: Tensor = (summed @ mean.reshape(len(summed), -1, 1)).flatten()
        return response / prod(self.layer.stride) if self.layer.transposed else response

    def change(self, place: str) -> Change:
        """The layer's relative error without and with β, and what is left at the borders."""
        constant, (_, count, energy) = self.constant(), self.counts.tolist()
        sums = (float(self.sums[1].sum()), self._gap(constant), self._border(constant) * count)
        errors = [(value / energy) ** 0.5 if energy > 0 else 0.0 for value in sums]
        return Change(self.consumer.layer, "bias", place, *errors)

    def _border(self, constant: Tensor) -> float:
        """Mean over positions of ‖r(p) − β‖², r the response to removed channels that are constantly their mean."""
        if isinstance(self.layer, nn.Linear):
            return 0.0
        mean = (self.inputs / self.counts[0]).to(self.weight.dtype)
        flat = mean.reshape(1, -1, *[1] * len(self._space)).expand(1, -1, *self._space)
        gap = self._respond(flat)[0].flatten(1).double() - constant[:, None]
        return float(gap.square().sum(0).mean())

    def _respond(self, x: Tensor) -> Tensor:
        """The layer's response to the removed inputs alone."""
        tensors = {"weight": self.weight}
        if self.layer.bias is not None:
            tensors["bias"] = self.weight.new_zeros(len(self._outputs))
        response: Tensor = functional_call(self.layer, tensors, (x,))
        return response


def _part(layer: Reading, consumer: Consumer) -> Tensor:
    """The weights from removed inputs to kept outputs, at least in single precision."""
    weight = layer.weight.detach()
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    dead, outputs, device = ~consumer.inputs, consumer.outputs, weight.device
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups  # all groups are cut alike
    if not isinstance(layer, nn.Linear) and layer.transposed:
        return weight.index_select(0, kept(dead, device)).index_select(1, kept(outputs.reshape(groups, -1)[0], device))
    return weight.index_select(1, kept(dead.reshape(groups, -1)[0], device)).index_select(0, kept(outputs, device))
