"""The shared library: there, chosen by the CPU, and replaced by the reference where it is not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from fxpress.ir.errors import KernelError
from fxpress.runtime import kernels
from fxpress.runtime.kernels import library


def layer() -> tuple[torch.Tensor, ...]:
    indices = torch.randint(0, 16, (1, 64, 600), dtype=torch.uint8)
    return torch.randn(4, 256), torch.randn(64, 16, 4), kernels.prepare_linear(indices, 16, "int8"), torch.randn(600)


@pytest.mark.skipif(not (shutil.which("c++") or "FXPRESS_KERNEL_LIBRARY" in os.environ), reason="no C++ compiler")
def test_library_is_built_where_there_is_a_compiler() -> None:
    assert kernels.available(), kernels.why_not()
    assert kernels.why_not() == ""
    assert kernels.isas()[-2:] == ("portable", "none")
    assert kernels.isa() == kernels.isas()[0]


def test_using_another_instruction_set() -> None:
    before = kernels.isa()
    with kernels.using("none"):
        assert kernels.isa() == "none"
        assert library.in_use()[0] is None
    assert kernels.isa() == before
    with pytest.raises(KernelError, match="cannot run kernels for 'sse'"), kernels.using("sse"):
        pass


MISSING = """
import torch, warnings
from fxpress.runtime import kernels
assert not kernels.available() and kernels.isas() == ("none",)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        layout = kernels.prepare_linear(torch.zeros(1, 2, 3, dtype=torch.uint8), 16)
        y = torch.ops.fxpress.pq_linear(torch.ones(1, 4), torch.ones(2, 16, 2), layout, None, 3, "int8")
assert y.tolist() == [[4.0, 4.0, 4.0]], y
(warning,) = [w for w in caught if "kernels" in str(w.message)]
print(warning.message)
"""


def test_without_the_library_the_reference_computes_and_says_so_once(tmp_path: Path) -> None:
    environment = {**os.environ, "FXPRESS_KERNEL_LIBRARY": str(tmp_path / "library.so")}
    command = [sys.executable, "-c", MISSING]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "without a C++ compiler. Install g++ or clang++" in done.stdout


def test_a_library_that_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "library.so"
    path.write_bytes(b"not a library")
    monkeypatch.setenv("FXPRESS_KERNEL_LIBRARY", str(path))
    found, why = library._loaded.__wrapped__()
    assert found is None
    assert f"{path} cannot be loaded" in why


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_has_threads_of_its_own() -> None:
    """As in the workers of a DataLoader: the parent's threads are not there after the fork."""
    x, codebook, layout, bias = layer()
    torch.set_num_threads(2)
    try:
        expected = torch.ops.fxpress.pq_linear(x, codebook, layout, bias, 600, "int8")
        child = os.fork()
        if child == 0:
            y = torch.ops.fxpress.pq_linear(x, codebook, layout, bias, 600, "int8")
            os._exit(0 if torch.equal(y, expected) else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert torch.equal(torch.ops.fxpress.pq_linear(x, codebook, layout, bias, 600, "int8"), expected)
    finally:
        torch.set_num_threads(1)


def test_calls_from_several_threads() -> None:
    x, codebook, layout, bias = layer()
    torch.set_num_threads(2)
    expected = torch.ops.fxpress.pq_linear(x, codebook, layout, bias, 600, "int8")
    right: list[bool] = []

    def call() -> None:
        torch.set_num_threads(2)
        results = [torch.ops.fxpress.pq_linear(x, codebook, layout, bias, 600, "int8") for _ in range(50)]
        right.append(all(torch.equal(y, expected) for y in results))

    threads = [threading.Thread(target=call) for _ in range(3)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        torch.set_num_threads(1)
    assert right == [True] * 3
