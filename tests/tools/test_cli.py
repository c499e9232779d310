"""Every command, in process, and every way in which it may fail: one line on standard error and status 1."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from fxpress.ir.errors import FxpressError, ModelError
from fxpress.tools import cli, demo
from fxpress.tools.one_line import one_line
from typer.testing import CliRunner, Result

import fxpress

NETS = """
import torch

class Net(torch.nn.Module):
    def __init__(self, classes=10):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 8, 3, padding=1)
        self.bn = torch.nn.BatchNorm2d(8)
        self.last = torch.nn.Conv2d(8, 6, 3, padding=1)
        self.fc = torch.nn.Linear(6, classes)

    def forward(self, x):
        x = self.bn(self.conv(x)).relu()
        return self.fc(self.last(x).relu().mean((2, 3)))

def net(classes=10):
    return Net(classes), torch.zeros(1, 1, 8, 8)

class Branch(torch.nn.Module):
    def forward(self, x):
        return x + 1 if x.sum() > 0 else x - 1

def branch():
    return Branch(), torch.zeros(1, 1, 8, 8)

def bug():
    class Bug(torch.nn.Module):
        def forward(self, x):
            raise ZeroDivisionError("by hand")
    return Bug(), torch.zeros(1, 1, 8, 8)
"""

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in a folder that holds nets.py; the result has stdout and stderr apart."""
    (tmp_path / "nets.py").write_text(NETS)
    (tmp_path / "half.yaml").write_text("passes:\n  - fold-batchnorm\n  - prune-channels: {budget: {macs: 0.5}}\n")
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(cli.app, list(map(str, arguments)), prog_name="fxpress")


def fails(result: Result, *words: str) -> str:
    """Assert that a command failed as it should, and give its line."""
    lines = result.stderr.strip().splitlines()
    assert result.exit_code == 1, result.output
    assert lines[-1].startswith("error: ")
    assert [line for line in lines[:-1] if not line.startswith("note: ")] == []
    assert "Traceback" not in result.output
    for word in words:
        assert word in lines[-1]
    return lines[-1]


def test_help_and_version(run: Run) -> None:
    for arguments in ((), ("--help",), ("-h",)):
        result = run(*arguments)
        assert result.exit_code == 0
        for command in ("demo", "compile", "evaluate", "explain", "view", "passes", "schema"):
            assert command in result.stdout
    assert run("--version").stdout.strip() == f"fxpress {version('fxpress')}"


