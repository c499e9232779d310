"""Codebooks learn by `distill`: indices stay, runs resume, and the pipeline that comes with the package works."""

from __future__ import annotations

import pytest
import torch
from fxpress.ir.errors import OptionError
from fxpress.passes.pipeline import Pipeline
from fxpress.runtime.data import Data
from fxpress.runtime.layers.pq_layer import PQLayer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fxpress

QUANTIZE = {"product-quantize": {"subspace": 4, "codewords": 8, "linear": {"codewords": 8}, "last": None, "sweeps": 1,
                                 "codebook": "int8"}}  # fmt: skip
TUNE = {"epochs": 2, "optimizer": "adamw", "lr": 0.01, "weight_decay": 0, "keep": "last"}


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(96, 32)).eval()


@pytest.fixture(scope="module")
def data(net):
    images = torch.randn(48, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        targets = net(images).argmax(1)
    loader = DataLoader(TensorDataset(images, targets), batch_size=16, shuffle=True)
    return Data(train=loader, calibration=[(images, targets)])


def tuned(net, data, **options):
    """The quantised network, and it behind `distill` with the losses of its epochs."""
    passes, example = [QUANTIZE, {"distill": {**TUNE, **options}}], torch.zeros(1, 3, 6, 6)
    before = fxpress.compile(net, passes[:1], example, data=data).module
    after = fxpress.compile(net, passes, example, data=data)
    return before, after.module, after.report["distill"].metrics["loss"]


@pytest.mark.parametrize("only", ["codebooks", "quantized"])
def test_codewords_learn_with_fixed_indices(net, data, only):
    before, after, losses = tuned(net, data, only=only, epochs=4, lr=0.003)
    old, new = before.state_dict(), after.state_dict()
    biases = [] if only == "codebooks" else [f"{n}.bias" for n, m in after.named_modules() if isinstance(m, PQLayer)]
    for name, tensor in old.items():
        learned = name.endswith("codebook") or name in biases
        assert torch.equal(tensor, new[name]) != learned or "running" in name or "tracked" in name, name
    assert all(parameter.requires_grad for parameter in after.parameters())
    assert losses[-1] < losses[0]


def test_other_parameters_learn_too_with_bf16_and_a_moving_average(net, data):
    before, after, _ = tuned(net, data, precision="bf16", ema=0.5)
    old, new = before.state_dict(), after.state_dict()
    assert not torch.equal(old["3.bias"], new["3.bias"])
    assert not torch.equal(old["3.codebook"], new["3.codebook"])
    assert torch.equal(old["3.indices"], new["3.indices"])
    assert all(torch.isfinite(layer.decoded()).all() for layer in after.modules() if isinstance(layer, PQLayer))


class Breaking(DataLoader):
    """Stops in the middle of a run, once."""

    left = 0

    def __iter__(self):
        for batch in super().__iter__():
            type(self).left -= 1
            if self.left == 0:
                raise InterruptedError
            yield batch


def test_a_run_resumes_to_the_same_bits(net, data, tmp_path):
    passes, example = [QUANTIZE, {"distill": {**TUNE, "ema": 0.5}}], torch.zeros(1, 3, 6, 6)
    breaking = Breaking(data.train.dataset, batch_size=16, shuffle=True)
    same = Data(train=breaking, calibration=data.calibration)
    whole = fxpress.compile(net, passes, example, data=same, workdir=tmp_path / "whole").module.state_dict()
    Breaking.left = 4
    with pytest.raises((InterruptedError, fxpress.FxpressError)):
        fxpress.compile(net, passes, example, data=same, workdir=tmp_path / "cut")
    resumed = fxpress.compile(net, passes, example, data=same, workdir=tmp_path / "cut", resume=True)
    for name, tensor in resumed.module.state_dict().items():
        assert torch.equal(whole[name], tensor), name


def test_codebooks_alone_need_codebooks(net, data):
    with pytest.raises(OptionError, match="'only': the network has no product-quantized layer"):
        fxpress.compile(net, [{"distill": {**TUNE, "only": "codebooks"}}], torch.zeros(1, 3, 6, 6), data=data)


def test_the_packaged_pipeline(net, data, repository):
    pipeline = Pipeline.load(repository / "passes" / "pipelines" / "quantized-cnn.yaml")
    names = [one.name for one in pipeline.passes]
    assert names == ["fold-batchnorm", "product-quantize", "distill", "emit"]
    assert pipeline.passes[1].correction == "accumulated"
    # its codebooks are for wider layers than these
    small = [one.model_copy(update={"codewords": 8}) if one.name == names[1] else one for one in pipeline.passes]
    compiled = fxpress.compile(net, small, torch.zeros(1, 3, 6, 6), data=data)
    assert any(isinstance(layer, PQLayer) for layer in compiled.module.modules())
    assert [row.name for row in compiled.report.rows] == ["trace", *names]
