"""The lint and the oracle: they find what is wrong, and say where."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from fxpress.ir import rewrites, rules
from fxpress.ir.cut import Cut, apply_cut
from fxpress.ir.errors import CutError, GraphError, VerifyError
from fxpress.ir.graph import Graph
from fxpress.ir.groups import find_groups
from fxpress.ir.labels import along
from fxpress.ir.trace import trace
from fxpress.ir.verify import distance, evaluating, prove_cut, prove_equal, refit_distance, run, tolerance
from torch import Tensor, nn


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()


@pytest.fixture
def graph() -> Graph:
    return trace(small(), torch.randn(2, 3, 8, 8))


def half(graph: Graph) -> Cut:
    groups = find_groups(graph)
    return Cut(groups, np.concatenate([g.classes[: g.channels // 2] for g in groups.groups]))


# -- the oracle


def test_a_right_cut_is_proven(graph: Graph) -> None:
    cut = half(graph)
    assert prove_cut(cut, cut.apply("test")) < 1e-6


def test_the_masked_network_differs_from_the_whole_one(graph: Graph) -> None:
    """The proof is not empty: masking does change the output."""
    cut = half(graph)
    assert distance(run(graph), run(cut.apply("test"))) > 1e-2


def test_a_wrong_slice_is_found_and_placed(graph: Graph) -> None:
    cut = half(graph)
    candidate = cut.apply("test")
    with torch.no_grad():
        candidate.tensor("0.weight").copy_(candidate.tensor("0.weight").flip(0))
    with pytest.raises(VerifyError, match=r"differs from the masked one by .* first at node '_?0'.* of 0") as caught:
        prove_cut(cut, candidate)
    assert "as it was before" in str(caught.value)


def test_a_wrong_label_rule_is_found(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that turns the channels round cuts others than it masks."""

    def wrong(labels: Any, node: Any, layer: Any, path: str) -> Tensor:
        right = rules_before(labels, node, layer, path)
        return along(right[0, :, 0, 0].flip(0), 1, right.shape)

    rules_before = rules.LAYERS["BatchNorm2d"]
    monkeypatch.setitem(rules.LAYERS, "BatchNorm2d", wrong)
    cut = half(graph)
    with pytest.raises(VerifyError, match="differs"):
        prove_cut(cut, cut.apply("test"))


def test_a_missing_rewrite_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slices(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)[:, 4:8])  # type: ignore[no-any-return]

    graph = trace(Slices().eval(), torch.randn(2, 3, 8, 8))
    monkeypatch.delitem(rewrites.REWRITES, torch.ops.aten.slice.Tensor)
    cut = half(graph)
    with pytest.raises((VerifyError, RuntimeError)):
        prove_cut(cut, cut.apply("test"))


def test_exact_passes_must_not_change_the_output(graph: Graph) -> None:
    other = graph.copy()
    assert prove_equal(graph, other) == 0
    other.set_tensor("3.weight", graph.tensor("3.weight") * 1.01)
    with pytest.raises(VerifyError, match="must not change them"):
        prove_equal(graph, other)


def test_refitted_norms_report_what_they_change() -> None:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.norm(self.a(x)))  # type: ignore[no-any-return]

    graph = trace(Norm().eval(), torch.randn(4, 6))
    groups = find_groups(graph, norms="refit")
    cut = Cut(groups, groups.groups[0].classes[:4])
    candidate = cut.apply("test")
    assert prove_cut(cut, candidate) < 1e-6
    assert refit_distance(cut, candidate) > 1e-3  # type: ignore[operator]
    assert refit_distance(Cut(groups, np.zeros(0, np.int64)), graph) is None


# -- distances


def test_distance_is_relative_to_the_largest_value() -> None:
    a = {"x": torch.tensor([0.0, 4.0]), "y": (torch.zeros(2),)}
    b = {"x": torch.tensor([1.0, 4.0]), "y": (torch.zeros(2),)}
    assert distance(a, a) == 0
    assert distance(a, b) == 0.25


def test_distance_of_what_is_not_finite() -> None:
    nan = torch.tensor([1.0, float("nan")])
    assert distance(nan, nan) == 0
    assert distance(nan, torch.ones(2)) == float("inf")
    assert distance(torch.ones(2), torch.tensor([1.0, float("inf")])) == float("inf")


def test_distance_of_other_shapes_is_an_error() -> None:
    with pytest.raises(VerifyError, match=r"\(2,\) in one network and \(3,\) in the other"):
        distance(torch.zeros(2), torch.zeros(3))
    with pytest.raises(VerifyError, match="returns 1 tensors, the other 2"):
        distance(torch.zeros(2), (torch.zeros(2), torch.zeros(2)))


def test_tolerance_follows_the_precision(graph: Graph) -> None:
    assert tolerance(graph) == 1e-4
    graph.module.double()
    assert tolerance(graph) == 1e-9


def test_evaluating_gives_every_layer_its_own_mode_back(graph: Graph) -> None:
    graph.module.train()
    graph.module.get_submodule("1").eval()
    with evaluating(graph.module):
        assert not any(m.training for m in graph.module.modules())
    assert graph.module.training
    assert not graph.module.get_submodule("1").training


# -- cuts that cannot be


def test_locked_classes_and_whole_groups_are_refused(graph: Graph) -> None:
    groups = find_groups(graph)
    with pytest.raises(CutError, match="locked"):
        apply_cut(groups, np.array([0]))
    with pytest.raises(CutError, match="without a channel"):
        apply_cut(groups, groups.groups[0].classes)


def test_the_graph_that_is_cut_stays_as_it_is(graph: Graph) -> None:
    before = {name: tensor.clone() for name, tensor in graph.module.state_dict().items()}
    expected = run(graph)
    half(graph).apply("test")
    assert all(torch.equal(tensor, before[name]) for name, tensor in graph.module.state_dict().items())
    assert torch.equal(run(graph), expected)


# -- lint


def test_lint_finds_a_dead_node(graph: Graph) -> None:
    node = next(n for n in graph.nodes if n.op == "call_module")
    with graph.module.graph.inserting_after(node):
        dead = graph.module.graph.call_function(torch.ops.aten.relu.default, (node,))
    dead.meta["spec"] = node.meta["spec"]
    with pytest.raises(GraphError, match="is dead"):
        graph.lint()


def test_lint_finds_a_node_without_shape(graph: Graph) -> None:
    del next(n for n in graph.nodes if n.op == "call_module").meta["spec"]
    with pytest.raises(GraphError, match="no shape"):
        graph.lint()


def test_lint_finds_an_unused_parameter(graph: Graph) -> None:
    graph.module.register_parameter("idle", nn.Parameter(torch.zeros(2)))
    with pytest.raises(GraphError, match=r"'idle'.*no node uses it"):
        graph.lint()


def test_lint_finds_a_layer_that_does_not_fit(graph: Graph) -> None:
    layer = graph.module.get_submodule("3")
    layer.in_channels = 7
    with pytest.raises(GraphError, match=r"states 7 input channels, but its input .* has 8"):
        graph.lint()
