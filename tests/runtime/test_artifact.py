"""What is saved comes back: nodes, weights, modes, ties, inputs; and what comes back is a full graph."""

from __future__ import annotations

import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from fxpress.ir.cut import Cut
from fxpress.ir.errors import ArtifactError
from fxpress.ir.graph import Graph
from fxpress.ir.groups import find_groups
from fxpress.ir.trace import trace
from fxpress.ir.verify import prove_cut
from fxpress.runtime.artifact import load, save
from fxpress.runtime.layers import ChannelMask
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding="same"), nn.BatchNorm2d(8, affine=False)
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(x + self.bn2(self.conv2(x)))
        return self.head(x.mean((2, 3)))


class Branches(nn.Module):
    """Split, shuffle, cat, a name that is no identifier, a path with an underscore."""

    def __init__(self) -> None:
        super().__init__()
        self._stem = nn.Conv2d(3, 8, 1)
        self.paths = nn.ModuleDict({"left-3": nn.Conv2d(4, 4, 3, padding=1, groups=2), "2": nn.Conv2d(4, 6, 1)})

    def forward(self, x: Tensor) -> Tensor:
        a, b = self._stem(x).chunk(2, dim=1)
        y = torch.cat([self.paths["left-3"](a), self.paths["2"](b)], 1)
        n, c, h, w = y.shape
        y = y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return F.interpolate(y[:, 1:-1:2], scale_factor=2, mode="bilinear")


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.norm, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        q, k, v = self.qkv(self.norm(x)).reshape(x.shape[0], -1, 3, 2, 4).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, scale=0.5).transpose(1, 2).reshape(x.shape)
        return self.out(F.gelu(y, approximate="tanh")) + x.masked_fill(x > 3, float("inf")).clamp(max=3)


class Dicts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 1)

    def forward(self, image: Tensor, pair: list[Tensor], *, scale: Tensor, names: dict[str, Tensor]) -> dict[str, Any]:
        y = self.conv(image) * scale
        aux = OrderedDict(low=y.sum(), high=(pair[0] + pair[1], [names["a/b"]]))
        return {"out": y, "aux": aux, "none": None}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 11)
        self.head.weight = self.embed.weight
        self.first = nn.Linear(6, 6)
        self.second = self.first
        self.register_buffer("scale", torch.tensor([2, 3], dtype=torch.int8), persistent=False)
        self.register_buffer("keep", torch.tensor([True, False, True, True, False, True]))
        self.register_buffer("empty", torch.zeros(0, 6))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.second(F.relu(self.first(self.embed(ids))))
        x = torch.where(self.keep, x, x * self.scale[0])
        return self.head(torch.cat([x, self.empty.expand(0, 6)[:, None].expand(0, x.shape[1], 6)]))


def _dicts() -> tuple[nn.Module, Any, dict[str, Any]]:
    image, small = torch.randn(2, 1, 4, 4), torch.randn(2, 3)
    return Dicts(), (image, [small, small * 2]), {"scale": torch.tensor(0.5), "names": {"a/b": small}}


CASES: dict[str, Callable[[], tuple[nn.Module, Any, dict[str, Any]]]] = {
    "residual": lambda: (Residual(), torch.randn(2, 3, 8, 8), {}),
    "residual-eval": lambda: (Residual().eval(), torch.randn(2, 3, 8, 8), {}),
    "residual-bf16": lambda: (Residual().bfloat16(), torch.randn(2, 3, 8, 8).bfloat16(), {}),
    "residual-fp16": lambda: (Residual().half(), torch.randn(2, 3, 8, 8).half(), {}),
    "residual-fp64": lambda: (Residual().double(), torch.randn(2, 3, 8, 8).double(), {}),
    "branches": lambda: (Branches(), torch.randn(2, 3, 6, 6), {}),
    "attention": lambda: (Attention(), torch.randn(2, 5, 8), {}),
    "dicts": _dicts,
    "tied": lambda: (Tied(), torch.arange(6).reshape(2, 3), {}),
}


def traced(name: str) -> Graph:
    model, inputs, kwargs = CASES[name]()
    return trace(model, inputs, example_kwargs=kwargs or None)


