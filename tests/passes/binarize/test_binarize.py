"""`binarize`: what becomes of every kind of network, the numbers behind it, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fxpress.ir.errors import OptionError
from fxpress.ir.graph import Graph
from fxpress.ir.trace import trace
from fxpress.passes.base import Context, PassResult
from fxpress.passes.binarize import quantizing
from fxpress.passes.binarize.binarize import Binarize
from fxpress.passes.runner import run_pass
from fxpress.runtime.layers import BinaryConv2d, BinaryLayer, BinaryLinear, HalfWaveQuantizer, Int8Conv2d, Int8Linear
from torch import Tensor, nn

import fxpress

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def conv(a: int, b: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(a, b, 3, padding=1, **options)


def settled(model: nn.Module, x: Tensor = IMAGES) -> nn.Module:
    """With statistics and affine parameters that are not those of a new network."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
    return model.eval()


def run(model: nn.Module, x: Tensor = IMAGES, data: Any = None, **options: Any) -> tuple[Graph, PassResult]:
    graph = trace(model.eval(), x)
    context = Context(graph.copy(), data=data or fxpress.Data())
    result, _ = run_pass(Binarize(**options), graph, context)
    return graph, result


def chain(graph: Graph, path: str) -> list[str]:
    """What leads to a layer, operation by operation, up to the layer or sum before."""
    node = next(node for node in graph.nodes if node.target == path)
    found: list[str] = []
    while True:
        node = node.all_input_nodes[0]
        layer = graph.layer(node)
        found.insert(0, type(layer).__name__ if layer is not None else node.name.rstrip("_0123456789"))
        if (
            isinstance(layer, (nn.Conv2d, nn.Linear, BinaryLayer))
            or node.op == "placeholder"
            or found[0] in ("add", "cat")
        ):
            return found


class Vgg(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            conv(3, 6), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), conv(6, 8), nn.BatchNorm2d(8), nn.ReLU6(),
            nn.Flatten(), nn.Dropout(), nn.Linear(128, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 5),
        )  # fmt: skip


def test_a_plain_network() -> None:
    model = settled(Vgg())
    graph, result = run(model)
    assert chain(graph, "4") == ["Conv2d", "max_pool2d", "BatchNorm2d", "HalfWaveQuantizer"]
    assert chain(graph, "9") == ["BinaryConv2d", "BatchNorm2d", "HalfWaveQuantizer", "flatten", "Dropout"]
    assert chain(graph, "12") == ["BinaryLinear", "BatchNorm1d", "relu"]  # in front of the last layer nothing changes
    assert isinstance(graph.module.get_submodule("4"), BinaryConv2d)
    assert isinstance(graph.module.get_submodule("9"), BinaryLinear)
    norm: Any = graph.module.get_submodule("1_norm")
    assert (norm.weight, norm.bias) == (None, None)
    old: Any = model[1]
    assert torch.equal(norm.running_mean, old.running_mean)
    assert torch.equal(norm.running_var, old.running_var)
    assert result.metrics["replaced"] == {"relu": 1, "hardtanh": 1}
    assert result.metrics["binary_layers"] == ["4", "9"]
    assert {skip.node: skip.reason for skip in result.skips} == {
        "0": "the first layer keeps its precision", "12": "the last layer keeps its precision"
    }  # fmt: skip
    assert any("norms removed: 2" in note for note in result.notes)
    assert graph.module.get_submodule("4").bias is None


def test_its_numbers() -> None:
    """The rewritten network, written out."""
    model: Any = settled(Vgg())
    graph, _ = run(model)
    layers = dict(graph.module.named_modules())
    q = HalfWaveQuantizer()

    def plain(x: Tensor, norm: Any) -> Tensor:
        return F.batch_norm(x, norm.running_mean, norm.running_var, eps=norm.eps)

    with torch.no_grad():
        x = q(plain(F.max_pool2d(model[0](IMAGES), 2), model[1]))
        x = q(plain(F.conv2d(x, layers["4"].binary_weight, model[4].bias, padding=1), model[5]))
        x = model[11](model[10](F.linear(x.flatten(1), layers["9"].binary_weight, model[9].bias)))
        assert torch.allclose(model[12](x), graph(IMAGES), atol=1e-4)


