"""The parts of select-channels: where masks stand, what a class weighs, which threshold meets a budget, and when."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from fxpress.ir.groups import find_groups
from fxpress.ir.verify import distance, run
from fxpress.passes.base import Context
from fxpress.passes.emit.emit import Emit
from fxpress.passes.prune.insert_masks import InsertMasks
from fxpress.passes.prune.prune_channels import PruneChannels
from fxpress.passes.prune.selecting.masks import ClassMasks
from fxpress.passes.prune.selecting.places import DRAWS, place_masks
from fxpress.passes.prune.selecting.schedule import Schedule
from fxpress.passes.prune.selecting.threshold import HYSTERESIS, least, savings, select, within
from fxpress.passes.runner import run_pass
from fxpress.runtime import artifact
from fxpress.runtime.layers.selection_mask import SelectionMask
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from fxpress import CutError, Graph, trace


def conv(i: int, o: int, kernel: int = 3, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(i, o, kernel, padding=kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(o), nn.ReLU()
    )


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = conv(width, 6), conv(6, width)[:2]

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.two(self.one(x)) + x)


class Residual(nn.Module):
    """Two stages; the shortcut between them pads channels with zeros, as in CIFAR ResNets."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stage1, self.stage2 = conv(3, 4), nn.Sequential(Block(4), Block(4)), Block(8)
        self.widen, self.head = conv(4, 8)[:2], nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage1(self.stem(x))
        x = functional.relu(self.widen(x) + functional.pad(x, (0, 0, 0, 0, 2, 2)))
        return self.head(self.stage2(x).mean((2, 3)))


class Vgg(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(conv(3, 6), nn.MaxPool2d(2), conv(6, 8), conv(8, 6), nn.Flatten(), nn.Linear(6 * 16, 5))


class Mobile(nn.Module):
    """An inverted bottleneck with a depthwise convolution, and a residual around it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.expand, self.depthwise = conv(3, 4), conv(4, 12, 1), conv(12, 12, 3, 12)
        self.project, self.head = conv(12, 4, 1)[:2], nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.project(self.depthwise(self.expand(x)))).mean((2, 3)))


class Dense(nn.Module):
    """DenseNet: norms read concatenations, convolutions write into them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(n) for n in (4, 8, 12))
        self.convs = nn.ModuleList(nn.Conv2d(n, 4, 3, padding=1) for n in (4, 8))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, layer in zip(self.norms, self.convs, strict=False):
            x = torch.cat([x, layer(norm(x).relu())], 1)
        return self.head(self.norms[2](x).relu().mean((2, 3)))


NETWORKS = {"residual": Residual, "vgg": Vgg, "mobile": Mobile, "dense": Dense}


def build(name: str, dtype: torch.dtype = torch.float64) -> Graph:
    """A network whose norms have large shifts, so that zeros must be real."""
    torch.manual_seed(1)
    model = NETWORKS[name]()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    return trace(model.to(dtype).eval(), torch.randn(2, 3, 8, 8, dtype=dtype))


def place(graph: Graph, **options: object) -> ClassMasks:
    return place_masks(graph, **{"ignore": (), "init": "ones", "alive": "layers", "seed": 0, **options})


def behind(graph: Graph) -> dict[str, str]:
    """Path of the layer before each mask → path of the mask."""
    nodes = [node for node in graph.nodes if isinstance(graph.layer(node), SelectionMask)]
    return {str(node.args[0].target): str(node.target) for node in nodes}


# -- places ------------------------------------------------------------------------------------------------------------


def test_a_stage_shares_a_mask_and_inner_convolutions_have_their_own() -> None:
    graph = build("residual")
    outputs = run(graph)
    place(graph)
    found = behind(graph)
    assert found["stem.1"] == found["stage1.0.two.1"] == found["stage1.1.two.1"]
    assert found["widen.1"] == found["stage2.two.1"] != found["stem.1"]
    inner = {found[f"{path}.one.1"] for path in ("stage1.0", "stage1.1", "stage2")}
    assert len(inner) == 3
    assert len(set(found.values())) == 5
    assert torch.equal(run(graph), outputs)  # masks of ones


def test_no_mask_where_only_norms_read() -> None:
    graph = build("dense")
    place(graph)
    assert set(behind(graph)) == {"norms.0", "norms.1", "norms.2"}