def test_help_is_quick_to_load() -> None:
    code = (
        "import sys\nfrom fxpress.tools import cli\nsys.argv = ['fxpress', '--help']\n"
        "try: cli.main()\nexcept SystemExit as end: code = end.code\n"
        "print(code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 False"


def test_compile_saves_what_evaluate_and_load_take(run: Run) -> None:
    result = run("compile", "nets.py:net", "half.yaml", "--out", "m.fxp", "--json", "report.json", "--workdir", "work")
    assert result.exit_code == 0, result.output
    assert "prune-channels" in result.stdout
    assert "saved m.fxp" in result.stdout
    report = json.loads(Path("report.json").read_text())
    assert [row["name"] for row in report["rows"]] == ["trace", "fold-batchnorm", "prune-channels"]
    compiled = fxpress.load("m.fxp")
    assert compiled(torch.zeros(3, 1, 8, 8)).shape == (3, 10)
    assert report["rows"][-1]["macs"] <= 0.52 * report["rows"][0]["macs"]

    result = run("evaluate", "m.fxp", "--data", "digits", "--json", "-")
    row = json.loads(result.stdout)
    assert 0 <= row["accuracy"] <= 1
    assert row["images"] > 100
    plain = run("evaluate", "m.fxp", "--data", "digits")
    assert plain.stdout.startswith(f"accuracy {row['accuracy']:.2%}")

    resumed = run("compile", "nets.py:net", "half.yaml", "--out", "again.fxp", "--workdir", "work", "--resume")
    assert resumed.exit_code == 0, resumed.output
    inputs = torch.randn(2, 1, 8, 8)
    assert torch.equal(compiled(inputs), fxpress.load("again.fxp")(inputs))


def test_compile_takes_names_of_passes_and_weights(run: Run) -> None:
    namespace: dict[str, object] = {}
    exec(NETS, namespace)  # noqa: S102 - the text above
    state = {key: torch.ones_like(value) for key, value in namespace["net"]()[0].state_dict().items()}  # type: ignore[operator]
    torch.save(state, "w.pt")
    result = run("compile", "nets.py:net", "fold-batchnorm, emit", "--weights", "w.pt", "--out", "m.fxp", "--no-verify")
    assert result.exit_code == 0, result.output
    bias = fxpress.load("m.fxp").module.state_dict()["fc.bias"]
    assert torch.equal(bias, torch.ones(10))


def test_compile_trains_on_data_of_the_size_that_the_network_takes(run: Run) -> None:
    Path("kd.yaml").write_text("passes:\n  - prune-channels: {ratio: 0.25}\n  - distill: {epochs: 1}\n")
    result = run("compile", "nets.py:net", "kd.yaml", "--data", "digits", "--input", "1x1x12x12", "--json", "-")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert rows[-1]["name"] == "distill"
    assert 0 <= rows[-1]["accuracy"] <= 1
    assert fxpress.load("compiled.fxp").graph.example_args[0].shape[1:] == (1, 12, 12)


def test_compile_learns_from_another_model_and_is_taken_up_again(run: Run) -> None:
    Path("kd.yaml").write_text("passes: [{distill: {epochs: 1, lr: 0.01, loss: scale-factor}}]\n")
    torch.save(net(3)[0].state_dict(), "t.pt")
    command = ["compile", "nets.py:net", "kd.yaml", "--data", "digits", "--workdir", "work"]
    result = run(*command, "--teacher", "nets.py:net", "--teacher-weights", "t.pt", "--out", "a.fxp")
    assert result.exit_code == 0, result.output
    assert {path.name for path in Path("work/01-distill").iterdir()} == {"log", "checkpoint-000000022.safetensors"}
    assert {"epochs.csv", "steps.csv"} < {path.name for path in Path("work/01-distill/log").iterdir()}
    state = {**json.loads(Path("work/state.json").read_text()), "finished": []}
    Path("work/state.json").write_text(json.dumps(state))  # as if killed between the last step and the end of the pass
    times = {path: path.stat().st_mtime_ns for path in Path("work/01-distill").glob("checkpoint*")}
    again = run(*command, "--teacher", "nets.py:net", "--teacher-weights", "t.pt", "--out", "b.fxp", "--resume")
    assert {path: path.stat().st_mtime_ns for path in times} == times  # nothing was learned again
    assert again.exit_code == 0, again.output
    one, two = (fxpress.load(name).module.state_dict() for name in ("a.fxp", "b.fxp"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    # another teacher is another run; and a run that is started over forgets the old one
    Path("work/state.json").write_text(json.dumps(state))
    fails(run(*command, "--resume"), "belongs to another run", "teacher")
    assert run(*command).exit_code == 0


def net(seed: int) -> tuple[torch.nn.Module, torch.Tensor]:
    """The network of nets.py with weights of its own."""
    namespace: dict[str, Callable[[], tuple[torch.nn.Module, torch.Tensor]]] = {}
    exec(NETS, namespace)  # noqa: S102 - the text above
    torch.manual_seed(seed)
    return namespace["net"]()


def test_packaged_pipelines_are_found_by_name(run: Run) -> None:
    for name in ("distill", "self-selection"):
        fails(run("compile", "nets.py:net", name), "needs images", "--data")


def test_a_packaged_pipeline_says_that_it_needs_data(run: Run) -> None:
    fails(run("compile", "nets.py:net", "demo"), "'distill'", "--data")


def test_explain(run: Run) -> None:
    result = run("explain", "nets.py:net")
    assert result.exit_code == 0, result.output
    assert "Can be cut" in result.stdout
    assert "Cannot be cut: fc, 10 channels" in result.stdout
    assert "MACs can be cut: 2 groups with 14 channels; 1 group cannot." in result.stdout
    content = json.loads(run("explain", "nets.py:net,classes=4", "--json", "-").stdout)
    assert {group["name"]: group["channels"] for group in content["groups"]} == {"conv": 8, "last": 6, "fc": 4}


def test_explain_notes_random_weights(run: Run) -> None:
    assert "note:" not in run("explain", "torchvision:squeezenet1_1").stderr


def test_view(run: Run) -> None:
    run("compile", "nets.py:net", "half.yaml", "--out", "m.fxp")
    for model in ("nets.py:net", "m.fxp"):
        result = run("view", model, "--out", "page.html")
        assert result.exit_code == 0, result.output
        page = Path("page.html").read_text(encoding="utf-8")
        assert model in page
        assert "wrote page.html" in result.stdout
    assert '"columns":["pass"' in page


def test_passes_and_schema(run: Run) -> None:
    listed = run("passes").stdout
    from fxpress.passes.registry import PASSES

    assert all(name in listed for name in PASSES)
    assert "budget" in listed
    one = run("passes", "prune-channels").stdout
    assert "round_to" in one
    assert "fold-batchnorm" not in one
    assert json.loads(run("schema").stdout) == fxpress.Pipeline.schema()
    assert run("schema", "--out", "s.json").stdout == ""
    assert json.loads(Path("s.json").read_text()) == fxpress.Pipeline.schema()


def test_demo_passes_its_options_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(demo, "run_demo", lambda out, **options: calls.append((out, options)))
    result = run("demo", "--out", "d.fxp", "--data", "mnist:/x", "--epochs", "2", "--seed", "5")
    assert result.exit_code == 0, result.output
    expected = {"data": "mnist:/x", "epochs": 2, "limit": None, "pipeline": None, "seed": 5}
    assert calls == [(Path("d.fxp"), expected)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["frob"], ["frob", "fxpress --help"]),
        (["explain"], ["fxpress explain --help"]),
        (["explain", "nets.py:net", "--bogus"], ["--bogus"]),
        (["explain", "nets.py:nett"], ["'net'"]),
        (["explain", "torchvision:resnt18"], ["'resnet18'"]),
        (["explain", "nets.py:net", "--input", "1x3"], ["1", "3"]),
        (["explain", "nets.py:net", "--input", "banana"], ["banana", "1x3x224x224"]),
        (["explain", "nets.py:net", "--weights", "none.pt"], ["none.pt"]),
        (["explain", "nets.py:branch"], ["nets.py", "x.sum() > 0"]),
        (["explain", "nets.py:bug"], ["ZeroDivisionError"]),
        (["explain", "none.fxp"], ["none.fxp"]),
        (["view", "nets.py:net", "--out", "no/such/page.html"], ["no/such"]),
        (["view", "nets.py:net", "--out", "."], ["is a folder"]),
        (["passes", "prune-chanels"], ["prune-channels"]),
        (["compile", "nets.py:net", "prune-chanels"], ["prune-channels"]),
        (["compile", "nets.py:net", "none.yaml"], ["none.yaml"]),
        (["compile", "nets.py:net", "emit", "--resume"], ["workdir"]),
        (["compile", "nets.py:net", "emit", "--teacher-weights", "t.pt"], ["--teacher MODEL"]),
        (["compile", "nets.py:net", "emit", "--teacher", "nets.py:nett"], ["'net'"]),
        (["compile", "nets.py:net", "emit", "--batch-size", "0"], ["--batch-size", "fxpress compile --help"]),
        (["compile", "nets.py:net", "emit", "--out", "no/m.fxp"], ["folder", "no"]),
        (["evaluate", "nets.py:net"], ["data"]),
        (["evaluate", "nets.py:net", "--data", "digit"], ["digit"]),
        (["evaluate", "nets.py:net,classes=4", "--data", "digits"], ["4", "classes"]),
    ],
)
def test_errors_are_one_line(run: Run, arguments: list[str], words: list[str]) -> None:
    fails(run(*arguments), *words)


def test_a_damaged_file(run: Run) -> None:
    Path("bad.fxp").write_bytes(b"PK\x03\x04 nothing of ours")
    for command in ("explain", "view", "evaluate"):
        fails(run(command, "bad.fxp", *(["--data", "digits"] if command == "evaluate" else [])), "bad.fxp")


def test_debug_shows_the_traceback(run: Run) -> None:
    for arguments in (("--debug", "explain", "nets.py:nett"), ("explain", "nets.py:nett", "--debug")):
        result = run(*arguments)
        assert result.exit_code == 1
        assert "Traceback" in result.stderr
        assert "ModelError" in result.stderr


def test_an_unexpected_error_is_one_line_too(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def burst(*_: object, **__: object) -> None:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(demo, "run_demo", burst)
    line = fails(run("demo"), "RuntimeError: two lines", "--debug")
    assert line.count("\n") == 0


def test_words_of_errors() -> None:
    assert one_line(FxpressError("it broke", hint="mend it")) == "it broke. mend it"
    assert one_line(ModelError("a\nb")) == "a b"
    assert one_line(FileNotFoundError(2, "No such file", "x")) == "No such file: x"


def test_as_a_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fxpress.tools.cli", "explain", "torchvision:nothing"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: torchvision has no model 'nothing'")
    assert done.stderr.count("\n") == 1