def same(a: Any, b: Any) -> bool:
    """Equal in structure, type and every bit."""
    left, spec = pytree.tree_flatten(a)
    right, other = pytree.tree_flatten(b)
    return spec == other and all(
        torch.equal(x, y) and x.dtype == y.dtype if isinstance(x, Tensor) else x == y
        for x, y in zip(left, right, strict=True)
    )


def run(graph: Graph, inputs: Graph | None = None) -> Any:
    """Outputs of a graph on the example inputs, its own or those of another one."""
    given = inputs or graph
    torch.manual_seed(3)
    with torch.no_grad():
        return graph(*given.example_args, **given.example_kwargs)


def inputs_of(graph: Graph) -> list[Tensor]:
    return pytree.tree_leaves((graph.example_args, graph.example_kwargs))


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Graph:
    """Each network traced once, with a frozen parameter and a history."""
    graph = traced(request.param)
    next(iter(graph.module.parameters())).requires_grad_(False)
    graph.history.append("some-pass")
    return graph


def test_round_trip(case: Graph, tmp_path: Path) -> None:
    size = save(tmp_path / "m.fxp", case, pipeline={"seed": 1}, report={"rows": [{"macs": 2.5}]})
    loaded = load(tmp_path / "m.fxp")
    back = loaded.graph
    assert size == (tmp_path / "m.fxp").stat().st_size
    assert (loaded.pipeline, loaded.report) == ({"seed": 1}, {"rows": [{"macs": 2.5}]})
    assert [n.format_node() for n in back.nodes] == [n.format_node() for n in case.nodes]
    assert [n.meta for n in back.nodes] == [n.meta for n in case.nodes]
    assert back.module.code == case.module.code
    assert [(t.shape, t.dtype) for t in inputs_of(back)] == [(t.shape, t.dtype) for t in inputs_of(case)]
    assert (back.dynamic_batch, back.dropped, back.history) == (case.dynamic_batch, case.dropped, case.history)
    assert same(run(back, case), run(case))
    save(tmp_path / "m.fxp", case, exact=True)
    exact = load(tmp_path / "m.fxp").graph
    assert same((exact.example_args, exact.example_kwargs), (case.example_args, case.example_kwargs))


def test_tensors_keep_their_kind(case: Graph, tmp_path: Path) -> None:
    save(tmp_path / "m.fxp", case)
    back = load(tmp_path / "m.fxp").graph.module
    for kind in ("named_parameters", "named_buffers"):
        old = dict(getattr(case.module, kind)(remove_duplicate=False))
        new = dict(getattr(back, kind)(remove_duplicate=False))
        assert list(new) == list(old)
        for key, value in old.items():
            assert same(new[key], value)
            assert (type(new[key]), new[key].requires_grad) == (type(value), value.requires_grad)
    assert list(back.state_dict()) == list(case.module.state_dict())
    assert [(p, m.training) for p, m in back.named_modules()] == [
        (p, m.training) for p, m in case.module.named_modules()
    ]


def test_same_graph_gives_the_same_bytes(case: Graph, tmp_path: Path) -> None:
    for file in ("a.fxp", "b.fxp"):
        save(tmp_path / file, case, report={"b": 1, "a": float("nan")})
    loaded = load(tmp_path / "a.fxp")
    save(tmp_path / "c.fxp", loaded.graph, report=loaded.report)
    first = (tmp_path / "a.fxp").read_bytes()
    assert first == (tmp_path / "b.fxp").read_bytes() == (tmp_path / "c.fxp").read_bytes()


def test_ties_are_the_same_objects_and_stored_once(tmp_path: Path) -> None:
    graph = traced("tied")
    save(tmp_path / "m.fxp", graph)
    back = load(tmp_path / "m.fxp").graph.module
    assert back.get_submodule("embed").weight is back.get_submodule("head").weight
    stored = safetensors.torch.load_file(tmp_path / "m.fxp")
    weights = [name for name in stored if name.endswith("weight") and stored[name].shape == (11, 6)]
    assert len(weights) == 1
    assert "scale" not in back.state_dict()
    assert "keep" in back.state_dict()