def test_depthwise_convolutions_share_the_mask_of_what_they_read() -> None:
    graph = build("mobile")
    place(graph)
    found = behind(graph)
    assert found["expand.1"] == found["depthwise.1"]
    assert found["stem.1"] == found["project.1"]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_hard_cut_leaves_the_outputs(name: str, dtype: torch.dtype) -> None:
    graph = build(name, dtype)
    masks = place(graph, init="uniform")
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for mask in masks.parameters:
            mask.mul_(torch.where(torch.rand(mask.shape) < 0.3, -1, 1))  # signs are learned too
    cost = masks.groups.cost()
    choice = select(masks, rng.random(masks.groups.count), {"macs": 0.5 * cost.macs})
    assert (~choice.kept).sum() >= 3
    masks.switch(choice.kept)
    outputs = run(graph)
    result, _ = run_pass(PruneChannels(masks="learned"), graph, Context(original=graph.copy()))
    assert distance(outputs, run(graph)) < (1e-12 if dtype == torch.float64 else 1e-5)
    assert result.metrics["macs"] == masks.groups.cost(choice.kept).macs <= 0.5 * cost.macs
    assert not any(isinstance(layer, SelectionMask) for layer in graph.module.modules())


def test_emit_folds_masks_that_were_not_cut() -> None:
    graph = build("residual")
    masks = place(graph, init="normal")
    kept = np.ones(masks.groups.count, dtype=bool)
    kept[masks.eligible[0].classes[:2]] = False
    masks.switch(kept)
    outputs = run(graph)
    run_pass(Emit(layout="contiguous"), graph, Context(original=graph.copy()))
    assert not any(isinstance(layer, SelectionMask) for layer in graph.module.modules())
    assert distance(outputs, run(graph)) < 1e-12


def test_cuts_survive_a_file_and_another_cut(tmp_path) -> None:
    graph = build("residual")
    masks = place(graph, init="unit")
    kept = np.ones(masks.groups.count, dtype=bool)
    kept[[group.classes[0] for group in masks.eligible]] = False
    masks.switch(kept)
    outputs = run(graph)
    artifact.save(tmp_path / "masked.fxp", graph, exact=True)
    loaded = artifact.load(tmp_path / "masked.fxp").graph
    assert torch.equal(run(loaded), outputs)
    run_pass(PruneChannels(ratio=0.25, floor=3), loaded, Context(original=loaded.copy()))  # cuts through the masks
    run_pass(PruneChannels(masks="learned"), loaded, Context(original=loaded.copy()))
    assert loaded.module(torch.randn(2, 3, 8, 8, dtype=torch.float64)).shape == (2, 5)


def test_masks_of_insert_masks_are_taken_over_with_what_they_leave_out() -> None:
    graph = build("residual")
    run_pass(InsertMasks(ignore=["stage1.0.one.0"]), graph, Context(original=graph.copy()))
    masks = place(graph)
    assert "stage1.0.one.1" not in behind(graph)
    spared = next(group for group in masks.groups.groups if group.name == "stage1.0.one.0")
    assert not masks.selectable[spared.classes].any()


def test_a_stage_with_a_gap_in_its_masks_is_left_alone() -> None:
    graph = build("residual")
    run_pass(InsertMasks(ignore=["stage2.two.0"]), graph, Context(original=graph.copy()))
    masks = place(graph)
    names = {group.name for group in masks.eligible}
    assert {"stage1.0.one.0", "stage1.1.one.0", "stage2.one.0"} == names


def test_what_is_ignored_stays() -> None:
    graph = build("residual")
    masks = place(graph, ignore=("stem.0", "stage2.one.*"))
    names = {group.name for group in masks.eligible}
    assert "stage2.one.0" not in names
    assert "stem.0" not in names
    assert "stage1.0.one.0" in names


def test_masks_with_factors_are_refused() -> None:
    graph = build("vgg")
    run_pass(InsertMasks(ratio=0.5), graph, Context(original=graph.copy()))
    with pytest.raises(CutError, match=r"masks\..* has factors other than 1.*given"):
        place(graph)


def test_nothing_to_select() -> None:
    graph = build("vgg")
    with pytest.raises(CutError, match="finds no channel that it may select"):
        place(graph, ignore=("*",))


