"""Exported operations become the layers that own the weights, and nothing else does."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from fxpress.ir import dialect
from fxpress.ir.graph import Graph
from fxpress.ir.trace import trace
from torch import Tensor, nn

X = (2, 4, 8, 8)
LAYERS = {
    "Conv1d same": (nn.Conv1d(4, 6, 3, padding="same"), (2, 4, 9)),
    "Conv2d": (nn.Conv2d(4, 6, (3, 1), stride=2, padding=(1, 0), dilation=(2, 1), groups=2, bias=False), X),
    "Conv3d": (nn.Conv3d(2, 4, (1, 3, 3), stride=(1, 2, 2), groups=2), (2, 2, 4, 6, 6)),
    "ConvTranspose1d": (nn.ConvTranspose1d(4, 6, 3, 2), (2, 4, 9)),
    "ConvTranspose2d": (nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2, dilation=2), X),
    "ConvTranspose3d": (nn.ConvTranspose3d(4, 6, 3, 2), (2, 4, 5, 5, 5)),
    "Linear": (nn.Linear(8, 3, bias=False), X),
    "BatchNorm1d of vectors": (nn.BatchNorm1d(4), (2, 4)),
    "BatchNorm1d": (nn.BatchNorm1d(4), (2, 4, 7)),
    "BatchNorm2d": (nn.BatchNorm2d(4, eps=1e-3, momentum=0.3), X),
    "BatchNorm2d cumulative": (nn.BatchNorm2d(4, momentum=None), X),
    "BatchNorm2d plain": (nn.BatchNorm2d(4, affine=False), X),
    "BatchNorm2d of the batch": (nn.BatchNorm2d(4, track_running_stats=False), X),
    "BatchNorm3d": (nn.BatchNorm3d(4), (2, 4, 3, 3, 3)),
    "GroupNorm": (nn.GroupNorm(2, 4), X),
    "LayerNorm": (nn.LayerNorm((8, 8)), X),
    "LayerNorm without bias": (nn.LayerNorm(8, bias=False), X),
    "RMSNorm": (nn.RMSNorm(8), X),
    "InstanceNorm2d": (nn.InstanceNorm2d(4, affine=True), X),
    "InstanceNorm2d tracked": (nn.InstanceNorm2d(4, affine=True, track_running_stats=True), X),
    "PReLU": (nn.PReLU(4), X),
    "Dropout": (nn.Dropout(0.2), X),
    "Dropout2d": (nn.Dropout2d(0.2), X),
    "AlphaDropout": (nn.AlphaDropout(0.2), X),
}


def calls(graph: Graph) -> list[str]:
    """What a graph computes: `path:Layer` and operations."""
    return [
        f"{n.target}:{type(graph.layer(n)).__name__}" if n.op == "call_module" else dialect.op_name(n.target)
        for n in graph.nodes
        if n.op.startswith("call_")
    ]


def same(graph: Graph, model: nn.Module, *inputs: Tensor) -> None:
    """The graph in evaluation mode computes what the model computes, from the same state-dict keys."""
    graph.module.eval()
    torch.testing.assert_close(graph(*inputs), model.eval()(*inputs))
    assert list(graph.module.state_dict()) == [key for key in model.state_dict() if key not in graph.dropped]


@pytest.mark.parametrize(("layer", "shape"), LAYERS.values(), ids=LAYERS.keys())
def test_layer_comes_back_as_itself(layer: nn.Module, shape: tuple[int, ...]) -> None:
    model = nn.Sequential(OrderedDict(here=layer))
    x = torch.randn(shape)
    graph = trace(model, x)
    assert calls(graph) == [f"here:{type(layer).__name__}"]
    assert dialect.config(graph.module.get_submodule("here")) == dialect.config(layer)
    same(graph, model, x)


def test_embedding_comes_back_as_itself() -> None:
    model = nn.Sequential(nn.Embedding(9, 4, padding_idx=2))
    graph = trace(model, torch.randint(0, 9, (2, 5)))
    assert calls(graph) == ["0:Embedding"]
    assert dialect.config(graph.module.get_submodule("0")) == dialect.config(model[0])
    same(graph, model, torch.randint(0, 9, (3, 7))[:, :5])


def test_configuration_is_that_of_the_operation() -> None:
    """A circular convolution is a pad and a plain convolution under the same name."""
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"))
    graph = trace(model, torch.randn(X))
    assert calls(graph) == ["aten.pad.default", "0:Conv2d"]
    assert dialect.config(graph.module.get_submodule("0"))["padding"] == [0, 0]
    same(graph, model, torch.randn(X))


class Owner(nn.Conv2d):
    """A layer class of the user's own, with a parameter and sub-modules beside the weight."""

    def __init__(self) -> None:
        super().__init__(4, 4, 3)
        self.alpha = nn.Parameter(torch.rand(4, 1, 1))
        self.after = nn.Sequential(nn.BatchNorm2d(4), nn.PReLU(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.after(F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias) * self.alpha)


def test_path_keeps_what_else_it_owns() -> None:
    model = nn.Sequential(Owner())
    graph = trace(model, torch.randn(X))
    assert calls(graph) == [
        "aten.pad.default",
        "0:Conv2d",
        "aten.mul.Tensor",
        "0.after.0:BatchNorm2d",
        "0.after.1:PReLU",
    ]
    assert type(graph.module.get_submodule("0")) is nn.Conv2d
    same(graph, model, torch.randn(X))
    same(graph.copy(), model, torch.randn(X))


class Reuse(nn.Module):
    """One weight in several configurations."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        wide = F.conv2d(x, self.conv.weight, self.conv.bias, padding=2, dilation=2)
        return self.conv(x) + wide + F.conv2d(x, self.conv.weight, padding=1) + self.conv(wide)


def test_other_configuration_of_a_weight_stays_an_operation() -> None:
    model = Reuse()
    graph = trace(model, torch.randn(X))
    names = calls(graph)
    assert names.count("conv:Conv2d") == 2  # the module's own calls, although the dilated one comes first
    assert names.count("aten.conv2d.default") == 2
    same(graph, model, torch.randn(X))


class Computed(nn.Module):
    """Weight standardisation, a fixed blur, layer scale, and a linear map whose bias is put together."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.linear = nn.Linear(8, 6)
        self.gamma = nn.Parameter(torch.rand(4, 1, 1))
        self.register_buffer("blur", torch.rand(4, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        w = self.conv.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True)
        x = F.conv2d(F.conv2d(x, w, self.conv.bias, padding=1), self.blur, groups=4, padding=1) * self.gamma
        return F.linear(x, self.linear.weight, torch.cat([self.linear.bias[:3], self.linear.bias[3:] * 0]))


def test_computed_weights_stay_values() -> None:
    model = Computed()
    graph = trace(model, torch.randn(X))
    assert not [name for name in calls(graph) if ":" in name]
    same(graph, model, torch.randn(X))


class Partial(nn.Module):
    """Norms with a weight and no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4))
        self.register_buffer("running_mean", torch.rand(4))
        self.register_buffer("running_var", torch.rand(4) + 0.5)
        self.group = nn.Module()
        self.group.weight = nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, None, self.training)
        return F.group_norm(x, 2, self.group.weight)


def test_norms_with_some_of_their_tensors() -> None:
    model = nn.Sequential(Partial()).eval()
    graph = trace(model, torch.randn(X))
    assert calls(graph) == ["0:BatchNorm2d", "0.group:GroupNorm"]
    same(graph, model, torch.randn(X))
    layer = graph.module.get_submodule("0")
    assert dialect.config(layer)["absent"] == ["bias", "num_batches_tracked"]
    before = graph.tensor("0.running_mean").clone()
    graph.module.train()
    graph(torch.randn(X))
    assert not torch.equal(before, graph.tensor("0.running_mean"))


class Biases(nn.Module):
    """A bias that the operation ignores and the graph reads elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.conv.weight) * self.conv.bias[:, None, None]


def test_bias_used_elsewhere_does_not_join_the_layer() -> None:
    model = Biases()
    graph = trace(model, torch.randn(X))
    assert "conv:Conv2d" not in calls(graph)
    same(graph, model, torch.randn(X))


class Dropouts(nn.Module):
    """Functional dropout, three times."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(F.dropout(self.conv(x), 0.3, self.training), 0.4, self.training)
        return F.dropout2d(F.dropout(x, 0.0, self.training), 0.5, self.training)


def test_functional_dropout_gets_a_path_below_its_module() -> None:
    graph = trace(nn.Sequential(Dropouts()), torch.randn(X))
    assert calls(graph) == ["0.conv:Conv2d", "0.dropout:Dropout", "0.dropout_1:Dropout", "0.dropout_2:Dropout2d"]
    x = torch.randn(X)
    assert not torch.equal(graph.module.train()(x), graph(x))
    assert torch.equal(graph.module.eval()(x), graph(x))


class Tied(nn.Module):
    """One matrix in two layers, one module under two paths."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 8)
        self.head = nn.Linear(8, 9, bias=False)
        self.head.weight = self.words.weight
        self.block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.same = self.block

    def forward(self, i: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(self.words(i)), self.same(self.block(x))


@pytest.mark.parametrize("copied", [False, True])
def test_tied_stays_tied(copied: bool) -> None:
    model = Tied()
    graph = trace(model, (torch.randint(0, 9, (2, 5)), torch.randn(X)))
    graph = graph.copy() if copied else graph
    assert calls(graph)[:2] == ["words:Embedding", "head:Linear"]
    assert calls(graph)[2:] == ["block.0:Conv2d", "block.1:BatchNorm2d"] * 2
    assert graph.tensor("head.weight") is graph.tensor("words.weight")
    assert graph.module.get_submodule("same.1") is graph.module.get_submodule("block.1")
    same(graph, model, torch.randint(0, 9, (2, 5)), torch.randn(X))


def test_decomposed_program_gets_its_layers_back() -> None:
    convolutional = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.GroupNorm(2, 6)
    model = nn.Sequential(*convolutional, nn.Flatten(), nn.Linear(216, 8), nn.LayerNorm(8)).eval()
    x = torch.randn(X)
    program = torch.export.export(model, (x,)).run_decompositions()
    assert "aten.addmm.default" in {str(n.target) for n in program.graph.nodes}
    graph = trace(program, x)
    layers = [name for name in calls(graph) if ":" in name]
    assert layers == ["0:Conv2d", "1:BatchNorm2d", "3:GroupNorm", "5:Linear", "6:LayerNorm"]
    same(graph, model, x)
