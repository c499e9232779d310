"""quantize-int8: which layers, on which spans, how far from the network before; emitted, trained, saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fxpress.ir.cost import measure_cost
from fxpress.runtime import kernels
from fxpress.runtime.layers import Int8Conv2d, Int8Layer, Int8Linear
from torch import Tensor, nn

import fxpress
from fxpress import OptionError


class Network(nn.Module):
    """Plain, strided, dilated and grouped convolutions, a batch norm, a view, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 5, stride=2, padding=2, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.wide = nn.Conv2d(12, 20, 3, padding=2, dilation=2)
        self.grouped = nn.Conv2d(20, 20, 3, padding=1, groups=4)
        self.same = nn.Conv2d(20, 20, 3, padding="same")
        self.even = nn.Conv2d(20, 6, 4, padding="same")
        self.fc = nn.Linear(6 * 64, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.wide(self.norm(self.stem(x)).relu()).relu()
        x = self.even(self.same(self.grouped(x).relu()))
        return self.fc(x.view(x.shape[0], -1))


def network() -> Network:
    torch.manual_seed(0)
    model = Network()
    with torch.no_grad():  # a batch norm that does something
        for _ in range(20):
            model(2 * torch.randn(8, 3, 16, 16) + 1)
        model.norm.weight.copy_(torch.randn(12))
        model.norm.bias.copy_(torch.randn(12))
    return model.eval()


X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
DATA = fxpress.Data(calibration=[(2 * X, torch.zeros(4, dtype=torch.long)), (-X, torch.zeros(4, dtype=torch.long))])


def test_what_is_quantised_and_what_is_not() -> None:
    compiled = fxpress.compile(network(), ["quantize-int8"], X, data=DATA)
    row = compiled.report["quantize-int8"]
    assert row.metrics["int8_layers"] == ["stem", "wide", "same", "fc"]
    kinds = {name: type(layer) for name, layer in compiled.module.named_children() if isinstance(layer, Int8Layer)}
    assert kinds == {"stem": Int8Conv2d, "wide": Int8Conv2d, "same": Int8Conv2d, "fc": Int8Linear}
    reasons = {skip.node: skip.reason for skip in row.skips}
    assert set(reasons) == {"grouped", "even"}
    assert "4 groups" in reasons["grouped"]
    assert "not the same on both sides" in reasons["even"]
    assert row.semantics == "lossy"
    assert row.distance is not None
    assert 0 < row.distance < 0.05
    assert "4 layers have 8 bits" in row.notes[0]
    again = fxpress.compile(compiled, ["quantize-int8"], X)
    assert again.report["quantize-int8"].notes == ["no layer is left to quantise"]


@pytest.mark.parametrize("data", [DATA, None])
def test_spans_are_those_of_the_images(data: fxpress.Data | None) -> None:
    compiled = fxpress.compile(network(), ["quantize-int8"], X, data=data)
    seen = torch.cat([2 * X, -X]) if data is not None else X
    stem: Any = compiled.module.get_submodule("stem")
    assert torch.equal(stem.input_range, torch.stack(torch.aminmax(seen)))
    source = "8 calibration images" if data is not None else "4 example inputs"
    assert source in compiled.report["quantize-int8"].notes[1]


@pytest.mark.parametrize("order", [["quantize-int8", "fold-batchnorm"], ["fold-batchnorm", "quantize-int8"]])
def test_batch_norms_fold_on_either_side(order: list[str]) -> None:
    model = network()
    compiled = fxpress.compile(model, order, X, data=DATA)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in compiled.module.modules())
    with torch.no_grad():
        assert torch.allclose(compiled(X), model(X), atol=0.05 * float(model(X).abs().max()))


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_emitted_networks_run_by_integers(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    compiled = fxpress.compile(model, ["quantize-int8", {"emit": {"layout": layout}}], X, data=DATA)
    assert compiled.report["emit"].distance is not None
    assert compiled.report["emit"].distance < 1e-4
    monkeypatch.setattr(Int8Layer, "_weighted", None)  # or it would be called
    monkeypatch.setattr(Int8Conv2d, "_weighted", None)
    monkeypatch.setattr(Int8Linear, "_weighted", None)
    if not kernels.available():
        pytest.skip("no compiled kernels")
    with torch.no_grad():
        y = compiled(X)
        assert torch.allclose(y, model(X), atol=0.05 * float(model(X).abs().max()))
        exported = torch.export.export(compiled.module, (X,), strict=False).module()
        assert torch.equal(exported(X), y)


def test_rectifiers_become_parts_of_layers() -> None:
    class Shared(nn.Module):
        """One ReLU that alone reads its layer, one beside another reader, and a batch norm behind a third."""

        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.three = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.two(self.one(x).relu())
            return self.norm(self.three(x + x.relu()).relu())

    x = torch.randn(2, 4, 6, 6)
    compiled = fxpress.compile(Shared().eval(), ["quantize-int8", "emit"], x)
    layers: Any = dict(compiled.module.named_children())
    assert [layers[name].relu for name in ("one", "two", "three")] == [True, False, True]
    assert "2 ReLUs became parts of the layers before them" in compiled.report["emit"].notes
    assert compiled.report["emit"].distance is not None
    assert compiled.report["emit"].distance < 1e-5
    again = fxpress.compile(compiled, ["fold-batchnorm"], x)  # a norm does not go through a ReLU
    assert [skip.reason for skip in again.report["fold-batchnorm"].skips] == ["its input three rectifies what it gives"]
    layer = layers["one"].train()
    assert float(layer(x).detach().min()) == 0


def test_max_pools_become_parts_of_convolutions(tmp_path: Path) -> None:
    class Pooled(nn.Module):
        """Pool behind ReLU, ReLU behind pool, a pool of another kind, and one beside another reader."""

        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.three, self.four = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            x = F.max_pool2d(self.one(x).relu(), 3, 2, 1)
            x = F.max_pool2d(self.two(x), 2).relu()
            x = F.max_pool2d(self.three(x), 3, 2, ceil_mode=True)
            x = self.four(x)
            return F.max_pool2d(x, 2, 1) + x.mean()

    x = torch.randn(2, 4, 36, 36)
    compiled = fxpress.compile(Pooled().eval(), ["quantize-int8", "emit"], x)
    layers: Any = dict(compiled.module.named_children())
    assert [layers[name].pool for name in ("one", "two", "three", "four")] == [
        (3, 3, 2, 2, 1, 1), (2, 2, 2, 2, 0, 0), (), (),
    ]  # fmt: skip
    assert layers["two"].relu
    assert "2 max pools became parts of the layers before them" in compiled.report["emit"].notes
    assert compiled.report["emit"].distance is not None
    assert compiled.report["emit"].distance < 1e-5
    before = fxpress.compile(Pooled().eval(), ["quantize-int8"], x)
    assert measure_cost(compiled.graph).macs == measure_cost(before.graph).macs
    with torch.no_grad():
        y = compiled(x)
        compiled.save(tmp_path / "pooled.fxp")
        assert torch.equal(fxpress.load(tmp_path / "pooled.fxp")(x), y)
        exported = torch.export.export(compiled.module, (x,), strict=False).module()
        assert torch.equal(exported(x), y)
    compiled.module.train()(x).sum().backward()
    assert float(layers["one"].weight.grad.abs().sum()) > 0


def test_a_file_holds_a_byte_for_each_weight(tmp_path: Path) -> None:
    convolutions = nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3)
    big = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(64 * 16, 10)).eval()
    x = torch.randn(2, 3, 8, 8)
    compiled = fxpress.compile(big, ["quantize-int8"], x)
    compiled.save(tmp_path / "m.fxp")
    layers = [layer for layer in compiled.module.modules() if isinstance(layer, Int8Layer)]
    packed = sum(layer.stored_bytes for layer in layers)
    assert packed == 64 * 27 + 64 * 576 + 10240 + 4 * 2 * (64 + 64 + 10) + 3 * 8
    assert packed <= (tmp_path / "m.fxp").stat().st_size < packed + 8192
    with torch.no_grad():
        assert torch.equal(fxpress.load(tmp_path / "m.fxp")(x), compiled(x))


def test_it_trains() -> None:
    compiled = fxpress.compile(network(), ["quantize-int8"], X)
    module = compiled.module.train()
    optimizer = torch.optim.SGD(module.parameters(), 1e-2)
    losses = []
    for _ in range(10):
        loss = module(X).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_layers_can_be_ignored() -> None:
    compiled = fxpress.compile(network(), [{"quantize-int8": {"ignore": ["s*", "fc", "even"]}}], X)
    row = compiled.report["quantize-int8"]
    assert row.metrics["int8_layers"] == ["wide"]
    assert sum(skip.reason == "ignored by option" for skip in row.skips) == 4
    with pytest.raises(OptionError, match="'quantize-int8', option 'ignore': no convolution or linear layer 'steam'"):
        fxpress.compile(network(), [{"quantize-int8": {"ignore": ["steam"]}}], X)