def test_first_factors() -> None:
    draw = torch.Generator().manual_seed(0)
    assert torch.equal(DRAWS["ones"](5, draw), torch.ones(5))
    normal, uniform, unit = (DRAWS[name](4000, draw) for name in ("normal", "uniform", "unit"))
    assert abs(float(normal.mean()) - 1) < 0.01
    assert abs(float(normal.std()) - 0.1) < 0.01
    assert 0.5 <= float(uniform.min()) < 0.51
    assert 1.49 < float(uniform.max()) <= 1.5
    assert 0 <= float(unit.min()) < 0.01 < 0.99 < float(unit.max()) <= 1
    one, two, other = (place(build("vgg"), init="uniform", seed=seed).parameters for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# -- classes -----------------------------------------------------------------------------------------------------------


def test_influence_is_the_slope_along_a_common_factor() -> None:
    graph = build("residual")
    masks = place(graph, init="uniform")
    x, weight = graph.example_args[0], torch.randn(2, 5, dtype=torch.float64)

    def loss() -> Tensor:
        return (graph.module(x) * weight).sum()

    loss().backward()
    influences, step = masks.influences(), 1e-6
    for index in np.flatnonzero(masks.selectable)[::3]:
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                before = [mask.clone() for mask in masks.parameters]
                for mask, classes in zip(masks.parameters, masks._classes, strict=True):
                    mask[classes == index] *= 1 + sign * step
                values.append(float(loss()))
                for mask, value in zip(masks.parameters, before, strict=True):
                    mask.copy_(value)
        assert influences[index] == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-4, abs=1e-7)
    assert np.all(influences[~masks.selectable & (masks.groups.group_of < 0)] == 0)


def test_without_gradients_there_is_no_influence() -> None:
    masks = place(build("vgg"))
    assert not masks.influences().any()


def test_magnitudes_are_means_over_the_places_of_a_class() -> None:
    graph = build("residual")
    masks = place(graph, init="uniform")
    found = behind(graph)
    first, second = (graph.module.get_submodule(found[path]) for path in ("stem.1", "widen.1"))
    groups = graph.analyse(find_groups)
    classes = groups.channels(next(n for n in graph.nodes if str(n.target) == found["stem.1"]))[1]
    expected = (first.mask.abs() + second.mask[2:6].abs()) / 2  # two channels of padding on either side
    assert np.allclose(masks.magnitudes()[classes], expected.detach().numpy())


def test_switching_reaches_every_place_and_is_read_back() -> None:
    graph = build("residual")
    masks = place(graph)
    kept = np.random.default_rng(0).random(masks.groups.count) < 0.6
    kept[~masks.selectable] = True
    masks.switch(kept)
    assert np.array_equal(masks.kept(), kept)
    for node in graph.nodes:
        layer = graph.layer(node)
        if isinstance(layer, SelectionMask):
            assert np.array_equal(layer.keep.numpy(), kept[masks.groups.channels(node)[1]])


def test_shrinking_is_the_proximal_step() -> None:
    masks = place(build("residual"), init="normal")
    with torch.no_grad():
        masks.parameters[0].mul_(-1)
    before = [mask.detach().clone() for mask in masks.parameters]
    amounts = np.random.default_rng(0).random(masks.groups.count) * 1.5
    masks.shrink(amounts)
    for old, new, classes in zip(before, masks.parameters, masks._classes, strict=True):
        limit = torch.from_numpy(amounts)[classes]
        expected = torch.where(old.abs() <= limit, 0.0, old - limit * old.sign())
        assert torch.allclose(new, expected)
        # the definition: argmin over z of (z - m)² / 2 + amount |z|
        grid = torch.linspace(-2, 2, 4001, dtype=torch.float64)
        cost = (grid - old[:, None]) ** 2 / 2 + limit[:, None] * grid.abs()
        assert torch.allclose(grid[cost.argmin(1)], new.detach(), atol=1e-3)


# -- threshold ---------------------------------------------------------------------------------------------------------


def test_savings_are_what_one_channel_costs() -> None:
    masks = place(build("residual"))
    kept = np.ones(masks.groups.count, dtype=bool)
    kept[masks.eligible[1].classes[:3]] = False
    weights = savings(masks, kept, ["macs"])
    groups = masks.groups
    costs = np.zeros(groups.count)
    for index in np.flatnonzero(kept & masks.selectable):
        less = kept.copy()
        less[index] = False
        costs[index] = groups.cost(kept).macs - groups.cost(less).macs
    on = kept & masks.selectable
    assert np.allclose(weights[on], costs[on] / costs[on].mean(), rtol=1e-3)
    assert np.all(weights[~masks.selectable] == 0)
    stage, inner = (next(g for g in masks.eligible if g.name == name) for name in ("stem.0", "stage1.0.one.0"))
    assert weights[stage.classes[0]] > 2 * weights[inner.classes[0]]  # read and written by many layers


