"""The container of a stored graph: one safetensors file, written and read in one pass with a bound on memory.

Layout (the safetensors format, so that any of its readers opens the weights)::

    8 bytes   length N of the header, little endian
    N bytes   JSON: "__metadata__" (text to text), then per tensor {"dtype", "shape", "data_offsets": [start, end]}
    the rest  raw little-endian tensor data, in the order of the header, without gaps

Source: https://github.com/huggingface/safetensors (format description).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import BinaryIO

import torch
from torch import Tensor

from .checks import JSON, FormatError, check_object, dump, parse

MAX_HEADER_BYTES = 64 << 20
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool, "C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: byte offsets are relative to the end of the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """Metadata and the place of each tensor, in file order."""

    metadata: dict[str, str]
    entries: dict[str, Entry]


def raw(tensor: Tensor) -> memoryview:
    """Bytes of a tensor in row-major order; a view where it is contiguous in CPU memory."""
    if tensor.is_meta or tensor.layout != torch.strided or tensor.dtype not in CODES:
        raise FormatError(f"a tensor of {tensor.dtype} ({tensor.layout}, {tensor.device}) cannot be stored")
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return flat.numpy().data


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    return hashlib.sha256(raw(tensor)).hexdigest()


def pack(metadata: dict[str, str], tensors: dict[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of the file, piece by piece; widest dtypes first, then by name, so that data stays aligned."""
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, JSON] = {"__metadata__": metadata}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = dump(header).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise FormatError(f"the description of the graph takes {len(text)} bytes, more than {MAX_HEADER_BYTES}")
    yield len(text).to_bytes(8, "little")
    yield text
    for _, tensor in ordered:
        yield raw(tensor)


def read_header(stream: BinaryIO, size_bytes: int) -> Header:
    """Header of a file of `size_bytes`, checked to describe exactly that many bytes; leaves the stream at the data."""
    length = int.from_bytes(_read(stream, 8), "little")
    if length > min(size_bytes - 8, MAX_HEADER_BYTES):
        raise FormatError(f"the header claims {length} bytes in a file of {size_bytes}")
    try:
        text = _read(stream, length).decode()
    except UnicodeDecodeError as error:
        raise FormatError(f"the header is not text ({error})") from None
    header = parse(text, "the header")
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__"), dict):
        raise FormatError("the header has no metadata")
    metadata = header.pop("__metadata__")
    if not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError("the metadata is not text")
    entries = {name: _entry(name, value) for name, value in header.items()}
    _check_offsets(entries.values(), size_bytes - 8 - length)
    return Header(metadata, entries)


def _entry(name: str, value: JSON) -> Entry:
    what = f"tensor {name[:200]!r}"
    check_object(value, what, {"dtype": str, "shape": list, "data_offsets": list})
    shape, offsets = value["shape"], value["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, *offsets)) or len(offsets) != 2 or len(shape) > 64:
        raise FormatError(f"{what} has no valid shape and offsets")
    dtype = DTYPES.get(value["dtype"])
    if dtype is None:
        raise FormatError(f"{what} has the unknown dtype {value['dtype'][:20]!r}")
    if offsets[1] - offsets[0] != prod(shape) * dtype.itemsize:
        raise FormatError(
            f"{what} of shape {tuple(shape)} and {dtype} does not fit its {offsets[1] - offsets[0]} bytes"
        )
    return Entry(dtype, tuple(shape), *offsets)


def _check_offsets(entries: Iterable[Entry], data_bytes: int) -> None:
    """Tensors follow each other without gap or overlap and fill the file: so memory never exceeds the file's size."""
    end = 0
    for entry in entries:
        if entry.start != end:
            raise FormatError(f"tensor data has a gap or an overlap at byte {end}")
        end = entry.end
    if end != data_bytes:
        raise FormatError(f"tensors take {end} bytes, but {data_bytes} bytes follow the header")


def read_tensor(stream: BinaryIO, entry: Entry) -> tuple[Tensor, str]:
    """The next tensor, read straight into its own memory, and the SHA-256 of its bytes."""
    try:
        flat = torch.empty(entry.end - entry.start, dtype=torch.uint8)
    except RuntimeError as error:
        raise FormatError(
            f"a tensor of {entry.end - entry.start} bytes finds no memory", "Free some memory."
        ) from error
    view = flat.numpy().data
    if stream.readinto(view) != len(view):  # type: ignore[attr-defined]
        raise FormatError("the file ends within the weights")
    if entry.dtype is torch.bool and flat.numel() and int(flat.max()) > 1:
        raise FormatError("a bool tensor holds other bytes than 0 and 1")
    return flat.view(entry.dtype).reshape(entry.shape), hashlib.sha256(view).hexdigest()


def _read(stream: BinaryIO, count: int) -> bytes:
    data = stream.read(count)
    if len(data) != count:
        raise FormatError("the file ends within the header")
    return data
