"""emit and product-quantized layers: table or dense by measurement, exact or lossy, still a module like any other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fxpress.ir.cost import measure_cost
from fxpress.ir.graph import submodule
from fxpress.ir.verify import distance, run
from fxpress.passes.base import EXACT, LOSSY, Context, PassResult
from fxpress.passes.emit import kernels
from fxpress.passes.emit.emit import Emit
from fxpress.passes.runner import run_pass
from fxpress.runtime.layers.pq_conv2d import PQConv2d
from fxpress.runtime.layers.pq_linear import PQLinear
from fxpress.runtime.measure import Latency
from torch import Tensor, nn

import fxpress
from fxpress import Data, Graph, OptionError, VerifyError, trace


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(8 * 16, 4)
        nn.init.normal_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.nn.functional.max_pool2d(self.norm(self.conv2(self.conv1(x).relu())).relu(), 2)
        return self.fc(self.drop(x.view(-1, 8 * 16)))  # type: ignore[no-any-return]


def quantised(model: nn.Module, x: Tensor, names: tuple[str, ...]) -> Graph:
    """The traced network with random codes in the layers of these names."""
    graph = trace(model.eval(), x)
    with graph.edit("test"):
        for name in names:
            layer = submodule(graph.module, name)
            out, inputs, *size = layer.weight.shape
            codebook = torch.randn(-(-inputs // 4), 16, 4) / inputs**0.5
            indices = torch.randint(16, (9 if size else 1, len(codebook), out), dtype=torch.uint8)
            cls = PQConv2d if size else PQLinear
            graph.module._modules[name] = cls.from_weights(layer, codebook, indices)
    return graph


@pytest.fixture
def graph() -> Graph:
    torch.manual_seed(0)
    return quantised(Net(), torch.randn(2, 3, 8, 8), ("conv1", "conv2", "fc"))


@pytest.fixture
def compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine has, the choice is made as where compiled kernels are."""
    monkeypatch.setattr(kernels.kernels, "available", lambda: True)


def emit(graph: Graph, **options: Any) -> PassResult:
    return run_pass(Emit(**options), graph, Context(original=graph.copy()))[0]


def chosen(graph: Graph) -> dict[str, tuple[str, str]]:
    named = graph.module.named_modules()
    return {name: (layer.kernel, layer.tables) for name, layer in named if isinstance(layer, (PQConv2d, PQLinear))}


def timed(monkeypatch: pytest.MonkeyPatch, ratio: dict[int, float]) -> list[tuple[Any, Any, Tensor]]:
    """Times of our own: ratio by number of outputs of the layer."""
    seen = []

    def latency(candidate: Any, reference: Any, x: Tensor, **options: Any) -> Latency:
        seen.append((candidate, reference, x))
        values: dict[str, Any] = dict.fromkeys(Latency.__dataclass_fields__, 1.0)
        return Latency(**{**values, "ratio": ratio[candidate.indices.shape[1]]})

    monkeypatch.setattr(kernels, "latency_ratio", latency)
    return seen


@pytest.mark.parametrize("wish", ["contiguous", "channels-last"])
def test_each_layer_runs_as_it_is_faster(
    graph: Graph, monkeypatch: pytest.MonkeyPatch, compiled_kernels: None, wish: str
) -> None:
    seen = timed(monkeypatch, {1: 1.3, 2: 0.25, 32: 0.01})  # sub-spaces of conv1, conv2, fc
    before = run(graph)
    result = emit(graph, layout=wish)
    assert chosen(graph) == {"conv1": ("dense", "fp32"), "conv2": ("table", "fp32"), "fc": ("table", "fp32")}
    for table, dense, x in seen:
        assert (table.kernel, dense.kernel) == ("table", "dense")
        with torch.inference_mode():
            y = table(x)
        assert y.dim() != 4 or y.is_contiguous(memory_format=torch.channels_last) == (wish == "channels-last")
    assert [tuple(x.shape) for _, _, x in seen] == [(2, 3, 8, 8), (2, 8, 8, 8), (2, 128)]
    assert distance(before, run(graph)) < 1e-5
    assert result.distance is not None
    assert result.distance < 1e-5
    assert result.notes[-3:] == [
        "2 quantised layers of 3 by fp32 table in 0.01 to 0.25 of the dense time",
        "1 quantised layer dense (conv1): the table takes longer than the decoded weight",
        f"engine torch, {wish} as asked for",
    ]
    found = result.metrics["kernels"]
    assert found["conv1"] == {
        "kernel": "dense",
        "reason": "the table takes longer than the decoded weight",
        "input": (2, 3, 8, 8),
        "table_ms": 1.0,
        "dense_ms": 1.0,
        "ratio": 1.3,
    }
    assert found["fc"]["reason"] == "table takes 0.01 of the dense time"
    assert found["fc"]["distance"] < 1e-5