def test_a_tied_layer_is_one_layer(tmp_path: Path) -> None:
    module = nn.Module()
    module.a = module.b = nn.Linear(3, 3)
    nodes = fx.Graph()
    x = nodes.placeholder("x")
    nodes.output(nodes.call_module("b", (nodes.call_module("a", (x,)),)))
    save(tmp_path / "m.fxp", Graph(fx.GraphModule(module, nodes), (torch.randn(1, 3),)))
    back = load(tmp_path / "m.fxp").graph
    assert back.module.a is back.module.b
    assert len(list(back.module.parameters())) == 2
    assert same(run(back), module.a(module.a(back.example_args[0])))


def test_safetensors_opens_it(tmp_path: Path) -> None:
    graph = traced("residual")
    save(tmp_path / "m.fxp", graph)
    with safetensors.safe_open(tmp_path / "m.fxp", "pt") as file:
        assert file.metadata()["format"] == "fxpress"
        assert torch.equal(file.get_tensor("conv1.weight"), graph.tensor("conv1.weight"))


def test_modes_per_layer(tmp_path: Path) -> None:
    graph = traced("residual")
    graph.module.get_submodule("bn1").eval()
    save(tmp_path / "m.fxp", graph)
    back = load(tmp_path / "m.fxp").graph.module
    assert back.training
    assert back.get_submodule("bn2").training
    assert not back.get_submodule("bn1").training


