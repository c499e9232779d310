"""What `explain` says: groups, shares of MACs, and the operation, line and hint for what cannot be cut."""

from __future__ import annotations

import json

import pytest
import torch
from fxpress.ir.cost import measure_cost
from fxpress.ir.groups import find_groups
from fxpress.ir.reasons import find_locked
from fxpress.ir.trace import trace
from fxpress.tools.explain import amount
from torch import Tensor, nn

import fxpress

IMAGE = torch.zeros(2, 3, 8, 8)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.inner = nn.Conv2d(6, 10, 3, padding=1)
        self.back = nn.Conv2d(10, 6, 3, padding=1)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.back(self.inner(x).relu())
        return self.fc(x.mean((2, 3)))


class Blocked(nn.Module):
    """Both branches end in an operation that no channel may leave."""

    def __init__(self) -> None:
        super().__init__()
        self.ordered = nn.Conv2d(3, 6, 1)
        self.free = nn.Conv2d(6, 5, 1)
        self.head = nn.Conv2d(5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.ordered(x)
        y = torch.cumsum(y, dim=1)
        return self.head(self.free(y))


class Shared(nn.Module):
    """Halves that change places tie all channels to each other."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        for _ in range(3):
            y = y + y.roll(1, dims=1)
        return self.head(y)


def test_groups_of_a_residual_network() -> None:
    explanation = fxpress.explain(Residual(), IMAGE)
    free = {group.name: group for group in explanation.groups if group.cuttable}
    assert {name: group.channels for name, group in free.items()} == {"stem": 6, "inner": 10}
    assert free["stem"].producers == ("stem", "back")
    assert "add" in " ".join(free["stem"].members)
    assert set(free["inner"].parameters) == {"inner.weight", "inner.bias", "back.weight"}
    assert free["inner"].macs == 2 * 64 * 9 * 6 * 10
    assert explanation.macs == 64 * 9 * (3 * 6 + 2 * 60) + 24


def test_shares_agree_with_groups_and_cost() -> None:
    graph = trace(Residual(), IMAGE)
    explanation = fxpress.explain(graph)
    assert explanation.cuttable_macs == graph.analyse(find_groups).cuttable_macs
    assert explanation.macs == pytest.approx(graph.analyse(measure_cost).macs)
    assert explanation.params == sum(p.numel() for p in Residual().parameters())
    assert explanation.summary.startswith(f"{100 * explanation.cuttable_macs:.1f} % of")
    assert [g.macs for g in explanation.groups] == sorted((g.macs for g in explanation.groups), reverse=True)


def test_the_output_is_named_as_the_reason() -> None:
    (blocked,) = fxpress.explain(Residual(), IMAGE).blocked
    assert (blocked.name, blocked.channels) == ("fc", 4)
    assert blocked.reasons[0].text == "is an output of the network"
    assert blocked.params == 6 * 4 + 4
    assert blocked.macs == 24


def test_a_blocking_op_with_its_line_and_a_hint() -> None:
    explanation = fxpress.explain(Blocked(), IMAGE)
    found = {group.name: group for group in explanation.blocked}
    (reason,) = found["ordered"].reasons
    assert "cumsum" in reason.op
    assert "test_explain.py" in reason.source
    assert "torch.cumsum(y, dim=1)" in reason.source
    assert reason.text
    assert reason.hint
    assert found["ordered"].channels == 6
    assert found["ordered"].macs == 64 * (3 * 6)
    assert [group.name for group in explanation.groups if group.cuttable] == ["free"]


def test_every_locked_channel_has_a_reason() -> None:
    for model in (Residual(), Blocked(), Shared()):
        graph = trace(model, IMAGE)
        groups = graph.analyse(find_groups)
        named = {member for found in find_locked(groups) for member in found.members}
        free = {member for group in groups.groups for member in group.members}
        layers = {node.name for node in graph.nodes if isinstance(graph.layer(node), (nn.Conv2d, nn.Linear))}
        assert layers <= named | free
        assert all(found.reasons for found in find_locked(groups))


def test_channels_that_are_all_tied_or_pinned_say_so() -> None:
    text = str(fxpress.explain(Shared(), IMAGE))
    assert "Cannot be cut: conv" in text
    assert "roll" in text


def test_text_fits_a_hundred_columns_and_is_summed_up() -> None:
    wide = nn.Sequential(*(nn.Conv2d(3 if i == 0 else 4, 4, 1) for i in range(40)))
    text = str(fxpress.explain(wide, IMAGE))
    assert max(map(len, text.splitlines())) <= 100
    assert "… and 15 more groups with 60 channels (--all lists them)" in text
    assert text.splitlines()[-1].endswith("39 groups with 156 channels; 1 group cannot.")


def test_json_and_notebook_form() -> None:
    explanation = fxpress.explain(Blocked(), IMAGE)
    content = json.loads(json.dumps(explanation.to_dict()))
    assert {"macs", "params", "cuttable_macs", "groups", "summary"} == set(content)
    assert [group["name"] for group in content["groups"]] == [group.name for group in explanation.groups]
    reasons = [reason for group in content["groups"] for reason in group["reasons"]]
    assert {key for reason in reasons for key in reason} == {"node", "op", "source", "text", "hint"}
    html = explanation._repr_html_()
    assert html.count("<tr>") == 1 + len(explanation.groups)
    assert "<script" not in html


def test_notebook_form_escapes_names() -> None:
    graph = trace(Blocked(), IMAGE)
    for node in graph.nodes:
        node.meta["source"] = "<script>alert(1)</script>"
    html = fxpress.explain(graph)._repr_html_()
    assert "<script>" not in html
    assert "&lt;script&gt;" in html


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (64, "64"),
        (999, "999"),
        (1000, "1.00 k"),
        (12_345, "12.3 k"),
        (999_600, "1.00 M"),
        (1.814e9, "1.81 G"),
    ],
)
def test_amounts(value: float, text: str) -> None:
    assert amount(value) == text


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, weight, self.bias, padding=1)


def test_a_weight_that_is_computed_goes_by_its_layer() -> None:
    explanation = fxpress.explain(nn.Sequential(Standardised(3, 6, 3), nn.ReLU(), Standardised(6, 2, 3)), IMAGE)
    free = [group for group in explanation.groups if group.cuttable]
    assert [(group.name, group.channels, group.producers) for group in free] == [("0", 6, ("0",))]
    assert [group.name for group in explanation.blocked] == ["2"]
    assert "%" not in "".join(name for group in explanation.groups for name in group.parameters)
