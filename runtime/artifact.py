"""The `.fxp` file: a graph, its weights, the pipeline that made it and the report, in one file without code.

An `.fxp` file *is* a safetensors file (`fxp/container.py`), of these tensors:

    conv1.weight ..      weights under their state-dict names
    fxpress/layers       layers with a stored form of their own, packed: product-quantized ones (`fxp/codecs.py`)
    inputs/N             example inputs that are stored; most are only described (`fxp/examples.py`)
    fxpress/document     graph, pipeline and report as JSON, deflated (`fxp/description.py`, `fxp/graph.py`)

and in the metadata of its header format, version and the SHA-256 of the document. What is not weights is small: 8 KB
for a ResNet-56 of 57 product-quantized layers.

Why not a zip archive: its reader has a large surface (two directories that may disagree, compression, encryption, path
names) and its members must be copied out before use. A safetensors file has one header and one data section, is
opened by every tool of the ecosystem, and its weights are read straight into their final memory, once.

Loading executes nothing from the file. Ops and layers are looked up by name in the allow-lists of `ir/dialect.py`;
names and values that reach the code which `torch.fx` generates are checked one by one; the header must account for each
byte of the file before memory is taken, and what is inflated has a bound; the document and each tensor have a SHA-256,
so damage is found and named. The checksums do not prove who wrote the file.

`save` is atomic (`atomic.py`) and deterministic: the same graph gives the same bytes.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from torch import Tensor

from ..ir.errors import ArtifactError, GraphError
from ..ir.graph import Graph
from . import layers as layers  # registers fxpress's own layers, which a file may name
from .atomic import write_atomically
from .fxp.checks import JSON, FormatError, clean, dump, parse
from .fxp.container import Entry, Header, pack, read_header, read_tensor
from .fxp.description import DOCUMENT, PARTS, VERSION, read_description, write_description
from .fxp.documents import pack_document, unpack_document
from .fxp.graph import Draft, decode_graph, encode_graph
from .fxp.tensors import Record

_DAMAGED = "The file is damaged or not written by fxpress: take another copy, or compile the model again."

_MAX_MESSAGE = 500  # a hostile file would put a book into the message

StrPath = str | os.PathLike[str]


@dataclass(frozen=True)
class Loaded:
    """Content of an `.fxp` file."""

    graph: Graph
    pipeline: dict[str, Any] | None
    report: dict[str, Any] | None


def save(
    path: StrPath,
    graph: Graph,
    *,
    pipeline: dict[str, Any] | None = None,
    report: dict[str, Any] | None = None,
    exact: bool = False,
) -> int:
    """Write a graph to an `.fxp` file, which appears as a whole or not at all.

    Args:
        path: the file; an existing one is replaced.
        graph: what to store; its tensors may lie on any device and are stored for the CPU.
        pipeline: options of the passes that made the graph, JSON values.
        report: what they reported, JSON values.
        exact: store every layer by its state dict and the example inputs as they are, so that work on the network goes
            on with the same bits; the file is larger.

    Returns:
        Size of the file in bytes.

    Raises:
        ArtifactError: the graph holds something that has no form in the file (the message names it), or the file cannot
            be written (no folder, no permission, no space).
    """
    with _errors("save", path, "Trace the model again without this part: the format has no form for it."):
        document, tensors = encode_graph(graph, exact=exact)
        parts = {
            "graph": document,
            "pipeline": pack_document("pipeline", pipeline),
            "report": pack_document("report", report),
        }
        metadata, tensors[DOCUMENT] = write_description(parts)
        _decode_parts(parse(dump(parts), "the description"))  # what would not load must not be written
        return write_atomically(path, pack(metadata, tensors))


def load(path: StrPath) -> Loaded:
    """Read an `.fxp` file; the result trains, exports and can be cut again.

    Raises:
        ArtifactError: no such file, not a file, or one that is damaged, hostile or of a newer version.
    """
    with _errors("read", path, _DAMAGED), _open(path) as stream:
        return _read(stream, os.fstat(stream.fileno()).st_size)


@contextlib.contextmanager
def _errors(verb: str, path: StrPath, hint: str) -> Iterator[None]:
    """Name the file in whatever goes wrong."""
    what = f"cannot {verb} {os.fspath(path)}"
    try:
        yield
    except (FormatError, GraphError) as error:
        text = clean(error.what if isinstance(error, GraphError) else str(error))
        short = text if len(text) <= _MAX_MESSAGE else f"{text[:_MAX_MESSAGE]}..."
        raise ArtifactError(f"{what}: {short}", hint=error.hint or hint) from error
    except RecursionError as error:
        raise ArtifactError(f"{what}: values are nested too deeply", hint=hint) from error
    except OSError as error:
        raise ArtifactError(f"{what}: {error.strerror or error}", hint="Check the path and the permissions.") from error


def _open(path: StrPath) -> BinaryIO:
    if not stat.S_ISREG(os.stat(path).st_mode):  # to open a pipe would wait for a writer
        raise FormatError("it is not a regular file", "Give the name of an .fxp file.")
    return open(path, "rb")


def _read(stream: BinaryIO, size_bytes: int) -> Loaded:
    header = read_header(stream, size_bytes)
    draft, pipeline, report = _decode_parts(read_description(stream, header))
    return Loaded(draft.finish(_read_tensors(stream, header, draft)), pipeline, report)


def _decode_parts(parts: dict[str, JSON]) -> tuple[Draft, dict[str, Any] | None, dict[str, Any] | None]:
    draft = decode_graph(parts["graph"])
    pipeline, report = (unpack_document(name, parts[name]) for name in PARTS[1:])
    return draft, pipeline, report


def _read_tensors(stream: BinaryIO, header: Header, draft: Draft) -> dict[str, Tensor]:
    """Put every tensor of the file in its place; return those that belong to no module."""
    document = {DOCUMENT} if header.metadata["version"] == VERSION else set()
    for name in sorted((draft.records.keys() | header.entries.keys()) - document):
        _check_entry(name, header.entries.get(name), draft.records.get(name))
    loose: dict[str, Tensor] = {}
    for name, entry in header.entries.items():
        if name in document:
            stream.seek(entry.end - entry.start, os.SEEK_CUR)
            continue
        data, sha256 = read_tensor(stream, entry)
        if sha256 != draft.records[name].sha256:
            raise FormatError(f"the checksum of tensor {name!r} is wrong")
        tensor = draft.records[name].fill(data)
        if not draft.records[name].places:
            loose[name] = tensor
    return loose


def _check_entry(name: str, entry: Entry | None, record: Record | None) -> None:
    """What the header says of a tensor must be what the graph needs."""
    if entry is None or record is None:
        raise FormatError(f"tensor {name[:200]!r} is {'missing' if entry is None else 'not part of the graph'}")
    if (entry.dtype, entry.shape) != (record.dtype, record.shape):
        found, wanted = f"{entry.dtype} {entry.shape}", f"{record.dtype} {record.shape}"
        raise FormatError(f"tensor {name!r} is {found}, but the graph needs {wanted}")
