"""Images that stop between layers see what they would have seen in one go; and what the walk refuses."""

from __future__ import annotations

import pytest
import torch
from fxpress.ir.errors import DataError
from fxpress.ir.trace import trace
from fxpress.passes.quantize import walk as walk_module
from fxpress.passes.quantize.walk import Walk
from torch import nn


class Net(nn.Module):
    """A residual block whose shortcut crosses the places where images stop, and a weight that is used by itself."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.scale = nn.Parameter(torch.rand(4, 1, 1))
        self.end = nn.Linear(4, 3)

    def forward(self, x):
        x = torch.relu(self.a(x))
        y = self.c(torch.relu(self.b(x))) * self.scale
        return self.end((x + y).mean((2, 3)))


@pytest.fixture
def networks():
    net = Net().eval()
    before = trace(net, torch.randn(2, 4, 6, 6))
    return net, before, before.copy()


BATCHES = [(torch.randn(n, 4, 6, 6), torch.zeros(n).long()) for n in (5, 3, 4)]


class Counting:
    """A loader that tells how often it was read."""

    def __init__(self):
        self.reads = 0

    def __iter__(self):
        self.reads += 1
        return iter(BATCHES)


def change(graph, name, factor):
    layer = getattr(graph.module, name)
    layer.weight = nn.Parameter(layer.weight.detach() * factor)


def by_hand(net, factors):
    """What each layer reads behind scaled layers, and gives in the original network."""
    images, found = torch.cat([images for images, _ in BATCHES]), {}

    def hook(name, side):
        return lambda _, args, out: found.setdefault(name, {}).update({side: (args[0], out)})

    scaled = Net().eval()
    scaled.load_state_dict(net.state_dict())
    for name, factor in factors.items():
        getattr(scaled, name).weight.data.mul_(factor)
    for side, network in (("old", net), ("new", scaled)):
        for name in "a", "b", "c", "end":
            getattr(network, name).register_forward_hook(hook(name, side))
        with torch.no_grad():
            network(images)
    return {name: (sides["new"][0], sides["old"][1]) for name, sides in found.items()}


@pytest.mark.parametrize("memory", [0, 2**30], ids=["from the start", "from where they stopped"])
@pytest.mark.parametrize("held", [1, 2**26], ids=["one by one", "whole batches"])
def test_layers_read_the_quantised_prefix_and_should_give_the_originals_response(networks, memory, held, monkeypatch):
    monkeypatch.setattr(walk_module, "HELD", held)
    net, before, after = networks
    loader, factors = Counting(), {"a": 0.5, "b": 2.0, "c": -1.0}
    walk = Walk(before, after, loader, 100, memory)
    wanted = by_hand(net, factors)
    for name in ("a", "b", "c", "end"):
        seen = []
        walk.visit([name], lambda _, x, y, seen=seen: seen.append((x, y)))
        assert len(seen) == (12 if held == 1 else 3)
        x, y = (torch.cat(part) for part in zip(*seen, strict=True))
        torch.testing.assert_close(x, wanted[name][0])
        torch.testing.assert_close(y, wanted[name][1])
        if name in factors:
            change(after, name, factors[name])
    assert walk.seen == 12
    assert loader.reads == (1 if memory else 4)


def test_several_layers_in_one_go(networks):
    net, before, _ = networks
    loader, seen = Counting(), {}
    walk = Walk(before, before, loader, 7, 0)
    walk.visit(["a", "c", "end"], lambda name, x, y: seen.setdefault(name, []).append((x, y)))
    assert loader.reads == 1
    assert walk.seen == 7
    for name, pairs in seen.items():
        x, y = (torch.cat(part) for part in zip(*pairs, strict=True))
        with torch.no_grad():
            torch.testing.assert_close(getattr(net, name)(x), y)
        assert len(x) == 7


def test_modes_come_back(networks):
    _, before, after = networks
    before.module.train()
    Walk(before, after, BATCHES, 5, 0).visit(["a"], lambda *_: None)
    assert before.module.training


def test_inputs_that_are_too_many(networks):
    _, before, after = networks
    batch = ((BATCHES[0][0], BATCHES[0][0]), BATCHES[0][1])
    with pytest.raises(DataError, match="batch 0 of calibration has 2 input tensors, the network takes 1"):
        Walk(before, after, [batch], 5, 0).visit(["a"], lambda *_: None)


def test_keyword_inputs_in_any_order():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, left, right):
            return self.layer(left - right)

    left, right = torch.randn(4, 3), torch.randn(4, 3)
    graph, seen = trace(Two().eval(), {"left": left, "right": right}), []
    batches = [({"right": right, "left": left}, torch.zeros(4).long())]
    Walk(graph, graph, batches, 9, 0).visit(["layer"], lambda _, x, __: seen.append(x))
    assert torch.equal(torch.cat(seen), left - right)
