"""Index layouts: the code words' numbers in the order in which a kernel reads them, behind a header that it checks.

A prepared layout is a 1-D uint8 tensor: 64 bytes of header (`Header`, little endian), then the payload. What a payload
looks like is told by the layout's id; `LAYOUTS` holds one `Layout` each, with the packing and its inverse in torch. Any
layout is computed right on any machine: a kernel that does not know an id unpacks it first.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from ...ir.errors import KernelError
from . import conv_layout, pages

MAGIC = b"FXPQIDX1"
HEADER_BYTES = 64
_FORMAT = struct.Struct("<8s6IQ24x")


@dataclass(frozen=True)
class Header:
    """What the first 64 bytes of a layout say.

    Attributes:
        layout: number of the layout, a key of `LAYOUTS`.
        codewords: K, code words per sub-space, a power of two from 2 to 256.
        taps: kernel height times width of a convolution, row-major; 1 for a linear layer.
        subspaces: M.
        outputs: output features or channels, over all groups.
        groups: groups of a convolution.
        payload_bytes: bytes behind the header.
    """

    layout: int
    codewords: int
    taps: int
    subspaces: int
    outputs: int
    groups: int
    payload_bytes: int

    @classmethod
    def read(cls, layout: Tensor) -> Header:
        """The header of a layout, checked against the size of the tensor."""
        check_tensor(layout)
        magic, *numbers = _FORMAT.unpack(bytes(layout[:HEADER_BYTES].tolist()))
        header = cls(*numbers)
        if magic != MAGIC or header.layout not in LAYOUTS:
            raise KernelError(f"Not an index layout: it begins with {magic!r}, layout {header.layout}", hint=_HINT)
        expected = header.expected_bytes() if header.is_sane() else -1
        if header.payload_bytes != expected or layout.numel() != HEADER_BYTES + expected:
            raise KernelError(
                f"An index layout whose header does not fit its {layout.numel()} bytes: {header}", hint=_HINT
            )
        return header

    def check(self, codebook: Tensor, outputs: int, taps: int = 1, groups: int = 1) -> None:
        """That a layout belongs to a codebook (M, K, d) and a layer; the C functions check the same.

        Raises:
            KernelError: it belongs to another layer.
        """
        mine = (self.subspaces, self.codewords, self.outputs, self.taps, self.groups)
        wanted = (*codebook.shape[:2], outputs, taps, groups)
        if mine != wanted:
            numbers = "{} sub-spaces, {} code words, {} outputs, {} taps and {} groups"
            what = f"An index layout of {numbers.format(*mine)} does not fit a codebook of {numbers.format(*wanted)}"
            raise KernelError(what, hint=_HINT)

    def is_sane(self) -> bool:
        """Whether each number alone is in its range; the same limits as in csrc/layout.h."""
        sizes = (self.taps, self.subspaces, self.outputs, self.groups)
        power_of_two = 2 <= self.codewords <= 256 and self.codewords & (self.codewords - 1) == 0
        return power_of_two and all(1 <= size < 2**24 for size in sizes) and self.outputs % self.groups == 0

    def expected_bytes(self) -> int:
        """Bytes of the payload."""
        return self.taps * LAYOUTS[self.layout].tap_bytes(self)

    def to_bytes(self) -> Tensor:
        """The 64 bytes as a tensor."""
        data = _FORMAT.pack(
            MAGIC,
            self.layout,
            self.codewords,
            self.taps,
            self.subspaces,
            self.outputs,
            self.groups,
            self.payload_bytes,
        )
        return torch.frombuffer(bytearray(data), dtype=torch.uint8)


_HINT = "Make it anew from the layer's indices with fxpress.runtime.kernels.prepare_linear or prepare_conv2d"


def check_tensor(layout: Tensor) -> None:
    """That it can be a layout at all; the rest is checked where it is read.

    Raises:
        KernelError: it is no 1-D uint8 tensor of at least 64 bytes.
    """
    if layout.dtype != torch.uint8 or layout.dim() != 1 or layout.numel() < HEADER_BYTES:
        shape = f"{str(layout.dtype).removeprefix('torch.')} {tuple(layout.shape)}"
        raise KernelError(f"An index layout is a 1-D uint8 tensor of at least 64 bytes, not {shape}", hint=_HINT)


@dataclass(frozen=True)
class Layout:
    """One order of the indices.

    Attributes:
        name: for messages and the README.
        tap_bytes: header -> bytes of one tap of the payload.
        pack: (header, indices (taps, M, out)) -> payload, 1-D uint8.
        unpack: (header, payload) -> indices (taps, M, out).
    """

    name: str
    tap_bytes: Callable[[Header], int]
    pack: Callable[[Header, Tensor], Tensor]
    unpack: Callable[[Header, Tensor], Tensor]


def pack(layout: int, indices: Tensor, codewords: int, groups: int = 1) -> Tensor:
    """Header and payload of `indices` (taps, M, out) uint8 in the layout of that number."""
    if indices.dtype != torch.uint8 or indices.dim() != 3 or not indices.numel():
        raise KernelError(
            f"Indices are uint8 of shape (taps, sub-spaces, outputs), not {indices.dtype} {tuple(indices.shape)}"
        )
    if int(indices.max()) >= codewords:
        raise KernelError(f"An index is {int(indices.max())} where there are only {codewords} code words")
    taps, subspaces, outputs = indices.shape
    header = Header(layout, codewords, taps, subspaces, outputs, groups, 0)
    if not header.is_sane():
        raise KernelError(f"No index layout for {header}", hint="Code words are a power of two from 2 to 256")
    header = Header(layout, codewords, taps, subspaces, outputs, groups, header.expected_bytes())
    return pages.cat([header.to_bytes(), LAYOUTS[layout].pack(header, indices)])


def unpack(layout: Tensor) -> tuple[Header, Tensor]:
    """The header, and the indices (taps, M, out) uint8 that a layout holds."""
    header = Header.read(layout)
    # what a damaged payload may hold beyond the code words is cut to their bits, as in the compiled kernels
    return header, LAYOUTS[header.layout].unpack(header, layout[HEADER_BYTES:]) & (header.codewords - 1)


def _plain_pack(_: Header, indices: Tensor) -> Tensor:
    return indices.contiguous().flatten()


def _plain_unpack(header: Header, payload: Tensor) -> Tensor:
    return payload.reshape(header.taps, header.subspaces, header.outputs)


@dataclass(frozen=True)
class _Panels:
    """Layouts in panels of 256 outputs: a row holds one step over the sub-spaces for all outputs of its panel.

    Attributes:
        unit: outputs are padded to a multiple of it.
        word: bytes of one step of one output.
        most: largest number of code words.
        fields: header -> (sub-spaces per step, bits of each).
    """

    unit: int
    word: int
    most: int
    fields: Callable[[Header], tuple[int, int]]

    def tap_bytes(self, header: Header) -> int:
        if header.codewords > self.most:
            return -1
        steps = -(-header.subspaces // self.fields(header)[0])
        return steps * -(-header.outputs // self.unit) * self.unit * self.word

    def pack(self, header: Header, indices: Tensor) -> Tensor:
        # panel by panel: the words of all outputs would take eight times the memory of the indices
        panels = indices.split(PANEL, dim=2)  # type: ignore[no-untyped-call]
        return torch.cat([self._panel(header, panel) for panel in panels], dim=1).flatten()

    def _panel(self, header: Header, indices: Tensor) -> Tensor:
        """Indices (taps, M, at most 256) -> bytes (taps, ...)."""
        per_step, bits = self.fields(header)
        padding = (0, -indices.shape[2] % self.unit, 0, -header.subspaces % per_step)
        fields = F.pad(indices, padding).long().unflatten(1, (-1, per_step))  # type: ignore[no-untyped-call]
        words = (fields << (torch.arange(per_step) * bits).view(-1, 1)).sum(2)
        rows: Tensor = words.to(torch.int32).contiguous().view(torch.uint8).unflatten(-1, (-1, 4))[..., : self.word]
        return rows.flatten(1)

    def unpack(self, header: Header, payload: Tensor) -> Tensor:
        per_step, bits = self.fields(header)
        steps, padded = -(-header.subspaces // per_step), -(-header.outputs // self.unit) * self.unit
        panels = payload.view(header.taps, -1).split(PANEL * steps * self.word, dim=1)  # type: ignore[no-untyped-call]
        rows = torch.cat([panel.reshape(header.taps, steps, -1, self.word) for panel in panels], dim=2).long()
        words = (rows << (torch.arange(self.word) * 8)).sum(-1)
        fields = words[:, :, None] >> (torch.arange(per_step) * bits).view(-1, 1)
        indices = fields.reshape(header.taps, steps * per_step, padded) & (header.codewords - 1)
        return indices[:, : header.subspaces, : header.outputs].to(torch.uint8)

    def layout(self, name: str) -> Layout:
        return Layout(name, self.tap_bytes, self.pack, self.unpack)


PANEL = 256
# one byte per index, in the order of the layer's own buffer
PLAIN = 1
# AVX-512, at most 32 code words: a 32-bit word per output holds 8 indices of 4 bits or 6 of 5
LANES = 2
# AVX-512 and AVX2: one byte per output
ROWS = 3
# AVX2, at most 16 code words: a byte per output holds two indices
PAIRS = 4
# convolutions: conv_layout.py, gangs of 1, 2 and 4
CONV1, CONV2, CONV4 = 5, 6, 7


def _conv(gang: int) -> Layout:
    def tap_bytes(header: Header) -> int:
        return conv_layout.tap_bytes(header, gang)

    def pack(header: Header, indices: Tensor) -> Tensor:
        return conv_layout.pack(header, indices, gang)

    def unpack(header: Header, payload: Tensor) -> Tensor:
        return conv_layout.unpack(header, payload, gang)

    return Layout(f"conv{gang}", tap_bytes, pack, unpack)


LAYOUTS: dict[int, Layout] = {
    PLAIN: Layout("plain", lambda header: header.subspaces * header.outputs, _plain_pack, _plain_unpack),
    LANES: _Panels(16, 4, 32, lambda header: (8, 4) if header.codewords <= 16 else (6, 5)).layout("lanes"),
    ROWS: _Panels(64, 1, 256, lambda _: (1, 8)).layout("rows"),
    PAIRS: _Panels(32, 1, 16, lambda _: (2, 4)).layout("pairs"),
    CONV1: _conv(1),
    CONV2: _conv(2),
    CONV4: _conv(4),
}
