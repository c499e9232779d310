"""Groups: what belongs together, and what a cut of it would save."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fxpress.ir.cost import measure_cost
from fxpress.ir.cut import Cut, apply_cut
from fxpress.ir.groups import Groups, find_groups
from fxpress.ir.trace import trace
from fxpress.ir.verify import prove_cut
from torch import Tensor, nn


class Residual(nn.Module):
    """A stem, a residual block and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.inner, self.outer = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.outer(torch.relu(self.inner(x)))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


@pytest.fixture
def groups() -> Groups:
    return find_groups(trace(Residual().eval(), torch.randn(2, 3, 8, 8)))


def test_groups_hold_what_meets_at_an_add(groups: Groups) -> None:
    stream, inner = groups.groups
    assert (stream.name, stream.channels, inner.name, inner.channels) == ("stem", 8, "inner", 6)
    assert {(s.name, s.dim) for s in stream.slots} == {
        ("stem.weight", 0), ("stem.bias", 0), ("norm.weight", 0), ("norm.bias", 0), ("norm.running_mean", 0),
        ("norm.running_var", 0), ("inner.weight", 1), ("outer.weight", 0), ("outer.bias", 0), ("head.weight", 1),
    }  # fmt: skip
    assert {(s.name, s.dim) for s in inner.slots} == {("inner.weight", 0), ("inner.bias", 0), ("outer.weight", 1)}


def test_cost_counts_what_the_layers_do(groups: Groups) -> None:
    whole = groups.cost()
    assert whole.macs == 64 * (8 * 27 + 6 * 8 + 8 * 6) + 8 * 5
    assert whole.params == sum(p.numel() for p in groups.graph.module.parameters())
    measured = measure_cost(groups.graph)
    assert (measured.macs, measured.params) == (whole.macs, whole.params)
    assert measured.per_node["stem"].macs == 64 * 8 * 27


def test_cost_after_a_cut_is_the_cost_of_the_cut_graph(groups: Groups) -> None:
    dead = np.concatenate([groups.groups[0].classes[:3], groups.groups[1].classes[2:]])
    kept = np.ones(groups.count, dtype=bool)
    kept[dead] = False
    after = measure_cost(apply_cut(groups, dead))
    assert (groups.cost(kept).macs, groups.cost(kept).params) == (after.macs, after.params)


def test_saving_and_share_that_can_be_cut(groups: Groups) -> None:
    inner = groups.groups[1]
    assert groups.saving(inner).macs == 64 * 96
    assert groups.cuttable_macs == pytest.approx(1 - (64 * (27 + 1 + 1) + 5) / groups.cost().macs)


def test_groups_of_a_node(groups: Groups) -> None:
    nodes = {node.name: node for node in groups.graph.nodes}
    assert [g.name for g in groups.of(nodes["inner"])] == ["inner"]
    assert groups.of(nodes["head"]) == []
    dim, classes = groups.channels(nodes["stem"])  # type: ignore[misc]
    assert (dim, len(classes)) == (1, 8)


@pytest.mark.parametrize("image", [1, 2])
def test_macs_are_per_image(image: int) -> None:
    groups = find_groups(trace(Residual().eval(), torch.randn(image, 3, 8, 8)))
    assert groups.cost().macs == 64 * (8 * 27 + 6 * 8 + 8 * 6) + 8 * 5


def test_the_same_graph_gives_the_same_groups(groups: Groups) -> None:
    again = find_groups(groups.graph)
    np.testing.assert_array_equal(groups.class_of, again.class_of)
    assert [g.name for g in groups.groups] == [g.name for g in again.groups]


def test_what_stays_of_each_tensor(groups: Groups) -> None:
    nodes = {node.name: node for node in groups.graph.nodes}
    cut = Cut(groups, groups.groups[1].classes[:2])
    dim, stays = cut.axis(nodes["inner"])  # type: ignore[misc]
    assert (dim, stays.tolist()) == (1, [False, False, True, True, True, True])
    assert cut.axis(nodes["stem"]) is None


def test_a_small_flattened_map_keeps_its_channels_apart() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 4, 1), nn.Linear(12 * 4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.cat([self.one(x).flatten(1), self.two(x).flatten(1)], 1))  # type: ignore[no-any-return]

    groups = find_groups(trace(Heads().eval(), torch.randn(2, 3, 2, 2)))
    assert [(group.name, group.channels) for group in groups.groups] == [("one", 8), ("two", 4)]


def test_an_empty_slice_is_no_obstacle() -> None:
    class Empty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.b(torch.cat([y[:, :0], torch.relu(y[:, 0:])], 1))  # type: ignore[no-any-return]

    groups = find_groups(trace(Empty().eval(), torch.randn(2, 5, 6)))
    cut = Cut(groups, groups.groups[0].classes[:3])
    assert prove_cut(cut, cut.apply("test")) < 1e-6


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.inner(self.embed(x))))  # type: ignore[no-any-return]


def test_a_tensor_with_two_names_is_cut_once() -> None:
    groups = find_groups(trace(Tied().eval(), torch.randint(0, 11, (4, 3))))
    (group,) = groups.groups
    assert {(s.name, s.dim) for s in group.slots} == {
        ("embed.weight", 1),
        ("inner.weight", 1),
        ("inner.weight", 0),
        ("inner.bias", 0),
    }
    cut = Cut(groups, group.classes[:3])
    candidate = cut.apply("test")
    assert prove_cut(cut, candidate) < 1e-6
    assert candidate.tensor("head.weight") is candidate.tensor("embed.weight")
    assert candidate.tensor("head.weight").shape == (11, 5)
    assert groups.cost(cut.kept).params == sum(p.numel() for p in candidate.module.parameters())
