"""The tensors of a binarized network: as a file keeps them, and as the library reads them.

Stored, they lie behind each other without gaps, little endian: signs with exactly one bit each, cuts with two bytes
where these suffice, everything else as float32. Prepared, they are sections, each at a multiple of 64 bytes behind a
table (their number, then offset and bytes of each, 64-bit): weights in the layout that is fastest here, cuts int32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from ...ir.errors import KernelError
from .binary_prepare import prepare_binary_conv2d, prepare_binary_linear
from .network_program import Part, Program, Step

_ALIGNED = 64


def pack(program: Program, tensors: Iterable[tuple[Tensor, ...]]) -> Tensor:
    """Stored bytes, uint8, of the tensors of each step (as `Program.parts` lists them)."""
    pieces = []
    for parts, given in zip(program.parts(), tensors, strict=True):
        for part, tensor in zip(parts, given, strict=True):
            if tuple(tensor.shape) != part.shape:
                raise KernelError(f"{part.name} have shape {tuple(tensor.shape)}; they must be {part.shape}")
            pieces.append(_pack(part, tensor.detach().cpu()))
    return torch.from_numpy(np.concatenate(pieces)) if pieces else torch.empty(0, dtype=torch.uint8)


def _pack(part: Part, tensor: Tensor) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    if part.dtype is torch.bool:
        return np.packbits(tensor.bool().contiguous().flatten().numpy(), bitorder="little")
    return np.frombuffer(tensor.to(part.dtype).contiguous().numpy().tobytes(), np.uint8)


def unpack(program: Program, stored: Tensor) -> list[tuple[Tensor, ...]]:
    """The inverse of `pack`.

    Raises:
        KernelError: another number of bytes than the program's steps ask for.
    """
    if stored.dtype != torch.uint8 or tuple(stored.shape) != (program.stored_bytes,):
        raise KernelError(
            f"data of a binary network are {stored.dtype} {tuple(stored.shape)}; its steps ask for "
            f"uint8 ({program.stored_bytes},)"
        )
    data, at, found = stored.detach().cpu().contiguous().numpy(), 0, []
    for parts in program.parts():
        tensors = []
        for part in parts:
            tensors.append(_unpack(part, data[at : at + part.stored_bytes]))
            at += part.stored_bytes
        found.append(tuple(tensors))
    return found


def _unpack(part: Part, data: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> Tensor:
    if part.dtype is torch.bool:
        count = math.prod(part.shape)
        bits = np.unpackbits(data, count=count, bitorder="little")
        return torch.from_numpy(bits).bool().reshape(part.shape)
    return torch.frombuffer(bytearray(data.tobytes()), dtype=part.dtype).reshape(part.shape)


def prepare(program: Program, tensors: list[tuple[Tensor, ...]]) -> Tensor:
    """What the library reads, uint8: table and sections."""
    sections = [
        section
        for step, parts in zip(program.steps, tensors, strict=True)
        for section in (_layout(step, parts) if step.kind in ("conv", "conv_levels") else parts)
    ]
    held = [section.contiguous().flatten().view(torch.uint8) for section in sections]
    table, at = [len(held)], _aligned(8 + 16 * len(held))
    for section in held:
        table += [at, section.numel()]
        at = _aligned(at + section.numel())
    data = torch.zeros(at, dtype=torch.uint8)
    head = torch.tensor(table, dtype=torch.int64).view(torch.uint8)
    data[: head.numel()] = head
    for begin, section in zip(table[1::2], held, strict=True):
        data[begin : begin + section.numel()] = section
    return data


def _layout(step: Step, parts: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    plus, ends = parts
    linear = step["linear"] and step["kernel"] == (1, 1) and step["groups"] == 1
    layout = prepare_binary_linear(plus) if linear else prepare_binary_conv2d(plus, step["groups"], step["stride"][1])
    return layout, ends.to(torch.int32) if step.kind == "conv_levels" else ends


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNED) * _ALIGNED
