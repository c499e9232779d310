"""The face: `compile`, `Compiled`, `load` — the contract, resuming, and bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fxpress.runtime.layers import PQLinear
from torch import Tensor, nn

from fxpress import (
    ArtifactError,
    BudgetError,
    Compiled,
    Data,
    DataError,
    FxpressError,
    ModelError,
    OptionError,
    Pipeline,
    TraceError,
    compile,  # noqa: A004
    load,
    trace,
)

PASSES: list[Any] = [
    "fold-batchnorm",
    {"prune-channels": {"budget": {"macs": 0.5}}},
    {"distill": {"epochs": 2, "lr": 0.01}},
    {"emit": {"layout": "contiguous"}},
]


class Net(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.conv = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(16)
        self.drop = nn.Dropout(0.2)
        self.fc = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = (x + self.norm2(self.conv(x))).relu()
        return self.fc(self.drop(x.mean((2, 3))))  # type: ignore[no-any-return]


X = torch.linspace(-1, 1, 2 * 36).reshape(2, 1, 6, 6)


def batches(count: int = 2, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(16, 1, 6, 6, generator=random), torch.randint(0, 3, (16,), generator=random)) for _ in range(count)
    ]


DATA = Data(train=batches(), val=batches(1, seed=1))


def network() -> Net:
    torch.manual_seed(0)
    return Net()


def state(compiled: Compiled) -> dict[str, Tensor]:
    return dict(compiled.module.state_dict())


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    return compile(network(), PASSES, X, data=DATA)


# The contract ---------------------------------------------------------------------------------------------------------


def test_half_the_macs_and_a_row_per_pass(compiled: Compiled) -> None:
    rows = compiled.report.rows
    assert [row.name for row in rows] == ["trace", "fold-batchnorm", "prune-channels", "distill", "emit"]
    assert [row.semantics for row in rows] == ["exact", "exact", "lossy", "training", "exact"]
    first, last = rows[0], rows[-1]
    assert first.parameters == sum(p.numel() for p in Net().parameters())
    assert first.macs == 36 * 9 * 16 * (1 + 16) + 16 * 3
    assert 0.48 <= rows[2].macs / first.macs <= 0.5
    assert last.parameters == sum(p.numel() for p in compiled.module.parameters())
    assert last.size_bytes < first.size_bytes
    for row in rows:
        assert row.size_bytes > 0
        assert row.accuracy is not None
        assert 0 <= row.accuracy <= 1
        assert row.latency_ms is not None
        assert row.latency_ms > 0
        assert row.latency_ratio is not None
        assert row.latency_ratio > 0
    assert first.latency_ratio == 1
    distances = [row.distance for row in rows]
    assert distances[3] is None
    assert all(distance is not None and distance < 1e-5 for distance in distances[:3] + distances[4:])


def test_report_as_text_and_json(compiled: Compiled) -> None:
    text = str(compiled.report)
    assert all(row.name in text for row in compiled.report.rows)
    assert json.loads(json.dumps(compiled.report.to_dict()))["rows"][2]["options"] == {"budget": {"macs": 0.5}}


def test_runs_any_batch_in_evaluation_mode(compiled: Compiled) -> None:
    assert isinstance(compiled.module, torch.fx.GraphModule)
    assert not compiled.module.training
    for count in (1, 2, 7):
        assert compiled(torch.randn(count, 1, 6, 6)).shape == (count, 3)
    assert torch.equal(compiled(X), compiled.module(X))
    assert compiled.train().module.training
    assert not compiled.eval().module.training


def test_the_model_is_left_untouched() -> None:
    model = network().train()
    model.norm.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(5)
    stream = torch.get_rng_state()
    compile(model, PASSES, X, data=DATA)
    assert same(before, dict(model.state_dict()))
    assert model.training
    assert model.conv.training
    assert not model.norm.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(stream, torch.get_rng_state())


def test_the_same_seed_gives_the_same_network_and_another_one_another() -> None:
    torch.manual_seed(1)
    one = compile(network(), PASSES, X, data=DATA, seed=3)
    torch.manual_seed(2)
    two = compile(network(), Pipeline(PASSES, seed=3), X, data=DATA)
    assert same(state(one), state(two))
    other = compile(network(), PASSES, X, data=DATA, seed=4)
    assert not same(state(one), state(other))


def test_save_and_load(compiled: Compiled, tmp_path: Path) -> None:
    compiled.save(tmp_path / "net.fxp")
    loaded = load(tmp_path / "net.fxp")
    assert torch.equal(loaded(X), compiled(X))
    assert same(state(loaded), state(compiled))
    assert loaded.pipeline == compiled.pipeline == Pipeline(PASSES)
    assert loaded.report == compiled.report
    assert not loaded.module.training
    assert repr(loaded) == repr(compiled)


def test_a_loaded_network_trains_exports_and_can_be_cut_again(compiled: Compiled, tmp_path: Path) -> None:
    emitted = compile(compiled, [{"emit": {"layout": "channels-last"}}], None)
    emitted.save(tmp_path / "net.fxp")
    loaded = load(tmp_path / "net.fxp")
    expected = loaded(X).detach()
    assert loaded.graph.tensor("stem.weight").is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(torch.export.export(loaded.module, (X,)).module()(X), expected, atol=1e-6)
    assert torch.allclose(torch.compile(loaded.module, backend="aot_eager")(X), expected, atol=1e-6)
    passes: list[Any] = [{"prune-channels": {"ratio": 0.5}}, {"distill": {"epochs": 1}}]
    again = compile(loaded, passes, None, data=DATA, teacher=compiled)
    assert again.report.rows[-1].macs < 0.6 * loaded.report.rows[-1].macs
    assert torch.equal(loaded(X), expected)
    loaded.train()(X).sum().backward()
    assert all(p.grad is not None for p in loaded.module.parameters())


def test_a_saved_network_loads_without_its_source(compiled: Compiled, tmp_path: Path) -> None:
    compiled.save(tmp_path / "net.fxp")
    torch.save((X, compiled(X)), tmp_path / "pair.pt")
    code = """
        import sys, torch, fxpress
        x, y = torch.load("pair.pt")
        assert torch.allclose(fxpress.load("net.fxp")(x), y, atol=1e-6)
        assert not [name for name in sys.modules if name.startswith("test_")]
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, check=True, timeout=120)