def test_signs_are_those_of_the_trained_weights() -> None:
    model: Any = settled(Vgg())
    graph, _ = run(model)
    layer: Any = graph.module.get_submodule("4")
    assert torch.equal(layer.weight >= 0, model[4].weight >= 0)  # factors of the norm before are positive here
    assert not torch.equal(layer.weight, model[4].weight)  # each input channel has its own slope


class Block(nn.Module):
    """A residual network: a block that keeps its shape, one with a shortcut of its own, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = conv(3, 6, bias=False), nn.BatchNorm2d(6)
        self.a, self.bn1, self.b, self.bn2 = conv(6, 6), nn.BatchNorm2d(6), conv(6, 6, bias=False), nn.BatchNorm2d(6)
        self.c, self.bn3 = conv(6, 8, stride=2, bias=False), nn.BatchNorm2d(8)
        self.down, self.bn4 = nn.Conv2d(6, 8, 1, 2, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn0(self.stem(x)))
        x = F.relu(self.bn2(self.b(F.relu(self.bn1(self.a(x))))) + x)
        x = F.relu(self.bn3(self.c(x)) + self.bn4(self.down(x)))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


def test_residual_blocks() -> None:
    graph, result = run(settled(Block()))
    assert result.metrics["binary_layers"] == ["a", "b", "c", "down"]
    assert chain(graph, "a") == ["Conv2d", "BatchNorm2d", "HalfWaveQuantizer"]
    assert chain(graph, "b") == ["BinaryConv2d", "BatchNorm2d", "HalfWaveQuantizer"]
    assert chain(graph, "c") == ["add", "BatchNorm2d", "HalfWaveQuantizer"]
    reads = {n.target: n.all_input_nodes[0] for n in graph.nodes if n.target in ("c", "down")}
    assert reads["c"] is reads["down"]  # one quantizer for both
    affine = {path for path, m in graph.module.named_modules() if isinstance(m, nn.BatchNorm2d) and m.affine}
    assert affine == {"bn0", "bn2", "bn3", "bn4"}  # where a ReLU or a sum follows
    assert result.metrics["new_norms"] == 1
    assert result.metrics["norms_without_affine"] == 2
    assert any("1 of them without statistics" in note for note in result.notes)


def test_new_norms_take_statistics_from_the_data() -> None:
    data = fxpress.Data(calibration=[(IMAGES, torch.zeros(4, dtype=torch.long))])
    graph, result = run(settled(Block()), data=data)
    assert not any("without statistics" in note for note in result.notes)
    assert any("batch norms from 1 batches" in note for note in result.notes)
    seen: dict[str, Tensor] = {}
    for name in ("add_norm", "bn0_norm", "bn1_norm"):
        graph.module.get_submodule(name).register_forward_hook(lambda _m, _i, y, name=name: seen.update({name: y}))
    with torch.no_grad():
        graph(IMAGES)
    for value in seen.values():
        assert float(value.mean((0, 2, 3)).abs().max()) < 0.01
        assert float((value.var((0, 2, 3), unbiased=False) - 1).abs().max()) < 0.05


class Fire(nn.Module):
    """Branches that are joined, and pooled for one of two readers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.three = conv(3, 4), nn.Conv2d(4, 3, 1), conv(4, 5)
        self.norm = nn.BatchNorm2d(3)
        self.left, self.right, self.head = conv(8, 4), conv(8, 4), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = torch.cat([F.relu(self.norm(self.one(x))), F.relu(self.three(x))], 1)
        y = torch.cat([self.left(x), self.right(F.max_pool2d(x, 3, 1, 1))], 1)
        return self.head(F.relu(y)).mean((2, 3))


def test_concatenations_are_quantised_branch_by_branch() -> None:
    graph, result = run(settled(Fire()))
    assert result.metrics["quantizers"] == 3  # the pooled reader pools levels that there are already
    joined = next(node for node in graph.nodes if node.target == "left").all_input_nodes[0]
    assert [type(graph.layer(part)) for part in joined.all_input_nodes] == [HalfWaveQuantizer] * 2
    pools = next(node for node in graph.nodes if node.target == "right").all_input_nodes[0].all_input_nodes
    assert [type(graph.layer(pool.all_input_nodes[0])) for pool in pools] == [HalfWaveQuantizer] * 2
    assert chain(graph, "head")[-1] == "relu"


