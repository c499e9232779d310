"""`fxpress ...`: arguments in, one call each, results out.

Exit status 0, or 1 with one clear line on standard error (`--debug` for the traceback). What takes long to import is
imported by the command that needs it, so that `--help` and completion answer at once.
"""

from __future__ import annotations

import json
import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .one_line import OneLineErrors

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    from ..ir.graph import Graph
    from ..passes.base import Pass
    from ..passes.pipeline import Pipeline
    from ..runtime.data import Data
    from .models import LoadedModel

app = typer.Typer(
    cls=OneLineErrors,
    help="Make a trained CNN several times smaller and faster, and prove what it cost.",
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

MODEL_HELP = "torchvision:NAME, timm:NAME, package.module:factory, path/file.py:factory, or a file.fxp"
DATA_HELP = "digits, mnist[:DIR], fashion-mnist[:DIR], cifar10:DIR or folder:DIR"

Model = Annotated[str, typer.Argument(help=MODEL_HELP, metavar="MODEL")]
Weights = Annotated[Path | None, typer.Option(help="State dict for MODEL (torch.save or .safetensors).")]
Input = Annotated[
    list[str] | None,
    typer.Option("--input", help="Example input such as 1x3x224x224 or 1x16:int64; once per input.", metavar="SIZES"),
]
DataName = Annotated[str | None, typer.Option(help=f"DATA: {DATA_HELP}.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images per batch.")]
Seed = Annotated[int, typer.Option(min=0, help="Seeds weights, order and every pass.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write JSON to this file, or to standard output with '-'.")]


@app.callback()
def root(
    context: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,  # noqa: ARG001
) -> None:
    """Without a command, show what there is."""
    if show_version:
        print(f"fxpress {version('fxpress')}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The file to save.")] = Path("demo.fxp"),
    data: Annotated[str, typer.Option(help=f"DATA: {DATA_HELP}.")] = "digits",
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs of the first training.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Training images to use.")] = None,
    pipeline: Annotated[Path | None, typer.Option(help="Another pipeline than the packaged one.")] = None,
    seed: Seed = 0,
) -> None:
    """Train a small network, halve its cost, save it, and load it in a fresh process."""
    from .demo import run_demo

    _check_folder(out)
    run_demo(out, data=data, epochs=epochs, limit=limit, pipeline=pipeline, seed=seed)


@app.command()
def compile(  # noqa: A001 - the name of the command
    model: Model,
    pipeline: Annotated[
        str,
        typer.Argument(help="A .yaml or .toml file, a packaged one such as demo, or PASS,PASS,...", metavar="PIPELINE"),
    ],
    data: DataName = None,
    weights: Weights = None,
    inputs: Input = None,
    teacher: Annotated[
        str | None, typer.Option(help="MODEL to learn from; MODEL itself if not given.", metavar="MODEL")
    ] = None,
    teacher_weights: Annotated[Path | None, typer.Option(help="State dict for --teacher.")] = None,
    out: Annotated[Path, typer.Option(help="The file to save.")] = Path("compiled.fxp"),
    workdir: Annotated[Path | None, typer.Option(help="Keep finished passes, checkpoints and logs here.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from what --workdir holds, also after a kill.")] = False,
    verify: Annotated[bool, typer.Option(help="Prove EXACT passes, measure the distance of LOSSY ones.")] = True,
    batch_size: BatchSize = 64,
    seed: Seed = 0,
    json_file: Json = None,
) -> None:
    """Run the passes of PIPELINE over MODEL and save the result."""
    from ..passes.compile import compile as compile_model
    from ..runtime.processes import is_main

    _check_folder(out)
    steps = _pipeline(pipeline)
    _check_data(steps, data)
    helper = _teacher(teacher, teacher_weights, inputs, seed)
    loaded = _load(model, weights, inputs, seed)
    images = None if data is None else _data(data, loaded, batch_size, seed)
    options: dict[str, Any] = {"workdir": workdir, "resume": resume, "verify": verify, "seed": seed}
    compiled = compile_model(loaded.model, steps, loaded.example_inputs, data=images, teacher=helper, **options)
    if not is_main():  # under torchrun the first process speaks for all
        return
    compiled.save(out)
    if json_file is not None:
        _write_json(compiled.report.to_dict(), json_file)
    console = _console(stderr=_is_stdout(json_file))
    console.print(compiled.report)
    console.print(f"saved {out}, {out.stat().st_size:,} bytes")


@app.command()
def evaluate(
    model: Model,
    data: Annotated[str, typer.Option(help=f"DATA: {DATA_HELP}.")],
    weights: Weights = None,
    inputs: Input = None,
    batch_size: BatchSize = 64,
    seed: Seed = 0,
    json_file: Json = None,
) -> None:
    """Measure the accuracy of MODEL on the test images of DATA."""
    from ..runtime.evaluate import evaluate as evaluate_model

    loaded = _load(model, weights, inputs, seed)
    images = _data(data, loaded, batch_size, seed).need("val", who="evaluate")
    found = evaluate_model(loaded.model, images)
    row = {"model": model, "data": data, "images": found.images, "accuracy": found.accuracy, "loss": found.loss}
    if json_file is not None:
        _write_json(row, json_file)
    if not _is_stdout(json_file):
        print(f"accuracy {found.accuracy:.2%}, cross entropy {found.loss:.4f}, {found.images:,} images of {data}")


