"""The wheel and the sdist hold everything that is on disk, and the wheel works away from the repository."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

FOLDERS = {"fxpress": "fxpress", "ir": "fxpress/ir", "runtime": "fxpress/runtime", "passes": "fxpress/passes"}
FOLDERS["tools"] = "fxpress/tools"
NOT_BUILT = (".git", ".venv", "build", "dist", "__pycache__", "*.egg-info", ".*_cache", ".hypothesis", "*.fxp", "*.so")
LIBRARY = "fxpress/runtime/kernels/libfxpress_kernels.so"


def on_disk(repository: Path) -> set[str]:
    """Names that the wheel should hold: every file of the five folders but notes, kept results and C++ sources."""
    return {
        f"{package}/{path.relative_to(repository / folder).as_posix()}"
        for folder, package in FOLDERS.items()
        for path in (repository / folder).rglob("*")
        if path.is_file()
        and path.name != "README.md"
        and not {"__pycache__", "results", "csrc"} & set(path.parts)
        and path.suffix != ".so"
        and not path.name.startswith(".")
    }


@pytest.fixture(scope="module")
def dist(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the sdist and the wheel that is built from that sdist, so that a gap in either shows."""
    place = tmp_path_factory.mktemp("packaging")
    shutil.copytree(repository, place / "source", ignore=shutil.ignore_patterns(*NOT_BUILT))
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(place / "dist"), str(place / "source")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=place, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return place / "dist"


@pytest.fixture(scope="module")
def installed(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder into which the wheel is installed, without its dependencies."""
    target = tmp_path_factory.mktemp("installed")
    (wheel,) = dist.glob("*.whl")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(command, check=True)
    return target


def test_wheel_holds_exactly_what_is_on_disk(repository: Path, dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("fxpress/")}
    assert names - {LIBRARY} == on_disk(repository)


def test_wheel_is_typed_and_licensed(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "fxpress/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_sdist_can_be_read_and_tested(repository: Path, dist: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "Makefile"} <= names
    tests = {path.relative_to(repository).as_posix() for path in (repository / "tests").rglob("*.py")}
    sources = {path.relative_to(repository).as_posix() for path in (repository / "runtime/kernels/csrc").iterdir()}
    assert tests | sources | {"setup.py"} <= names


IMPORT_ALL = """
import importlib, pkgutil, sys
import fxpress
assert fxpress.__file__.startswith(sys.argv[1]), fxpress.__file__
found = [module.name for module in pkgutil.walk_packages(fxpress.__path__, "fxpress.")]
# pkgutil takes the kernels for a module; they are loaded by ctypes
names = [name for name in found if not name.endswith(".libfxpress_kernels")]
for name in names:
    importlib.import_module(name)
foreign = [n for n, m in sys.modules.items() if n.startswith("fxpress") and not m.__file__.startswith(sys.argv[1])]
assert not foreign, foreign
assert {"ir", "runtime", "passes", "tools"}.isdisjoint(sys.modules)
print(len(names))
"""


def test_every_module_imports_from_the_wheel(repository: Path, installed: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, str(installed)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(installed), "PATH": "", "HOME": str(tmp_path)},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    modules = {name for name in on_disk(repository) if name.endswith(".py")}
    assert int(done.stdout) == len(modules) - 1  # all but fxpress/__init__.py itself


def test_command_line_is_installed(installed: Path) -> None:
    (entry_points,) = installed.glob("fxpress-*.dist-info/entry_points.txt")
    assert "fxpress = fxpress.tools.cli:main" in entry_points.read_text()
