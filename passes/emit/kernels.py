"""Table kernel or decoded dense weight: measured for each product-quantized layer on the input that it really gets."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...ir.graph import Graph
from ...ir.verify import distance
from ...runtime import kernels
from ...runtime.data import Inputs
from ...runtime.forward import call, modes_restored
from ...runtime.layers.pq_conv2d import PQConv2d
from ...runtime.layers.pq_linear import PQLinear
from ...runtime.measure import latency_ratio

Kernel = Literal["dense", "table"]
Tables = Literal["fp32", "int16", "int8"]
PQ = (PQLinear, PQConv2d)

ROUNDS = 5


@dataclass(frozen=True)
class KernelChoice:
    """How a layer runs, and why.

    Args:
        layer: its name.
        kernel: `table` looks products up, `dense` multiplies with the decoded weight.
        reason: for the report.
        tables: numbers in the tables; None without tables.
        input: shape of what it was measured on.
        table_ms: time of one call by table; None where it was not measured.
        dense_ms: time of one call with the decoded weight.
        ratio: table time / dense time, of both measured in turns.
        distance: largest difference of the outputs of tables and decoded weight over the largest output.
    """

    layer: str
    kernel: Kernel
    reason: str
    tables: Tables | None = None
    input: tuple[int, ...] | None = None
    table_ms: float | None = None
    dense_ms: float | None = None
    ratio: float | None = None
    distance: float | None = None


def choose_kernels(
    graph: Graph, wish: Literal["auto", "dense", "table"], tables: Tables, batch: Inputs | None
) -> list[KernelChoice]:
    """Set `kernel` and `tables` of every product-quantized layer: as wished, or for `auto` what is faster on the batch.

    Args:
        graph: laid out as it is going to run: the memory format of images matters.
        wish: `auto` measures both.
        tables: numbers in the tables of the layers that run by table.
        batch: inputs of the network; None: nothing is measured, and `auto` keeps to decoded weights.
    """
    named = {name: layer for name, layer in graph.module.named_modules() if isinstance(layer, PQ)}
    measured = _on_real_inputs(graph, named, wish, tables, batch) if named and batch is not None else {}
    choices = []
    for name, layer in named.items():
        choice = measured.get(name) or _unmeasured(name, layer, wish, tables)
        layer.kernel, layer.tables = choice.kernel, choice.tables or "fp32"
        layer.eval().prepare()  # so that torch.export and torch.compile see it as it runs
        choices.append(choice)
    return choices


def metrics_of(choices: list[KernelChoice]) -> dict[str, Any]:
    """Layer → what was chosen and measured, as JSON values."""
    return {
        choice.layer: {key: value for key, value in asdict(choice).items() if key != "layer" and value is not None}
        for choice in choices
    }


def notes_of(choices: list[KernelChoice]) -> list[str]:
    """One sentence for the layers by table, and one for each reason why others are not."""
    notes = []
    tables = [choice for choice in choices if choice.kernel == "table"]
    if tables:
        shares = [choice.ratio for choice in tables if choice.ratio is not None]
        span = f" in {min(shares):.2f} to {max(shares):.2f} of the dense time" if shares else ""
        notes.append(f"{_count(tables)} of {len(choices)} by {tables[0].tables} table{span}")
    reasons: dict[str, list[KernelChoice]] = {}
    for choice in choices:
        if choice.kernel == "dense":
            reasons.setdefault(choice.reason, []).append(choice)
    for reason, found in reasons.items():
        names = ", ".join(choice.layer for choice in found[:3])
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        notes.append(f"{_count(found)} dense ({names}{more}): {reason}")
    return notes


def _count(choices: list[KernelChoice]) -> str:
    return f"{len(choices)} quantised layer{'s' if len(choices) > 1 else ''}"


def _unfit(layer: PQLinear | PQConv2d) -> str | None:
    """Why no compiled kernel could run this layer."""
    if not kernels.available():
        return f"no compiled kernels: {kernels.why_not()}"
    if layer.codebook.dtype != torch.float32:
        return f"the kernels compute in float32, the layer in {str(layer.codebook.dtype).removeprefix('torch.')}"
    return None


def _unmeasured(name: str, layer: PQLinear | PQConv2d, wish: str, tables: Tables) -> KernelChoice:
    if wish == "table":
        return KernelChoice(name, "table", "table as asked for", tables)
    if wish == "dense":
        return KernelChoice(name, "dense", "dense as asked for")
    return KernelChoice(name, "dense", _unfit(layer) or "not measured, the inputs mix positional and keyword ones")


def _on_real_inputs(
    graph: Graph, named: dict[str, Any], wish: str, tables: Tables, batch: Inputs
) -> dict[str, KernelChoice]:
    """Run the network once; every layer is judged when its input is there, so that no input is kept."""
    found: dict[str, KernelChoice] = {}

    def judge(name: str, layer: PQLinear | PQConv2d, x: Tensor) -> None:
        if name not in found:  # a layer that is called twice is judged by its first input
            found[name] = _judge(name, layer, x, wish, tables)

    with ExitStack() as stack:
        stack.enter_context(modes_restored(graph.module))
        stack.enter_context(torch.inference_mode())
        graph.module.eval()
        for name, layer in named.items():
            stack.enter_context(_before_each_call(name, layer, judge))
        call(graph.module, batch)
    return found


@contextmanager
def _before_each_call(name: str, layer: nn.Module, judge: Callable[[str, Any, Tensor], None]) -> Iterator[None]:
    handle = layer.register_forward_pre_hook(lambda module, inputs: judge(name, module, inputs[0]))
    try:
        yield
    finally:
        handle.remove()


def _judge(name: str, layer: PQLinear | PQConv2d, x: Tensor, wish: str, tables: Tables) -> KernelChoice:
    unfit = _unfit(layer)
    if wish == "dense" or (unfit and wish == "auto"):
        return _unmeasured(name, layer, wish, tables)
    table, dense = _twin(layer, "table", tables), _twin(layer, "dense", "fp32")
    off = distance(dense(x), table(x))
    if unfit:
        reason = f"table as asked for, by the torch reference: {unfit}"
        return KernelChoice(name, "table", reason, tables, tuple(x.shape), distance=off)
    time = latency_ratio(table, dense, x, rounds=ROUNDS)
    numbers = (tuple(x.shape), time.candidate_ms, time.reference_ms, time.ratio)
    if wish == "table" or time.ratio < 1:
        reason = "table as asked for" if wish == "table" else f"table takes {time.ratio:.2g} of the dense time"
        return KernelChoice(name, "table", reason, tables, *numbers, off)
    return KernelChoice(name, "dense", "the table takes longer than the decoded weight", None, *numbers)


def _twin(layer: PQLinear | PQConv2d, kernel: Kernel, tables: Tables) -> PQLinear | PQConv2d:
    """The layer on the same tensors with another kernel, without anything that is hooked in or prepared."""
    twin = copy.copy(layer)
    twin.kernel, twin.tables = kernel, tables
    twin._forward_pre_hooks = OrderedDict()
    return twin
