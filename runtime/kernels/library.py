"""The shared library: whether it is there, what this CPU can run, and which instruction set is in use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ...ir.errors import KernelError


def available() -> bool:
    """Whether the compiled kernels are there; where they are not, the torch reference computes the same."""
    return isa() != "none"


def why_not() -> str:
    """Why the compiled kernels are not there, with the next step; "" where they are."""
    return "the shared library was not built"


def isa() -> str:
    """Instruction set in use: "avx512", "avx2" or "portable"; "none" for the torch reference."""
    return "none"


def isas() -> tuple[str, ...]:
    """Every instruction set that this machine can run, the fastest first; "none" is always one of them."""
    return ("none",)


@contextmanager
def using(name: str) -> Iterator[None]:
    """Run the kernels of another instruction set (for tests and benchmarks).

    Raises:
        KernelError: this machine cannot run that one.
    """
    if name not in isas():
        raise KernelError(f"This machine cannot run kernels for {name!r}", hint=f"It can run {', '.join(isas())}")
    yield