def test_both_layouts_are_measured_with_the_kernels_that_suit_them(graph: Graph, compiled_kernels: None) -> None:
    result = emit(graph)
    assert result.metrics["channels_last_ratio"] > 0
    assert set(result.metrics["kernels"]) == {"conv1", "conv2", "fc"}
    for name, kernel in chosen(graph).items():
        known = result.metrics["kernels"][name]
        assert known["kernel"] == kernel[0]
        assert known["kernel"] == ("table" if known["ratio"] < 1 else "dense")
        assert known["table_ms"] > 0
        assert known["dense_ms"] > 0


def test_without_compiled_kernels_weights_are_decoded(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.kernels, "available", lambda: False)
    monkeypatch.setattr(kernels.kernels, "why_not", lambda: "no compiler at install time")
    result = emit(graph, layout="contiguous", tables="int8")
    assert set(chosen(graph).values()) == {("dense", "fp32")}
    assert (
        "3 quantised layers dense (conv1, conv2, fc): no compiled kernels: no compiler at install time" in result.notes
    )
    assert result.distance is not None
    assert result.distance < 1e-6
    result = emit(graph, layout="contiguous", kernels="table")  # the torch reference computes the same
    assert set(chosen(graph).values()) == {("table", "fp32")}
    assert result.metrics["kernels"]["fc"]["reason"].startswith("table as asked for, by the torch reference: no comp")


def test_double_precision_stays_dense(compiled_kernels: None) -> None:
    graph = quantised(Net().double(), torch.randn(2, 3, 8, 8).double(), ("conv1",))
    result = emit(graph, layout="contiguous")
    assert result.metrics["kernels"]["conv1"]["reason"] == "the kernels compute in float32, the layer in float64"


@pytest.mark.parametrize("tables", ["int8", "int16"])
def test_quantised_tables_are_lossy_and_say_how_much(graph: Graph, tables: str) -> None:
    before = run(graph)
    result = emit(graph, kernels="table", tables=tables)
    moved = distance(before, run(graph))
    assert set(chosen(graph).values()) == {("table", tables)}
    assert 1e-6 < moved < 0.2
    assert result.distance == result.metrics["output_distance"] == pytest.approx(moved)
    assert result.metrics["exact_distance"] < 1e-6
    assert all(1e-7 < known["distance"] < 0.2 for known in result.metrics["kernels"].values())


def test_the_meaning_depends_on_the_tables() -> None:
    assert Emit().meaning() is Emit(kernels="table").meaning() is EXACT
    assert Emit(tables="int16").meaning() is Emit(tables="int8").meaning() is LOSSY


