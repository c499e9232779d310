"""The stored form of product-quantized layers: indices of exactly log2(K) bits, codewords in the dtype that was chosen.

One layer is, without gaps and little endian,

    codewords   M · K · d numbers of 4, 2 or 1 bytes (fp32, fp16, int8)
    scales      M float32, with int8 alone
    indices     taps · M · out of log2(K) bits, or entropy coded (`bits.py`)
    bias        out float32, where there is one

which is `PQLayer.stored_bytes`, the formula of Wu et al. 2016 with the dtype of the codewords left open; an entropy
coded layer takes less, or is stored plain. The loaded layer computes the same bits as the stored one: its forward pass
has used the codewords with their stored values all along.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..layers.pq_codebook import as_stored, bits, quantized
from ..layers.pq_layer import PQLayer
from .bits import decode, encode, pack, packed_bytes, unpack
from .checks import FormatError

FloatArray = npt.NDArray[np.float32]
PLAIN, HUFFMAN = "bits", "huffman"
_DTYPES: dict[str, np.dtype[Any]] = {"fp32": np.dtype("<f4"), "fp16": np.dtype("<f2"), "int8": np.dtype("i1")}
_FLOAT: np.dtype[np.float32] = np.dtype("<f4")


def fits(layer: PQLayer) -> bool:
    """Whether a layer has this form: its codewords and bias are float32 (a model in double is stored as it is)."""
    return all(parameter.dtype == torch.float32 for parameter in layer.parameters())


def encode_layer(layer: PQLayer) -> tuple[bytes, str]:
    """Bytes of a layer, and how its indices are coded.

    Raises:
        FormatError: an index without a codeword, or a codebook that is not finite and shall be stored as int8.
    """
    codebook, indices = layer.codebook.detach().cpu(), layer.indices.cpu()
    if indices.numel() and int(indices.max()) >= layer.codewords:
        raise FormatError(f"an index names codeword {int(indices.max())} of {layer.codewords}")
    coded = None
    if layer.entropy:
        by_rank, ranks = by_frequency(codebook, indices)
        coded = encode(ranks)
    if coded is not None and len(coded) < packed_bytes(indices.numel(), bits(layer.codewords)):
        return _codewords(by_rank, layer) + coded + _bias(layer), HUFFMAN
    return _codewords(codebook, layer) + pack(indices, bits(layer.codewords)) + _bias(layer), PLAIN


def by_frequency(codebook: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """The same codewords, those of each sub-space by how often they are used, and the indices `(taps, M, out)` to them.

    Numbered as k-means found them, all numbers are about equally frequent over the sub-spaces, and there is nothing to
    gain; numbered by rank, one Huffman table serves all sub-spaces nearly as well as one for each.
    """
    words = codebook.shape[1]
    counts = torch.stack([torch.bincount(part.flatten(), minlength=words) for part in indices.long().unbind(1)])
    order = counts.argsort(dim=1, descending=True, stable=True)  # (M, K): codeword of each rank
    rank = order.argsort(dim=1).to(torch.uint8)
    by_rank = codebook.gather(1, order.unsqueeze(2).expand_as(codebook))
    ranks = torch.stack([row[part.long()] for row, part in zip(rank, indices.unbind(1), strict=True)], 1)
    return by_rank, ranks


def decode_layer(layer: PQLayer, data: memoryview, coding: str) -> dict[str, Tensor]:
    """The tensors of a layer, which is still on the `meta` device, from its bytes.

    Raises:
        FormatError: another number of bytes than the layer's sizes ask for, or indices that name no codeword.
    """
    if coding not in (PLAIN, HUFFMAN):
        raise FormatError(f"the coding {coding[:20]!r} of a layer is unknown")
    if (coding == PLAIN) != (len(data) == layer.stored_bytes) or len(data) > layer.stored_bytes:
        raise FormatError(f"a {coding} layer has {len(data)} bytes, its sizes ask for {layer.stored_bytes}")
    book = layer.codebook.numel() * _DTYPES[layer.precision].itemsize
    scales = 4 * len(layer.codebook) if layer.precision == "int8" else 0
    end = len(data) - (0 if layer.bias is None else 4 * layer.bias.numel())
    if end < book + scales:
        raise FormatError(f"a layer of {len(data)} bytes has no room for its codewords")
    indices = _decode_indices(data[book + scales : end], layer, coding)
    found = {"codebook": _decode_codewords(data[:book], data[book : book + scales], layer), "indices": indices}
    return found if layer.bias is None else {**found, "bias": _floats(data[end:])}


def _codewords(codebook: Tensor, layer: PQLayer) -> bytes:
    if layer.precision != "int8":
        values: FloatArray = as_stored(codebook, layer.precision).numpy()
        return values.astype(_DTYPES[layer.precision]).tobytes()
    if not bool(codebook.isfinite().all()):
        raise FormatError("a codebook that is not finite cannot be stored as int8")
    numbers, scale = quantized(codebook)
    return numbers.to(torch.int8).numpy().tobytes() + scale.numpy().astype(_FLOAT).tobytes()


def _decode_codewords(data: memoryview, scales: memoryview, layer: PQLayer) -> Tensor:
    values = torch.from_numpy(np.frombuffer(data, _DTYPES[layer.precision]).astype(np.float32))
    values = values.reshape(layer.codebook.shape)
    return values * _floats(scales).reshape(-1, 1, 1) if layer.precision == "int8" else values


def _decode_indices(data: memoryview, layer: PQLayer, coding: str) -> Tensor:
    count = layer.indices.numel()
    if coding == PLAIN:
        flat = unpack(data, count, bits(layer.codewords))
    else:
        flat = decode(data, count)
        if count and int(flat.max()) >= layer.codewords:
            raise FormatError(f"an index names codeword {int(flat.max())} of {layer.codewords}")
    return flat.reshape(layer.indices.shape)


def _bias(layer: PQLayer) -> bytes:
    return b"" if layer.bias is None else layer.bias.detach().cpu().numpy().astype(_FLOAT).tobytes()


def _floats(data: memoryview) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, _FLOAT).astype(np.float32))
