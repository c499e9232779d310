"""Layouts of one-bit weights: header, and the bits in the order in which a kernel reads them.

A prepared layout is a 1-D uint8 tensor: 64 bytes of header (`Header`, little endian), then the payload.

    SIX      [output / 64][group][ky][kx][64] bytes: six weights are an index into a table of 64 sums (AVX-512). Bit b
             of group g of G = ceil(channels / 6) belongs to channel b G + g. Outputs 0..31 of a block of 64 are the
             even bytes, 32..63 the odd ones.
    PLANES   [group][output / 32][tap][channel / 64][block of 8 outputs, up to 4][8] words of 64 bits, little endian:
             for kernels that count bits. One stream of memory serves four registers of outputs.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ...ir.errors import KernelError
from . import pages

MAGIC = b"FXPBIN03"
HEADER_BYTES = 64
SIX, PLANES = 1, 2
# blocks of eight outputs beside each other in PLANES
BESIDE = 4
# entries of a table are at most 18, so that this many fit a byte; sums fit 16 bits up to so many weights
BYTE_SUMS, WORD_SUMS = 255 // 18, 32767 // 3
# most kernel rows of layout SIX
TABLE_ROWS = 16
_FORMAT = struct.Struct("<8s6I32x")
_HINT = "Make it anew with fxpress.runtime.kernels.prepare_binary_conv2d or prepare_binary_linear"


@dataclass(frozen=True)
class Header:
    """The first 64 bytes: layout, groups, outputs of all groups, channels of one, height and width of a kernel."""

    layout: int
    groups: int
    outputs: int
    channels: int
    kh: int
    kw: int

    @classmethod
    def read(cls, layout: Tensor) -> Header:
        """The header of a layout, checked against the size of the tensor."""
        if layout.dtype != torch.uint8 or layout.dim() != 1 or layout.numel() < HEADER_BYTES:
            shape = f"{str(layout.dtype).removeprefix('torch.')} {tuple(layout.shape)}"
            raise KernelError(f"A layout of binary weights is 1-D uint8 of at least 64 bytes, not {shape}", hint=_HINT)
        magic, *numbers = _FORMAT.unpack(bytes(layout[:HEADER_BYTES].tolist()))
        header = cls(*numbers)
        if magic != MAGIC or header.layout not in (SIX, PLANES):
            raise KernelError(f"Not a layout of binary weights: it begins with {magic!r}", hint=_HINT)
        if not header.is_sane() or layout.numel() != HEADER_BYTES + header.payload_bytes:
            raise KernelError(f"A layout of binary weights of {layout.numel()} bytes does not fit {header}", hint=_HINT)
        return header

    def is_sane(self) -> bool:
        """Whether the numbers are in their ranges; the same limits as in csrc/binary.cpp."""
        sizes = (self.groups, self.outputs, self.channels, self.kh, self.kw)
        if not all(1 <= size < 2**24 for size in sizes) or self.outputs % self.groups:
            return False
        terms = self.kh * self.kw * self.channels
        if self.layout == SIX:
            fits = self.kw <= BYTE_SUMS and self.kh <= TABLE_ROWS and terms <= WORD_SUMS
            return self.groups == 1 and fits
        return self.kh * self.kw <= 2**12 and terms < 2**28

    @property
    def blocks(self) -> int:
        """Blocks of 64 channels."""
        return -(-self.channels // 64)

    @property
    def six_groups(self) -> int:
        """Groups of six channels."""
        return -(-self.channels // 6)

    @property
    def payload_bytes(self) -> int:
        """Bytes behind the header."""
        taps = self.kh * self.kw
        if self.layout == SIX:
            return self.six_groups * -(-self.outputs // 64) * taps * 64
        return self.groups * -(-(self.outputs // self.groups) // 8) * taps * self.blocks * 64

    def to_bytes(self) -> Tensor:
        """The 64 bytes as a tensor."""
        numbers = (self.layout, self.groups, self.outputs, self.channels, self.kh, self.kw)
        return torch.frombuffer(bytearray(_FORMAT.pack(MAGIC, *numbers)), dtype=torch.uint8)


def pack(layout: int, plus: Tensor, groups: int = 1) -> Tensor:
    """Header and payload of signs (out, channels of a group, kh, kw), True for +1."""
    if plus.dtype != torch.bool or plus.dim() != 4 or not plus.numel():
        raise KernelError(
            f"Signs are bool of shape (outputs, channels, height, width), not {plus.dtype} {tuple(plus.shape)}"
        )
    header = Header(layout, groups, *plus.shape)
    if not header.is_sane():
        raise KernelError(f"No layout of binary weights for {header}")
    payload = _six(plus) if layout == SIX else _planes(header, plus)
    return pages.cat([header.to_bytes(), payload.flatten()])


def unpack(layout: Tensor) -> tuple[Header, Tensor]:
    """The header, and the signs (out, channels of a group, kh, kw) as bool."""
    header = Header.read(layout)
    payload = layout[HEADER_BYTES:]
    return header, _from_six(header, payload) if header.layout == SIX else _from_planes(header, payload)


def _six(plus: Tensor) -> Tensor:
    codes = _padded(plus, 6, 64).unflatten(1, (6, -1))  # type: ignore[no-untyped-call]
    index = (codes * (1 << torch.arange(6))[:, None, None, None]).sum(1).to(torch.uint8)  # (out, group, kh, kw)
    index = index.unflatten(0, (-1, 2, 32))  # (out / 64, half, 32, group, kh, kw)
    made: Tensor = index.permute(0, 3, 4, 5, 2, 1)  # (out / 64, group, kh, kw, 32, half)
    return made


def _from_six(header: Header, payload: Tensor) -> Tensor:
    blocks = payload.view(-1, header.six_groups, header.kh, header.kw, 32, 2)
    index = blocks.permute(0, 5, 4, 1, 2, 3).flatten(0, 2)  # (out, group, kh, kw)
    shifts = torch.arange(6, dtype=torch.uint8)
    found = (index[:, None] >> shifts[:, None, None, None] & 1).flatten(1, 2)  # (out, bit, group) -> channels
    return found[: header.outputs, : header.channels].bool()


def _planes(header: Header, plus: Tensor) -> Tensor:
    # (group, out, channel, tap)
    grouped = plus.unflatten(0, (header.groups, -1)).flatten(3)  # type: ignore[no-untyped-call]
    grouped = F.pad(grouped, (0, 0, 0, -header.channels % 64, 0, -grouped.shape[1] % 8))
    # (group, out / 8, 8, block, byte, bit, tap), and without the bits
    bits = grouped.unflatten(2, (-1, 8, 8)).unflatten(1, (-1, 8))  # type: ignore[no-untyped-call]
    data: Tensor = (bits * (1 << torch.arange(8))[:, None]).sum(5).to(torch.uint8)
    parts = data.split(BESIDE, 1)  # type: ignore[no-untyped-call]
    beside = [some.permute(0, 5, 3, 1, 2, 4).flatten(1) for some in parts]
    return torch.cat(beside, 1)


def _from_planes(header: Header, payload: Tensor) -> Tensor:
    taps, outputs = header.kh * header.kw, header.outputs // header.groups
    sizes = [min(BESIDE, -(-outputs // 8) - begin) for begin in range(0, -(-outputs // 8), BESIDE)]
    words = taps * header.blocks * 64
    beside = payload.view(header.groups, -1).split([size * words for size in sizes], 1)  # type: ignore[no-untyped-call]
    shaped = [
        some.view(header.groups, taps, header.blocks, size, 8, 8).permute(0, 3, 4, 2, 5, 1)
        for some, size in zip(beside, sizes, strict=True)
    ]
    data = torch.cat(shaped, 1)  # (group, out / 8, 8, block, byte, tap)
    bits = data[..., None, :] >> torch.arange(8, dtype=torch.uint8)[:, None] & 1
    grouped = bits.flatten(3, 5).flatten(1, 2)[:, :outputs, : header.channels]
    plus: Tensor = grouped.flatten(0, 1).unflatten(2, (header.kh, header.kw)).bool()  # type: ignore[no-untyped-call]
    return plus


def _padded(plus: Tensor, channels: int, outputs: int) -> Tensor:
    """Channels and outputs filled up with -1 to multiples of these."""
    return F.pad(plus, (0, 0, 0, 0, 0, -plus.shape[1] % channels, 0, -plus.shape[0] % outputs))
