"""MODEL: every form of it, its weights and inputs, and what is said where something is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fxpress.ir.errors import ModelError, OptionError
from fxpress.ir.graph import Graph
from fxpress.ir.trace import trace
from fxpress.runtime.artifact import save
from fxpress.tools.inputs import parse_input
from fxpress.tools.models import load_model, parse_options
from torch import nn

FACTORY = """
import torch
from neighbour import WIDTH

def build(classes=3):
    return torch.nn.Sequential(torch.nn.Conv2d(1, WIDTH, 3), torch.nn.Flatten(), torch.nn.Linear(WIDTH * 4, classes))

def with_inputs():
    return build(), torch.zeros(2, 1, 4, 4)

ready = build()
number = 3

def broken():
    raise ValueError("no such luck")

def word():
    return "resnet"
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "neighbour.py").write_text("WIDTH = 5\n")
    path = tmp_path / "nets.py"
    path.write_text(FACTORY)
    return str(path)


def test_torchvision_with_options_and_its_own_input_size() -> None:
    model, inputs = load_model("torchvision:squeezenet1_1,num_classes=7")
    assert [tuple(x.shape) for x in inputs] == [(1, 3, 224, 224)]
    assert not model.training
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 7)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("shufflenet_v2_x0_5", (1, 3, 224, 224)), ("inception_v3,init_weights=False", (1, 3, 299, 299))],
)
def test_torchvision_sizes(name: str, shape: tuple[int, ...]) -> None:
    assert tuple(load_model(f"torchvision:{name}").example_inputs[0].shape) == shape


def test_segmentation_downloads_no_backbone() -> None:
    model, inputs = load_model("torchvision:lraspp_mobilenet_v3_large")
    assert isinstance(model, nn.Module)
    assert tuple(inputs[0].shape) == (1, 3, 520, 520)


def test_video_models_get_clips() -> None:
    assert tuple(load_model("torchvision:r3d_18").example_inputs[0].shape) == (1, 3, 16, 112, 112)


def test_timm_knows_its_input_size() -> None:
    pytest.importorskip("timm")
    assert tuple(load_model("timm:test_resnet").example_inputs[0].shape) == (1, 3, 160, 160)


def test_a_file_may_import_its_neighbours_and_give_inputs(file: str) -> None:
    model, inputs = load_model(f"{file}:with_inputs")
    assert tuple(inputs[0].shape) == (2, 1, 4, 4)
    assert model(inputs[0]).shape == (2, 3)


def test_a_module_object_and_options(file: str) -> None:
    assert isinstance(load_model(f"{file}:ready", inputs=["1x1x4x4"]).model, nn.Sequential)
    model = load_model(f"{file}:build,classes=9", inputs=["1x1x4x4"]).model
    assert model(torch.zeros(1, 1, 4, 4)).shape == (1, 9)


def test_a_module_by_its_name(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(file).parent)
    assert isinstance(load_model("nets:ready", inputs=["1x1x4x4"]).model, nn.Sequential)


def test_an_fxp_brings_its_inputs(tmp_path: Path) -> None:
    graph = trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), torch.zeros(1, 3, 8, 8))
    save(tmp_path / "m.fxp", graph, pipeline=None, report=None)
    model, inputs = load_model(str(tmp_path / "m.fxp"))
    assert isinstance(model, Graph)
    assert inputs[0].shape[1:] == (3, 8, 8)


def test_the_seed_decides_the_random_weights(file: str) -> None:
    torch.manual_seed(123)
    state = torch.random.get_rng_state()
    first, again, other = (
        load_model(f"{file}:build", inputs=["1x1x4x4"], seed=seed).model.state_dict()["0.weight"] for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("torchvision:resnt18", ["no model 'resnt18'", "'resnet18'"]),
        ("torchvision:resnet18,depth=3", ["torchvision:resnet18(depth=3) failed", "depth"]),
        ("torchvision:resnet18,depth", ["'depth'", "name,option=value"]),
        ("torchvision:raft_small", ["input size", "--input"]),
        ("resnet18", ["'resnet18' is not a model", "'torchvision:resnet18'"]),
        ("nowhere", ["not a model", "torchvision:NAME"]),
        ("no.such.module:factory", ["no module 'no.such.module'"]),
        ("nofile.py:factory", ["no file 'nofile.py'"]),
        ("nofile.fxp", ["no file 'nofile.fxp'"]),
        ("json:loads", ["json:loads() failed", "TypeError"]),
        ("json:lods", ["json has no 'lods'", "'loads'"]),
    ],
)
def test_errors_name_what_is_near(spec: str, words: list[str]) -> None:
    with pytest.raises(ModelError) as error:
        load_model(spec)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("broken", ["failed", "ValueError: no such luck"]),
        ("word", ["gave a str, not an nn.Module"]),
        ("number", ["is a int, not a function"]),
        ("build", ["input size", "--input"]),
        ("buidl", ["has no 'buidl'", "'build'"]),
    ],
)
def test_errors_of_a_factory(file: str, name: str, words: list[str]) -> None:
    with pytest.raises(ModelError) as error:
        load_model(f"{file}:{name}")
    assert all(word in str(error.value) for word in words)


