"""PQLinear: a linear layer whose weight is made of codewords."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ...ir.dialect import register_layer
from ...ir.errors import OptionError
from .. import kernels
from .pq_layer import ATTRIBUTES, OPTIONS, PQLayer


class PQLinear(PQLayer):
    """A product-quantized linear layer (Wu et al., CVPR 2016).

        y[.., o] = bias[o] + Σ_m codebook[m, indices[0, m, o], :] · x[.., m d : (m + 1) d]

    Args:
        in_features, out_features, bias: as in torch.nn.Linear.
        **options: `subspace`, `codewords`, `codebook`, `entropy`, `kernel`, `tables`, `relu`, as in `PQLayer`.

    Raises:
        OptionError: kernel `dense-int8`, or a value out of its range.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, **options: Any) -> None:
        super().__init__(in_features, out_features, 1, bias, **options)
        if self.kernel == "dense-int8":
            raise OptionError("kernel is 'dense-int8', which is of convolutions", hint="'table' is smaller and faster.")
        self.in_features, self.out_features = in_features, out_features

    @classmethod
    def from_weights(cls, layer: nn.Linear, codebook: Tensor, indices: Tensor, /, **options: Any) -> PQLinear:
        """The layer that takes the place of `layer`, with its bias, dtype, device and mode.

        Args:
            codebook: `(M, K, d)`; sizes are read from it.
            indices: `(1, M, out)`, of any whole-number dtype.
            **options: `codebook` (what a file keeps), `entropy`, `kernel`, `tables`, `relu`.
        """
        sizes = {"subspace": codebook.shape[2], "codewords": codebook.shape[1]}
        made = cls(layer.in_features, layer.out_features, layer.bias is not None, **sizes, **options)
        made._put(layer, codebook, indices)
        return made

    @property
    def inputs(self) -> int:
        """Number of inputs."""
        return self.in_features

    def dense(self) -> nn.Module:
        """The torch.nn.Linear that computes the same."""
        bias = self.bias is not None
        return self._take_over(nn.Linear(self.in_features, self.out_features, bias, device="meta"))

    def fit(self, inputs: int, outputs: int) -> None:
        """State the sizes of tensors that were cut."""
        self.forget()
        self.in_features, self.out_features = inputs, outputs

    def decoded(self) -> Tensor:
        """The dense weight `(out, in)`, differentiable in the codebook."""
        return super().decoded().squeeze(2)

    def _weighted(self, x: Tensor, weight: Tensor) -> Tensor:
        """`(.., in)` -> `(.., out)`."""
        return self.finish(F.linear(x, weight, self.bias))

    def _bind(self) -> kernels.Bound:
        codebook = kernels.prepare_codebook(self.stored_codebook())
        layout = kernels.prepare_linear(self.indices, self.codewords, self.tables)
        return kernels.BoundPQLinear(codebook, layout, self.bias, self.out_features, self.tables, self.relu)

    def extra_repr(self) -> str:
        """The arguments, as `repr` shows them."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, {self._options_repr()}"


register_layer(PQLinear, ("in_features", "out_features", "bias", *OPTIONS), ("bias",), ATTRIBUTES)
