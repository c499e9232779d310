"""What a file says of itself: one JSON text, deflated, in the data section as the uint8 tensor `fxpress/document`.

    {"graph": .., "pipeline": .. or null, "report": .. or null}

Text in the header would be escaped and could not be compressed: of ResNet-56 it takes 140 KB there and 5 KB so.
The header's metadata hold "format", "version" and the SHA-256 of the deflated bytes. Files of version 1 had the three
texts in the metadata; they are still read.
"""

from __future__ import annotations

import hashlib
import zlib
from typing import BinaryIO

import torch
from torch import Tensor

from .bits import inflate
from .checks import JSON, FormatError, check_object, dump, parse
from .container import Entry, Header, read_tensor

VERSION = "2"
DOCUMENT = "fxpress/document"  # no path of a module has a slash
PARTS = ("graph", "pipeline", "report")
MAX_BYTES = 32 << 20  # of the text: bounds what a few deflated kilobytes can become


def write_description(parts: dict[str, JSON]) -> tuple[dict[str, str], Tensor]:
    """Metadata of the header, and the tensor `fxpress/document`.

    Raises:
        FormatError: the text is too long to be read again.
    """
    text = dump(parts).encode()
    if len(text) > MAX_BYTES:
        raise FormatError(f"the description of the graph takes {len(text)} bytes, more than {MAX_BYTES}")
    data = zlib.compress(text, 9)
    metadata = {"format": "fxpress", "version": VERSION, "sha256": hashlib.sha256(data).hexdigest()}
    return metadata, torch.frombuffer(bytearray(data), dtype=torch.uint8)


def read_description(stream: BinaryIO, header: Header) -> dict[str, JSON]:
    """The three parts; `fxpress/document` is taken out of the header's entries, the stream is where it was.

    Raises:
        FormatError: not an fxpress file, a newer one, or a damaged one.
    """
    metadata = header.metadata
    if metadata.get("format") != "fxpress":
        raise FormatError("it is a safetensors file, but not an .fxp file", "Give the name of an .fxp file.")
    if metadata.get("version") == "1":
        return _read_version_1(metadata)
    if metadata.get("version") != VERSION:
        found = metadata.get("version", "")[:20]
        raise FormatError(f"it has version {found!r}, this fxpress reads 1 and {VERSION}", "Update fxpress.")
    entry = header.entries.get(DOCUMENT)
    if metadata.keys() != {"format", "version", "sha256"} or entry is None:
        raise FormatError("its metadata is incomplete")
    data = _read_entry(stream, entry)
    if hashlib.sha256(data).hexdigest() != metadata["sha256"]:
        raise FormatError("the checksum of its description is wrong")
    text = inflate(data, zlib.MAX_WBITS, MAX_BYTES, "description", exact=False)
    return check_object(parse(_decoded(text), "the description"), "the description", dict.fromkeys(PARTS, object))


def _read_entry(stream: BinaryIO, entry: Entry) -> memoryview:
    """Bytes of the entry, wherever it lies."""
    if entry.dtype is not torch.uint8 or len(entry.shape) != 1:
        raise FormatError(f"{DOCUMENT} is {entry.dtype} {entry.shape}, not bytes")
    place = stream.tell()
    stream.seek(place + entry.start)
    tensor, _ = read_tensor(stream, entry)
    stream.seek(place)
    return tensor.numpy().data


def _decoded(text: bytes) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise FormatError(f"the description is not text ({error})") from None


def _read_version_1(metadata: dict[str, str]) -> dict[str, JSON]:
    if metadata.keys() != {"format", "version", "sha256", *PARTS}:
        raise FormatError("its metadata is incomplete")
    total = hashlib.sha256()
    for name in PARTS:
        try:
            data = metadata[name].encode()
        except UnicodeEncodeError:
            raise FormatError(f"the {name} is not text") from None
        total.update(len(data).to_bytes(8, "little") + data)
    if metadata["sha256"] != total.hexdigest():
        raise FormatError("the checksum of its description is wrong")
    return {name: parse(metadata[name], f"the {name}") for name in PARTS}
