"""A state dict from a file into a model, with errors that name the keys."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..ir.errors import ModelError

StateDict = dict[str, Tensor]


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state dict strictly.

    Raises:
        ModelError: the file is missing or holds something else, or keys or shapes do not fit.
    """
    state = read_state_dict(path)
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unexpected:
        parts = [_some("missing", missing), _some("unexpected", unexpected)]
        raise ModelError(
            f"{str(path)!r} does not fit the model: {'; '.join(filter(None, parts))}",
            hint="Are the weights of this very architecture, and of its number of classes?",
        )
    wrong = [f"{key} {_shape(state[key])}, not {_shape(own[key])}" for key in own if state[key].shape != own[key].shape]
    if wrong:
        raise ModelError(
            f"{str(path)!r} does not fit the model: {_some('wrong shape', wrong)}",
            hint="For another number of classes build the model so, for example torchvision:resnet18,num_classes=10",
        )
    model.load_state_dict(state)


def read_state_dict(path: Path) -> StateDict:
    """Read `.safetensors` or `torch.save` without running code from the file.

    `{"state_dict": …}`, `{"model": …}` and the `module.` prefix of `DataParallel` are unwrapped.
    """
    if not path.is_file():
        raise ModelError(f"there is no weights file {str(path)!r}")
    state: Any = _read(path)
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ModelError(
            f"{str(path)!r} holds no state dict but a {type(state).__name__}",
            hint="Save one with torch.save(model.state_dict(), path)",
        )
    if state and all(key.startswith("module.") for key in state):
        return {key.removeprefix("module."): value for key, value in state.items()}
    return dict(state)


def _read(path: Path) -> Any:
    """Whatever the file holds, as far as it can be read without running code."""
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors: StateDict = load_file(path)
            return tensors
        except SafetensorError as error:
            raise ModelError(f"{str(path)!r} is not a safetensors file: {error}") from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        first = str(error).strip().partition("\n")[0][:160]
        raise ModelError(
            f"{str(path)!r} cannot be read as a state dict: {first}",
            hint="Save one with torch.save(model.state_dict(), path)",
        ) from error


def _some(what: str, keys: list[str], show: int = 3) -> str:
    """`3 missing (a, b, c)`; the first few of many."""
    more = f", … {len(keys) - show} more" if len(keys) > show else ""
    return f"{len(keys)} {what} ({', '.join(keys[:show])}{more})" if keys else ""


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "scalar"  # noqa: RUF001
