"""The sensitivity scan against a network whose channels are set to zero by hand, and what reports draw of it."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fxpress.ir.cut import Cut
from fxpress.ir.errors import DataError, ModelError, OptionError
from fxpress.ir.graph import Graph
from fxpress.ir.groups import find_groups
from fxpress.ir.trace import trace
from fxpress.ir.verify import MaskedNetwork
from fxpress.passes.analyse.branching import branches, flat_inputs
from fxpress.passes.analyse.chart import bar, sensitivity_table, value_text
from fxpress.passes.analyse.sensitivity import GroupSensitivity, Sensitivity, layer_sensitivity
from fxpress.passes.report import Report, Row, scans_of
from torch import Tensor, nn


class Net(nn.Module):
    """Two hidden layers in a row, of 4 and 6 channels, and 3 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.one(x).relu()).relu().mean((2, 3)))


@pytest.fixture
def net() -> Net:
    net = Net()
    with torch.no_grad():
        net.head.weight *= 20
    return net


@pytest.fixture
def graph(net: Net) -> Graph:
    return trace(net, torch.randn(2, 2, 8, 8))


def loader(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [(torch.randn(n, 2, 8, 8, generator=generator), torch.randint(3, (n,), generator=generator)) for n in sizes]


def rising(graph: Graph) -> np.ndarray:
    """Scores by which channel 0 of each group matters least."""
    groups = graph.analyse(find_groups)
    scores = np.zeros(groups.count)
    for group in groups.groups:
        scores[group.classes] = np.arange(group.channels)
    return scores


def by_hand(net: Net, data: list[tuple[Tensor, Tensor]], layer: str, count: int, measure: str) -> float:
    """The same with the first channels of a layer zero, weights and bias: behind a ReLU that is a masked channel."""
    masked = copy.deepcopy(net)
    with torch.no_grad():
        getattr(masked, layer).weight[:count] = 0
        getattr(masked, layer).bias[:count] = 0
        x, y = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
        p, q = net(x).softmax(1), masked(x).softmax(1)
    if measure == "accuracy":
        return float((p.argmax(1) == y).float().mean() - (q.argmax(1) == y).float().mean())
    return float((p * (p / q).log()).sum(1).mean())


@pytest.mark.parametrize("measure", ["kl", "accuracy"])
def test_against_zeros_by_hand(net: Net, graph: Graph, measure: str) -> None:
    data = loader(7, 4)
    found = layer_sensitivity(graph, data, rising(graph), ratios=(0.75, 0.25, 0.5), measure=measure)
    assert (found.images, found.ratios) == (11, (0.25, 0.5, 0.75))
    assert [(one.name, one.channels) for one in found.groups] == [("one", 4), ("two", 6)]
    assert [one.masked for one in found.groups] == [(1, 2, 3), (2, 3, 4)]
    for one in found.groups:
        for count, value in zip(one.masked, one.values, strict=True):
            assert value == pytest.approx(by_hand(net, data, one.name, count, measure), rel=1e-3, abs=1e-6)
    right = torch.cat([net(x).argmax(1) == y for x, y in data]).float().mean()
    assert found.accuracy == (pytest.approx(float(right)) if measure == "accuracy" else None)


def test_the_graph_and_its_modes_stay(graph: Graph) -> None:
    graph.module.train()
    before = {name: value.clone() for name, value in graph.module.state_dict().items()}
    layer_sensitivity(graph, loader(3), rising(graph))
    assert graph.module.training
    assert all(torch.equal(before[name], value) for name, value in graph.module.state_dict().items())


def test_batches_and_limits_do_not_matter(graph: Graph) -> None:
    x, y = loader(12)[0]
    whole = layer_sensitivity(graph, [(x, y)], rising(graph))
    parts = [(x[:5], y[:5]), (x[5:], y[5:])]
    for found in (
        layer_sensitivity(graph, parts, rising(graph)),
        layer_sensitivity(graph, [*parts, *loader(9)], rising(graph), limit=12),
    ):
        assert found.images == 12
        for one, two in zip(found.groups, whole.groups, strict=True):
            assert one.values == pytest.approx(two.values, rel=1e-4)


def test_branches_are_the_masked_networks(graph: Graph) -> None:
    """What runs once and what runs again makes no difference, whatever set of channels is masked."""
    groups, rng = graph.analyse(find_groups), np.random.default_rng(1)
    (one, two), x = groups.groups, loader(3)[0][0]
    sets = [two.classes[:2], one.classes[:1], np.concatenate([one.classes[2:], two.classes[1:4]]), np.zeros(0, int)]
    cuts = [Cut(groups, rng.permutation(chosen)) for chosen in sets]
    graph.module.eval()
    with torch.no_grad():
        found = dict(branches(cuts, graph, flat_inputs(graph, x, "x")))
        assert torch.equal(found[-1], graph.module(x))
        for number, cut in enumerate(cuts):
            whole = MaskedNetwork(cut).run(x, enable_io_processing=False)
            torch.testing.assert_close(found[number], whole if isinstance(whole, Tensor) else whole[0])
        torch.testing.assert_close(found[3], found[-1])


def scan(*means: float, measure: str = "kl") -> Sensitivity:
    groups = tuple(GroupSensitivity(name, 4, (2,), (mean,)) for name, mean in zip(("one", "two"), means, strict=True))
    return Sensitivity(measure, 100, 0.9 if measure == "accuracy" else None, (0.5,), groups)


def test_weights_are_roots_with_geometric_mean_one(graph: Graph) -> None:
    groups = graph.analyse(find_groups)
    one, two = (group.classes for group in groups.groups)
    factors = scan(0.16, 0.01).factors(groups)
    np.testing.assert_allclose(factors[one], 2)
    np.testing.assert_allclose(factors[two], 0.5)
    np.testing.assert_allclose(scan(1e3, 0).factors(groups)[two], 0.1)  # not without bounds
    scores = np.arange(groups.count, dtype=float)
    np.testing.assert_allclose(scan(0.16, 0.01).weigh(scores, groups)[one], 2 * scores[one])
    standard = scan(0.16, 0.01).weigh(scores - 5, groups, standard=True)
    np.testing.assert_allclose(standard[two], scores[two] - 5 - np.log(2))
    np.testing.assert_allclose(scan(-0.1, 0.0, measure="accuracy").factors(groups), 1)  # a gain is no influence


def test_json_values_and_back(graph: Graph) -> None:
    found = layer_sensitivity(graph, loader(3), rising(graph), measure="accuracy")
    assert Sensitivity.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    with pytest.raises(ValueError, match="measure"):
        Sensitivity.from_dict({**found.to_dict(), "measure": "guess"})


def test_errors(graph: Graph) -> None:
    scores = rising(graph)
    for ratios in ((), (0.0,), (0.5, 1.0)):
        with pytest.raises(OptionError, match="between 0 and 1"):
            layer_sensitivity(graph, loader(2), scores, ratios=ratios)
    with pytest.raises(DataError, match="is empty"):
        layer_sensitivity(graph, [], scores)
    x, y = loader(2)[0]
    with pytest.raises(DataError, match="target 9 is out of range"):
        layer_sensitivity(graph, [(x, y * 0 + 9)], scores, measure="accuracy")
    with pytest.raises(DataError, match="batch 0 of calibration has 2 inputs, the network takes 1"):
        layer_sensitivity(graph, [((x, x), y)], scores)
    with torch.no_grad():
        graph.module.head.bias[0] = torch.nan
    with pytest.raises(ModelError, match="outputs on batch 0 of calibration are NaN"):
        layer_sensitivity(graph, [(x, y)], scores)


def test_the_report_draws_it() -> None:
    rows = [Row("trace", "exact", parameters=10, macs=100), Row("prune-channels", "lossy", parameters=5, macs=50)]
    rows[1].metrics["sensitivity"] = scan(0.16, 0.01).to_dict()
    text = str(Report(rows)).splitlines()
    title = next(i for i, line in enumerate(text) if "KL to the original" in line)
    what = "KL to the original in nats when a share of one group alone is masked, 100 images"
    assert text[title] == f"prune-channels: {what}"
    assert text[title + 1].split() == ["group", "channels", "50%", "masked", "influence", "on", "the", "whole"]
    assert text[title + 2].split() == ["one", "4", "0.16", "█" * 16]
    assert text[title + 3].split() == ["two", "4", "0.01", "█" * 4]
    again = Report.from_dict(json.loads(json.dumps(Report(rows).to_dict())))
    assert [(row.name, found) for row, found in scans_of(again)] == [("prune-channels", scan(0.16, 0.01))]


@pytest.mark.parametrize("content", [None, 3, {}, {"measure": "kl"}])
def test_what_is_no_scan_is_not_drawn(content: object) -> None:
    assert scans_of(Report([Row("trace", "exact", metrics={"sensitivity": content})])) == []


def test_many_groups_are_shortened() -> None:
    groups = tuple(GroupSensitivity(f"layer{i}", 4, (2,), (i / 100,)) for i in range(100))
    table = sensitivity_table(Sensitivity("kl", 10, None, (0.5,), groups))
    names = [str(cell) for cell in table.columns[0].cells]
    ends = [*range(20), *range(80, 100)]
    assert names == [*(f"layer{i}" for i in ends), "... and 60 between"]


@pytest.mark.parametrize(("share", "text"), [(0, ""), (1, "████"), (0.5, "██"), (1 / 32, "▏"), (2, "████"), (-1, "")])
def test_bars(share: float, text: str) -> None:
    assert bar(share, 4) == text


def test_values_as_text() -> None:
    assert value_text(scan(1, 1), 0.0123) == "0.012"
    assert value_text(scan(1, 1, measure="accuracy"), 0.0123) == "1.2%"


WORKER = """
import json, sys, torch
sys.path.insert(0, sys.argv[2])
import test_sensitivity as t
torch.set_num_threads(1)
torch.manual_seed(0)
graph = t.trace(t.Net(), torch.randn(2, 2, 8, 8))
found = t.layer_sensitivity(graph, t.loader(5, 1, 4), t.rising(graph), measure="accuracy")
from accelerate import PartialState
state = PartialState()
assert state.num_processes == 2
open(f"{sys.argv[1]}/{state.process_index}", "w").write(json.dumps(found.to_dict()))
"""


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "worker.py"]
    (tmp_path / "worker.py").write_text(WORKER)
    done = subprocess.run(
        [*command, str(tmp_path), str(Path(__file__).parent)],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    torch.manual_seed(0)
    graph = trace(Net(), torch.randn(2, 2, 8, 8))
    whole = layer_sensitivity(graph, loader(5, 1, 4), rising(graph), measure="accuracy")
    for rank in (0, 1):
        assert Sensitivity.from_dict(json.loads((tmp_path / str(rank)).read_text())) == whole
