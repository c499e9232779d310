"""A model becomes a graph that computes the same; the model stays as it was; failures name the line and the layer."""

from __future__ import annotations

import copy
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fxpress.ir import dialect
from fxpress.ir.errors import ModelError, TraceError
from fxpress.ir.graph import Graph, TensorSpec
from fxpress.ir.trace import trace
from torch import Tensor, fx, nn


class Residual(nn.Module):
    """A small residual network with every habit of a big one: in-place ReLU, shared ReLU, flatten, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 5)
        self.auxiliary = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.relu(self.stem(x))
        y = self.norm(self.conv(x))
        y += x
        x = F.adaptive_avg_pool2d(self.relu(y), 1).flatten(1)
        if self.training:
            return self.head(x), self.auxiliary(x)
        return self.head(self.drop(x))


def randomise(model: nn.Module) -> nn.Module:
    """Statistics that a mistake in a batch norm cannot hide behind."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


@pytest.fixture
def model() -> nn.Module:
    return randomise(Residual())


X = (2, 3, 8, 8)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_graph_computes_what_the_model_computes(model: nn.Module, batch: int) -> None:
    graph = trace(model.eval(), torch.randn(X))
    assert graph.dynamic_batch
    x = torch.randn(batch, *X[1:])
    torch.testing.assert_close(graph(x), model(x))


def test_state_dict_keys_are_the_models(model: nn.Module) -> None:
    graph = trace(model, torch.randn(X))
    assert graph.dropped == ("auxiliary.weight", "auxiliary.bias")
    assert list(graph.module.state_dict()) == [k for k in model.state_dict() if not k.startswith("auxiliary")]
    graph.module.load_state_dict({k: v for k, v in model.state_dict().items() if k not in graph.dropped})


def test_model_is_left_alone(model: nn.Module) -> None:
    model.train()
    model.norm.eval()
    modes = {path: module.training for path, module in model.named_modules()}
    attributes = {path: dict(module.__dict__) for path, module in model.named_modules()}
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    graph = trace(model, torch.randn(X))
    torch.set_rng_state(state)
    graph = trace(model, torch.ones(X))
    assert torch.equal(torch.get_rng_state(), state)
    assert {path: module.training for path, module in model.named_modules()} == modes
    assert {path: dict(module.__dict__) for path, module in model.named_modules()} == attributes
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    with torch.no_grad():
        graph.tensor("conv.weight").zero_()
    assert model.conv.weight.abs().sum() > 0


def test_modes_are_those_of_the_model(model: nn.Module) -> None:
    model.train()
    model.norm.eval()
    graph = trace(model, torch.randn(X))
    assert graph.module.training
    assert graph.module.get_submodule("conv").training
    assert not graph.module.get_submodule("norm").training


def test_training_mode_is_alive(model: nn.Module) -> None:
    graph = trace(model.train(), torch.randn(X))
    x = torch.randn(X)
    before = graph.tensor("norm.running_mean").clone()
    outputs = graph(x), graph(x)
    assert not torch.equal(*outputs)  # dropout draws
    assert not torch.equal(before, graph.tensor("norm.running_mean"))
    assert int(graph.tensor("norm.num_batches_tracked")) == 2
    outputs[0].sum().backward()
    assert all(p.grad is not None for p in graph.module.parameters())


def test_training_step_is_the_models(model: nn.Module) -> None:
    """Same loss and same gradients, with statistics of the batch."""
    graph = trace(model, torch.randn(X))
    x = torch.randn(X)
    for module in (model, graph.module):
        module.eval()
        for child in module.modules():
            child.training = isinstance(child, nn.BatchNorm2d)
    model(x).square().sum().backward()
    graph(x).square().sum().backward()
    ours, theirs = dict(graph.module.named_parameters()), dict(model.named_parameters())
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter.grad, theirs[name].grad)
    torch.testing.assert_close(graph.tensor("norm.running_var"), model.norm.running_var)


