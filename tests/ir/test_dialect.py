"""The allow-lists: what may be named by a stored graph, and what may not."""

from __future__ import annotations

import json
import operator

import pytest
import torch
from fxpress.ir import dialect
from fxpress.ir.errors import GraphError
from torch import nn

OPS = ["aten.add.Tensor", "aten.conv2d.default", "aten.scaled_dot_product_attention.default", "aten.pad.default",
       "aten.to.dtype", "aten.slice_scatter.default", "operator.getitem", "torch.sym_max", "math.ceil"]  # fmt: skip
REFUSED = ["aten.add_.Tensor", "aten.add.out", "aten.from_file.default", "aten.__class__.default", "aten.add.__init__",
           "aten.conv2d", "conv2d.default", "os.system", "operator.attrgetter", "builtins.eval", "aten.nothing.default",
           "aten.record_stream.default", "aten._unsafe_index.Tensor", "aten.add.int", "aten.Generator.default",
           "aten.relu_backward.default", "aten._sparse_coo_tensor_unsafe.default", "aten.empty_quantized.default",
           "prims.add.default", "aten.conv2d.default.x", "", "aten..default"]  # fmt: skip
EXAMPLES = [
    nn.Conv2d(3, 4, (3, 1), padding="same", bias=False),
    nn.ConvTranspose1d(4, 6, 3, 2, output_padding=1, groups=2),
    nn.Linear(3, 4),
    nn.BatchNorm2d(4, momentum=None),
    nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
    nn.GroupNorm(2, 4),
    nn.LayerNorm((3, 4), bias=False),
    nn.RMSNorm(4, eps=1e-4),
    nn.Embedding(5, 4, padding_idx=1),
    nn.PReLU(4),
    nn.Dropout(0.1),
]


@pytest.mark.parametrize("name", OPS)
def test_names_lead_to_operations_and_back(name: str) -> None:
    assert dialect.op_name(dialect.op_from_name(name)) == name


@pytest.mark.parametrize("name", REFUSED)
def test_other_names_lead_nowhere(name: str) -> None:
    with pytest.raises(GraphError, match="unknown operation"):
        dialect.op_from_name(name)


@pytest.mark.parametrize(
    "op", [torch.ops.aten.relu_.default, torch.ops.aten.add.out, torch.relu, print, eval, "aten.add"]
)
def test_operation_outside_is_not_allowed(op: object) -> None:
    assert not dialect.allowed(op)
    with pytest.raises(GraphError, match="not in the dialect"):
        dialect.op_name(op)


def test_arithmetic_on_sizes_is_allowed() -> None:
    assert dialect.op_name(operator.floordiv) == "operator.floordiv"
    assert not dialect.allowed(operator.setitem)


def test_torchvision_operations_are_allowed_once_registered() -> None:
    pytest.importorskip("torchvision")
    op = dialect.op_from_name("torchvision.roi_align.default")
    assert op is torch.ops.torchvision.roi_align.default


@pytest.mark.parametrize("layer", EXAMPLES, ids=lambda layer: type(layer).__name__)
def test_layer_is_rebuilt_from_json(layer: nn.Module) -> None:
    config = json.loads(json.dumps(dialect.config(layer)))
    twin = dialect.build(dialect.layer_name(layer), config)
    assert repr(twin) == repr(layer)
    assert twin.state_dict().keys() == layer.state_dict().keys()
    assert all(tensor.is_meta for tensor in twin.state_dict().values())


def test_absent_tensors_stay_absent() -> None:
    layer = nn.BatchNorm2d(4)
    layer.bias = None
    layer.num_batches_tracked = None
    config = dialect.config(layer)
    assert config["absent"] == ["bias", "num_batches_tracked"]
    assert list(dialect.build("BatchNorm2d", config).state_dict()) == ["weight", "running_mean", "running_var"]


def test_huge_layer_takes_no_memory() -> None:
    layer = dialect.build("Linear", {"in_features": 2**20, "out_features": 2**20, "bias": False})
    assert layer.weight.is_meta


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("Sequential", {}, "unknown layer type 'Sequential'"),
        ("Linear", {"in_features": 3, "out_features": 3, "device": "cpu"}, "no option 'device'"),
        ("Linear", {"in_features": 3}, "cannot be built"),
        ("Conv2d", {"in_channels": 3, "out_channels": 4, "kernel_size": 3, "groups": 2}, "cannot be built"),
        ("Conv2d", {"in_channels": "3", "out_channels": 4, "kernel_size": 3}, "cannot be built"),
        ("Dropout", {"p": 2.0}, "cannot be built"),
        ("PReLU", {"num_parameters": 2, "absent": ["bias"]}, "no tensor 'bias'"),
    ],
)
def test_bad_configuration_is_named(name: str, config: dict[str, object], message: str) -> None:
    with pytest.raises(GraphError, match=message):
        dialect.build(name, config)


class Doubling(nn.Module):
    """A layer type of a test's own."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times


def test_registered_layer_joins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialect, "LAYERS", dict(dialect.LAYERS))
    with pytest.raises(GraphError, match="not in the dialect"):
        dialect.config(Doubling(3))
    dialect.register_layer(Doubling, ("times",))
    assert dialect.build("Doubling", dialect.config(Doubling(3))).times == 3
    with pytest.raises(GraphError, match="belongs to"):
        dialect.register_layer(type("Doubling", (nn.Module,), {}), ())


def test_subclass_does_not_pass_for_its_parent() -> None:
    class Mine(nn.Conv2d):
        pass

    Mine.__name__ = "Conv2d"
    with pytest.raises(GraphError, match="not in the dialect"):
        dialect.layer_name(Mine(3, 4, 3))
