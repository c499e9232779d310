"""Builds the shared library of runtime/kernels; everything else is in pyproject.toml.

Each file of csrc/ is compiled with the flags of its instruction set, told by the end of its name. A file that the
compiler refuses is left out together with all others of its set. Without a compiler fxpress installs all the same, and
the torch reference runs in place of the kernels.
"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
CSRC = Path("runtime/kernels/csrc")
# gcc 12 takes the undefined operands of its own intrinsics for mistakes
QUIET = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
COMMON = ["-std=c++17", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra"]
# ending of a file's name -> flags; the most specific names first
ISAS = {
    "avx512": [
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vbmi", "-mavx512vnni"),
        "-mavx512vpopcntdq",
        *("-mavx2", "-mfma", "-mbmi2", "-mprefer-vector-width=512"),
    ],
    "avx2": ["-mavx2", "-mfma", "-mbmi2"],
}


def extra_flags() -> list[str]:
    """What the environment asks for, for example `-fsanitize=address,undefined` in `make asan`."""
    return os.environ.get("FXPRESS_KERNEL_FLAGS", "").split()


class BuildKernels(build_ext):
    """One translation unit per instruction set, linked into one library with a plain C interface."""

    def build_extension(self, ext: Extension) -> None:
        """Compile and link; raises CompileError or LinkError, which `optional` turns into a warning."""
        groups: dict[str, list[str]] = {name: [] for name in ("", *ISAS)}
        for source in sorted(ext.sources):
            groups[next((name for name in ISAS if Path(source).stem.endswith(name)), "")].append(source)
        objects: list[str] = []
        macros: list[tuple[str, str | None]] = []
        for name, flags in ISAS.items():
            found = self._compile_isa(groups[name], flags)
            objects += found
            macros += [(f"FX_HAVE_{name.upper()}", "1")] if found else []
        objects += self._compile(groups[""], [], macros)
        target = self.get_ext_fullpath(ext.name)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        self.compiler.link_shared_object(
            objects, target, extra_postargs=["-pthread", *extra_flags()], target_lang="c++"
        )

    def _compile_isa(self, sources: list[str], flags: list[str]) -> list[str]:
        """Objects of one instruction set, none where it is another machine's or the compiler does not know it."""
        if platform.machine().lower() not in ("x86_64", "amd64", "i686", "i386"):
            return []
        try:
            return self._compile(sources, flags, [])
        except CompileError as error:
            if extra_flags():  # a sanitizer that leaves out the kernels finds nothing
                raise
            self.warn(f"kernels compiled without {' '.join(flags)}: {error}")
            return []

    def _compile(self, sources: list[str], flags: list[str], macros: list[tuple[str, str | None]]) -> list[str]:
        found: list[str] = self.compiler.compile(
            sources,
            output_dir=self.build_temp,
            macros=macros,
            extra_postargs=[*COMMON, *QUIET, *flags, *extra_flags()],
            depends=[str(path) for path in sorted(CSRC.glob("*.h"))],
        )
        return found

    def get_ext_filename(self, fullname: str) -> str:
        """No Python version in the name: the library knows nothing of Python."""
        suffix = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
        return os.path.join(*fullname.split(".")) + suffix

    def get_export_symbols(self, _: Extension) -> list[str]:
        """No PyInit function either."""
        return []


class PlatformWheel(bdist_wheel):
    """Any Python 3 of this platform can load the library."""

    def get_tag(self) -> tuple[str, str, str]:
        """For example py3-none-linux_x86_64."""
        _, _, system = super().get_tag()
        return "py3", "none", system


os.chdir(ROOT)
COMMANDS: dict[str, Any] = {"build_ext": BuildKernels, "bdist_wheel": PlatformWheel}
setup(
    ext_modules=[
        Extension(
            "fxpress.runtime.kernels.libfxpress_kernels",
            sources=[str(path) for path in sorted(CSRC.glob("*.cpp"))],
            depends=[str(path) for path in sorted(CSRC.glob("*.h"))],
            language="c++",
            optional=True,
        )
    ],
    cmdclass=COMMANDS,
)
