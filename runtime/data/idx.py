"""Reader of IDX files, the format of MNIST and Fashion-MNIST (http://yann.lecun.com/exdb/mnist)."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ...ir.errors import DataError

_UNSIGNED_BYTE = 0x08
_LIMIT_BYTES = 2**31


def find_idx(folder: Path, stem: str) -> Path | None:
    """`folder/stem`, plain or with `.gz`, also spelled `train-images.idx3-ubyte`; None where it is not there."""
    names = (stem, f"{stem}.gz", stem.replace("-idx", ".idx"), stem.replace("-idx", ".idx") + ".gz")
    return next((folder / name for name in names if (folder / name).is_file()), None)


def read_idx(path: Path, *, dims: int) -> Tensor:
    """Read an IDX file of unsigned bytes, plain or gzip (name ends in `.gz`).

    The format: two zero bytes, the type (8 is unsigned byte), the number of dimensions, each size as a big-endian
    32-bit integer, then the values in row-major order.

    Args:
        path: the file.
        dims: number of dimensions that it must have, 3 for images and 1 for labels.

    Returns:
        uint8 tensor of the sizes in the header.

    Raises:
        DataError: the file cannot be read, is of another format, is truncated, or holds more than its header says.
    """
    try:
        with path.open("rb") as raw:
            return _read(gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw, path, dims)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}", hint="Fetch the file again.") from error


def _read(file: BinaryIO | gzip.GzipFile, path: Path, dims: int) -> Tensor:
    magic = file.read(4)
    if magic != bytes((0, 0, _UNSIGNED_BYTE, dims)):
        raise DataError(
            f"{path} is not an IDX file of unsigned bytes in {dims} dimensions: "
            f"it begins with {magic.hex() or 'nothing'}, not 000008{dims:02x}"
        )
    header = file.read(4 * dims)
    if len(header) < 4 * dims:
        raise DataError(f"{path} is truncated: its header ends after {4 + len(header)} bytes", hint="Fetch it again.")
    shape = struct.unpack(f">{dims}I", header)
    size = math.prod(shape)
    if not 0 < size <= _LIMIT_BYTES:
        raise DataError(f"{path}: sizes {shape} in its header are not plausible (at most {_LIMIT_BYTES} bytes)")
    values = file.read(size + 1)
    if len(values) != size:
        held = "more" if len(values) > size else str(len(values))
        raise DataError(
            f"{path} is {'truncated' if len(values) < size else 'too long'}: "
            f"its header announces {size} bytes {shape}, it holds {held}",
            hint="Fetch it again.",
        )
    return torch.frombuffer(bytearray(values), dtype=torch.uint8).reshape(shape)
