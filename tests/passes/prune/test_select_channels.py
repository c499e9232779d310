"""select-channels: lands on the budget, lets channels return, stops, resumes, and hands over to prune-channels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fxpress.ir.groups import find_groups
from fxpress.ir.verify import distance, run
from fxpress.passes.base import Context, PassResult
from fxpress.passes.pipeline import Pipeline
from fxpress.passes.prune.prune_channels import PruneChannels
from fxpress.passes.prune.select_channels import SelectChannels
from fxpress.passes.prune.selecting.places import place_masks
from fxpress.passes.prune.selecting.schedule import Schedule
from fxpress.passes.prune.selecting.selector import Rules, Selector
from fxpress.passes.runner import run_pass
from fxpress.runtime.layers.selection_mask import SelectionMask
from fxpress.runtime.training import EpochResult, TrainSettings, train
from torch import Tensor, nn
from torch.nn import functional

import fxpress
from fxpress import BudgetError, Data, Graph, OptionError, trace


class Net(nn.Module):
    """A stem, a residual block at half the resolution, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.one, self.norm1 = nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.two, self.norm2 = nn.Conv2d(12, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.stem(x)))
        x = functional.max_pool2d(x, 2)
        x = functional.relu(self.norm2(self.two(functional.relu(self.norm1(self.one(x))))) + x)
        return self.head(x.mean((2, 3)))


def batches(count: int = 6, size: int = 16, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Three classes of textures: stripes along, across, and none."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        targets = torch.randint(0, 3, (size,), generator=generator)
        images = torch.randn(size, 2, 6, 6, generator=generator) * 0.5
        images[targets == 0, 0, ::2] += 1
        images[targets == 1, 1, :, ::2] += 1
        made.append((images, targets))
    return made


DATA = Data(train=batches(), val=batches(2, seed=1))


@pytest.fixture(scope="module")
def trained() -> Graph:
    torch.manual_seed(0)
    graph = trace(Net().eval(), torch.randn(2, 2, 6, 6))
    train(graph.module, DATA, settings=TrainSettings(epochs=8, lr=0.05, keep="last"))
    return graph


def select(trained: Graph, context: dict[str, Any] | None = None, **options: Any) -> tuple[Graph, PassResult]:
    graph = fxpress.passes.clone.clone_graph(trained)
    one = SelectChannels(**{"budget": {"macs": 0.5}, "epochs": 4, "lr": 0.02, **options})
    setting = {"data": DATA, "seed": 3, "teacher": trained.module, **(context or {})}
    return graph, run_pass(one, graph, Context(original=trained, **setting))[0]


def cut_to(graph: Graph, trained: Graph) -> float:
    """Cut what is off; the share of MACs that remains. The outputs must not move."""
    outputs = run(graph)
    run_pass(PruneChannels(masks="learned"), graph, Context(original=trained))
    assert distance(outputs, run(graph)) < 1e-5
    assert not any(isinstance(layer, SelectionMask) for layer in graph.module.modules())
    return graph.analyse(find_groups).cost().macs / trained.analyse(find_groups).cost().macs


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"knowledge": "none", "cut": "hard"},
        {"knowledge": "logits", "score": "magnitude", "init": "normal", "sparsity": 1.0, "alive": "factors"},
        {"knowledge": "hint", "init": "uniform", "threshold": "median", "sparsity": 3.0},
        {"epochs": 1, "init": "unit", "places": ["relu_*"], "optimizer": "adamw", "lr": 0.002, "free": 0},
    ],
    ids=["default", "hard", "magnitude", "median", "one epoch"],
)
def test_lands_on_the_budget_whatever_the_way(trained: Graph, options: dict[str, Any]) -> None:
    graph, result = select(trained, **options)
    rows = result.metrics["selection"]
    assert 0.4 < rows[-1]["macs"] <= 0.5  # widths of 8 and 12 are coarse
    assert len(rows) == result.metrics["steps"] / 6 == options.get("epochs", 4)
    assert all(2 <= row["channels"] <= 20 for row in rows)
    assert cut_to(graph, trained) == pytest.approx(rows[-1]["macs"])


