"""Failures of tracing in words that help: the line of the model's code, the layer, the shapes, the next step."""

from __future__ import annotations

import os
import traceback
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..errors import TraceError
from . import provenance

_VALUES = ("data-dependent", "data dependent", "_local_scalar_dense", "is_nonzero", "unbacked", "dynamic control")


def where(node: fx.Node) -> str:
    """The line of the model's code that a node comes from, else its module's path."""
    source = node.meta.get("source") or provenance.source_line(node.meta.get("stack_trace"))
    path = node.meta.get("path") or provenance.module_path(node.meta)
    return f"`{source}`" if source else f"module {path!r}" if path else "the model"


def in_place_refusal(node: fx.Node, why: str) -> TraceError:
    """An in-place operation that has no exact functional form."""
    return TraceError(
        f"{where(node)}: {node.target} {why}",
        hint="Write the line without the in-place form (`x = x + y` for `x += y`).",
    )


def own_tensor_refusal(name: str, node: fx.Node | None) -> TraceError:
    """The model changes a parameter or buffer in evaluation mode."""
    line = f"{where(node)}: " if node is not None else ""
    return TraceError(
        f"{line}the forward pass in evaluation mode writes to the model's own tensor {name!r}",
        hint="Return the new value instead of storing it, or guard the line with `if self.training:`.",
    )


def region_refusal(node: fx.Node, name: str, body: fx.GraphModule | None) -> TraceError:
    """A higher-order operation: a mixed-precision region, a branch or a loop."""
    lines = [where(n) for n in (node, *(body.graph.nodes if body is not None else ()))]
    line = next((text for text in lines if text.startswith("`")), lines[0])
    if "autocast" in name:
        return TraceError(
            f"{line} runs under torch.autocast; the graph has one type per tensor, that of its weights",
            hint="Remove the region from the model, and give it weights of the lower type where that is wanted.",
        )
    return TraceError(
        f"{line}: {name} has no place in the graph, which has neither branches nor loops",
        hint="Compute both sides and choose with torch.where, or unroll the loop.",
    )


def op_refusal(node: fx.Node) -> TraceError:
    """An operation outside of the dialect."""
    return TraceError(
        f"{where(node)}: the operation {node.target} is not in the dialect",
        hint="Only functional ATen and torchvision operations are; express it with those.",
    )


def explain(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception) -> TraceError:
    """Why an export failed: the model itself fails on these inputs, its control flow depends on data, or else.

    The model (in evaluation mode) is run once on the inputs to tell the first case.
    """
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    except Exception as eager:  # whatever the model raises is what is to be explained
        return _bad_inputs(model, args, kwargs, eager)
    finally:
        for buffer, value in buffers:  # a model may count its calls
            buffer.copy_(value)
    line = _line(error)
    text = str(error)
    if any(word in text for word in _VALUES) or "Data" in type(error).__name__:
        return TraceError(
            f"{line or type(model).__name__}: control flow depends on the values of a tensor, so there is no one graph",
            hint="Rewrite the line without the branch (torch.where, a mask, a fixed number of steps), or export the "
            "model yourself and pass the ExportedProgram.",
        )
    return TraceError(
        f"{line or type(model).__name__}: torch.export failed: {_sentence(text) or type(error).__name__}",
        hint="Simplify that line, or export the model yourself and pass the ExportedProgram.",
    )


def _bad_inputs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception) -> TraceError:
    given = ", ".join(str(tuple(t.shape)) for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor))
    start = f"the model fails on the example inputs of shape {given}"
    frame, path, layer = _innermost(model, error)
    tensor = _input(frame)
    if layer is None or tensor is None or not (path or _expectation(layer, tensor)):
        line = _line(error)
        details = f"{line}: " if line else ""
    else:
        expected = _expectation(layer, tensor)
        details = f"{path!r} ({type(layer).__name__})" if path else type(layer).__name__
        details += f" expects {expected}, given" if expected else " fails on"
        details += f" a {str(tensor.dtype).removeprefix('torch.')} tensor of shape {tuple(tensor.shape)}: "
    return TraceError(
        f"{start}: {details}{_sentence(str(error))}", hint="Check the number, shapes and types of the inputs."
    )


def _frames(error: BaseException) -> list[FrameType]:
    frames: list[FrameType] = []
    trace: TracebackType | None = error.__traceback__
    while trace is not None:
        frames.append(trace.tb_frame)
        trace = trace.tb_next
    return frames


def _innermost(model: nn.Module, error: Exception) -> tuple[FrameType | None, str, nn.Module | None]:
    """The deepest call of a module of the model that was under way, with the module's path."""
    paths = {id(module): path for path, module in model.named_modules()}
    for frame in reversed(_frames(error)):
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and id(owner) in paths:
            return frame, paths[id(owner)], owner
    return None, "", None


def _input(frame: FrameType | None) -> Tensor | None:
    values = frame.f_locals.values() if frame is not None else ()
    return next((value for value in values if isinstance(value, Tensor)), None)


def _expectation(layer: nn.Module, given: Tensor) -> str:
    """What a layer takes, where the given tensor is something else."""
    channels = given.shape[1] if given.dim() > 1 else 0
    if isinstance(layer, nn.modules.conv._ConvNd):
        rank = len(layer.kernel_size) + 2
        fits = channels == layer.in_channels and given.dim() == rank
        return "" if fits else f"{layer.in_channels} channels in dimension 1 of {rank}"
    if isinstance(layer, nn.Linear):
        fits = given.dim() > 0 and given.shape[-1] == layer.in_features
        return "" if fits else f"{layer.in_features} features in the last dimension"
    if isinstance(layer, nn.modules.batchnorm._NormBase):
        return "" if channels == layer.num_features else f"{layer.num_features} channels in dimension 1"
    return ""


def _line(error: Exception) -> str:
    """The innermost line of the model's code in a traceback, as `model.py:12 if x.sum() > 0:`."""
    for summary in reversed(traceback.extract_tb(error.__traceback__)):
        if provenance.is_model_code(summary.filename):
            return f"`{os.path.basename(summary.filename)}:{summary.lineno} {summary.line or ''}`".rstrip()
    return ""


def _sentence(text: str, limit: int = 300) -> str:
    """The first lines of a message up to a blank one, on one line."""
    head = " ".join(text.strip().split("\n\n")[0].split()).rstrip(". ")
    return head if len(head) <= limit else head[:limit].rsplit(" ", 1)[0] + " …"