@given(
    st.sampled_from(sorted(NETWORKS)), st.floats(0.35, 1.0), st.sampled_from(["macs", "params"]), st.integers(0, 2**31)
)
@settings(max_examples=25)
def test_the_threshold_lands_on_the_budget(name: str, budget: float, metric: str, seed: int) -> None:
    masks = place(build(name))
    rng = np.random.default_rng(seed)
    importance = rng.random(masks.groups.count)
    limits = {metric: budget * getattr(masks.groups.cost(), metric)}
    choice = select(masks, importance, limits)
    assert within(masks.groups, choice.kept, limits)
    assert choice.kept[~masks.selectable].all()
    for group in masks.eligible:
        on = choice.kept[group.classes]
        assert on.any()
        if (~on).any():  # within a group it is a threshold
            assert importance[group.classes[~on]].max() <= importance[group.classes[on]].min()


def test_hysteresis() -> None:
    masks = place(build("vgg"))
    groups, group = masks.groups, masks.eligible[1]
    importance = np.ones(groups.count) * 10
    order = group.classes
    importance[order] = np.arange(len(order)) + 10.0
    limits = {"macs": groups.cost().macs * 0.9}
    off = select(masks, importance, limits)
    masks.switch(off.kept)
    cut, next_one = np.flatnonzero(~off.kept), int(np.flatnonzero(off.kept & masks.selectable)[0])
    weakest_on = min(importance[off.kept & masks.selectable])
    importance[cut[-1]] = weakest_on * (HYSTERESIS - 0.01)  # better than what is on, but not by enough
    assert np.array_equal(select(masks, importance, limits).kept, off.kept)
    importance[cut[-1]] = max(importance) * HYSTERESIS * 1.01
    assert select(masks, importance, limits).kept[cut[-1]]
    assert next_one >= 0


def test_widths() -> None:
    masks = place(build("mobile"))
    groups = masks.groups
    importance = np.random.default_rng(0).random(groups.count)
    kept = select(masks, importance, {"macs": groups.cost().macs * 0.6}, round_to=4).kept
    assert all(int(kept[g.classes].sum()) % 4 == 0 for g in masks.eligible)
    kept = select(masks, importance, {"macs": groups.cost().macs * 0.5}, floor=3).kept
    assert all(int(kept[g.classes].sum()) >= 3 for g in masks.eligible)
    smallest = least(masks, round_to=1, floor=3)
    kept = select(masks, importance, {"macs": 0.0}, floor=3).kept
    assert all(int(kept[g.classes].sum()) == 3 for g in masks.eligible)
    assert groups.cost(kept) == smallest


def test_a_cap_on_the_threshold() -> None:
    masks = place(build("residual"))
    importance = np.random.default_rng(0).random(masks.groups.count)
    kept = select(masks, importance, {"macs": 0.1 * masks.groups.cost().macs}, cap=0.2).kept
    cuttable = itertools.chain.from_iterable(g.classes[importance[g.classes] < 0.2] for g in masks.eligible)
    assert set(np.flatnonzero(~kept)) == set(cuttable)
    assert select(masks, importance, {"macs": 0.0}, cap=0.0).kept.all()


# -- schedule ----------------------------------------------------------------------------------------------------------


def test_the_limits_fall_along_a_cubic() -> None:
    schedule = Schedule(epochs=4, free=0.1, ramp=0.6, settle=0.2, interval=0.5)
    assert [schedule.tightness(p) for p in (0.0, 0.1)] == [0, 0]
    assert schedule.tightness(0.35) == pytest.approx(1 - 0.5**3)
    assert [schedule.tightness(p) for p in (0.6, 0.9, 1.0)] == [1, 1, 1]
    rising = [schedule.tightness(p / 100) for p in range(101)]
    assert rising == sorted(rising)
    assert [schedule.tick(e) for e in (0.0, 0.49, 0.5, 1.2, 3.9)] == [0, 0, 1, 2, 7]
    assert schedule.progress(1.0) == 0.25
