"""Write a file as a whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import time
from collections.abc import Iterable
from pathlib import Path

from ..ir.errors import ArtifactError

_STALE_SECONDS = 3600


def write_atomically(path: str | os.PathLike[str], pieces: Iterable[bytes | memoryview]) -> int:
    """Write the pieces to a temporary file beside `path`, flush it to the disk and put it in place with one rename.

    Whoever opens `path` sees the old file or the new one, never a part: also after a full disk, a kill or a power cut.
    What a killed writer left behind (`.NAME.*.tmp`, not written to for an hour) is removed.

    Returns:
        The number of bytes written.

    Raises:
        ArtifactError: the folder is missing or not writable, the disk is full, `path` is a folder.
    """
    final = Path(os.path.realpath(path))  # a symbolic link stays one, its target is replaced
    temporary = final.with_name(f".{final.name[:200]}.{secrets.token_hex(6)}.tmp")
    try:
        mode = _mode(path, final)
        _sweep(final)
        written = _write(temporary, pieces)
        if mode is not None:
            temporary.chmod(mode)
        os.replace(temporary, final)
    except OSError as error:
        _remove(temporary)
        raise ArtifactError(f"cannot save {path}: {error.strerror or error}", hint=_hint(error, final)) from error
    except BaseException:
        _remove(temporary)
        raise
    _sync_folder(final.parent)
    return written


def _mode(path: str | os.PathLike[str], final: Path) -> int | None:
    """Permissions of the file to be replaced, None where there is none."""
    try:
        found = final.stat().st_mode
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(found):
        kind = "folder" if stat.S_ISDIR(found) else "device or pipe"
        raise ArtifactError(f"cannot save {path}: it is a {kind}", hint="Give the name of a file, such as model.fxp.")
    return stat.S_IMODE(found)


def _write(path: Path, pieces: Iterable[bytes | memoryview]) -> int:
    written = 0
    # not tempfile: its files are private (0600), and a rename would pass that on to the artifact
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    with open(descriptor, "wb", buffering=0) as stream:
        for piece in pieces:
            view = memoryview(piece)
            while view.nbytes:  # one write may take only a part, at most 2 GiB on Linux
                count = stream.write(view)
                written += count
                view = view[count:]
        os.fsync(stream.fileno())
    return written


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where the system can."""
    with contextlib.suppress(OSError):  # some file systems refuse to; the file is whole in any case
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove(temporary: Path) -> None:
    with contextlib.suppress(OSError):  # the error that led here matters more
        temporary.unlink(missing_ok=True)


def _sweep(final: Path) -> None:
    """Remove what killed writers of the same file left; a living one keeps its file young by writing."""
    for leftover in final.parent.glob(f".{_escape(final.name[:200])}.*.tmp"):
        with contextlib.suppress(OSError):  # another process may sweep as well
            if time.time() - leftover.stat().st_mtime > _STALE_SECONDS:
                leftover.unlink()


def _escape(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _hint(error: OSError, final: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return (
            "The disk, the quota or the allowed file size is full; the old file, if any, is untouched. Free some space."
        )
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return f"Create the folder {final.parent} first."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"Give yourself permission to write in {final.parent}, or choose another folder."
    return "The old file, if any, is untouched."
