"""The shared library: whether it is there, what this CPU can run, and which instruction set is in use."""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from ...ir.errors import KernelError

# name -> number in csrc/common.h, the fastest first
_NUMBERS = {"avx512": 2, "avx2": 1, "portable": 0}
_ABI = 6
# another build of the library to load, for example one with a sanitizer
_VARIABLE = "FXPRESS_KERNEL_LIBRARY"
_chosen: str | None = None
_known: tuple[ctypes.CDLL | None, int] | None = None  # what `in_use` found, for as long as `_chosen` stays
# arguments of the functions: p a pointer, s a pointer to a packed struct, l an int64_t, i an int
_KINDS = {"p": ctypes.c_void_p, "s": ctypes.c_char_p, "l": ctypes.c_int64, "i": ctypes.c_int}
_SIGNATURES = {
    "fxpress_pq_linear": "s",
    "fxpress_pq_conv2d": "s",
    "fxpress_binary_layer": "s",
    "fxpress_int8_layer": "s",
    "fxpress_binary_network": "pl" + "pl" + "ppl" + "ppl" + "ii",
}


@cache
def _loaded() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and the reason."""
    suffix = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
    path = Path(os.environ.get(_VARIABLE) or Path(__file__).parent / f"libfxpress_kernels{suffix}")
    if not path.is_file():
        return None, "fxpress was installed without a C++ compiler. Install g++ or clang++, then fxpress once more"
    try:
        library = ctypes.CDLL(str(path))
        library.fxpress_message.restype = ctypes.c_char_p
        for name, kinds in _SIGNATURES.items():
            getattr(library, name).argtypes = [_KINDS[kind] for kind in kinds]
        if library.fxpress_abi() != _ABI:
            return None, f"{path} belongs to another version of fxpress. Install fxpress once more"
    except (OSError, AttributeError) as error:
        return None, f"{path} cannot be loaded ({error}). Install fxpress once more, on this machine"
    return library, ""


def in_use() -> tuple[ctypes.CDLL | None, int]:
    """The library, and the number of the instruction set in use.

    None where the reference is to compute, which is said once if nobody asked for it.
    """
    return _known or _find()


def _find() -> tuple[ctypes.CDLL | None, int]:
    global _known
    name = isa()
    if name == "none" and not available():
        _say_once()
    _known = (None if name == "none" else _loaded()[0], _NUMBERS.get(name, -1))
    return _known


@cache
def _say_once() -> None:
    warnings.warn(f"The compiled kernels are not there, torch computes in their place: {why_not()}.", stacklevel=2)


def available() -> bool:
    """Whether the compiled kernels are there; where they are not, the torch reference computes the same."""
    return _loaded()[0] is not None


def why_not() -> str:
    """Why the compiled kernels are not there, with the next step; "" where they are."""
    return _loaded()[1]


def isa() -> str:
    """Instruction set in use: "avx512", "avx2" or "portable"; "none" for the torch reference."""
    return _chosen or isas()[0]


@cache
def isas() -> tuple[str, ...]:
    """What this machine can run, the fastest first; the last is always "none", the torch reference."""
    found = _loaded()[0]
    names = [name for name, number in _NUMBERS.items() if found is not None and found.fxpress_can_run(number)]
    return (*names, "none")


@contextmanager
def using(name: str) -> Iterator[None]:
    """Run the kernels of another instruction set, in all threads (for tests and benchmarks).

    Raises:
        KernelError: this machine cannot run that one.
    """
    global _chosen, _known
    if name not in isas():
        raise KernelError(f"This machine cannot run kernels for {name!r}", hint=f"It can run {', '.join(isas())}")
    before, _chosen, _known = _chosen, name, None
    try:
        yield
    finally:
        _chosen, _known = before, None


def check(status: int) -> None:
    """Raise KernelError with the library's own message where a function did not return 0."""
    found = _loaded()[0]
    if status and found is not None:
        raise KernelError(found.fxpress_message().decode())
