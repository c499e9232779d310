"""Imports go one way: ir, runtime, passes, tools, face; read from the source, nothing is imported."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Container, Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

FOLDERS = {"fxpress": "fxpress", "ir": "fxpress.ir", "runtime": "fxpress.runtime", "passes": "fxpress.passes"}
FOLDERS["tools"] = "fxpress.tools"
MAY_IMPORT = {
    "ir": {"ir"},
    "runtime": {"ir", "runtime"},
    "passes": {"ir", "runtime", "passes"},
    "tools": {"fxpress", "ir", "runtime", "passes", "tools"},
    "fxpress": {"ir", "runtime", "passes", "tools"},
}
IR_PACKAGES = {"torch", "numpy", "scipy"}


def modules(repository: Path) -> dict[str, Path]:
    """Every module by its full name."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in (repository / folder).rglob("*.py"):
            parts = path.relative_to(repository / folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


def imports(name: str, path: Path, *, top_level: bool, known: Container[str] = ()) -> Iterator[str]:
    """Full names that a module imports; with `top_level` only what runs when it is itself imported.

    `from . import a, b` with `known` modules a and b needs those two: the package round it has already begun.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in statements(tree) if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = absolute(name, path, node)
            names = [f"{base}.{alias.name}" for alias in node.names]
            if not (name.startswith(f"{base}.") and all(each in known for each in names)):
                yield base
            yield from names


def statements(tree: ast.Module) -> Iterator[ast.stmt]:
    """Statements outside of functions and of `if TYPE_CHECKING:`."""
    waiting: list[ast.stmt] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
            continue
        yield node
        waiting += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]


def absolute(name: str, path: Path, node: ast.ImportFrom) -> str:
    """Full name of the module that `from ... import` reads."""
    if not node.level:
        return node.module or ""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    return ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])


def layer(name: str) -> str | None:
    """Folder of a module of ours, None for another package's."""
    parts = name.split(".")
    if parts[0] != "fxpress":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in MAY_IMPORT else "fxpress"


@pytest.mark.parametrize("folder", sorted(MAY_IMPORT))
def test_no_import_goes_up(repository: Path, folder: str) -> None:
    wrong = [
        f"{name} imports {target}"
        for name, path in modules(repository).items()
        if layer(name) == folder
        for target in imports(name, path, top_level=False)
        if (home := layer(target)) is not None and home not in MAY_IMPORT[folder]
    ]
    assert not wrong


def test_ir_needs_only_the_numeric_packages(repository: Path) -> None:
    allowed = IR_PACKAGES | set(sys.stdlib_module_names) | {"fxpress"}
    wrong = [
        f"{name} imports {target}"
        for name, path in modules(repository).items()
        if layer(name) == "ir"
        for target in imports(name, path, top_level=False)
        if target.split(".")[0] not in allowed
    ]
    assert not wrong


def test_no_import_goes_in_a_circle(repository: Path) -> None:
    """While modules are being imported; what a function imports when it is called may look back."""
    known = modules(repository)
    needs = {
        name: {target for target in imports(name, path, top_level=True, known=known) if target in known} - {name}
        for name, path in known.items()
    }
    TopologicalSorter(needs).prepare()  # CycleError names the circle


def test_own_imports_are_relative(repository: Path) -> None:
    """An absolute `import fxpress...` inside the package could find another copy than the one it lies in."""
    wrong = [
        f"{path.relative_to(repository)}:{node.lineno}"
        for path in modules(repository).values()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] in FOLDERS)
        or (isinstance(node, ast.Import) and any(alias.name.split(".")[0] in FOLDERS for alias in node.names))
    ]
    assert not wrong


def test_folders_are_not_modules_of_their_own() -> None:
    """With the repository's root on the path, `import ir` would make a second copy of every class."""
    import fxpress

    assert fxpress.Graph
    assert not {"ir", "runtime", "passes", "tools"} & set(sys.modules)


def test_importing_the_face_is_light() -> None:
    """Not even torch: `fxpress --help` and completion answer at once."""
    code = "import sys, fxpress; print(*sorted({'torch', 'torchvision', 'accelerate', 'sklearn'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
