"""`torch.export` with a dynamic batch, and its failures in words that help."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from . import provenance
from .errors import TraceError


@dataclass(frozen=True)
class Exported:
    """A program and the inputs it was made with."""

    program: ExportedProgram
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def dynamic_batch(self) -> bool:
        """Whether the batch stayed symbolic."""
        return is_dynamic(self.program)


def export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Exported:
    """Export in evaluation mode; modes, the random state and the model's tensors stay as they are.

    A dynamic batch is tried first, then the example's own batch.

    Raises:
        TraceError: the model fails on these inputs, or cannot be exported.
    """
    attempts = [a for a in (_batched(args, kwargs), (args, kwargs, None)) if a is not None]
    errors: list[Exception] = []
    with _evaluation(model), _quiet_state():
        for tried_args, tried_kwargs, dynamic in attempts:
            try:
                program = torch.export.export(
                    model, tried_args, tried_kwargs, dynamic_shapes=dynamic, strict=False
                )
                return Exported(program, tried_args, tried_kwargs)
            except Exception as error:  # the exporter raises whatever the model or its own machinery raises
                errors.append(error)
        raise _explained(model, args, kwargs, errors[-1]) from errors[-1]


def is_dynamic(program: ExportedProgram) -> bool:
    """Whether dimension 0 of an input of the program is symbolic."""
    names = set(program.graph_signature.user_inputs)
    values = [n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder" and n.name in names]
    return any(isinstance(v, Tensor) and v.dim() and isinstance(v.shape[0], torch.SymInt) for v in values)


def _batched(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], Any] | None:
    """Inputs with a batch of at least two and the marks of their dynamic dimensions; None without a batch."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    sizes = [t.shape[0] for t in leaves if isinstance(t, Tensor) and t.dim()]
    if not sizes or sizes[0] == 0:
        return None
    batch = sizes[0]
    marks: list[Any] = []
    for i, leaf in enumerate(leaves):
        batched = isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == batch
        marks.append({0: Dim.AUTO} if batched else None)
        if batched and batch == 1:
            leaves[i] = torch.cat([leaf, leaf]).requires_grad_(leaf.requires_grad)
    new_args, new_kwargs = pytree.tree_unflatten(leaves, spec)
    args_marks, kwargs_marks = pytree.tree_unflatten(marks, spec)
    dynamic = (*args_marks, *kwargs_marks.values())
    return new_args, new_kwargs, _Marks(dynamic, args_marks, kwargs_marks).shapes()


@dataclass(frozen=True)
class _Marks:
    flat: tuple[Any, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def shapes(self) -> Any:
        return self.flat


@contextlib.contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; outside, every module has its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def _quiet_state() -> Iterator[None]:
    """One way to trace whatever the caller has set: gradients on, no fused attention, the random state put back."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def _explained(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception) -> TraceError:
    return TraceError(f"{type(error).__name__}: {error}")
