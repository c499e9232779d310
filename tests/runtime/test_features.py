"""`tapped`: the same network, its parameters and its modes, with some of its tensors beside the outputs."""

from __future__ import annotations

import pytest
import torch
from fxpress.ir.errors import OptionError
from fxpress.runtime.training.features import Taps, find_node, tapped
from torch import fx, nn
from torch.nn import functional

import fxpress


class Network(nn.Module):
    """Two stages, a residual one among them, and an output that is a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.stage1 = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.stage2 = nn.Sequential(nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.ReLU(inplace=True))
        self.unused = nn.ReLU()
        self.register_buffer("scale", torch.tensor(2.0))
        self.head = nn.Linear(4, 5)

    def forward(self, x, shift=None):
        low = self.stage1(x)
        high = self.stage2(low) + functional.avg_pool2d(low, 2)
        pooled = (high * self.scale).mean((2, 3))
        return {"logits": self.head(pooled if shift is None else pooled + shift), "pooled": pooled}


def images(seed=0):
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def hooked(model, place, *args):
    """The output of one module, by a hook of our own."""
    found = []
    handle = model.get_submodule(place).register_forward_hook(lambda _, __, out: found.append(out))
    model(*args)
    handle.remove()
    return found[-1]


@pytest.mark.parametrize("kind", ["graph", "symbolic", "module"])
def test_same_outputs_and_the_tensors_asked_for(kind):
    model = Network().eval()
    network = {
        "graph": lambda: fxpress.trace(model, images()).module,
        "symbolic": lambda: fx.symbolic_trace(model, concrete_args={"shift": None}),
        "module": lambda: model,
    }[kind]()
    outputs, features = tapped(network, ["stage2.1", "stage1"])(images(1))
    expected = model(images(1))
    for name in ("logits", "pooled"):
        torch.testing.assert_close(outputs[name], expected[name])
    torch.testing.assert_close(features[0], hooked(model, "stage2.1", images(1)))
    torch.testing.assert_close(features[1], hooked(model, "stage1", images(1)))


def test_names_of_nodes():
    graph = fxpress.trace(Network(), images())
    _, (pooled, high) = tapped(graph.module, ["mean", "add"])(images(1))
    assert pooled.shape == (2, 4)
    torch.testing.assert_close((high * 2).mean((2, 3)), pooled)
    assert find_node(graph.module.graph, "stage1").name == "relu"
    assert find_node(graph.module.graph, "stage1.0").target == "stage1.0"


@pytest.mark.parametrize("traced", [True, False])
def test_one_set_of_parameters_and_modes(traced):
    network = fxpress.trace(Network(), images()).module if traced else Network()
    twin = tapped(network, ["stage1"])
    assert [id(p) for p in twin.parameters()] == [id(p) for p in network.parameters()]
    assert [id(b) for b in twin.buffers()] == [id(b) for b in network.buffers()]
    if traced:
        assert list(twin.state_dict()) == list(network.state_dict())
    statistics = network.get_submodule("stage1.1")
    twin.train()
    assert statistics.training
    before = statistics.running_mean.clone()
    outputs, (low,) = twin(images())
    assert not torch.equal(statistics.running_mean, before)
    (outputs["logits"].sum() + low.square().sum()).backward()
    assert network.get_submodule("head").weight.grad is not None
    assert network.get_submodule("stage1.0").weight.grad.abs().sum() > 0
    twin.eval()
    assert not statistics.training


def test_a_moved_network_moves_its_twin():
    network = fxpress.trace(Network(), images()).module
    twin = tapped(network, ["stage1"])
    network.double()
    outputs, (low,) = twin(images().double())
    assert low.dtype == outputs["logits"].dtype == torch.float64


def test_keywords_and_the_module_left_as_it_was():
    model = Network().eval()
    twin = tapped(model, ["stage1"])
    outputs, _ = twin(images(), shift=torch.ones(4))
    torch.testing.assert_close(outputs["logits"], model(images(), shift=torch.ones(4))["logits"])
    assert not any(child._forward_hooks for child in model.modules())
    with pytest.raises(RuntimeError):
        twin(images()[:, :2])
    assert not any(child._forward_hooks for child in model.modules())


def test_under_compile():
    network = fxpress.trace(Network().eval(), images()).module
    twin = tapped(network, ["stage1"])
    outputs, features = torch.compile(twin, backend="eager", fullgraph=True)(images(1))
    torch.testing.assert_close(outputs["logits"], network(images(1))["logits"])
    torch.testing.assert_close(features[0], twin(images(1))[1][0])


def test_what_is_not_there():
    model, graph = Network(), fxpress.trace(Network(), images())
    with pytest.raises(OptionError, match=r"no module 'stage3'. Did you mean .*'stage[12]'"):
        tapped(model, ["stage3"])
    with pytest.raises(OptionError, match=r"no module 'QQQ'. `model.named_modules\(\)` lists"):
        tapped(model, ["QQQ"])
    with pytest.raises(OptionError, match=r"no node or module 'stag1'. Did you mean .*'stage1"):
        tapped(graph.module, ["stag1"])
    with pytest.raises(OptionError, match=r"no node or module 'QQQ'. `print\(graph.module.graph\)` lists"):
        tapped(graph.module, ["QQQ"])
    with pytest.raises(OptionError, match="'unused' was not called"):
        tapped(model, ["unused"])(images())
    with pytest.raises(OptionError, match=r"output of module 'stage2.0' is changed in place later"):
        tapped(model, ["stage2.0"])(images())
    around = nn.Sequential()
    around.add_module("inner", model)
    with pytest.raises(OptionError, match="module 'inner' gives a dict, not a tensor"):
        tapped(around, ["inner"])(images())


def test_taps_come_in_pairs():
    assert Taps(["a"], ["b"]).teacher == ["b"]
    with pytest.raises(OptionError, match="2 places in the student and 1 in the teacher"):
        Taps(["a", "b"], ["c"])
    with pytest.raises(OptionError, match="0 places"):
        Taps([], [])