def test_timm_names_are_suggested() -> None:
    pytest.importorskip("timm")
    with pytest.raises(ModelError, match="'resnet18'"):
        load_model("timm:resnet18x")


@pytest.mark.parametrize(
    ("text", "shape", "dtype"),
    [
        ("1x3x4x4", (1, 3, 4, 4), torch.float32),
        ("2x16:int64", (2, 16), torch.int64),
        ("1,3:bfloat16", (1, 3), torch.bfloat16),
    ],
)
def test_inputs_from_text(text: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    value = parse_input(text)
    assert tuple(value.shape) == shape
    assert value.dtype == dtype


@pytest.mark.parametrize("text", ["", "3x", "axb", "1x0x3", "1x3:float33", "-1x3"])
def test_bad_inputs(text: str) -> None:
    with pytest.raises(OptionError, match="input"):
        parse_input(text)


def test_options_are_literals_or_text() -> None:
    assert parse_options("f,a=1,b=(2;3),c=True") == ("f", {"a": 1, "b": "(2;3)", "c": True})


# Weights --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def weights(file: str, tmp_path: Path) -> tuple[str, Path, dict[str, torch.Tensor]]:
    state = {
        key: torch.randn_like(value)
        for key, value in load_model(f"{file}:build", inputs=["1x1x4x4"]).model.state_dict().items()
    }
    return f"{file}:build", tmp_path / "w.pt", state


@pytest.mark.parametrize("wrap", ["plain", "state_dict", "data_parallel", "safetensors"])
def test_weights_of_every_form(weights: tuple[str, Path, dict[str, torch.Tensor]], wrap: str) -> None:
    spec, path, state = weights
    if wrap == "safetensors":
        from safetensors.torch import save_file

        path = path.with_suffix(".safetensors")
        save_file(state, path)
    else:
        forms = {
            "plain": state,
            "state_dict": {"epoch": 3, "state_dict": state},
            "data_parallel": {f"module.{key}": value for key, value in state.items()},
        }
        torch.save(forms[wrap], path)
    model = load_model(spec, path, inputs=["1x1x4x4"]).model
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_weights_that_do_not_fit_name_the_keys(weights: tuple[str, Path, dict[str, torch.Tensor]]) -> None:
    spec, path, state = weights
    torch.save({"0.weight": state["0.weight"], "0.scale": torch.ones(1)}, path)
    with pytest.raises(ModelError, match=r"3 missing \(0\.bias, 2\.bias, 2\.weight\); 1 unexpected \(0\.scale\)"):
        load_model(spec, path, inputs=["1x1x4x4"])
    torch.save({**state, "2.bias": torch.ones(8)}, path)
    with pytest.raises(ModelError, match=r"2\.bias 8, not 3"):
        load_model(spec, path, inputs=["1x1x4x4"])


class Payload:
    """What a hostile pickle would run."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("import pathlib; pathlib.Path('pwned').touch()",))


def test_weights_run_no_code(
    weights: tuple[str, Path, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, path, _ = weights
    monkeypatch.chdir(path.parent)
    torch.save(Payload(), path)
    with pytest.raises(ModelError, match="cannot be read as a state dict"):
        load_model(spec, path, inputs=["1x1x4x4"])
    assert not (path.parent / "pwned").exists()


@pytest.mark.parametrize("content", [b"", b"nonsense"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_damaged_weights(weights: tuple[str, Path, dict[str, torch.Tensor]], content: bytes, suffix: str) -> None:
    spec, path, _ = weights
    path = path.with_suffix(suffix)
    path.write_bytes(content)
    with pytest.raises(ModelError, match=path.name):
        load_model(spec, path, inputs=["1x1x4x4"])


def test_missing_and_wrong_weights(weights: tuple[str, Path, dict[str, torch.Tensor]]) -> None:
    spec, path, _ = weights
    with pytest.raises(ModelError, match="no weights file"):
        load_model(spec, path, inputs=["1x1x4x4"])
    torch.save([1, 2], path)
    with pytest.raises(ModelError, match="holds no state dict but a list"):
        load_model(spec, path, inputs=["1x1x4x4"])
