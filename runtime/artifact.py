"""The `.fxp` file: a graph, its weights, the pipeline that made it and the report, in one file without code.

An `.fxp` file *is* a safetensors file (`fxp/container.py`): weights under their state-dict names, example inputs under
`inputs/N`, and in the metadata of its header the texts

    format "fxpress", version "1", graph (JSON, see `fxp/graph.py`), pipeline and report (JSON or null),
    sha256 of these texts

Why not a zip archive: its reader has a large surface (two directories that may disagree, compression, encryption, path
names) and its members must be copied out before use. A safetensors file has one header and one data section, is
opened by every tool of the ecosystem, and its weights are read straight into their final memory, once.

Loading executes nothing from the file. Ops and layers are looked up by name in the allow-lists of `ir/dialect.py`;
names and values that reach the code which `torch.fx` generates are checked one by one; the header must account for each
byte of the file before memory is taken; each text and tensor has a SHA-256, so damage is found and named. The checksums
do not prove who wrote the file.

`save` is atomic (`atomic.py`) and deterministic: the same graph gives the same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
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
from .fxp.checks import FormatError, clean, dump, parse
from .fxp.container import Entry, Header, pack, read_header, read_tensor
from .fxp.documents import pack_document, unpack_document
from .fxp.graph import INPUTS, Draft, decode_graph, encode_graph
from .fxp.tensors import Record

VERSION = "1"
_TEXTS = ("graph", "pipeline", "report")
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
    path: StrPath, graph: Graph, *, pipeline: dict[str, Any] | None = None, report: dict[str, Any] | None = None
) -> int:
    """Write a graph to an `.fxp` file, which appears as a whole or not at all.

    Args:
        path: the file; an existing one is replaced.
        graph: what to store; its tensors may lie on any device and are stored for the CPU.
        pipeline: options of the passes that made the graph, JSON values.
        report: what they reported, JSON values.

    Returns:
        Size of the file in bytes.

    Raises:
        ArtifactError: the graph holds something that has no form in the file (the message names it), or the file cannot
            be written (no folder, no permission, no space).
    """
    with _errors("save", path, "Trace the model again without this part: the format has no form for it."):
        document, tensors = encode_graph(graph)
        texts = {
            "graph": dump(document),
            "pipeline": dump(pack_document("pipeline", pipeline)),
            "report": dump(pack_document("report", report)),
        }
        _decode_texts(texts)  # what would not load must not be written
        metadata = {"format": "fxpress", "version": VERSION, **texts, "sha256": _digest(texts)}
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
    metadata = header.metadata
    if metadata.get("format") != "fxpress":
        raise FormatError("it is a safetensors file, but not an .fxp file", "Give the name of an .fxp file.")
    if metadata.get("version") != VERSION:
        found = metadata.get("version", "")[:20]
        raise FormatError(f"it has version {found!r}, this fxpress reads {VERSION!r}", "Update fxpress.")
    if metadata.keys() != {"format", "version", "sha256", *_TEXTS}:
        raise FormatError("its metadata is incomplete")
    if metadata["sha256"] != _digest(metadata):
        raise FormatError("the checksum of its description is wrong")
    draft, pipeline, report = _decode_texts(metadata)
    return Loaded(draft.finish(_read_tensors(stream, header, draft)), pipeline, report)


def _decode_texts(texts: dict[str, str]) -> tuple[Draft, dict[str, Any] | None, dict[str, Any] | None]:
    draft = decode_graph(parse(texts["graph"], "the graph"))
    pipeline, report = (unpack_document(name, parse(texts[name], f"the {name}")) for name in _TEXTS[1:])
    return draft, pipeline, report


def _digest(texts: dict[str, str]) -> str:
    """SHA-256 over the three texts and their lengths."""
    total = hashlib.sha256()
    for name in _TEXTS:
        try:
            data = texts[name].encode()
        except UnicodeEncodeError:
            raise FormatError(f"the {name} is not text") from None
        total.update(len(data).to_bytes(8, "little") + data)
    return total.hexdigest()


def _read_tensors(stream: BinaryIO, header: Header, draft: Draft) -> dict[str, Tensor]:
    """Put every tensor of the file in its place; return those of the example inputs."""
    for name in sorted(draft.records.keys() | header.entries.keys()):
        _check_entry(name, header.entries.get(name), draft.records.get(name))
    examples: dict[str, Tensor] = {}
    for name, entry in header.entries.items():
        data, sha256 = read_tensor(stream, entry)
        if sha256 != draft.records[name].sha256:
            raise FormatError(f"the checksum of tensor {name!r} is wrong")
        tensor = draft.records[name].fill(data)
        if name.startswith(INPUTS):
            examples[name] = tensor
    return examples


def _check_entry(name: str, entry: Entry | None, record: Record | None) -> None:
    """What the header says of a tensor must be what the graph needs."""
    if entry is None or record is None:
        raise FormatError(f"tensor {name[:200]!r} is {'missing' if entry is None else 'not part of the graph'}")
    if (entry.dtype, entry.shape) != (record.dtype, record.shape):
        found, wanted = f"{entry.dtype} {entry.shape}", f"{record.dtype} {record.shape}"
        raise FormatError(f"tensor {name!r} is {found}, but the graph needs {wanted}")