def test_what_is_folded_is_proven_where_tables_are_not(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(graph: Graph, author: str) -> int:
        with torch.no_grad():
            graph.tensor("fc.bias").add_(1.0)
        return 0

    monkeypatch.setattr("fxpress.passes.emit.emit.remove_dropout", spoil)
    with pytest.raises(VerifyError, match="pass 'emit'"):
        emit(graph, tables="int8")


def test_the_report_shows_the_row_before_and_after(graph: Graph) -> None:
    images = [(torch.randn(16, 3, 8, 8), torch.randint(4, (16,)))]
    compiled = fxpress.compile(graph, [{"emit": {"kernels": "table", "tables": "int8"}}], None, data=Data(val=images))
    before, after = compiled.report.rows
    assert (before.semantics, after.semantics) == ("exact", "lossy")
    assert before.accuracy is not None
    assert after.accuracy is not None
    assert after.options == {"kernels": "table", "tables": "int8"}


def test_batch_norm_behind_a_quantised_layer_stays(graph: Graph) -> None:
    result = emit(graph)
    assert [skip.node for skip in result.skips] == ["norm"]
    assert "conv2 is product-quantized: outputs share codewords" in result.skips[0].reason
    assert any(isinstance(graph.layer(node), nn.BatchNorm2d) for node in graph.nodes)


def timed_8_bits(monkeypatch: pytest.MonkeyPatch, table: float, rounded: float) -> None:
    """Times of our own: ratios of tables and of decoded weights of 8 bits."""

    def latency(candidate: Any, reference: Any, x: Tensor, **options: Any) -> Latency:
        values: dict[str, Any] = dict.fromkeys(Latency.__dataclass_fields__, 1.0)
        return Latency(**{**values, "ratio": {"table": table, "dense-int8": rounded}[candidate.kernel]})

    monkeypatch.setattr(kernels, "latency_ratio", latency)


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_decoded_weights_of_8_bits_where_they_are_faster(
    graph: Graph, monkeypatch: pytest.MonkeyPatch, compiled_kernels: None, layout: str, tmp_path: Any
) -> None:
    timed_8_bits(monkeypatch, 0.5, 0.25)
    x, before = torch.randn(2, 3, 8, 8), run(graph)
    result = emit(graph, tables="int8", layout=layout)
    assert chosen(graph) == {
        "conv1": ("dense-int8", "fp32"),
        "conv2": ("dense-int8", "fp32"),
        "fc": ("table", "int8"),
    }
    assert "1 quantised layer of 3 by int8 table in 0.50 of the dense time" in result.notes
    noted = "2 quantised layers by decoded weights of 8 bits (conv1, conv2) in 0.25 of the dense time"
    assert noted in result.notes
    known = result.metrics["kernels"]["conv1"]
    assert known["kernel"] == "dense-int8"
    assert known["reason"] == "table takes 0.5 of the dense time, the decoded weight of 8 bits 0.25"
    assert (known["ratio"], known["int8_ratio"], known["int8_ms"]) == (0.5, 0.25, 1.0)
    assert 1e-6 < known["int8_distance"] <= known["distance"]
    assert "tables" not in known
    assert "int8_ms" not in result.metrics["kernels"]["fc"]
    moved = distance(before, run(graph))
    assert 1e-6 < moved < 0.1
    assert result.distance == pytest.approx(moved)
    fxpress.compile(graph, [], x, verify=False).save(tmp_path / "net.fxp")
    loaded = fxpress.load(tmp_path / "net.fxp")
    assert chosen(loaded.graph) == chosen(graph)
    with torch.inference_mode():
        expected = graph(x)
        assert torch.equal(loaded(x), expected)
        assert torch.equal(torch.export.export(graph.module, (x,)).module()(x), expected)
    again = emit(loaded.graph, tables="int8", layout=layout)
    assert again.metrics["kernels"]["conv2"]["kernel"] == "dense-int8"
    graph.module.train()
    graph.module(x).sum().backward()
    assert graph.tensor("conv1.codebook").grad is not None


@pytest.mark.parametrize(
    ("table", "rounded", "kernel"),
    [(0.5, 0.6, "table"), (1.5, 1.2, "dense"), (1.5, 0.5, "dense-int8"), (0.5, 1.2, "table")],
)
def test_the_fastest_of_three(
    graph: Graph, monkeypatch: pytest.MonkeyPatch, compiled_kernels: None, table: float, rounded: float, kernel: str
) -> None:
    timed_8_bits(monkeypatch, table, rounded)
    result = emit(graph, tables="int8", layout="contiguous")
    assert chosen(graph)["conv1"][0] == kernel
    assert result.metrics["kernels"]["conv1"]["int8_ratio"] == rounded


@pytest.mark.parametrize("table", [0.5, 1.5])
def test_8_bits_must_be_as_close_as_the_tables(
    graph: Graph, monkeypatch: pytest.MonkeyPatch, compiled_kernels: None, table: float
) -> None:
    timed_8_bits(monkeypatch, table, 0.25)
    monkeypatch.setattr(kernels, "_is_closer", lambda found: found.layer == "conv2")
    result = emit(graph, tables="int8", layout="contiguous")
    known = result.metrics["kernels"]["conv1"]
    assert known["kernel"] == chosen(graph)["conv1"][0] == ("table" if table < 1 else "dense")
    assert known["reason"].endswith("that of 8 bits is faster and moves the outputs further than the table")
    assert chosen(graph)["conv2"][0] == "dense-int8"


@pytest.mark.parametrize("tables", ["fp32", "int16"])
def test_8_bits_are_for_those_who_ask_for_them(
    graph: Graph, monkeypatch: pytest.MonkeyPatch, compiled_kernels: None, tables: str
) -> None:
    timed_8_bits(monkeypatch, 0.5, 0.25)
    emit(graph, tables=tables, layout="contiguous")
    assert set(chosen(graph).values()) == {("table", tables)}


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_relus_and_pools_become_parts_of_weights_of_8_bits(
    layout: str, monkeypatch: pytest.MonkeyPatch, compiled_kernels: None
) -> None:
    timed_8_bits(monkeypatch, 0.5, 0.25)
    torch.manual_seed(0)
    x = torch.randn(2, 8, 17, 13)
    graph = quantised(Rectified(), x, ("first", "fourth", "fc"))
    expected, costs = graph(x), measure_cost(graph).macs
    emit(graph, tables="int8", layout=layout)
    first, fourth = (submodule(graph.module, name) for name in ("first", "fourth"))
    assert first.kernel == fourth.kernel == "dense-int8"
    assert (first.pool, fourth.pool) == ((3, 3, 2, 2, 0, 0), (3, 2, 3, 2, 1, 0))
    assert distance(graph(x), expected) < 0.1
    assert measure_cost(graph).macs > costs


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("kernel", ["dense", "table"])
def test_still_trains_exports_and_compiles(graph: Graph, kernel: str, layout: str) -> None:
    x = torch.randn(3, 3, 8, 8)
    emit(graph, kernels=kernel, layout=layout)
    module = graph.module
    with torch.inference_mode():
        expected = graph(x)
        exported = torch.export.export(module, (x,)).module()
        assert torch.allclose(exported(x), expected, atol=1e-5)
        assert torch.allclose(torch.compile(module, backend="aot_eager")(x), expected, atol=1e-5)
    module.train()
    module(x).square().mean().backward()
    for name in ("conv1", "conv2", "fc"):
        gradient = graph.tensor(f"{name}.codebook").grad
        assert gradient is not None
        assert gradient.abs().sum() > 0
    torch.optim.SGD(module.parameters(), 0.1).step()
    assert not torch.allclose(module.eval()(x), expected)


@pytest.mark.parametrize("tables", ["fp32", "int8"])
def test_the_file_keeps_the_choice(graph: Graph, tmp_path: Any, tables: str) -> None:
    x = torch.randn(2, 3, 8, 8)
    compiled = fxpress.compile(graph, [{"emit": {"kernels": "table", "tables": tables}}], x)
    compiled.save(tmp_path / "net.fxp")
    loaded = fxpress.load(tmp_path / "net.fxp")
    assert chosen(loaded.graph) == chosen(compiled.graph)
    with torch.inference_mode():
        assert torch.equal(loaded(x), compiled(x))
    assert loaded.report["emit"].metrics["kernels"]["fc"]["kernel"] == "table"


def test_a_layer_called_twice_is_judged_once(compiled_kernels: None) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.fc(x).relu())  # type: ignore[no-any-return]

    graph = quantised(Twice(), torch.randn(2, 8), ("fc",))
    result = emit(graph)
    assert list(result.metrics["kernels"]) == ["fc"]