def test_channels_last_weights_stay_so(tmp_path: Path) -> None:
    graph = traced("residual")
    graph.module.to(memory_format=torch.channels_last)
    save(tmp_path / "m.fxp", graph)
    weight = load(tmp_path / "m.fxp").graph.tensor("conv2.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(weight, graph.tensor("conv2.weight"))


def test_own_layers(tmp_path: Path) -> None:
    graph = traced("residual")
    graph.module.add_module("mask", ChannelMask(8))
    with torch.no_grad():
        graph.module.mask.mask[2] = 0
    with graph.edit("insert") as nodes:
        bn = next(n for n in nodes.nodes if n.target == "bn1")
        with nodes.inserting_after(bn):
            mask = nodes.call_module("mask", ())
        bn.replace_all_uses_with(mask)
        mask.args, mask.meta = (bn,), dict(bn.meta)
    save(tmp_path / "m.fxp", graph)
    back = load(tmp_path / "m.fxp").graph
    assert type(back.module.mask) is ChannelMask
    assert same(run(back, graph), run(graph))
    assert {n.meta.get("author") for n in back.nodes} == {None, "insert"}


# What comes back is alive ---------------------------------------------------------------------------------------------


def test_a_loaded_graph_trains(tmp_path: Path) -> None:
    save(tmp_path / "m.fxp", traced("residual"))
    graph = load(tmp_path / "m.fxp").graph
    optimizer = torch.optim.Adam(graph.module.parameters(), lr=0.03)
    x, y = torch.randn(16, 3, 8, 8), torch.randint(5, (16,))
    mean, losses = graph.tensor("bn1.running_mean").clone(), []
    for _ in range(30):
        loss = F.cross_entropy(graph(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert not torch.equal(mean, graph.tensor("bn1.running_mean"))


def test_a_loaded_graph_exports_and_compiles(tmp_path: Path) -> None:
    save(tmp_path / "m.fxp", traced("residual-eval"))
    graph = load(tmp_path / "m.fxp").graph
    expected = run(graph)
    exported = torch.export.export(graph.module, graph.example_args).module()
    compiled = torch.compile(graph.module, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(exported(*graph.example_args), expected)
        torch.testing.assert_close(compiled(*graph.example_args), expected)
    assert same(run(trace(graph.module, graph.example_args)), expected)


def test_a_loaded_graph_can_be_edited_and_copied(tmp_path: Path) -> None:
    save(tmp_path / "m.fxp", traced("residual-eval"))
    graph = load(tmp_path / "m.fxp").graph
    twin = graph.copy()
    with graph.edit("test") as nodes:
        relu = next(n for n in nodes.nodes if "relu" in str(n.target))
        relu.replace_all_uses_with(relu.args[0])
    assert graph.history == ["test"]
    assert not same(run(graph), run(twin))


@pytest.mark.parametrize("name", ["residual-eval", "branches"])
def test_a_loaded_graph_is_cut_like_the_one_that_was_saved(name: str, tmp_path: Path) -> None:
    graph = traced(name)
    graph.module.eval()
    save(tmp_path / "m.fxp", graph)
    results = []
    for one in (graph, load(tmp_path / "m.fxp").graph):
        groups = one.analyse(find_groups)
        cut = Cut(groups, np.concatenate([group.classes[::2][: group.channels - 1] for group in groups.groups]))
        candidate = cut.apply("cut")
        assert prove_cut(cut, candidate) < 1e-4  # relative: whether the drawn inputs hit a small output is chance
        results.append(candidate)
    assert sum(p.numel() for p in results[1].module.parameters()) < sum(p.numel() for p in graph.module.parameters())
    assert same(run(results[1], graph), run(results[0]))
    save(tmp_path / "cut.fxp", results[1])
    again = load(tmp_path / "cut.fxp").graph
    again.lint()
    assert again.history == ["cut"]
    assert same(run(again, graph), run(results[0]))


def test_the_batch_stays_dynamic(tmp_path: Path) -> None:
    graph = traced("residual-eval")
    save(tmp_path / "m.fxp", graph)
    x = torch.randn(5, 3, 8, 8)
    assert same(load(tmp_path / "m.fxp").graph(x), graph(x))


def test_a_fresh_process_needs_no_model_source(tmp_path: Path) -> None:
    graph = traced("residual-eval")
    save(tmp_path / "m.fxp", graph)
    code = (
        "import sys, torch; from fxpress.runtime.artifact import load; g = load(sys.argv[1]).graph;"
        "torch.save((g.example_args, g(*g.example_args)), sys.argv[2])"
    )
    command = [sys.executable, "-I", "-c", code, str(tmp_path / "m.fxp"), str(tmp_path / "out.pt")]
    subprocess.run(command, check=True, cwd=tmp_path)
    inputs, output = torch.load(tmp_path / "out.pt", weights_only=True)
    assert same(inputs, load(tmp_path / "m.fxp").graph.example_args)  # drawn, the same everywhere
    assert same(output.detach(), graph(*inputs).detach())


# Reports and refusals -------------------------------------------------------------------------------------------------


def test_reports_may_hold_special_numbers(tmp_path: Path) -> None:
    report = {"rows": [{"distance": float("inf"), "text": "two\nlines é", "none": None, "flag": True, "n": 2**60}]}
    save(tmp_path / "m.fxp", traced("residual"), report=report)
    assert load(tmp_path / "m.fxp").report == report


def test_control_characters_do_not_reach_a_terminal(tmp_path: Path) -> None:
    save(tmp_path / "m.fxp", traced("residual"), report={"note": "\x1b[2J"})
    assert load(tmp_path / "m.fxp").report == {"note": "\ufffd[2J"}


@pytest.mark.parametrize("bad", [{"model": nn.Linear(1, 1)}, {1: 2}, {"float": "nan"}, {"deep": {"x": 1j}}])
def test_reports_are_json(tmp_path: Path, bad: Any) -> None:
    with pytest.raises(ArtifactError, match="report"):
        save(tmp_path / "m.fxp", traced("residual"), report=bad)
    assert not list(tmp_path.iterdir())


def test_a_layer_outside_of_the_dialect_is_refused(tmp_path: Path) -> None:
    class Mine(nn.Linear):
        pass

    nodes = fx.Graph()
    nodes.output(nodes.call_module("mine", (nodes.placeholder("x"),)))
    module = nn.Module()
    module.mine = Mine(2, 2)
    with pytest.raises(ArtifactError, match=r"m\.fxp.*Mine"):
        save(tmp_path / "m.fxp", Graph(fx.GraphModule(module, nodes), (torch.ones(1, 2),)))


def test_a_function_outside_of_the_dialect_is_refused(tmp_path: Path) -> None:
    nodes = fx.Graph()
    nodes.output(nodes.call_function(print, (nodes.placeholder("x"),)))
    with pytest.raises(ArtifactError, match="print"):
        save(tmp_path / "m.fxp", Graph(fx.GraphModule(nn.Module(), nodes), (torch.ones(1, 2),)))


def test_a_layer_cut_without_its_configuration_is_refused(tmp_path: Path) -> None:
    graph = traced("residual")
    graph.set_tensor("conv1.weight", torch.zeros(7, 3, 3, 3))
    with pytest.raises(ArtifactError, match=r"conv1\.weight.*7, 3, 3, 3.*8, 3, 3, 3"):
        save(tmp_path / "m.fxp", graph)
