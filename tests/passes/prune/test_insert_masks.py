"""insert-masks: where masks stand, which factors they have, and that a zero there means cuttable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fxpress.ir.verify import distance, run
from fxpress.passes.base import Context, PassResult
from fxpress.passes.prune.insert_masks import InsertMasks
from fxpress.passes.prune.prune_channels import PruneChannels
from fxpress.passes.runner import run_pass
from fxpress.runtime import artifact
from fxpress.runtime.layers.channel_mask import ChannelMask
from torch import Tensor, nn

from fxpress import Graph, OptionError, trace


class Residual(nn.Module):
    """Stem and a residual block with a depthwise convolution; norms with large shifts, so that zeros must be real."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.expand = nn.Conv2d(width, 8, 1)
        self.norm1 = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm2 = nn.BatchNorm2d(8)
        self.project = nn.Conv2d(8, width, 1)
        self.before_head = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 4)
        for norm in (self.norm, self.norm1, self.norm2, self.before_head):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        y = self.norm1(self.expand(x)).relu()
        y = self.norm2(self.depthwise(y)).relu()
        x = self.before_head(x + self.project(y)).relu()
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


@pytest.fixture
def graph() -> Graph:
    return trace(Residual().double().eval(), torch.randn(2, 3, 6, 6, dtype=torch.float64))


def insert(graph: Graph, **options: Any) -> PassResult:
    return run_pass(InsertMasks(**options), graph, Context(original=graph.copy()))[0]


def places(graph: Graph) -> dict[str, str]:
    """Path of the layer before each mask → path of the mask."""
    nodes = [node for node in graph.nodes if isinstance(graph.layer(node), ChannelMask)]
    return {str(node.args[0].target): str(node.target) for node in nodes}  # type: ignore[union-attr]


def masks(graph: Graph) -> dict[str, Tensor]:
    return {path: layer.mask for path, layer in graph.module.named_modules() if isinstance(layer, ChannelMask)}


def test_one_mask_per_group_behind_all_that_produces_or_shifts(graph: Graph) -> None:
    outputs = run(graph)
    result = insert(graph)
    found = places(graph)
    assert set(found) == {"norm", "norm1", "norm2", "project", "before_head"}
    assert found["norm"] == found["project"] == found["before_head"]
    assert found["norm1"] == found["norm2"] != found["norm"]
    assert {path: mask.numel() for path, mask in masks(graph).items()} == {found["norm"]: 6, found["norm1"]: 8}
    assert all(bool((mask == 1).all()) and mask.requires_grad for mask in masks(graph).values())
    assert torch.equal(run(graph), outputs)
    assert result.metrics == {"masks": 2, "places": 5, "zeros": 0, "output_distance": 0}
    assert result.distance == 0


def test_given_factors_reach_every_place(graph: Graph) -> None:
    factors = [0.0, 1.0, 0.5, 1.0, 0.0, 2.0]
    result = insert(graph, masks={"stem": factors})
    assert masks(graph)[places(graph)["project"]].tolist() == factors
    assert masks(graph)[places(graph)["norm1"]].tolist() == [1.0] * 8
    assert result.metrics["zeros"] == 2
    assert result.distance is not None
    assert result.distance > 0.01


def test_a_glob_gives_to_several_layers(graph: Graph) -> None:
    insert(graph, masks={"*p*d": [0, 1, 1, 1, 1, 1, 1, 1]})  # expand; depthwise is spelt with an e at its end
    assert masks(graph)[places(graph)["norm2"]].tolist() == [0] + [1] * 7


def test_the_weakest_channels_are_zero(graph: Graph) -> None:
    weight = graph.tensor("expand.weight").clone()
    weight[[1, 5]] *= 1e-3
    graph.set_tensor("expand.weight", weight)
    depthwise = graph.tensor("depthwise.weight").clone()
    depthwise[[1, 5]] *= 1e-3
    graph.set_tensor("depthwise.weight", depthwise)
    insert(graph, ratio=0.25, criterion="l2", ignore=["stem", "project", "before_head"])
    assert masks(graph)[places(graph)["norm1"]].nonzero().flatten().tolist() == [0, 2, 3, 4, 6, 7]
    assert "norm" not in places(graph)