@pytest.mark.parametrize(("option", "value"), [("kernels", "fast"), ("tables", "int4"), ("tables", 8)])
def test_unknown_values_are_refused(option: str, value: Any) -> None:
    with pytest.raises(OptionError, match=f"pass 'emit', option '{option}': given .*, allowed: "):
        Emit(**{option: value})


class Rectified(nn.Module):
    """A convolution for each thing that may or may not become a part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third, self.fourth = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(4))
        self.hidden, self.fc = nn.Linear(8 * 6, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.first(x).relu(), 3, 2)
        x = nn.functional.max_pool2d(self.second(x).relu(), 2, 1, ceil_mode=True)
        y = self.third(x)
        x = nn.functional.max_pool2d(y.relu() + y, (2, 3), (1, 1), (1, 1), (1, 1))
        x = nn.functional.max_pool2d(self.fourth(x).relu(), [3, 2], stride=[3, 2], padding=[1, 0])
        return self.fc(self.hidden(x.flatten(1)).relu()).relu()  # type: ignore[no-any-return]


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_relus_and_pools_become_parts_of_layers_by_table(layout: str, tmp_path: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8, 17, 13)
    names = ("first", "second", "third", "fourth", "hidden", "fc")
    graph = quantised(Rectified(), x, names)
    expected = graph(x)
    costs = measure_cost(graph).macs
    result = emit(graph, kernels="table", layout=layout)
    assert "5 ReLUs became parts of the layers before them" in result.notes
    assert "2 max pools became parts of the layers before them" in result.notes
    layers = {name: submodule(graph.module, name) for name in names}
    assert [name for name in names if layers[name].relu] == ["first", "second", "fourth", "hidden", "fc"]
    assert [layers[name].pool for name in names[:4]] == [(3, 3, 2, 2, 0, 0), (), (), (3, 2, 3, 2, 1, 0)]
    assert distance(graph(x), expected) < 1e-5
    assert measure_cost(graph).macs == costs
    fxpress.compile(graph, [], x, verify=False).save(tmp_path / "net.fxp")
    loaded = fxpress.load(tmp_path / "net.fxp")
    with torch.inference_mode():
        assert torch.equal(loaded(x), graph(x))
        exported = torch.export.export(graph.module, (x,)).module()
        assert torch.equal(exported(x), graph(x))
    graph.module.train()
    assert distance(graph.module(x), expected) < 1e-5


def test_dense_layers_leave_relus_and_pools_to_torch() -> None:
    x = torch.randn(2, 8, 17, 13)
    graph = quantised(Rectified(), x, ("first", "hidden"))
    emit(graph, kernels="dense")
    assert sum("relu" in str(node.target) for node in graph.nodes) == 6
