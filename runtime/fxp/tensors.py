"""Rows of a tensor table: what the data of each tensor must be, and where the loaded tensor belongs.

{"kind": "parameter", "requires_grad": true, "dtype": "F32", "shape": [..], "sha256": ".."}
{"kind": "buffer", "persistent": false, .., "channels_last": true}     a weight in channels-last memory format
{"kind": "parameter", "requires_grad": true, "same": "head1.weight"}   tied to a tensor before it
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor, nn

from .checks import JSON, FormatError, check_object
from .container import CODES, DTYPES, digest

_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
_MAX_DIMS = 64
_MAX_ELEMENTS = 2**48  # a shape with a zero in it takes no bytes, yet its other sizes can overflow


@dataclass
class Record:
    """One stored tensor: what its data must be, and the places where the loaded object belongs."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    sha256: str
    channels_last: bool = False
    requires_grad: bool | None = None  # None: not a parameter
    places: list[tuple[nn.Module, str]] = field(default_factory=list)

    def meta(self) -> Tensor:
        """A tensor of this shape and dtype that takes no memory."""
        return self._finish(torch.empty(self.shape, dtype=self.dtype, device="meta"))

    def fill(self, tensor: Tensor) -> Tensor:
        """Put the data in all places, tied ones get the same object; return that object."""
        if self.channels_last:
            tensor = tensor.contiguous(memory_format=_FORMATS[tensor.dim()])
        final = self._finish(tensor)
        for owner, leaf in self.places:
            (owner._parameters if leaf in owner._parameters else owner._buffers)[leaf] = final  # type: ignore[assignment]
        return final

    def _finish(self, tensor: Tensor) -> Tensor:
        return tensor if self.requires_grad is None else nn.Parameter(tensor, requires_grad=self.requires_grad)


def named_tensors(path: str, module: nn.Module, whole: bool) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Name, owner, leaf and value of the tensors of a layer (`whole`), or of those that a container itself holds."""
    for inner, owner in module.named_modules() if whole else [("", module)]:
        for leaf, tensor in (*owner._parameters.items(), *owner._buffers.items()):
            if tensor is not None:
                yield ".".join(filter(None, (path, inner, leaf))), owner, leaf, tensor


def tensor_row(name: str, owner: nn.Module, leaf: str, tensor: Tensor, same: str | None) -> dict[str, JSON]:
    """Row of a tensor that its owner holds under the name `leaf`; `same` names the tensor that it is tied to."""
    row: dict[str, JSON] = {"kind": "buffer", "persistent": leaf not in owner._non_persistent_buffers_set}
    if leaf in owner._parameters:
        row = {"kind": "parameter", "requires_grad": tensor.requires_grad}
    return row | ({"same": same} if same else describe(name, tensor))


def describe(name: str, tensor: Tensor) -> dict[str, JSON]:
    """What the data of a tensor must be: dtype, shape, checksum, and whether the channels come last in memory."""
    if tensor.dtype not in CODES or tensor.is_meta or tensor.layout != torch.strided:
        kind = f"{tensor.dtype} ({tensor.layout}, {tensor.device})"
        raise FormatError(f"{name} is a tensor of {kind}, which cannot be stored")
    return {**describe_form(tensor), "sha256": digest(tensor)}


def describe_form(tensor: Tensor) -> dict[str, JSON]:
    """Dtype, shape, and whether the channels come last in memory."""
    row: dict[str, JSON] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape)}
    memory_format = _FORMATS.get(tensor.dim())
    if memory_format and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=memory_format):
        row["channels_last"] = True
    return row


def read_record(name: str, row: JSON, extra: dict[str, type] | None = None) -> Record:
    """One row of a tensor table; the inverse of `describe`."""
    fields = {"dtype": str, "shape": list, "sha256": str, **(extra or {})}
    check_object(row, f"tensor {name[:200]!r}", fields, {"channels_last": bool})
    record = read_form(name, row)
    record.sha256, record.requires_grad = row["sha256"], row.get("requires_grad")
    if record.requires_grad and not (record.dtype.is_floating_point or record.dtype.is_complex):
        raise FormatError(f"tensor {name[:200]!r} of {record.dtype} cannot be trained")
    return record


def read_form(name: str, row: dict[str, JSON]) -> Record:
    """Dtype, shape and memory format; the inverse of `describe_form`."""
    dtype, shape = DTYPES.get(row["dtype"]), tuple(row["shape"])
    channels_last = bool(row.get("channels_last"))
    sizes = all(type(n) is int and n >= 0 for n in shape) and prod(max(n, 1) for n in shape) < _MAX_ELEMENTS
    if dtype is None or not sizes or len(shape) > _MAX_DIMS:
        raise FormatError(f"tensor {name[:200]!r} has no valid dtype and shape")
    if channels_last and len(shape) not in _FORMATS:
        raise FormatError(f"tensor {name[:200]!r} of {len(shape)} dimensions cannot have its channels last")
    return Record(dtype, shape, "", channels_last)