def test_at_least_one_channel_stays(graph: Graph) -> None:
    insert(graph, ratio=0.99)
    assert all(int((mask != 0).sum()) == 1 for mask in masks(graph).values())


def test_zero_masks_can_be_cut_without_changing_the_outputs(graph: Graph) -> None:
    insert(graph, masks={"stem": [0, 1, 0.5, 1, 0, 2], "expand": [1, 0, 1, 1, 0, 0, 3, 1]})
    outputs = run(graph)
    result, _ = run_pass(PruneChannels(masks="given"), graph, Context(original=graph.copy()))
    assert result.metrics["output_distance"] < 1e-12
    assert distance(outputs, run(graph)) < 1e-12
    assert graph.tensor("stem.weight").shape[0] == 4
    assert graph.tensor("depthwise.weight").shape[0] == 5
    assert graph.tensor("head.weight").shape == (4, 4)


def test_the_same_channels_in_another_dimension_share_their_factors(tmp_path: Path) -> None:
    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mix, self.head = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.embed(x).flatten(2).transpose(1, 2)
            return self.head((tokens + self.mix(tokens.relu())).mean(1))  # type: ignore[no-any-return]

    graph = trace(Patches().double().eval(), torch.randn(2, 3, 6, 6, dtype=torch.float64))
    insert(graph, masks={"mix": [0, 2, 1, 1, 1, 0, 1, 1]})
    found = [graph.layer(node) for node in graph.nodes if isinstance(graph.layer(node), ChannelMask)]
    one, two = (layer for layer in found if isinstance(layer, ChannelMask))
    assert (one.dim, two.dim) == (1, 2)
    assert one.mask is two.mask
    outputs = run(graph)
    artifact.save(tmp_path / "masked.fxp", graph, exact=True)
    loaded = artifact.load(tmp_path / "masked.fxp").graph
    assert torch.equal(run(loaded), outputs)
    assert len([name for name, _ in loaded.module.named_parameters() if name.startswith("masks.")]) == 1
    for twin in (graph, loaded):
        run_pass(PruneChannels(masks="given"), twin, Context(original=twin.copy()))
        assert distance(outputs, run(twin)) < 1e-12
        assert twin.tensor("embed.weight").shape[0] == 6


def test_masks_of_half_precision_and_of_tokens() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x).relu())  # type: ignore[no-any-return]

    graph = trace(Tokens().to(torch.bfloat16).eval(), torch.randn(2, 5, 3).to(torch.bfloat16))
    insert(graph, masks={"one": [0.0] + [1.0] * 7})
    (node,) = [node for node in graph.nodes if isinstance(graph.layer(node), ChannelMask)]
    layer = graph.layer(node)
    assert isinstance(layer, ChannelMask)
    assert (str(node.args[0].target), layer.dim, layer.mask.dtype) == ("one", 2, torch.bfloat16)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"masks": {"stm": [1.0] * 6}}, "no layer 'stm' whose channels could be masked: did you mean 'stem'?"),
        ({"masks": {"head": [1.0] * 4}}, "no layer 'head' whose channels could be masked"),
        ({"masks": {"stem": [1.0] * 5}}, "stem has 6 channels, given 5 factors"),
        ({"masks": {"stem": [1.0] * 6, "project": [0.0] + [1.0] * 5}}, "channel 0 of project is given 0 and"),
    ],
)
def test_masks_that_do_not_fit(graph: Graph, options: dict[str, Any], message: str) -> None:
    before = len(graph.nodes)
    with pytest.raises(OptionError) as caught:
        insert(graph, **options)
    assert message in str(caught.value)
    assert "pass 'insert-masks', option 'masks'" in str(caught.value)
    assert len(graph.nodes) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"masks": {}, "ratio": 0.5}, "'masks' and 'ratio' exclude each other"),
        ({"ratio": 1.0}, "option 'ratio': given 1.0, allowed: number >= 0 and < 1"),
        ({"criterion": "l3"}, "option 'criterion': given 'l3', allowed: 'l1' or 'l2'"),
        ({"masks": {"stem": [float("nan")]}}, "option 'masks': given"),
    ],
)
def test_options_that_are_not_allowed(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        InsertMasks(**options)
    assert message in str(caught.value)