def test_what_is_reported(trained: Graph) -> None:
    _, result = select(trained, interval=0.25)
    rows = result.metrics["selection"]
    assert [row["epoch"] for row in rows] == pytest.approx([k + 1 - 0.5 / 6 for k in range(4)])
    assert [row["macs"] for row in rows] == sorted((row["macs"] for row in rows), reverse=True)
    assert rows[0]["macs"] > 0.5
    assert rows[0]["lam"] > 0
    assert rows[-1]["lam"] == 0  # nothing pulls at the budget
    assert sum(row["cut"] - row["returned"] for row in rows) == 20 - rows[-1]["channels"]
    assert "of 20 channels selected, MACs 0.4" in result.notes[0] or "MACs 0.500" in result.notes[0]
    assert result.notes[1] == "6 batches for the statistics of batch norms"


def test_both_metrics_and_widths(trained: Graph) -> None:
    graph, _ = select(trained, budget={"macs": 0.7, "params": 0.5}, round_to=2, floor=3, recalibrate=0)
    cut_to(graph, trained)
    before, after = (one.analyse(find_groups).cost() for one in (trained, graph))
    assert after.macs <= 0.7 * before.macs
    assert after.params <= 0.5 * before.params
    widths = [graph.tensor(f"{layer}.weight").shape[0] for layer in ("stem", "one", "two")]
    assert all(width % 2 == 0 and width >= 4 for width in widths)


def test_the_teacher_stays_and_masks_have_no_weight_decay(trained: Graph) -> None:
    before = {name: value.clone() for name, value in trained.module.state_dict().items()}
    select(trained, epochs=1)
    assert all(torch.equal(value, before[name]) for name, value in trained.module.state_dict().items())
    masks = place_masks(fxpress.passes.clone.clone_graph(trained), ignore=(), init="ones", alive="layers", seed=0)
    selector = Selector(masks, Rules({"macs": 1.0}, lr_scale=3.0), Schedule(1, 0.1, 0.6, 0.2, 1.0))
    (group,) = selector.parameter_groups(nn.Identity())
    assert group["weight_decay"] == 0
    assert group["lr_scale"] == 3
    assert {id(p) for p in group["params"]} == {id(p) for p in masks.parameters}


# -- the reversible cut ------------------------------------------------------------------------------------------------


