"""Whole numbers of a few bits each, packed without gaps, or entropy coded.

Packed, number i takes bits i·b to (i + 1)·b of the stream, most significant first; the last byte is filled with zeros.

Entropy coded, the numbers are bytes in a raw deflate stream without matches (zlib's `Z_HUFFMAN_ONLY`): Huffman codes
with a table of their own for some 32,000 numbers each, from the standard library. On indices of k-means an arithmetic
coder with one table for each sub-space takes 1 % less (4.86 against 4.91 bits of 5 on EfficientNet-Lite0), for which
another dependency is not worth while. What matters is the order of the code words (`quantized.by_frequency`).
"""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor

from .checks import FormatError

_CHUNK = 1 << 20  # numbers unpacked at a time: a multiple of 8, so that a chunk ends with a byte
_SYMBOLS_PER_BYTE = 8  # a Huffman code has one bit at least; a stream that gives more numbers is not one of ours


def packed_bytes(count: int, width: int) -> int:
    """Bytes that `count` numbers of `width` bits take."""
    return -(-count * width // 8)


def pack(numbers: Tensor, width: int) -> bytes:
    """Numbers below 2^width, uint8 of any shape, in row-major order."""
    flat = numbers.contiguous().flatten().numpy()
    pieces = []
    for start in range(0, len(flat), _CHUNK):
        wide = np.unpackbits(flat[start : start + _CHUNK, None], axis=1)
        pieces.append(np.packbits(wide[:, 8 - width :]).tobytes())
    return b"".join(pieces)


def unpack(data: memoryview, count: int, width: int) -> Tensor:
    """The inverse of `pack`, uint8 `(count,)`; `data` has exactly `packed_bytes(count, width)` bytes."""
    source, found = np.frombuffer(data, np.uint8), np.empty(count, np.uint8)
    for start in range(0, count, _CHUNK):
        number = min(_CHUNK, count - start)
        piece = source[start * width // 8 : packed_bytes(start + number, width)]
        wide = np.unpackbits(piece, count=number * width).reshape(number, width)
        found[start : start + number] = np.packbits(wide, axis=1)[:, 0] >> (8 - width)
    if count * width % 8 and source[-1] & (0xFF >> count * width % 8):
        raise FormatError("the bits behind packed numbers are not zero")
    return torch.from_numpy(found)


def encode(numbers: Tensor) -> bytes:
    """Entropy coded numbers, uint8 of any shape, in row-major order."""
    coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return coder.compress(numbers.contiguous().flatten().numpy().data) + coder.flush()


def decode(data: memoryview, count: int) -> Tensor:
    """The inverse of `encode`, uint8 `(count,)`.

    Raises:
        FormatError: the stream is damaged, or does not hold exactly `count` numbers.
    """
    if count > _SYMBOLS_PER_BYTE * len(data):
        raise FormatError(f"{len(data)} bytes cannot hold {count} coded numbers")
    return torch.from_numpy(np.frombuffer(inflate(data, -15, count, "coded numbers"), np.uint8).copy())


def inflate(data: memoryview | bytes, wbits: int, size: int, what: str, *, exact: bool = True) -> bytes:
    """Inflated bytes of one whole deflate stream: exactly, or at most, `size` of them; never more are made.

    Raises:
        FormatError: the stream is damaged or truncated, has something behind its end, or another size.
    """
    decoder = zlib.decompressobj(wbits)
    try:
        found = decoder.decompress(data, size + 1)
    except zlib.error as error:
        raise FormatError(f"the {what} cannot be inflated ({error})") from None
    if len(found) > size or (exact and len(found) != size):
        raise FormatError(f"the {what} take{'s' * (not what.endswith('s'))} more or less than {size} bytes")
    if not decoder.eof or decoder.unused_data:
        raise FormatError(f"the {what} do not end with their data")
    return found