def test_every_node_knows_where_it_comes_from(model: nn.Module) -> None:
    graph = trace(model, torch.randn(X))
    calls = [n for n in graph.nodes if n.op.startswith("call_")]
    nodes = {n.target: n for n in calls if n.op == "call_module"}
    assert nodes["conv"].meta["path"] == "conv"
    assert nodes["conv"].meta["source"].startswith("test_trace.py:")
    assert nodes["conv"].meta["source"].endswith("y = self.norm(self.conv(x))")
    assert nodes["conv"].meta["spec"] == TensorSpec((2, 8, 8, 8), torch.float32)
    assert {key for n in graph.nodes for key in n.meta} <= {"spec", "path", "source", "author"}
    assert all("test_trace.py" in n.meta["source"] for n in calls)
    assert all(dialect.allowed(n.target) for n in calls if n.op == "call_function")


def test_batch_of_one_is_repeated(model: nn.Module) -> None:
    graph = trace(model, torch.randn(1, 3, 8, 8))
    assert graph.dynamic_batch
    assert graph.example_args[0].shape == (2, 3, 8, 8)
    assert graph.nodes[-1].all_input_nodes[0].meta["spec"].shape == (2, 5)


def test_graph_copies_exports_and_traces_again(model: nn.Module) -> None:
    graph = trace(model.eval(), torch.randn(X))
    x = torch.randn(X)
    expected = model(x)
    again = trace(graph.module, x)
    exported = torch.export.export(graph.module, (x,)).module()
    for twin in (graph.copy(), copy.deepcopy(graph.module), exported, again, trace(again)):
        torch.testing.assert_close(twin(x), expected)
    assert [n.target for n in again.nodes] == [n.target for n in graph.nodes]


def test_other_kinds_of_model(model: nn.Module) -> None:
    x = torch.randn(X)
    expected = model.eval()(x)
    symbolic = fx.symbolic_trace(nn.Sequential(model.stem, model.relu))
    torch.testing.assert_close(trace(symbolic, x)(x), symbolic(x))
    program = torch.export.export(model, (x,))
    for graph in (trace(program), trace(program, x), trace(torch.compile(model), x)):
        torch.testing.assert_close(graph(x), expected)
        assert "stem.0" in {n.target for n in graph.nodes}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_types(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)).to(dtype).eval()
    x = torch.randn(X, dtype=dtype)
    graph = trace(model, x)
    torch.testing.assert_close(graph(x), model(x))
    assert graph.tensor("0.weight").dtype is dtype


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_callers_gradient_mode_does_not_matter(model: nn.Module, mode: type) -> None:
    with mode():
        graph = trace(model, torch.randn(X))
    assert graph.tensor("conv.weight").requires_grad
    assert not graph.tensor("conv.weight").is_inference()


# Signatures -----------------------------------------------------------------------------------------------------------


