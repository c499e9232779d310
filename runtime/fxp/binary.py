"""The stored form of binary layers whose weights are their values: one bit for each, two where zero is among them.

`emit` makes such layers: in place of latent weights they hold ±α (and 0), which the layer makes of itself again.
Without gaps and little endian a layer is

    signs    one bit per weight, 1 for not negative, least significant first
    zeros    likewise, 1 for a weight that is not zero, with ternary weights alone
    scale    α of each filter, float32
    bias     float32, where there is one
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ..layers.binary_layer import BinaryLayer
from .checks import FormatError

CODING = "signs"
_FLOAT = np.dtype("<f4")


def fits(layer: BinaryLayer) -> bool:
    """Whether every filter holds one size of weight, with zeros or without: a layer that trains does not."""
    if any(parameter.dtype != torch.float32 for parameter in layer.parameters()) or not layer.weight.numel():
        return False
    size = layer.weight.detach().abs().flatten(1)
    fine = (size == size.amax(1, keepdim=True)) | ((size == 0) & (layer.weights == "ternary"))
    return bool(fine.all())


def stored_bytes(layer: BinaryLayer) -> int:
    """Bytes of a layer: `planes ceil(n / 8) + 4 out (+ 4 out)` for n weights."""
    planes = 1 if layer.weights == "binary" else 2
    ends = 4 * len(layer.weight) * (1 if layer.bias is None else 2)
    return planes * -(-layer.weight.numel() // 8) + ends


def encode_layer(layer: BinaryLayer) -> tuple[bytes, str]:
    """Bytes of a layer."""
    weight = layer.weight.detach().cpu().flatten(1)
    pieces = [_bits(weight >= 0)] + ([_bits(weight != 0)] if layer.weights == "ternary" else [])
    pieces += [_floats(weight.abs().amax(1))] + ([] if layer.bias is None else [_floats(layer.bias.detach().cpu())])
    return b"".join(pieces), CODING


def decode_layer(layer: BinaryLayer, data: memoryview, coding: str) -> dict[str, Tensor]:
    """The tensors of a layer, which is still on the `meta` device, from its bytes.

    Raises:
        FormatError: another coding or number of bytes, or a scale that is negative or not finite.
    """
    if coding != CODING or len(data) != stored_bytes(layer):
        raise FormatError(f"a binary layer of {stored_bytes(layer)} bytes has {len(data)}, coded as {coding[:20]!r}")
    shape, outputs = layer.weight.shape, len(layer.weight)
    plane = -(-math.prod(shape) // 8)
    at = plane if layer.weights == "binary" else 2 * plane
    scale = _read(data[at : at + 4 * outputs])
    if not bool((scale >= 0).all() and scale.isfinite().all()):
        raise FormatError("a binary layer has a scale that is negative or not finite")
    column = scale.view(-1, *(1,) * (len(shape) - 1))
    weight = torch.where(_signs(data[:plane], shape), column, -column)
    if layer.weights == "ternary":
        weight = torch.where(_signs(data[plane:at], shape), weight, 0.0)
    bias = {} if layer.bias is None else {"bias": _read(data[at + 4 * outputs :])}
    return {"weight": weight, **bias}


def _bits(values: Tensor) -> bytes:
    return np.packbits(values.flatten().numpy(), bitorder="little").tobytes()


def _signs(data: memoryview, shape: torch.Size) -> Tensor:
    flat = np.unpackbits(np.frombuffer(data, np.uint8), count=math.prod(shape), bitorder="little")
    return torch.from_numpy(flat).bool().reshape(shape)


def _floats(values: Tensor) -> bytes:
    return values.numpy().astype(_FLOAT).tobytes()


def _read(data: memoryview) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, _FLOAT).astype(np.float32))
