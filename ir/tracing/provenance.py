"""Where a node comes from: the module path and the line of the model's own code."""

from __future__ import annotations

import functools
import os
import re
from typing import Any

import torch

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in [^\n]*\n\s*([^\n]*)')
_TORCH = os.path.dirname(torch.__file__) + os.sep


def module_path(meta: dict[str, Any]) -> str:
    """Dotted path of the innermost module that was running, "" for the model itself or where it is not known.

    The second call of a module is recorded as `conv@1`; the path is `conv`.
    """
    stack = meta.get("nn_module_stack")
    if not stack:
        return ""
    path: str = re.sub(r"@\d+", "", next(reversed(stack.values()))[0])
    return "" if path.startswith("_empty_nn_module_stack") else path  # nodes that the exporter adds


@functools.lru_cache(maxsize=4096)
def source_line(stack_trace: str | None) -> str:
    """The innermost line outside torch of a recorded stack trace, as `resnet.py:92 out = self.conv1(x)`; "" if none."""
    if not stack_trace:
        return ""
    frames = _FRAME.findall(stack_trace)
    for file, line, code in reversed(frames):
        if not file.startswith(_TORCH) and not file.startswith("<"):
            return f"{os.path.basename(file)}:{line} {code.strip()}".rstrip()
    return ""


def is_model_code(file: str) -> bool:
    """Whether a source file is neither torch's, nor fxpress's own, nor generated."""
    here = os.path.dirname(os.path.abspath(__file__)) + os.sep
    return not file.startswith((_TORCH, here, "<"))
