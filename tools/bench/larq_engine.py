"""Larq Compute Engine as a peer of binary convolutions: weights and activations of one bit.

It wants a TensorFlow and a numpy that do not go with the rest, so a process of an environment of its own computes
(`larq_worker.py`) and clocks itself; it takes its turns like every other engine. To make such an environment:

    python3 -m venv LARQ
    LARQ/bin/pip install larq-compute-engine==0.16.0 larq==0.13.3 tensorflow-cpu==2.16.2 tf-keras==2.16.0 \\
        numpy==1.26.4 protobuf==3.20.3
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ...ir.errors import FxpressError, OptionError
from .engines import Engine, relative_distance
from .larq_worker import KERNELS

WORKER = Path(__file__).with_name("larq_worker.py")


class Larq:
    """A process of an environment with Larq Compute Engine.

    Args:
        python: interpreter of that environment.

    Raises:
        OptionError: there is no such program.
    """

    def __init__(self, python: Path) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="fxpress-")
        self._said = (self.folder / "said.txt").open("w+")
        settings = {**os.environ, "TF_USE_LEGACY_KERAS": "1", "TF_CPP_MIN_LOG_LEVEL": "3", "OMP_NUM_THREADS": "1"}
        try:
            self._process = subprocess.Popen(
                [str(python), "-I", str(WORKER)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True, env=settings,
            )  # fmt: skip
        except OSError as error:
            hint = "Give the python of an environment with larq-compute-engine."
            raise OptionError(f"--larq {python}: {error.strerror}", hint=hint) from None

    @property
    def folder(self) -> Path:
        """Where arrays pass from process to process."""
        return Path(self._folder.name)

    def engines(self, layer: nn.Conv2d, images: Tensor, threads: int) -> list[Engine]:
        """Its kernels on the signs of a 3×3 convolution's weight and of its input; those of earlier calls are gone.

        Raises:
            FxpressError: it cannot run this layer; with what it says.
        """
        weight = layer.weight.detach().permute(2, 3, 1, 0)
        np.save(self.folder / "weight.npy", weight.contiguous().numpy())
        np.save(self.folder / "images.npy", images.permute(0, 2, 3, 1).contiguous().numpy())
        self.ask(prepare=str(self.folder), threads=threads)
        return [self._engine(kernel) for kernel in KERNELS]

    def versions(self) -> dict[str, str]:
        """Of the packages in its environment that matter.

        Raises:
            FxpressError: they are not there.
        """
        return self.ask(versions=["larq-compute-engine", "larq", "tensorflow-cpu", "numpy"])

    def _engine(self, kernel: str) -> Engine:
        def clocked(calls: int) -> tuple[float, float]:
            answer = self.ask(run=kernel, calls=calls)
            return answer["cpu"], answer["wall"]

        def output() -> Tensor:
            file = self.folder / "output.npy"
            self.ask(output=kernel, file=str(file))
            return torch.from_numpy(np.load(file)).permute(0, 3, 1, 2)

        return Engine(name_of(kernel), "binary", lambda: clocked(1), output, clocked)

    def ask(self, **request: Any) -> dict[str, Any]:
        """One request, and its answer.

        Raises:
            FxpressError: it failed.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        answer: dict[str, Any] = json.loads(line) if line else {"error": self._last_words()}
        if "error" in answer:
            raise FxpressError(f"Larq Compute Engine failed: {answer['error']}")
        return answer

    def _last_words(self) -> str:
        self._said.seek(0)
        return (self._said.read().strip().splitlines() or ["it ended and wrote nothing"])[-1]

    def close(self) -> None:
        """End the process."""
        self._process.communicate()
        self._said.close()
        self._folder.cleanup()


@contextmanager
def running(python: Path | None) -> Iterator[Larq | None]:
    """The process of an environment while it is wanted; nothing where none is given."""
    larq = None if python is None else Larq(python)
    try:
        yield larq
    finally:
        if larq is not None:
            larq.close()


def name_of(kernel: str) -> str:
    """Name of a kernel among the engines; it says what is computed, which is less than the others compute."""
    return f"Larq 1 bit x 1 bit, {kernel}"


def distances(engines: list[Engine], layer: nn.Conv2d, images: Tensor) -> dict[str, float]:
    """Of each to the convolution of signs in double precision, with ones around the image."""
    weight, signs = (torch.where(x >= 0, 1.0, -1.0).double() for x in (layer.weight.detach(), images))
    side = layer.weight.shape[-1] // 2
    expected = functional.conv2d(functional.pad(signs, (side,) * 4, value=1.0), weight)
    return {engine.name: relative_distance(expected, engine.output()) for engine in engines}
