"""Tables or a decoded weight: measured for each product-quantized layer on the input that it really gets."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
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

Kernel = Literal["dense", "dense-int8", "table"]
Tables = Literal["fp32", "int16", "int8"]
PQ = (PQLinear, PQConv2d)

ROUNDS = 5


@dataclass(frozen=True)
class KernelChoice:
    """How a layer runs, and why.

    Args:
        layer: its name.
        kernel: `table` looks products up, `dense` multiplies with the decoded weight, `dense-int8` with 8 bits of
            each of its numbers.
        reason: for the report.
        tables: numbers in the tables; None without tables.
        input: shape of what it was measured on.
        table_ms: time of one call by table; None where it was not measured.
        dense_ms: time of one call with the decoded weight.
        ratio: table time / dense time, of both measured in turns.
        distance: largest difference of the outputs of tables and decoded weight over the largest output.
        int8_ms: time of one call with the weight of 8 bits; None where that was no candidate, as of the next two.
        int8_ratio: that time / dense time, of both measured in turns.
        int8_distance: as `distance`, of the outputs of the weight of 8 bits.
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
    int8_ms: float | None = None
    int8_ratio: float | None = None
    int8_distance: float | None = None


def choose_kernels(
    graph: Graph, wish: Literal["auto", "dense", "table"], tables: Tables, batch: Inputs | None
) -> list[KernelChoice]:
    """Set `kernel` and `tables` of product-quantized layers: as wished, or for `auto` what is fastest on the batch.

    Where tables may have 8 bits, so may the decoded weight of a convolution: if that is the fastest, and moves the
    outputs no further than the tables do, the layer runs by it.

    Args:
        graph: laid out as it is going to run: the memory format of images matters.
        wish: `auto` measures all.
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
    """One sentence for the layers by table, one for those by weights of 8 bits, one for each reason of the others."""
    notes = []
    tables = [choice for choice in choices if choice.kernel == "table"]
    if tables:
        shares = [choice.ratio for choice in tables if choice.ratio is not None]
        notes.append(f"{_count(tables)} of {len(choices)} by {tables[0].tables} table{_span(shares)}")
    rounded = [choice for choice in choices if choice.kernel == "dense-int8"]
    if rounded:
        shares = [choice.int8_ratio for choice in rounded if choice.int8_ratio is not None]
        notes.append(f"{_count(rounded)} by decoded weights of 8 bits ({_names(rounded)}){_span(shares)}")
    reasons: dict[str, list[KernelChoice]] = {}
    for choice in choices:
        if choice.kernel == "dense":
            reasons.setdefault(choice.reason, []).append(choice)
    for reason, found in reasons.items():
        notes.append(f"{_count(found)} dense ({_names(found)}): {reason}")
    return notes


def _span(shares: list[float]) -> str:
    if not shares:
        return ""
    least, most = f"{min(shares):.2f}", f"{max(shares):.2f}"
    return f" in {least if least == most else f'{least} to {most}'} of the dense time"


def _names(choices: list[KernelChoice]) -> str:
    more = f" and {len(choices) - 3} more" if len(choices) > 3 else ""
    return ", ".join(choice.layer for choice in choices[:3]) + more


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
    expected = dense(x)
    off = distance(expected, table(x))
    if unfit:
        reason = f"table as asked for, by the torch reference: {unfit}"
        return KernelChoice(name, "table", reason, tables, tuple(x.shape), distance=off)
    time = latency_ratio(table, dense, x, rounds=ROUNDS)
    found = KernelChoice(
        name,
        "table",
        "table as asked for",
        tables,
        tuple(x.shape),
        time.candidate_ms,
        time.reference_ms,
        time.ratio,
        off,
    )
    if wish == "table":
        return found
    if tables == "int8" and isinstance(layer, PQConv2d) and not layer.no_int8():
        rounded = _twin(layer, "dense-int8", "fp32")
        time = latency_ratio(rounded, dense, x, rounds=ROUNDS)
        off = distance(expected, rounded(x))
        found = replace(found, int8_ms=time.candidate_ms, int8_ratio=time.ratio, int8_distance=off)
    return _fastest(found)


def _fastest(found: KernelChoice) -> KernelChoice:
    """The choice from what was measured."""
    assert found.ratio is not None
    took = f"table takes {found.ratio:.2g} of the dense time"
    rejected = ""
    if found.int8_ratio is not None and found.int8_ratio < min(found.ratio, 1):
        took = f"{took}, the decoded weight of 8 bits {found.int8_ratio:.2g}"
        if _is_closer(found):
            return replace(found, kernel="dense-int8", reason=took, tables=None)
        rejected = "; that of 8 bits is faster and moves the outputs further than the table"
    if found.ratio < 1:
        return replace(found, reason=took + rejected)
    slower = f"the table takes longer than the decoded weight{rejected}"
    return replace(found, kernel="dense", reason=slower, tables=None, distance=None)


def _is_closer(found: KernelChoice) -> bool:
    """Whether the weight of 8 bits moves the outputs no further than the tables do."""
    return found.int8_distance is not None and found.distance is not None and found.int8_distance <= found.distance


def _twin(layer: PQLinear | PQConv2d, kernel: Kernel, tables: Tables) -> PQLinear | PQConv2d:
    """The layer on the same tensors with another kernel, without anything that is hooked in or prepared."""
    twin = copy.copy(layer)
    twin.kernel, twin.tables = kernel, tables
    twin._forward_pre_hooks = OrderedDict()
    return twin