@app.command()
def explain(
    model: Model,
    weights: Weights = None,
    inputs: Input = None,
    show_all: Annotated[bool, typer.Option("--all", help="List every group.")] = False,
    json_file: Json = None,
) -> None:
    """List the dependency groups of MODEL: what can be cut, and why the rest cannot."""
    from dataclasses import replace

    from .explain import explain as explain_graph

    explanation = explain_graph(_graph(model, weights, inputs))
    if json_file is not None:
        _write_json(explanation.to_dict(), json_file)
    if not _is_stdout(json_file):
        _console().print(replace(explanation, shown=None) if show_all else explanation)


@app.command()
def view(
    model: Model,
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("view.html"),
    weights: Weights = None,
    inputs: Input = None,
) -> None:
    """Draw the graph of MODEL as one self-contained HTML page."""
    from ..passes.compile import load
    from .view import build_page

    _check_folder(out)
    graph = _graph(model, weights, inputs)
    report = load(model).report if model.endswith(".fxp") else None
    out.write_text(build_page(graph, model, report), encoding="utf-8")
    print(f"wrote {out}, {out.stat().st_size:,} bytes: open it in a browser")


@app.command()
def passes(
    name: Annotated[
        str | None, typer.Argument(help="Only this pass, with its whole documentation.", metavar="PASS")
    ] = None,
) -> None:
    """List the passes with their options."""
    from .pass_list import describe_pass, list_passes

    _console().print(list_passes() if name is None else describe_pass(name))


@app.command()
def schema(
    out: Annotated[Path | None, typer.Option(help="Write it to this file instead of standard output.")] = None,
) -> None:
    """Print the JSON Schema of pipeline files, for editors."""
    from ..passes.pipeline import Pipeline

    _write_json(Pipeline.schema(), out or Path("-"))


def main() -> None:
    """Entry point of the `fxpress` program."""
    app(prog_name="fxpress")


def _load(model: str, weights: Path | None, inputs: list[str] | None, seed: int = 0) -> LoadedModel:
    from .models import load_model

    loaded = load_model(model, weights, inputs=inputs or (), seed=seed)
    if weights is None and model.startswith(("torchvision:", "timm:")):
        print(f"note: {model} has random weights; --weights FILE loads trained ones", file=sys.stderr)
    return loaded


def _teacher(
    teacher: str | None, weights: Path | None, inputs: list[str] | None, seed: int
) -> nn.Module | Graph | None:
    from ..ir.errors import OptionError

    if teacher is not None:
        return _load(teacher, weights, inputs, seed).model
    if weights is not None:
        raise OptionError("--teacher-weights needs a network to put them into", hint="Give --teacher MODEL")
    return None


def _graph(model: str, weights: Path | None, inputs: list[str] | None) -> Graph:
    from ..ir.trace import trace
    from .models import load_model

    loaded = load_model(model, weights, inputs=inputs or ())
    return trace(loaded.model, loaded.example_inputs)


def _data(name: str, loaded: LoadedModel, batch_size: int, seed: int) -> Data:
    """Images of the size that the network takes."""
    from ..runtime.data import load_data_like

    return load_data_like(name, loaded.example_inputs[0], batch_size=batch_size, seed=seed)


def _pipeline(text: str) -> Pipeline:
    """A file, a packaged pipeline by its name, or names of passes."""
    from importlib.resources import as_file, files

    from ..passes.pipeline import Pipeline

    packaged = files("fxpress.passes") / "pipelines" / f"{text}.yaml"
    if re.fullmatch(r"[\w-]+", text) and packaged.is_file():
        with as_file(packaged) as path:
            return Pipeline.load(path)
    return Pipeline.of(text if "," not in text or Path(text).exists() else [name.strip() for name in text.split(",")])


def _check_data(pipeline: Pipeline, data: str | None) -> None:
    """Say which option is missing; `compile` itself would speak of Python arguments."""
    if data is None:
        for one in pipeline:
            _check_without_data(one)


def _check_without_data(one: Pass) -> None:
    from ..ir.errors import DataError, OptionError
    from ..runtime.data import Data

    try:
        one.check_data(Data())
    except DataError as error:
        raise OptionError(f"pass {one.name!r} needs images", hint=f"Give --data: {DATA_HELP}") from error


def _check_folder(out: Path) -> None:
    """Refuse at once, not after hours of work, to write where there is no folder."""
    from ..ir.errors import OptionError

    if not out.parent.is_dir():
        raise OptionError(f"--out {out}: there is no folder {str(out.parent)!r}", hint="Make it first")
    if out.is_dir():
        raise OptionError(f"--out {out} is a folder", hint="Name a file in it")


def _is_stdout(path: Path | None) -> bool:
    return path == Path("-")


def _write_json(value: Any, path: Path) -> None:
    text = json.dumps(value, indent=2)
    if _is_stdout(path):
        print(text)
    else:
        path.write_text(text + "\n", encoding="utf-8")


def _console(stderr: bool = False) -> Console:
    """Plain text as wide as the reports are where output goes to a file."""
    from rich.console import Console

    console = Console(highlight=False, stderr=stderr)
    return console if console.is_terminal else Console(highlight=False, stderr=stderr, width=110)


if __name__ == "__main__":
    main()