def test_compiles_what_is_compiled_loaded_or_traced(compiled: Compiled, tmp_path: Path) -> None:
    compiled.save(tmp_path / "net.fxp")
    before = {name: value.clone() for name, value in state(compiled).items()}
    again: list[Any] = [{"prune-channels": {"ratio": 0.5}}]
    for source in (compiled, load(tmp_path / "net.fxp"), compiled.graph):
        twice = compile(source, again, None)
        assert twice.report.rows[-1].macs < compiled.report.rows[-1].macs
        assert twice(X).shape == (2, 3)
    assert same(before, state(compiled))
    exported = torch.export.export(network().eval(), (X,), strict=False)
    assert compile(exported, again, X).report.rows[-1].parameters < compile(exported, [], X).report.rows[-1].parameters
    graph = trace(network(), X)
    assert same(dict(compile(graph, [], X).module.state_dict()), dict(graph.module.state_dict()))


def test_no_passes_is_the_network_itself() -> None:
    model = network().eval()
    plain = compile(model, [], X)
    assert [row.name for row in plain.report.rows] == ["trace"]
    assert same(state(plain), dict(model.state_dict()))
    with torch.no_grad():
        assert torch.allclose(plain(X), model(X), atol=1e-6)


def test_a_pipeline_file(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("passes:\n  - prune-channels: {ratio: 0.5}\n")
    (tmp_path / "p.toml").write_text("[[passes]]\nprune-channels = {ratio = 0.5}\n")
    one, two = (compile(network(), tmp_path / name, X) for name in ("p.yaml", "p.toml"))
    assert same(state(one), state(two))


def test_keyword_inputs_and_several_outputs() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
            hidden = self.one(left + right).relu()
            return {"hidden": hidden.sum(1), "out": self.two(hidden)}

    inputs = {"left": torch.randn(2, 4), "right": torch.randn(2, 4)}
    compiled = compile(Pair(), ["fold-batchnorm", "emit"], inputs)
    assert set(compiled(**inputs)) == {"hidden", "out"}
    assert compiled.report.rows[0].latency_ms is not None


def test_a_teacher_of_its_own() -> None:
    passes: list[Any] = [{"distill": {"epochs": 1, "alpha": 1.0, "keep": "last"}}]
    teacher = network()
    with torch.no_grad():
        teacher.fc.bias.add_(torch.tensor([9.0, 0.0, 0.0]))
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    one = compile(network(), passes, X, data=DATA, teacher=teacher)
    two = compile(network(), passes, X, data=DATA)
    three = compile(network(), passes, X, data=DATA, teacher=compile(teacher, [], X))
    assert not same(state(one), state(two))
    assert torch.allclose(state(one)["fc.bias"], state(three)["fc.bias"], atol=1e-4)
    assert same(before, dict(teacher.state_dict()))


# Interrupted and resumed ----------------------------------------------------------------------------------------------


def test_resume_equals_the_uninterrupted_run(
    compiled: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fxpress.passes.train.distill import Distill

    def power_cut(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Distill, "run", power_cut)
        with pytest.raises(KeyboardInterrupt):
            compile(network(), PASSES, X, data=DATA, workdir=tmp_path)
    assert json.loads((tmp_path / "state.json").read_text())["finished"] == ["01-fold-batchnorm", "02-prune-channels"]
    kept = (tmp_path / "02-prune-channels.fxp").stat().st_mtime_ns

    resumed = compile(network(), PASSES, X, data=DATA, workdir=tmp_path, resume=True)
    assert same(state(resumed), state(compiled))
    assert torch.equal(resumed(X), compiled(X))
    assert [row.name for row in resumed.report.rows] == [row.name for row in compiled.report.rows]
    assert [row.macs for row in resumed.report.rows] == [row.macs for row in compiled.report.rows]
    assert (tmp_path / "02-prune-channels.fxp").stat().st_mtime_ns == kept

    (tmp_path / "04-emit.fxp").write_bytes(b"damaged")
    with pytest.warns(RuntimeWarning, match=r"04-emit\.fxp is passed over"):
        again = compile(network(), PASSES, X, data=DATA, workdir=tmp_path, resume=True)
    assert same(state(again), state(compiled))

    finished = compile(network(), PASSES, X, data=DATA, workdir=tmp_path, resume=True)
    assert same(state(finished), state(compiled))
    with pytest.raises(OptionError, match="another pipeline"):
        compile(network(), PASSES[:2], X, data=DATA, workdir=tmp_path, resume=True)
    other = network()
    with torch.no_grad():
        other.fc.bias += 1
    with pytest.raises(OptionError, match="another model"):
        compile(other, PASSES, X, data=DATA, workdir=tmp_path, resume=True)
    with pytest.raises(OptionError, match="another seed"):
        compile(network(), PASSES, X, data=DATA, workdir=tmp_path, resume=True, seed=1)


@pytest.mark.slow
def test_a_killed_process_is_resumed_by_another(tmp_path: Path, repository: Path) -> None:
    code = f"""
        import os, signal, sys
        from importlib.util import module_from_spec, spec_from_file_location
        spec = spec_from_file_location("nets", {str(repository / "tests" / "test_compile.py")!r})
        nets = module_from_spec(spec)
        spec.loader.exec_module(nets)
        import torch
        torch.set_num_threads(1)
        from fxpress.passes.train.distill import Distill
        if sys.argv[1] == "kill":
            Distill.run = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        done = nets.compile(nets.network(), nets.PASSES, nets.X, data=nets.DATA, workdir="w", resume=True)
        done.save(sys.argv[1] + ".fxp")
    """

    def run(what: str) -> int:
        command = [sys.executable, "-c", textwrap.dedent(code), what]
        return subprocess.run(command, cwd=tmp_path, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode

    assert run("kill") == -signal.SIGKILL
    assert not (tmp_path / "kill.fxp").exists()
    assert run("resumed") == 0
    (tmp_path / "w").rename(tmp_path / "first")
    assert run("whole") == 0
    assert same(state(load(tmp_path / "resumed.fxp")), state(load(tmp_path / "whole.fxp")))


def test_resume_needs_a_workdir() -> None:
    with pytest.raises(OptionError, match="resume=True needs a workdir"):
        compile(network(), [], X, resume=True)


# Bad input ------------------------------------------------------------------------------------------------------------


def broken(name: str, value: float) -> Net:
    model = network()
    with torch.no_grad():
        dict(model.state_dict(keep_vars=True))[name].flatten()[3] = value
    return model


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["conv.weight", "norm.running_var"])
def test_weights_that_are_no_numbers(name: str, value: float) -> None:
    with pytest.raises(ModelError, match=name):
        compile(broken(name, value), [], X)
    graph = trace(network(), X)
    with torch.no_grad():
        graph.tensor(name).flatten()[3] = value
    with pytest.raises(ModelError, match=name):
        compile(graph, [], X)


@pytest.mark.parametrize(
    "inputs", [torch.randn(2, 3, 6, 6), torch.randn(2, 7), (X, X), {"y": X}, "image", X.long(), (), None]
)
def test_example_inputs_that_do_not_fit(inputs: Any) -> None:
    with pytest.raises((TraceError, ModelError)) as caught:
        compile(network(), [], inputs)
    assert "\n" not in str(caught.value).strip()


@pytest.mark.parametrize("inputs", [torch.randn(2, 3, 6, 6), (X, X), {"y": X}])
def test_example_inputs_that_do_not_fit_a_traced_network(inputs: Any) -> None:
    with pytest.raises(ModelError, match=r"does not take example inputs of shape .* traced with"):
        compile(trace(network(), X), [], inputs)


def test_a_model_that_cannot_be_traced() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if x.sum() > 0 else x - 1

    with pytest.raises(TraceError, match=r"test_compile\.py"):
        compile(Branches(), [], X)


@pytest.mark.parametrize("model", [None, "resnet18", torch.relu])
def test_no_model_at_all(model: Any) -> None:
    with pytest.raises(FxpressError):
        compile(model, [], X)


class Noisy(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.randn(x.shape[0], 1)


def test_a_model_that_draws_random_numbers_differs_from_itself() -> None:
    with pytest.raises(ModelError, match="the traced graph's outputs differ from the model's"):
        compile(Noisy(), [], X)


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        (["prune-chanels"], "no pass 'prune-chanels': did you mean 'prune-channels'?"),
        ([{"prune-channels": {"ratio": 0.5, "rond_to": 8}}], "no option 'rond_to': did you mean 'round_to'?"),
        ([{"prune-channels": {"budget": {"macs": 2}}}], "'macs': given 2"),
        ([{"prune-channels": {"budget": 2}}], "'budget': given 2"),
        ("missing.yaml", "no pipeline file missing.yaml"),
        (5, "'passes' is a int"),
    ],
)
def test_passes_that_are_not_allowed(passes: Any, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        compile(network(), passes, X)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": batches()}, "data=[(tensor"),
        ({"data": {"train": []}}, "data={'train': []} is a dict; allowed: fxpress.Data(train="),
        ({"teacher": "resnet18"}, "teacher='resnet18' is a str; allowed: a module"),
        ({"workdir": 3}, "workdir=3 is a int; allowed: the path"),
        ({"seed": -1}, "seed=-1 is negative; allowed: an integer >= 0"),
        ({"seed": "0"}, "seed='0' is a str"),
    ],
)
def test_arguments_of_the_wrong_type(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        compile(network(), [], X, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_budget_that_cannot_be_met() -> None:
    with pytest.raises(BudgetError, match=r"pass 'prune-channels' .*macs: .* is the least that can be reached"):
        compile(network(), [{"prune-channels": {"budget": {"macs": 0.001}}}], X)


def test_missing_data_is_noticed_before_anything_runs() -> None:
    with pytest.raises(DataError, match=r"pass 'distill' needs data to train on.*Data\(train="):
        compile("no model is looked at", ["distill"], X)


def exhausted() -> Any:
    used = iter(batches())
    for _ in used:
        pass
    return used


@pytest.mark.parametrize("make", [list, exhausted, lambda: [(X, torch.tensor([0]))], lambda: [X]])
def test_loaders_that_give_nothing_or_nonsense(make: Callable[[], Any]) -> None:
    passes: list[Any] = [{"distill": {"epochs": 1}}]
    with pytest.raises(DataError):
        compile(network(), passes, X, data=Data(train=make()))
    with pytest.raises(DataError):
        compile(network(), passes, X, data=Data(train=batches(), val=make()))


def test_a_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "x.fxp").write_bytes(b"not a network")
    for name in ("x.fxp", "missing.fxp"):
        with pytest.raises(ArtifactError, match=name):
            load(tmp_path / name)


def test_a_file_whose_pipeline_or_report_is_not_ours(compiled: Compiled, tmp_path: Path) -> None:
    from fxpress.runtime import artifact

    artifact.save(tmp_path / "p.fxp", compiled.graph, pipeline={"passes": ["from-the-future"]}, report=None)
    with pytest.warns(RuntimeWarning, match=r"pipeline in .*p\.fxp is left out.*no pass 'from-the-future'"):
        loaded = load(tmp_path / "p.fxp")
    assert torch.equal(loaded(X), compiled(X))
    assert len(loaded.pipeline) == 0
    artifact.save(tmp_path / "r.fxp", compiled.graph, pipeline=None, report={"rows": [{"name": "trace", "macs": "x"}]})
    with pytest.raises(ArtifactError, match=r"the report in .*r\.fxp is not valid.*macs"):
        load(tmp_path / "r.fxp")
    artifact.save(tmp_path / "n.fxp", compiled.graph, pipeline=None, report=None)
    assert len(load(tmp_path / "n.fxp").pipeline) == 0


def test_a_pass_that_fails_keeps_the_snapshots_of_those_before(tmp_path: Path) -> None:
    passes = ["fold-batchnorm", {"prune-channels": {"budget": {"macs": 0.001}}}]
    with pytest.raises(BudgetError):
        compile(network(), passes, X, workdir=tmp_path)
    assert json.loads((tmp_path / "state.json").read_text())["finished"] == ["01-fold-batchnorm"]


def test_quiet_and_verbose(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    compile(network(), ["fold-batchnorm"], X)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("FXPRESS_PROGRESS", "1")
    compile(network(), ["fold-batchnorm"], X)
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split()[0] for line in err.strip().splitlines()] == ["trace", "fold-batchnorm"]


def test_a_module_with_quantised_layers_is_not_what_was_compiled() -> None:
    x = torch.randn(2, 8)
    layer = PQLinear(8, 16, subspace=2, codewords=4).eval()
    with pytest.warns(RuntimeWarning, match="1 product-quantized layers.*give the Compiled"):
        compiled = compile(nn.Sequential(layer), [], x)
    assert torch.allclose(compiled(x), layer(x), atol=1e-6)