class Signature(nn.Module):
    """Keyword-only inputs in nested containers, and an output that is a dict of tuples."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor, *, scale: float = 1.0, extra: dict[str, tuple[Tensor, ...]]) -> dict[str, object]:
        return OrderedDict(a=self.conv(x) * scale, b=(x, [x + 1]), c=extra["q"][0] - extra["q"][1])


def test_keyword_inputs_and_structured_outputs() -> None:
    model, x = Signature().eval(), torch.randn(X)
    extra = {"q": (torch.randn(X), torch.randn(X))}
    positional = trace(model, x, example_kwargs={"extra": extra, "scale": 2.0})
    keyword = trace(model, {"x": x, "extra": extra, "scale": 2.0})
    for ours in (positional(x, extra=extra, scale=2.0), keyword(x=x, extra=extra, scale=2.0)):
        expected = model(x, extra=extra, scale=2.0)
        assert type(ours) is OrderedDict
        torch.testing.assert_close(ours, expected)
    assert positional.dynamic_batch


def test_inputs_in_a_tuple_and_variadic_inputs() -> None:
    class Variadic(nn.Module):
        def forward(self, pair: tuple[Tensor, Tensor], *others: Tensor, **more: Tensor) -> Tensor:
            return pair[0] + pair[1] + sum(others) + more["z"]

    x = torch.randn(X)
    graph = trace(Variadic(), ((x, x), x, x), example_kwargs={"z": x})
    torch.testing.assert_close(graph((x, 2 * x), x, x, z=x), 6 * x)


def test_constants_and_non_persistent_buffers() -> None:
    class Constants(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("kept", torch.rand(3, 1, 1))
            self.register_buffer("lost", torch.rand(3, 1, 1), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.kept + self.lost + torch.tensor([[[2.0]]])

    model, x = Constants(), torch.randn(X)
    graph = trace(model, x)
    assert list(graph.module.state_dict()) == list(graph.copy().module.state_dict()) == ["kept"]
    assert len(list(graph.module.buffers())) == 3
    torch.testing.assert_close(graph(x), model(x))


@pytest.mark.parametrize(
    ("condition", "dynamic"), [("x.shape[0] == 2", False), ("x.shape[0] < 5", False), ("x.shape[1] == 3", True)]
)
def test_dynamic_batch_is_not_claimed_in_vain(condition: str, dynamic: bool) -> None:
    class Asking(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if eval(condition) else x  # noqa: S307 - the conditions above

    graph = trace(Asking(), torch.randn(X))
    assert graph.dynamic_batch is dynamic
    torch.testing.assert_close(graph(torch.ones(X)), torch.full(X, 2.0))


def test_static_model_keeps_its_batch_of_one() -> None:
    class One(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(3, 64)

    graph = trace(One(), torch.randn(1, 3, 8, 8))
    assert not graph.dynamic_batch
    assert graph.example_args[0].shape[0] == 1


def test_sizes_that_depend_on_data_are_measured() -> None:
    class Positive(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[x > 0] * x.mean().item()

    x = torch.randn(X)
    graph = trace(Positive(), x)
    torch.testing.assert_close(graph(x), Positive()(x))
    assert graph.nodes[-1].all_input_nodes[0].meta["spec"].shape == (int((x > 0).sum()),)


def test_regions_without_effect_are_inlined() -> None:
    class Regions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                y = self.conv(x) + 1
            with torch.autocast("cpu", enabled=False):
                z = self.conv(y)
            return y, z

    model, x = Regions(), torch.randn(X)
    graph = trace(model, x)
    assert [str(n.target) for n in graph.nodes if n.op.startswith("call")] == ["conv", "aten.add.Tensor", "conv"]
    torch.testing.assert_close(graph(x), model(x))


def test_hooked_weight_norm_leaves_no_trace() -> None:
    model = torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
    old = nn.Conv2d(3, 4, 3)
    with pytest.warns(FutureWarning):
        torch.nn.utils.weight_norm(old)
    for convolution in (model, old):
        graph = trace(convolution, torch.randn(X))
        x = torch.randn(X)
        assert type(convolution.weight) in (Tensor, nn.Parameter)
        torch.testing.assert_close(graph(x), convolution(x))
        assert graph.module.state_dict().keys() == convolution.state_dict().keys()


# Failures -------------------------------------------------------------------------------------------------------------


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x * 2
        return x


class Steps(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(int(x.max())):
            x = x + 1
        return x


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return x * self.count


class Moving(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.norm.running_mean, self.norm.running_var, training=True)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.conv(x)


class Conditional(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))


class Numpy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(x.numpy() * 2)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Branch(), r"test_trace\.py:\d+ if x\.sum\(\) > 0:`: control flow depends on the values.*torch\.where"),
        (Steps(), r"for _ in range\(int\(x\.max\(\)\)\):`: control flow depends on the values"),
        (Counter(), r"self\.count \+= 1`: .* writes to the model's own tensor 'count'"),
        (Moving(), r"return F\.batch_norm.* writes to the model's own tensor 'norm\.running_mean'"),
        (Mixed(), r"`test_trace\.py:\d+ .*` runs under torch\.autocast"),
        (Conditional(), r"return torch\.cond.*: cond has no place in the graph"),
        (Numpy(), r"return torch\.from_numpy.*torch\.export failed"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_untraceable_model_is_told_its_line(model: nn.Module, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TraceError, match=message) as caught:
        trace(model, torch.randn(X))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            (torch.randn(2, 1, 8, 8),),
            r"\(2, 1, 8, 8\): 'stem\.0' \(Conv2d\) expects 3 channels .* given a float32 tensor",
        ),
        (
            (torch.randn(2, 3, 8, 8).double(),),
            r"'stem\.0' \(Conv2d\) fails on a float64 tensor of shape \(2, 3, 8, 8\)",
        ),
        ((torch.randn(X), torch.randn(X)), r"takes 2 positional arguments but 3 were given"),
        ({"image": torch.randn(X)}, r"unexpected keyword argument 'image'"),
        ((np.zeros(X),), r"example input \[0\]\[0\] is a numpy\.ndarray, not a tensor"),
        (3, r"example_inputs is a builtins\.int, not a tensor"),
        ((1, 2), r"hold no tensor"),
        (None, r"hold no tensor"),
        (torch.randn(0, 3, 8, 8), r"no elements"),
    ],
)
def test_wrong_inputs_are_named(
    model: nn.Module, inputs: object, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(TraceError, match=message):
        trace(model, inputs)  # type: ignore[arg-type]
    assert capfd.readouterr().err == ""
    assert model.training


def test_names_that_the_graph_needs_itself_are_refused() -> None:
    model = nn.Module()
    model.graph = nn.Conv2d(3, 3, 1)
    model.forward = model.graph.forward  # type: ignore[method-assign]
    with pytest.raises(TraceError, match="'graph' has the name of an attribute of GraphModule"):
        trace(model, torch.randn(X))


def test_failed_trace_does_not_count_as_a_call() -> None:
    class CountingBranch(Counter):
        def forward(self, x: Tensor) -> Tensor:
            return Branch()(super().forward(x))

    model = CountingBranch()
    with pytest.raises(TraceError):
        trace(model, torch.randn(X))
    assert int(model.count) == 0


@pytest.mark.parametrize("thing", ["resnet18", Residual, lambda x: x, None])
def test_what_is_no_model_is_refused(thing: object) -> None:
    with pytest.raises(TraceError, match="cannot trace a"):
        trace(thing, torch.randn(X))  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["conv.weight", "norm.running_var"])
def test_tensors_that_are_not_finite_are_named(model: nn.Module, name: str, value: float) -> None:
    model.get_parameter("conv.weight")
    model.state_dict()[name].view(-1)[1] = value
    with pytest.raises(ModelError, match=rf"'{name}' of shape \(8.* holds 1 (NaN|infinite)"):
        trace(model, torch.randn(X))


def test_large_weights_are_finite_and_masks_may_be_infinite() -> None:
    model = nn.Sequential(nn.Linear(8, 8)).half()
    with torch.no_grad():
        model[0].weight.fill_(60000)  # their sum overflows
    model.register_buffer("mask", torch.full((2,), float("-inf")))
    trace(model, torch.zeros(2, 8, dtype=torch.half))


def test_tensors_without_values_are_named() -> None:
    with pytest.raises(ModelError, match="'weight' has no values yet"):
        trace(nn.Conv2d(3, 4, 3, device="meta"), torch.randn(X))
    with pytest.raises(ModelError, match="'weight' has no values yet"):
        trace(nn.LazyConv2d(4, 3), torch.randn(X))
    with torch.inference_mode():
        frozen = nn.Conv2d(3, 4, 3)
    with pytest.raises(ModelError, match="inference_mode"):
        trace(frozen, torch.randn(X))


# Networks of others ---------------------------------------------------------------------------------------------------


def assert_same(graph: Graph, model: nn.Module, size: int) -> None:
    model.eval()
    graph.module.eval()
    for batch in (1, 3):
        x = torch.randn(batch, 3, size, size)
        with torch.no_grad():
            torch.testing.assert_close(graph(x), model(x), rtol=1e-4, atol=1e-5)
    assert [k for k in model.state_dict() if k not in graph.dropped] == list(graph.module.state_dict())


@pytest.mark.parametrize("name", ["resnet18", "shufflenet_v2_x0_5", "squeezenet1_1"])
def test_torchvision(name: str) -> None:
    models = pytest.importorskip("torchvision.models")
    model = randomise(models.get_model(name))
    assert_same(trace(model, torch.randn(1, 3, 64, 64)), model, 64)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_nfnet"])
def test_timm(name: str) -> None:
    timm = pytest.importorskip("timm")
    model = randomise(timm.create_model(name))
    size = model.pretrained_cfg["input_size"][-1]
    assert_same(trace(model, torch.randn(1, 3, size, size)), model, size)
