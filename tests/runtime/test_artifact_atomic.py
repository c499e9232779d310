"""The old file or the new one, never a part: errors, full disks and kills in the middle of writing."""

from __future__ import annotations

import errno
import os
import random
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fxpress.ir.errors import ArtifactError
from fxpress.ir.graph import Graph
from fxpress.runtime.artifact import load, save
from fxpress.runtime.atomic import write_atomically
from torch import fx, nn


def graph_of(value: float, size: int = 4) -> Graph:
    """A graph with one buffer of `size` equal numbers."""
    root = nn.Module()
    root.register_buffer("value", torch.full((size,), value))
    nodes = fx.Graph()
    nodes.output(nodes.call_function(torch.ops.aten.add.Tensor, (nodes.placeholder("x"), nodes.get_attr("value"))))
    return Graph(fx.GraphModule(root, nodes), (torch.ones(1),))


def value_in(path: Path) -> float:
    tensor = load(path).graph.tensor("value")
    assert bool((tensor == tensor[0]).all())
    return float(tensor[0])


def failing(pieces: int, error: BaseException) -> Iterator[bytes]:
    for _ in range(pieces):
        yield b"x" * 1000
    raise error


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), ValueError()])
@pytest.mark.parametrize("pieces", [0, 1, 3])
def test_an_error_leaves_the_old_file_alone(tmp_path: Path, error: BaseException, pieces: int) -> None:
    path = tmp_path / "m.fxp"
    path.write_bytes(b"old")
    with pytest.raises((ArtifactError, type(error))):
        write_atomically(path, failing(pieces, error))
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["m.fxp"]


def test_the_number_of_bytes(tmp_path: Path) -> None:
    assert write_atomically(tmp_path / "m", [b"abc", memoryview(b"de"), b""]) == 5
    assert (tmp_path / "m").read_bytes() == b"abcde"


def test_permissions_and_links_stay(tmp_path: Path) -> None:
    os.umask(old := os.umask(0o022))
    write_atomically(tmp_path / "new", [b"1"])
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o666 & ~old
    (tmp_path / "new").chmod(0o604)
    (tmp_path / "link").symlink_to("new")
    write_atomically(tmp_path / "link", [b"2"])
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "new").read_bytes() == b"2"
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o604


def test_leftovers_of_killed_writers_go(tmp_path: Path) -> None:
    old, young, other = (tmp_path / f".{name}.tmp" for name in ("m[1].fxp.aa", "m[1].fxp.bb", "m1.fxp.cc"))
    for path in (old, young, other):
        path.touch()
    os.utime(old, (0, 0))
    os.utime(other, (0, 0))
    write_atomically(tmp_path / "m[1].fxp", [b"1"])
    assert (old.exists(), young.exists(), other.exists()) == (False, True, True)


@pytest.mark.parametrize("name", ["missing/m.fxp", "file/m.fxp", "folder", "pipe"])
def test_places_that_cannot_be_written(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ArtifactError, match=name) as caught:
        save(tmp_path / name, graph_of(1))
    assert caught.value.hint
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("above", [0o755, 0o700])
def test_a_folder_without_permission(above: int) -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own folder is closed to others
        folder = Path(name) / "folder"
        folder.mkdir(mode=0o555)
        Path(name).chmod(above)
        child = os.fork()
        if child == 0:
            os._exit(save_as_nobody(folder / "m.fxp"))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert not list(folder.iterdir())


def save_as_nobody(path: Path) -> int:
    """0 if the error says what to do; root may write anywhere and must be somebody else."""
    if os.getuid() == 0:
        os.setuid(65534)
    try:
        write_atomically(path, [b"1"])
    except ArtifactError as error:
        return 0 if "ermission" in error.what and "permission" in error.hint else 2
    except BaseException:
        return 3
    return 4


WRITER = """
import resource, sys
import torch
sys.path.insert(0, {folder!r})
from test_artifact_atomic import graph_of
from fxpress.ir.errors import ArtifactError
from fxpress.runtime.artifact import save
torch.set_num_threads(1)
"""


def start(code: str) -> subprocess.Popen[str]:
    source = WRITER.format(folder=str(Path(__file__).parent)) + code
    return subprocess.Popen([sys.executable, "-c", source], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_a_full_disk(tmp_path: Path) -> None:
    """A limit on the size of files stands for it: the write fails in the middle, as on a full disk."""
    path = tmp_path / "m.fxp"
    save(path, graph_of(1))
    writer = start(f"""
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    save({str(path)!r}, graph_of(2, 100_000))
except ArtifactError as error:
    print(error)
""")
    out, _ = writer.communicate(timeout=300)
    assert writer.returncode == 0
    assert "m.fxp" in out
    assert "Free some space" in out
    assert value_in(path) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["m.fxp"]


def test_kills_in_the_middle_of_save(tmp_path: Path) -> None:
    """Processes save 20 MB again and again and are killed at random moments; the file is whole every time."""
    path = tmp_path / "m.fxp"
    save(path, graph_of(0, 5_000_000))
    mother = start(f"""
import os
for value in range(1, 11):  # torch is imported once, each child is a fresh fork of this process
    sys.stdin.readline()
    child = os.fork()
    if child == 0:
        while True:
            save({str(path)!r}, graph_of(value, 5_000_000))
    print(child, flush=True)
    os.waitpid(child, 0)
    print("gone", flush=True)
""")
    assert mother.stdin is not None
    assert mother.stdout is not None
    chance, parts = random.Random(0), 0
    for value in range(1, 11):
        print(file=mother.stdin, flush=True)
        child = int(mother.stdout.readline())
        time.sleep(chance.uniform(0, 0.4))
        os.kill(child, signal.SIGKILL)
        assert mother.stdout.readline() == "gone\n"
        assert value_in(path) in range(value + 1)
        leftovers = list(tmp_path.glob(".*.tmp"))
        parts += len(leftovers)
        for leftover in leftovers:
            leftover.unlink()
    assert mother.wait(timeout=60) == 0
    assert parts  # at least one kill hit the middle of a write
    save(path, graph_of(99))
    assert value_in(path) == 99
