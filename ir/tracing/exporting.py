"""`torch.export` with a dynamic batch, and its failures in words that help."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.utils import _pytree as pytree

from . import explaining

_OTHERS = (3, 7, 32)  # batch sizes for which a program must hold to be called dynamic


@dataclass(frozen=True)
class Exported:
    """A program, the inputs it was made with, and whether their batch may change."""

    program: ExportedProgram
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dynamic_batch: bool


def export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Exported:
    """Export in evaluation mode; the model's modes, tensors and attributes and the random state stay as they are.

    A dynamic batch is tried first, then the example's own batch.

    Raises:
        TraceError: the model fails on these inputs, or cannot be exported.
    """
    with _untouched(model), _neutral_state():
        model.eval()
        try:
            exported = _export_dynamic(model, args, kwargs)
            return exported or Exported(_export(model, args, kwargs, None), args, kwargs, False)
        except Exception as error:  # the exporter raises whatever the model or its own machinery raises
            raise explaining.explain(model, args, kwargs, error) from error


def is_dynamic(program: ExportedProgram) -> bool:
    """Whether dimension 0 of an input of the program is symbolic, and may be of any size."""
    return len(_batches(program)) > 0 and _any_batch(program)


def _export_dynamic(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Exported | None:
    """Export with a symbolic batch of at least two; None where the model fixes its batch."""
    batched, count = _batched(args, kwargs)
    if count == 0:
        return None
    new_args, new_kwargs, shapes = batched
    try:
        program = _export(model, new_args, new_kwargs, shapes)
    except Exception:  # the static attempt that follows reports what is wrong
        return None
    if len(_batches(program)) == count and _any_batch(program):
        return Exported(program, new_args, new_kwargs, True)
    return None


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any) -> ExportedProgram:
    with _quiet():
        return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's warnings, log lines and dumped graphs from the terminal: a failure is explained in words."""
    handlers, said = logging.getLogger("torch").handlers, io.StringIO()
    for handler in handlers:
        handler.addFilter(_nothing)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(said):
            warnings.simplefilter("ignore")
            yield
        print(said.getvalue(), end="", file=sys.stderr)  # all went well: what is there, the model itself has said
    finally:
        for handler in handlers:
            handler.removeFilter(_nothing)


def _nothing(record: logging.LogRecord) -> bool:  # noqa: ARG001 - the signature of a filter
    return False


def _batches(program: ExportedProgram) -> list[torch.SymInt]:
    """Dimension 0 of the inputs where it is symbolic (the exporter may have found that it must be a certain number)."""
    names = set(program.graph_signature.user_inputs)
    values = [n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder" and n.name in names]
    sizes: list[Any] = [value.shape[0] for value in values if isinstance(value, Tensor) and value.dim()]
    return [size for size in sizes if isinstance(size, torch.SymInt) and not size.node.expr.is_number]


def _any_batch(program: ExportedProgram) -> bool:
    """Whether all that was asked about sizes (`if x.shape[0] < 5`) has the same answer for other batches."""
    nodes = [size.node for size in _batches(program)]
    symbols = {node.expr for node in nodes}
    guards = [guard.expr for node in nodes[:1] if node.shape_env is not None for guard in node.shape_env.guards]
    return all(_holds(guard, dict.fromkeys(symbols, batch)) for guard in guards for batch in _OTHERS)


def _holds(guard: Any, sizes: dict[Any, int]) -> bool:
    """Whether a condition on symbols holds for these sizes, or does not speak of them alone."""
    try:
        return bool(guard.subs(sizes) != False)  # noqa: E712 - sympy's own false is not Python's
    except ZeroDivisionError:
        return False


def _batched(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, Any, ShapesCollection], int]:
    """Inputs with a batch of at least two, the marks of their dynamic dimension, and the number of marks.

    The batch is dimension 0 of the first tensor; every tensor with the same dimension 0 takes part in it.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    sizes = [t.shape[0] for t in leaves if isinstance(t, Tensor) and t.dim()]
    batch = sizes[0] if sizes else 0
    shapes, count = ShapesCollection(), 0  # type: ignore[no-untyped-call]
    for i, leaf in enumerate(leaves):
        if batch and isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == batch:
            # a size of one is a constant to the exporter; a tensor given twice must be two to be marked twice
            leaves[i] = (torch.cat([leaf, leaf]) if batch == 1 else leaf.clone()).detach()
            shapes[leaves[i]] = {0: Dim.AUTO}
            count += 1
    new_args, new_kwargs = pytree.tree_unflatten(leaves, spec)
    return (new_args, new_kwargs, shapes), count


@contextlib.contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Whatever an export does to the attributes of the modules (modes, caches, computed weights) is undone."""
    tables = ("_parameters", "_buffers", "_modules")
    before = [(m, dict(m.__dict__), [dict(m.__dict__[t]) for t in tables]) for m in model.modules()]
    try:
        yield
    finally:
        for module, attributes, contents in before:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for name, content in zip(tables, contents, strict=True):
                if attributes[name] != content:
                    attributes[name].clear()
                    attributes[name].update(content)


@contextlib.contextmanager
def _neutral_state() -> Iterator[None]:
    """One way to trace whatever the caller has set: gradients on, no fused attention; the random state is put back."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