@pytest.mark.parametrize(
    "activation",
    [nn.ReLU(), nn.ReLU6(), nn.PReLU(4), nn.PReLU(), nn.Hardswish(), nn.SiLU(), nn.GELU(), nn.LeakyReLU(), nn.ELU(),
     nn.Mish(), nn.Hardtanh(0, 1)],
)  # fmt: skip
def test_activations_that_are_replaced(activation: nn.Module) -> None:
    model = settled(
        nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), activation, conv(4, 4), nn.Flatten(), nn.Linear(256, 2))
    )
    graph, result = run(model)
    assert chain(graph, "3") == ["Conv2d", "BatchNorm2d", "HalfWaveQuantizer"]
    assert sum(result.metrics["replaced"].values()) == 1


@pytest.mark.parametrize("activation", [nn.Sigmoid(), nn.Tanh(), nn.Hardtanh(), nn.AvgPool2d(1), nn.Softmax(1)])
def test_other_inputs_get_a_norm_and_a_quantizer_of_their_own(activation: nn.Module) -> None:
    model = settled(
        nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), activation, conv(4, 4), nn.Flatten(), nn.Linear(256, 2))
    )
    graph, result = run(model)
    found = chain(graph, "3")
    assert found[:2] == ["Conv2d", "BatchNorm2d"]
    assert found[-2:] == ["BatchNorm2d", "HalfWaveQuantizer"]
    assert len(found) == 5
    assert graph.module.get_submodule("1").affine is True
    assert result.metrics["replaced"] == {}
    assert any("no such activation" in note for note in result.notes)


