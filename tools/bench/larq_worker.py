"""Convolutions on Larq Compute Engine, on request: runs in an environment of its own, without fxpress and torch.

Requests and answers are lines of JSON on standard input and output, one answer for one request:

    {"versions": [PACKAGE, ...]}             → {PACKAGE: version, ...}
    {"prepare": FOLDER, "threads": 1}        FOLDER holds weight.npy, (3, 3, in, out), and images.npy, (N, H, W, in)
    {"run": KERNEL, "calls": 10}             → {"cpu": milliseconds of a call, "wall": ...} of this process
    {"output": KERNEL, "file": FILE}         one call; FILE.npy takes what came out, (N, H, W, out)

An answer to what went wrong is {"error": text}. What libraries print goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import numpy as np

KERNELS = {"as shipped": False, "indirect": True}
"""Kernel → whether the interpreter is told to `use_indirect_bgemm`."""

Build = Callable[[Any, Any, int], "dict[str, Callable[[], Any]]"]


def serve(requests: Iterable[str], answers: TextIO, build: Build) -> None:
    """Answer requests until there are no more.

    Args:
        requests: lines.
        answers: takes a line for each.
        build: weight, images, threads → kernel → one call.
    """
    calls: dict[str, Callable[[], Any]] = {}
    for line in requests:
        request = json.loads(line)
        try:
            answer: dict[str, Any] = {}
            if "versions" in request:
                answer = {name: version(name) for name in request["versions"]}
            elif "prepare" in request:
                folder = Path(request["prepare"])
                calls = build(np.load(folder / "weight.npy"), np.load(folder / "images.npy"), request["threads"])
            elif "run" in request:
                answer = clocked(calls[request["run"]], request["calls"])
            else:
                np.save(request["file"], calls[request["output"]]())
        except Exception as error:  # whatever it was, the other side has to know
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def clocked(call: Callable[[], Any], calls: int) -> dict[str, float]:
    """Milliseconds of one of several calls."""
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(calls):
        call()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"cpu": cpu * 1e3 / calls, "wall": wall * 1e3 / calls}


def build_larq(weight: Any, images: Any, threads: int) -> dict[str, Callable[[], Any]]:
    """Both kernels on one 3×3 convolution: signs of the input times signs of the weight, ones around the image.

    Zeros around it, which have no sign, would cost Larq a correction. There is no factor per filter.
    """
    import larq
    import larq_compute_engine
    import tensorflow
    from larq_compute_engine.tflite.python.interpreter import Interpreter

    inputs = tensorflow.keras.Input(images.shape[1:], batch_size=len(images))
    layer = larq.layers.QuantConv2D(
        weight.shape[3], weight.shape[0], padding="same", pad_values=1.0, use_bias=False,
        input_quantizer="ste_sign", kernel_quantizer="ste_sign", kernel_constraint="weight_clip",
    )  # fmt: skip
    network = tensorflow.keras.Model(inputs, layer(inputs))
    layer.set_weights([weight])
    model = larq_compute_engine.convert_keras_model(network)
    kernels = {
        name: Interpreter(model, num_threads=threads, use_indirect_bgemm=indirect).interpreter
        for name, indirect in KERNELS.items()
    }
    return {name: _call(interpreter, images) for name, interpreter in kernels.items()}


def _call(interpreter: Any, images: Any) -> Callable[[], Any]:
    return lambda: interpreter.predict([images])[0]


def main() -> None:
    """Serve over the pipe that this process was started with."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.stdin, answers, build_larq)


if __name__ == "__main__":
    main()
