"""The streaming driver: which tensors a visitor sees, how often, and what a bad loader gets."""

from __future__ import annotations

import io

import pytest
import torch
from fxpress.ir.errors import DataError, OptionError
from fxpress.ir.graph import Graph
from fxpress.ir.trace import trace
from fxpress.passes.analyse.progress import counted
from fxpress.passes.analyse.streaming import stream, stream_each
from rich.console import Console
from torch import Tensor, nn


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 3)

    def forward(self, image: Tensor, scale: Tensor | None = None) -> Tensor:
        x = torch.relu(self.norm(self.conv(image)))
        x = self.drop(x if scale is None else x * scale[:, None, None, None])
        return self.head(x.mean((2, 3)))


@pytest.fixture
def model() -> Small:
    model = Small()
    nn.init.uniform_(model.norm.weight, 0.5, 2.0)
    return model


@pytest.fixture
def graph(model: Small) -> Graph:
    return trace(model, torch.randn(2, 2, 5, 5))


def batches(*sizes: int, scale: bool = False) -> list[tuple[object, Tensor]]:
    pairs = [(torch.randn(n, 2, 5, 5), torch.zeros(n, dtype=torch.long)) for n in sizes]
    return [(((x, torch.rand(len(x))) if scale else x), y) for x, y in pairs]


def test_the_visitor_sees_what_the_model_computes(graph: Graph, model: Small) -> None:
    data, seen = batches(3, 2), list[dict[str, Tensor]]()
    count = stream(graph, data, seen.append, nodes=["image", "conv", "relu", "head"])
    assert count == 5
    assert [sorted(found) for found in seen] == [["conv", "head", "image", "relu"]] * 2
    model.eval()
    for (x, _), found in zip(data, seen, strict=True):
        torch.testing.assert_close(found["image"], x)
        torch.testing.assert_close(found["conv"], model.conv(x))
        torch.testing.assert_close(found["relu"], model.norm(model.conv(x)).relu())
        torch.testing.assert_close(found["head"], model(x))
        assert not any(tensor.requires_grad for tensor in found.values())


def test_each_comes_in_the_order_of_the_network(graph: Graph) -> None:
    seen = list[str]()
    stream_each(graph, batches(1, 1), lambda node, _: seen.append(node), nodes=["head", "conv"])
    assert seen == ["conv", "head"] * 2


def test_modes_statistics_and_nodes_stay(graph: Graph) -> None:
    graph.module.train()
    mean, nodes = graph.module.norm.running_mean.clone(), [node.name for node in graph.nodes]
    outputs = list[Tensor]()
    for _ in range(2):
        stream(
            graph,
            [(torch.ones(2, 2, 5, 5), torch.zeros(2).long())],
            lambda f: outputs.append(f["head"]),
            nodes=["head"],
        )
    assert torch.equal(*outputs)  # no dropout
    assert graph.module.training
    assert graph.module.norm.training
    assert torch.equal(graph.module.norm.running_mean, mean)
    assert [node.name for node in graph.nodes] == nodes


@pytest.mark.parametrize("form", ["tuple", "dict in another order"])
def test_several_inputs(model: Small, form: str) -> None:
    graph = trace(model, (torch.randn(2, 2, 5, 5), torch.rand(2)))
    if form != "tuple":
        graph = trace(model, {"image": torch.randn(2, 2, 5, 5), "scale": torch.rand(2)})
    data = batches(3, scale=True)
    x, scale = data[0][0]
    if form != "tuple":
        data = [({"scale": scale, "image": x}, data[0][1])]
    seen = list[dict[str, Tensor]]()
    stream(graph, data, seen.append, nodes=["head"])
    torch.testing.assert_close(seen[0]["head"], model.eval()(x, scale))


@pytest.mark.parametrize(("limit", "sizes"), [(1, [1]), (3, [3]), (4, [3, 1]), (5, [3, 2]), (99, [3, 2])])
def test_limit_cuts_the_last_batch(graph: Graph, limit: int, sizes: list[int]) -> None:
    seen = list[int]()
    count = stream(graph, batches(3, 2), lambda found: seen.append(len(found["head"])), nodes=["head"], limit=limit)
    assert (seen, count) == (sizes, sum(sizes))


def test_nothing_is_read_beyond_the_limit(graph: Graph) -> None:
    def endless():
        while True:
            yield batches(2)[0]

    assert stream(graph, endless(), lambda _: None, nodes=["head"], limit=5) == 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_inputs_take_the_precision_of_the_network(model: Small, dtype: torch.dtype) -> None:
    graph = trace(model.to(dtype), torch.randn(2, 2, 5, 5, dtype=dtype))
    seen = list[torch.dtype]()
    stream(graph, batches(2), lambda found: seen.append(found["conv"].dtype), nodes=["conv"])
    assert seen == [dtype]


class NoLength:
    def __iter__(self):
        yield from batches(2, 1)


def test_loader_without_length(graph: Graph) -> None:
    assert stream(graph, NoLength(), lambda _: None, nodes=["head"]) == 3


@pytest.mark.parametrize(
    ("loader", "what"),
    [
        ([], "the calibration loader .* is empty"),
        ([torch.zeros(2)], "not a pair"),
        ([(torch.full((1, 2, 5, 5), torch.nan), torch.zeros(1).long())], "NaN"),
        ([(torch.zeros(1, 7, 5, 5), torch.zeros(1).long())], r"cannot take batch 0 of calibration .*\(1, 7, 5, 5\)"),
    ],
)
def test_bad_loaders(graph: Graph, loader: list[object], what: str) -> None:
    with pytest.raises(DataError, match=what):
        stream(graph, loader, lambda _: None, nodes=["head"])


def test_unknown_node_and_bad_limit(graph: Graph) -> None:
    with pytest.raises(OptionError, match=r"no node or module 'haed'.*'head'"):
        stream(graph, batches(1), lambda _: None, nodes=["haed"])
    with pytest.raises(OptionError, match="limit of 0"):
        stream(graph, batches(1), lambda _: None, nodes=["head"], limit=0)


def test_errors_of_the_visitor_are_its_own(graph: Graph) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match=r"^mine$"):
        stream(graph, batches(1), fail, nodes=["conv"])


def test_progress_is_shown_on_terminals_only() -> None:
    for terminal in (True, False):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
        with counted(console, "statistics", 2) as step:
            step(16)
            step(16)
        text = console.file.getvalue()
        assert ("2/2" in text and "images/s" in text) is terminal
