"""Index layouts of the convolution: blocks of 64 channels, gangs of 1, 2 or 4 neighbouring sub-spaces.

    [group][block][term = gang of sub-spaces][tap][vector][64 lanes], one byte each

A byte is the place of the table entry among those of its term (csrc/pq_conv.h, `term_byte`). Gang 4 is for at most 32
code words, gang 2 for 64, gang 1 for any number.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

BLOCK = 64


def tap_bytes(header: Any, gang: int) -> int:
    """Bytes of the payload per tap; -1 where the gang does not go with the number of code words."""
    if (gang == 4 and header.codewords > 32) or (gang == 2 and max(16, header.codewords) != 64):
        return -1
    blocks = -(-(header.outputs // header.groups) // BLOCK)
    terms = -(-header.subspaces // gang)
    size: int = header.groups * blocks * terms * gang * BLOCK
    return size


def pack(header: Any, indices: Tensor, gang: int) -> Tensor:
    """Indices (taps, M, out) -> payload."""
    blocked = indices.long().unflatten(2, (header.groups, -1))  # type: ignore[no-untyped-call]
    blocked = F.pad(blocked, (0, -blocked.shape[3] % BLOCK, 0, 0, 0, -header.subspaces % gang))
    # tap, term, sub, group, block, channel
    terms = blocked.unflatten(3, (-1, BLOCK)).unflatten(1, (-1, gang))  # type: ignore[no-untyped-call]
    sub = torch.arange(gang).view(-1, 1, 1, 1)
    fours = terms // 16 * 64 + terms // 4 % 4 * 16 + sub * 4 + terms % 4
    terms = fours if gang == 4 else terms + sub * 64
    terms = terms.permute(3, 4, 1, 0, 5, 2)  # group, block, term, tap, channel, sub
    if gang == 1:
        terms = terms.unflatten(4, (2, BLOCK // 2)).transpose(4, 5)  # the two halves of a block alternate
    payload: Tensor = terms.to(torch.uint8).flatten()
    return payload


def unpack(header: Any, payload: Tensor, gang: int) -> Tensor:
    """The inverse of `pack`."""
    blocks = -(-(header.outputs // header.groups) // BLOCK)
    terms = payload.long().reshape(header.groups, blocks, -1, header.taps, BLOCK, gang)
    if gang == 1:
        terms = terms.unflatten(4, (BLOCK // 2, 2)).transpose(4, 5).flatten(4, 5)  # type: ignore[no-untyped-call]
    if gang == 4:
        terms = terms // 64 * 16 + terms // 16 % 4 * 4 + terms % 4
    blocked = terms.permute(3, 2, 5, 0, 1, 4).flatten(4, 5).flatten(1, 2)  # tap, m, group, channel
    kept = blocked[:, : header.subspaces, :, : header.outputs // header.groups] & (header.codewords - 1)
    indices: Tensor = kept.flatten(2).to(torch.uint8)
    return indices
