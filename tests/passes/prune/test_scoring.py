"""What scores are made from besides the criterion: recorded statistics, sensitivity, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fxpress.ir.errors import DataError, OptionError
from fxpress.ir.graph import Graph
from fxpress.ir.groups import find_groups
from fxpress.passes.analyse.over_time import time_statistics
from fxpress.passes.base import Context
from fxpress.passes.pipeline import Pipeline
from fxpress.passes.prune.criteria import Source, score_classes
from fxpress.passes.prune.prune_channels import PruneChannels
from fxpress.passes.records import Records
from fxpress.runtime.data import Data
from scipy.stats import zscore

from fxpress import compile as compile_network


@pytest.fixture
def graph(graph_of_all_layers: Graph) -> Graph:
    return graph_of_all_layers


@pytest.fixture
def batches() -> list[Any]:
    return [(torch.randn(8, 3, 10, 10), torch.randint(5, (8,))) for _ in range(2)]


def width(graph: Graph, name: str) -> int:
    """Channels of a group; one that has a single channel left is no group any more."""
    return next((group.channels for group in find_groups(graph).groups if group.name == name), 1)


def wandering(graph: Graph, count: int = 4) -> list[dict[str, torch.Tensor]]:
    """Checkpoints in which filter 2 of `hidden` changes most."""
    states = []
    for index in range(count):
        state = {name: tensor.detach().clone() for name, tensor in graph.module.state_dict().items()}
        for name, tensor in state.items():
            if tensor.dim() > 1:
                state[name] = tensor * (1 + 0.01 * torch.rand(len(tensor), *[1] * (tensor.dim() - 1)))
        state["hidden.weight"][2] *= 1 + 0.5 * index
        states.append(state)
    return states


def test_instability_takes_part_where_it_was_recorded(graph: Graph) -> None:
    states = wandering(graph)
    groups = find_groups(graph)
    recorded = time_statistics(graph, states)
    found = score_classes(graph, groups, "statistics", source=Source(recorded=recorded))
    rows = np.stack([state["hidden.weight"].double().numpy() for state in states])
    means, stds = np.abs(rows).mean(2), rows.std(2)
    u = zscore(means.mean(0)) + zscore(stds.mean(0)) - 0.25 * zscore(means.std(0) / means.mean(0))
    group = next(group for group in groups.groups if group.name == "hidden")
    np.testing.assert_allclose(found[group.classes], zscore(u), rtol=1e-6)
    single = score_classes(graph, groups, "statistics", source=Source(recorded=time_statistics(graph, states[:1])))
    assert not np.allclose(found[group.classes], single[group.classes])


def test_what_an_earlier_pass_recorded_is_used_and_said(graph: Graph) -> None:
    records = Records()
    records.statistics = time_statistics(graph, wandering(graph))
    one = PruneChannels(ratio=0.3, criterion="statistics", scope="global")
    result = one.run(graph, Context(original=graph.copy(), records=records))
    assert "statistics over 4 checkpoints" in result.notes
    again = one.run(graph, Context(original=graph.copy(), records=records))
    assert any("of other widths and not used" in note for note in again.notes)


def test_files_of_checkpoints(graph: Graph, tmp_path: Path) -> None:
    names = []
    for index, state in enumerate(wandering(graph, 3)):
        torch.save(state, tmp_path / f"{index}.pt")
        names.append(str(tmp_path / f"{index}.pt"))
    result = PruneChannels(ratio=0.3, criterion="statistics", history=names).run(graph, Context(original=graph.copy()))
    assert "statistics over 3 checkpoints" in result.notes


def test_a_file_of_other_widths_is_an_error(graph: Graph, tmp_path: Path) -> None:
    time_statistics(graph, wandering(graph)).save(tmp_path / "record.safetensors")
    PruneChannels(ratio=0.4).run(graph, Context(original=graph.copy()))
    one = PruneChannels(ratio=0.3, criterion="statistics", history=[str(tmp_path / "record.safetensors")])
    with pytest.raises(OptionError, match="its recorded statistics are of"):
        one.run(graph, Context(original=graph.copy()))


def test_one_threshold_in_standard_deviations(graph: Graph) -> None:
    """What goes is what lies below mean - k std of its group, for the k that is reported."""
    groups = find_groups(graph)
    scores = score_classes(graph, groups, "statistics")
    result = PruneChannels(ratio=0.4, criterion="statistics", scope="global").run(graph, Context(original=graph.copy()))
    threshold = result.metrics["threshold"]
    assert f"cut at mean - k std of every group with k = {-threshold:.3f}" in result.notes
    for group in groups.groups:
        expected = max(int((scores[group.classes] > threshold).sum()), 1)
        assert width(graph, group.name) == expected


@pytest.mark.parametrize(("measure", "criterion"), [("kl", "l1"), ("kl", "statistics"), ("accuracy", "l1")])
def test_a_layer_that_matters_more_keeps_more(graph: Graph, measure: str, criterion: str) -> None:
    """The outputs hang on `inner` alone: its batch norm is loud, and what the stem gives is quiet."""
    with torch.no_grad():
        graph.tensor("inner_norm.weight").mul_(50)
        graph.tensor("inner_norm.bias").mul_(50)
        images = torch.randn(32, 3, 10, 10)
        graph.tensor("head.bias").sub_(graph(images).mean(0))  # so that it tells the images apart
        data = Data(calibration=[(images, graph(images).argmax(1))])
    plain, weighed = graph.copy(), graph.copy()
    PruneChannels(ratio=0.4, scope="global", criterion=criterion).run(plain, Context(original=graph))
    result = PruneChannels(ratio=0.4, scope="global", criterion=criterion, sensitivity=measure).run(
        weighed, Context(original=graph, data=data)
    )
    found = {one["name"]: float(np.mean(one["values"])) for one in result.metrics["sensitivity"]["groups"]}
    least, most = min(found, key=found.__getitem__), max(found, key=found.__getitem__)
    assert found[most] > found[least]
    before, after = ({name: width(pruned, name) for name in found} for pruned in (plain, weighed))
    assert after[most] >= before[most]
    assert after[least] <= before[least]
    assert after != before
    assert not any("mean - k std" in note for note in result.notes)


def test_missing_data_is_found_before_work_starts(graph: Graph) -> None:
    passes = ["fold-batchnorm", {"prune-channels": {"ratio": 0.3, "criterion": "taylor"}}]
    with pytest.raises(DataError, match=r"pass 'prune-channels', option 'criterion': 'taylor' needs data"):
        compile_network(graph, passes, None)
    passes = [{"prune-channels": {"ratio": 0.3, "scope": "global", "sensitivity": "kl"}}]
    with pytest.raises(DataError, match=r"pass 'prune-channels', option 'sensitivity' needs data"):
        compile_network(graph, passes, None)


def test_sensitivity_needs_a_global_scope() -> None:
    with pytest.raises(OptionError, match=r"option 'sensitivity': given 'kl'.*scope: global"):
        PruneChannels(ratio=0.3, sensitivity="kl")


@pytest.mark.parametrize(
    "criterion", ["apoz", "taylor", "obd", "obs", "entropy", "variance", "taylor-abs", "fpgm", "random"]
)
def test_every_criterion_prunes(graph: Graph, batches: Any, criterion: str) -> None:
    original = graph.copy()
    result = PruneChannels(budget={"macs": 0.6}, scope="global", criterion=criterion).run(
        graph, Context(original=original, data=Data(calibration=batches))
    )
    assert result.distance is not None
    assert result.distance < 1e-4
    assert result.metrics["macs"] <= 0.6 * find_groups(original).cost().macs


def test_the_pipeline_that_comes_with_it(graph: Graph, batches: Any, repository: Path) -> None:
    """What `distill` records is what `prune-channels` uses, and the budget is met; with fewer epochs."""
    passes = [
        {one.name: one.settings() | ({"epochs": 4} if one.name == "distill" else {})}
        for one in Pipeline.load(repository / "passes/pipelines/statistics.yaml")
    ]
    compiled = compile_network(graph, passes, None, data=Data(train=batches, val=batches, calibration=batches))
    first, _, pruned, *_ = compiled.report.rows
    assert [row.name for row in compiled.report.rows] == ["trace", "distill", "prune-channels", "distill", "emit"]
    assert "statistics over 2 checkpoints" in pruned.notes
    assert pruned.macs <= 0.5 * first.macs