def informative() -> Graph:
    """One layer of six channels of which the first alone tells the classes apart; the head reads all."""

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(2, 6, 1, bias=False), nn.BatchNorm2d(6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(functional.relu(self.norm(self.conv(x))).mean((2, 3)))

    model = One()
    with torch.no_grad():
        model.conv.weight.zero_()
        model.conv.weight[0, 0] = 1.0  # plane 0 holds the class, plane 1 is noise
        model.conv.weight[1:, 1] = torch.tensor([1.0, -1.0, 0.8, -0.8, 1.2])[:, None, None]
        model.head.weight.copy_(torch.tensor([[-2.0], [2.0]]) * torch.tensor([1.0, 0.1, 0.1, 0.1, 0.1, 0.1]))
    return trace(model.eval(), torch.randn(2, 2, 3, 3))


def telling(count: int = 10) -> Data:
    generator, made = torch.Generator().manual_seed(0), []
    for _ in range(count):
        targets = torch.randint(0, 2, (32,), generator=generator)
        images = torch.randn(32, 2, 3, 3, generator=generator)
        images[:, 0] = (targets * 2.0 - 1)[:, None, None] + 0.3 * images[:, 0]
        made.append((images, targets))
    return Data(train=made)


@pytest.mark.parametrize(
    ("score", "alive"),
    [("saliency", "layers"), ("magnitude", "layers"), ("saliency", "factors"), ("saliency", "none")],
)
def test_an_informative_channel_that_was_cut_returns(score: Any, alive: Any) -> None:
    graph = informative()
    masks = place_masks(graph, ignore=(), init="ones", alive=alive, seed=0)
    (group,) = masks.eligible
    on = np.ones(masks.groups.count, dtype=bool)
    on[group.classes[[0, 5]]] = False  # the wrong one goes
    masks.switch(on)
    limits = {"macs": masks.groups.cost().macs * 4 / 6}
    selector = Selector(masks, Rules(limits, score, stable=None), Schedule(4, 0.0, 0.01, 0.0, 0.5))
    train(graph.module, telling(), settings=TrainSettings(epochs=4, lr=0.2, keep="last"), callbacks=[selector])
    assert bool(masks.kept()[group.classes[0]]) is (alive != "none")
    assert (sum(row["returned"] for row in selector.history) > 0) is (alive != "none")
    assert masks.kept()[group.classes].sum() == 4


def test_a_channel_that_is_off_goes_on_learning() -> None:
    graph = informative()
    masks = place_masks(graph, ignore=(), init="ones", alive="layers", seed=0)
    (group,) = masks.eligible
    on = np.ones(masks.groups.count, dtype=bool)
    on[group.classes[0]] = False
    masks.switch(on)
    before = graph.tensor("conv.weight")[0].clone(), graph.tensor("norm.weight")[0].clone()
    train(graph.module, telling(2), settings=TrainSettings(epochs=1, weight_decay=0.0, keep="last"))
    assert not torch.equal(graph.tensor("conv.weight")[0], before[0])
    assert not torch.equal(graph.tensor("norm.weight")[0], before[1])
    assert masks.parameters[0][0] != 1


def test_importance_does_not_change_when_a_factor_moves_into_the_norm(trained: Graph) -> None:
    found = []
    for factor in (1.0, 0.25):
        graph = fxpress.passes.clone.clone_graph(trained)
        masks = place_masks(graph, ignore=(), init="ones", alive="layers", seed=0)
        node = next(n for n in graph.nodes if isinstance(graph.layer(n), SelectionMask) and "one" in str(n.target))
        with torch.no_grad():
            graph.layer(node).mask.mul_(factor)  # type: ignore[union-attr]
            graph.tensor("norm1.weight").div_(factor)
            graph.tensor("norm1.bias").div_(factor)
        selector = Selector(masks, Rules({"macs": 1.0}), Schedule(1, 0.5, 0.6, 0.2, 1.0))
        inputs, targets = DATA.train[0]  # type: ignore[index]
        functional.cross_entropy(graph.module(inputs), targets).backward()
        selector.after_step(0.0, 0.1)
        found.append(selector.importance()[masks.selectable])
    assert np.allclose(*found, rtol=1e-4)


def test_a_hard_cut_comes_at_once_and_stays(trained: Graph) -> None:
    _, result = select(trained, cut="hard", interval=0.25)
    rows = result.metrics["selection"]
    assert len({row["macs"] for row in rows}) == 1
    assert [row["returned"] for row in rows] == [0] * 4
    assert [row["cut"] for row in rows[1:]] == [0] * 3


# -- the run -----------------------------------------------------------------------------------------------------------


def test_stops_when_all_is_settled(trained: Graph) -> None:
    _, result = select(trained, epochs=12, free=0.0, ramp=0.1, stable=2, interval=0.5)
    rows = result.metrics["selection"]
    assert len(rows) < 12
    assert [row["cut"] + row["returned"] for row in rows[-2:]] == [0, 0]
    assert rows[-3]["cut"] + rows[-3]["returned"] > 0
    _, longer = select(trained, epochs=6, free=0.0, ramp=0.1, stable=None, interval=0.5)
    assert len(longer.metrics["selection"]) == 6


def test_does_not_stop_above_the_budget(trained: Graph) -> None:
    graph = fxpress.passes.clone.clone_graph(trained)
    masks = place_masks(graph, ignore=(), init="ones", alive="layers", seed=0)
    selector = Selector(masks, Rules({"macs": 1.0}, stable=1), Schedule(9, 0.1, 0.6, 0.2, 1.0))
    assert not any(selector.after_epoch(EpochResult(0, 0)) for _ in range(3))
    met = Selector(masks, Rules({"macs": masks.groups.cost().macs}, stable=2), Schedule(9, 0.1, 0.6, 0.2, 1.0))
    assert [met.after_epoch(EpochResult(0, 0)) for _ in range(2)] == [False, True]


class Interrupted(list):  # type: ignore[type-arg]
    """Breaks off in its third epoch."""

    epochs = 0

    def __iter__(self) -> Any:
        self.epochs += 1
        for index, batch in enumerate(super().__iter__()):
            if self.epochs == 3 and index == 4:
                raise KeyboardInterrupt
            yield batch


def test_a_resumed_run_ends_as_an_uninterrupted_one(trained: Graph, tmp_path: Path) -> None:
    options = {"checkpoint_every": 2, "interval": 0.5}
    expected, whole = select(trained, {"workdir": tmp_path / "whole"}, **options)
    broken = {"workdir": tmp_path / "broken", "data": Data(train=Interrupted(batches()))}
    with pytest.raises(KeyboardInterrupt):
        select(trained, broken, **options)
    graph, result = select(trained, {"workdir": tmp_path / "broken"}, **options)
    for name, value in expected.module.state_dict().items():
        assert torch.equal(graph.module.state_dict()[name], value), name
    assert result.metrics["selection"] == whole.metrics["selection"]


def test_the_pipeline_that_comes_with_it(trained: Graph, repository: Path) -> None:
    pipeline = Pipeline.load(repository / "passes/pipelines/self-selection.yaml")
    names = [one.name for one in pipeline]
    assert names == ["select-channels", "prune-channels", "distill", "emit"]
    shorter = [
        {n: {**o.settings(), **({"epochs": 2} if "epochs" in type(o).model_fields else {})}}
        for n, o in zip(names, pipeline, strict=True)
    ]
    compiled = fxpress.compile(trained, shorter, None, data=DATA)
    select_row, prune_row = compiled.report.rows[1:3]
    assert prune_row.macs <= 0.5 * select_row.macs
    assert prune_row.accuracy == select_row.accuracy
    assert (prune_row.distance or 0) < 1e-5


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs option 'budget'"),
        ({"budget": {"latency": 0.5}}, "given 'latency', allowed: 'macs', 'params'"),
        ({"budget": {"macs": 0.5}, "free": 0.7}, "'free' 0.7 must be below 'ramp' 0.6"),
        ({"budget": {"macs": 0.5}, "ramp": 0.9}, "at most 1 - 'settle' = 0.8"),
        ({"budget": {"macs": 0.5}, "knowledge": "wisdom"}, "'attention' or 'hint' or 'logits' or 'none'"),
        ({"budget": {"macs": 0.5}, "keep": "best"}, "allowed: 'last'"),
    ],
)
def test_options_that_are_not_allowed(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        SelectChannels(**options)


def test_a_budget_below_the_least(trained: Graph) -> None:
    with pytest.raises(BudgetError, match=r"macs: .* allowed, .* is the least .* Raise the budget"):
        select(trained, budget={"macs": 0.1}, floor=6)


# -- several processes -------------------------------------------------------------------------------------------------

SCRIPT = """
import os, sys, torch
sys.path.insert(0, sys.argv[2])
torch.set_num_threads(1)
from test_select_channels import DATA, Net, select, trace
torch.manual_seed(0)
graph, result = select(trace(Net().eval(), torch.randn(2, 2, 6, 6)), epochs=2, interval=0.5)
rank = os.environ["RANK"]
torch.save({"state": graph.module.state_dict(), "rows": result.metrics["selection"]}, f"{sys.argv[1]}/{rank}.pt")
"""


@pytest.mark.slow
def test_two_processes_select_the_same(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, str(tmp_path / "script.py"), str(tmp_path), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env={**os.environ})
    assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert one["rows"] == two["rows"]
    assert one["rows"][-1]["macs"] <= 0.5
    for name, value in one["state"].items():
        assert torch.equal(value, two["state"][name]), name