def test_inverted_residuals() -> None:
    """MobileNetV2: a depthwise layer stays with its activations, and a linear bottleneck has none."""

    class Mobile(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.bn0 = conv(3, 4), nn.BatchNorm2d(4)
            self.wide, self.bn1, self.deep, self.bn2 = (
                nn.Conv2d(4, 8, 1),
                nn.BatchNorm2d(8),
                conv(8, 8, groups=8),
                nn.BatchNorm2d(8),
            )
            self.narrow, self.bn3, self.head = nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.bn0(self.stem(x))
            y = F.relu6(self.bn2(self.deep(F.relu6(self.bn1(self.wide(x))))))
            return self.head((x + self.bn3(self.narrow(y))).mean((2, 3)))  # type: ignore[no-any-return]

    graph, result = run(settled(Mobile()))
    assert result.metrics["binary_layers"] == ["wide", "narrow"]
    assert "depthwise" in {skip.node: skip.reason for skip in result.skips}["deep"]
    assert chain(graph, "deep") == ["BinaryConv2d", "BatchNorm2d", "relu"]
    assert chain(graph, "narrow") == ["Conv2d", "BatchNorm2d", "HalfWaveQuantizer"]
    assert chain(graph, "wide") == ["Conv2d", "BatchNorm2d", "HalfWaveQuantizer"]
    assert {"bn0", "bn0_norm"} <= {path for path, _ in graph.module.named_modules()}  # the sum still reads the former


class Odd(nn.Module):
    """Layers that have no binary form."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice, self.tied, self.other = conv(3, 4), conv(4, 4), conv(4, 4), conv(4, 4)
        self.other.weight = self.tied.weight
        self.up, self.circular = nn.ConvTranspose2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")
        self.even = nn.Conv2d(4, 4, 2, padding="same")
        self.gate, self.tokens, self.line = nn.Conv2d(4, 4, 1), nn.Linear(8, 8), nn.Conv1d(4, 4, 1)
        self.fine, self.head = nn.Conv2d(4, 4, (3, 1), padding="same", dilation=2), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(self.stem(x).relu()).relu()).relu()
        x = self.even(self.circular(self.up(self.other(self.tied(x).relu()).relu()).relu()).relu()).relu()
        x = self.tokens(x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid())
        x = x + self.line(x.flatten(2)).view(x.shape)
        return self.head(self.fine(x.relu()).relu())  # type: ignore[no-any-return]


def test_what_it_leaves_alone_and_why() -> None:
    graph, result = run(Odd())
    reasons = {skip.node: skip.reason for skip in result.skips}
    for path, words in {
        "twice": "called 2 times", "tied": "shared with another", "other": "shared with another",
        "up": "ConvTranspose2d", "even": "'same'", "gate": "one position",
        "tokens": "not dimension 1", "line": "Conv1d", "stem": "first", "head": "last",
    }.items():  # fmt: skip
        assert words in reasons.pop(path)
    assert reasons == {}
    assert result.metrics["binary_layers"] == ["circular", "fine"]  # the former's padding is an operation of its own
    layer: Any = graph.module.get_submodule("fine")
    assert (layer.padding, layer.dilation) == ((2, 0), (2, 2))


def test_first_and_last() -> None:
    graph, result = run(settled(Vgg()), first="binary", last="binary")
    assert result.metrics["binary_layers"] == ["0", "4", "9", "12"]
    assert chain(graph, "0") == ["input"]  # images are read as they are
    assert chain(graph, "12") == ["BinaryLinear", "BatchNorm1d", "HalfWaveQuantizer"]
    assert graph.module.get_submodule("12").bias is not None
    with pytest.raises(OptionError, match="given 'int4', allowed: 'float' or 'int8' or 'binary'"):
        Binarize(first="int4")


def test_options_reach_the_layers() -> None:
    options = {"bits": 3, "zero_bin": "round", "backward": "vanilla", "weights": "ternary", "scale": "layer"}
    graph, result = run(settled(Vgg()), ignore=("9",), **options)
    layer: Any = graph.module.get_submodule("4")
    quantizer: Any = graph.module.get_submodule("1_quantizer")
    assert (layer.weights, layer.scale) == ("ternary", "layer")
    assert (quantizer.bits, quantizer.zero_bin, quantizer.backward) == (3, "round", "vanilla")
    assert isinstance(graph.module.get_submodule("9"), nn.Linear)
    assert any("three values" in note for note in result.notes)
    with pytest.raises(OptionError, match="'ignore': no convolution or linear layer 'layer9': layers: 0, 4"):
        run(settled(Vgg()), ignore=("layer9",))
    with pytest.raises(OptionError, match="zero_bin has no meaning"):
        Binarize(uniform=False, zero_bin="round")


@pytest.mark.parametrize("model", [Vgg, Block, Fire])
def test_two_stages_make_the_same_network(model: Any) -> None:
    network = settled(model())
    whole, _ = run(network)
    graph = trace(network, IMAGES)
    context = Context(graph.copy())
    first, _ = run_pass(Binarize(stage="activations"), graph, context)
    assert not any(isinstance(m, BinaryLayer) for m in graph.module.modules())
    second, _ = run_pass(Binarize(stage="weights"), graph, context)
    assert second.metrics["binary_layers"]
    assert "quantizers" in first.metrics
    assert "quantizers" not in second.metrics
    assert [n.name for n in graph.nodes] == [n.name for n in whole.nodes]
    with torch.no_grad():
        assert torch.allclose(graph(IMAGES), whole(IMAGES), atol=1e-5)
    again, _ = run_pass(Binarize(), graph, context)
    assert again.notes[-1] == "no layer is left to binarize"


def test_weights_alone() -> None:
    graph, result = run(settled(Vgg()), stage="weights")
    assert not any(isinstance(m, HalfWaveQuantizer) for m in graph.module.modules())
    assert "2 of these layers read values that are not quantised" in result.notes


def test_the_slopes_bring_the_network_nearer_to_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Vgg()
    for norm in (model[1], model[5]):
        nn.init.uniform_(norm.weight, 0.02, 3)  # type: ignore[arg-type]
    model = model.eval()
    data = fxpress.Data(calibration=[(torch.randn(64, 3, 8, 8), torch.zeros(64, dtype=torch.long))])

    def gap() -> float:
        torch.manual_seed(0)
        graph, _ = run(model, stage="activations", data=data)
        with torch.no_grad():
            wanted, found = model(IMAGES), graph(IMAGES)
        return float(1 - torch.corrcoef(torch.stack([wanted.flatten(), found.flatten()]))[0, 1])

    with_slopes = gap()
    monkeypatch.setattr(quantizing.Quantizing, "_slope", lambda *_: None)
    assert with_slopes < gap()


def test_it_trains_exports_and_is_saved(tmp_path: Any) -> None:
    """Activations first, then weights; the trained network in full precision teaches both."""
    x = torch.randn(512, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    y = x[:, :, :4].mean((1, 2, 3)).gt(x[:, :, 4:].mean((1, 2, 3))).long()  # which half is brighter
    batches = list(zip(x.split(32), y.split(32), strict=True))
    data = fxpress.Data(train=batches, val=batches)
    model = Vgg()
    learn = {"distill": {"loss": "cross-entropy", "epochs": 8, "lr": 0.05, "clip_norm": None}}
    teacher = fxpress.compile(model.eval(), [learn], x[:2], data=data)
    again = {"distill": {"epochs": 3, "lr": 0.02, "clip_norm": None}}
    passes = [{"binarize": {"stage": "activations"}}, again, {"binarize": {"stage": "weights"}}, again]
    compiled = fxpress.compile(teacher.module, passes, x[:2], data=data)
    accuracies = [row.accuracy for row in compiled.report.rows]
    assert accuracies[0] > 0.9
    assert accuracies[-1] > 0.8
    assert accuracies[-1] > accuracies[-2]
    exported = torch.export.export(compiled.module, (x[:2],)).module()
    with torch.no_grad():
        assert torch.allclose(exported(x[:2]), compiled(x[:2]), atol=1e-5)
        compiled.save(tmp_path / "m.fxp")
        assert torch.equal(fxpress.load(tmp_path / "m.fxp")(x), compiled(x))


@pytest.mark.parametrize("calibrated", [True, False])
def test_ends_of_8_bits(calibrated: bool) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    ).eval()  # fmt: skip
    x = torch.randn(4, 3, 10, 10)
    data = fxpress.Data(calibration=[(5 * x, torch.zeros(4, dtype=torch.long))]) if calibrated else None
    passes = [{"binarize": {"first": "int8", "last": "int8"}}]
    compiled = fxpress.compile(model, passes, x, data=data)
    assert compiled.report["binarize"].metrics["int8_layers"] == ["0", "8"]
    assert compiled.report["binarize"].metrics["binary_layers"] == ["3"]
    first = compiled.module.get_submodule("0")
    assert isinstance(first, Int8Conv2d)
    assert torch.allclose(first.input_range, (5 if calibrated else 1) * torch.stack(torch.aminmax(x)))
    assert isinstance(compiled.module.get_submodule("8"), Int8Linear)
    assert compiled(x).isfinite().all()
    again = fxpress.compile(compiled, passes, x, data=data)  # what is small already stays as it is
    assert again.report["binarize"].metrics["int8_layers"] == []


def test_ends_of_8_bits_are_emitted_saved_and_loaded(tmp_path: Any) -> None:
    torch.manual_seed(0)
    stages = [part for i, o in ((3, 24), (24, 24), (24, 48)) for part in (
        nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2))]  # fmt: skip
    model = nn.Sequential(*stages, nn.Flatten(), nn.Linear(48 * 4, 10)).eval()
    x = torch.randn(4, 3, 16, 16)
    data = fxpress.Data(train=[(x, torch.zeros(4, dtype=torch.long))])
    ends = {"binarize": {"first": "int8", "last": "int8"}}
    trained = fxpress.compile(model, [ends], x, data=data)
    emitted = fxpress.compile(trained, ["emit"], x)
    kinds = [type(layer).__name__ for layer in emitted.module.children()]
    assert kinds.count("Int8Conv2d") == kinds.count("Int8Linear") == kinds.count("BinaryNetwork") == 1
    emitted.save(tmp_path / "m.fxp")
    loaded = fxpress.load(tmp_path / "m.fxp")
    with torch.no_grad():
        y = emitted(x)
        assert torch.equal(loaded(x), y)
        assert torch.allclose(emitted(x[:1]), y[:1], atol=1e-5)  # spans are the layer's: no image moves another's
    bits, weights = sum(24 * 9 * o for o in (24, 48)) // 8, 24 * 27 + 10 * 192
    assert bits + weights < (tmp_path / "m.fxp").stat().st_size < bits + weights + 12_000
