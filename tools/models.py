"""MODEL, as the command line takes it: where a network comes from, its weights, and the size of its inputs.

torchvision:resnet18          a model of torchvision       torchvision:resnet18,num_classes=10
timm:convnext_atto            a model of timm              (options follow behind commas, for every kind)
package.module:factory        a function or class that returns an nn.Module, or (nn.Module, example inputs)
path/file.py:factory          the same in a file
m.fxp                         a file saved by fxpress
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ir.errors import ModelError
from ..ir.graph import Graph
from .inputs import parse_input, timm_inputs, torchvision_inputs
from .weights import load_weights

KINDS = "torchvision:NAME, timm:NAME, package.module:factory, path/file.py:factory, or a file.fxp"

Options = dict[str, Any]


class LoadedModel(NamedTuple):
    """A network and the example inputs with which to trace it (a tuple of positional inputs)."""

    model: nn.Module | Graph
    example_inputs: tuple[Tensor, ...]


def load_model(
    spec: str, weights: str | Path | None = None, *, inputs: Iterable[str] = (), seed: int = 0
) -> LoadedModel:
    """Find, build and load MODEL.

    Args:
        spec: one of the forms above.
        weights: a state dict (`torch.save` or safetensors); without it the model keeps the values of its constructor.
        inputs: one text per positional input, such as `1x3x224x224` or `1x16:int64`; replaces the known default.
        seed: seed of the random initialisation, so that two calls give the same weights.

    Raises:
        ModelError: nothing is found under that name, the factory fails or returns something else, or the weights
            do not fit; with near names where there are some.
    """
    given = tuple(parse_input(text) for text in inputs)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, default = _build(spec)
    if weights is not None:
        load_weights(model.module if isinstance(model, Graph) else model, Path(weights))
    if not given and default is None:
        raise ModelError(f"the input size of {spec!r} is not known", hint="Give it, for example --input 1x3x224x224")
    if isinstance(model, nn.Module):
        model.eval()
    return LoadedModel(model, given or default or ())


def suggest(name: str, known: Iterable[str]) -> str:
    """`Did you mean 'resnet18' or 'resnet101'?`, or nothing where no known name is near."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f"Did you mean {' or '.join(map(repr, near))}?" if near else ""


Built = tuple[nn.Module | Graph, tuple[Tensor, ...] | None]


def _build(spec: str) -> Built:
    if spec.endswith(".fxp"):
        return _from_artifact(Path(spec))
    place, colon, rest = spec.rpartition(":")
    if not colon or not place or not rest:
        raise ModelError(f"{spec!r} is not a model", hint=_known_as(spec) or f"A model is {KINDS}")
    name, options = parse_options(rest)
    if place in ("torchvision", "timm"):
        return (_from_torchvision if place == "torchvision" else _from_timm)(name, options)
    return _from_factory(place, name, options)


def _known_as(name: str) -> str:
    """A hint for a bare name that torchvision knows."""
    from torchvision import models

    return suggest(f"torchvision:{name}", (f"torchvision:{known}" for known in models.list_models() if known == name))


def parse_options(text: str) -> tuple[str, Options]:
    """`resnet18,num_classes=10` → `("resnet18", {"num_classes": 10})`; values are Python literals or else text."""
    name, *pairs = text.split(",")
    options: Options = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise ModelError(f"{pair!r} in {text!r} is not an option of a model", hint="Write name,option=value")
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key] = value
    return name, options


def _from_artifact(path: Path) -> Built:
    from ..runtime.artifact import load

    if not path.exists():
        raise ModelError(f"there is no file {str(path)!r}", hint=suggest(str(path), map(str, _beside(path))))
    graph = load(path).graph
    return graph, tuple(graph.example_args)


def _from_torchvision(name: str, options: Options) -> Built:
    from torchvision import models

    if name not in models.list_models():
        raise ModelError(f"torchvision has no model {name!r}", hint=suggest(name, models.list_models()))
    builder = models.get_model_builder(name)
    if "weights_backbone" in inspect.signature(builder).parameters:
        options = {"weights_backbone": None, **options}  # its default would download
    return _call(builder, f"torchvision:{name}", options), torchvision_inputs(name)


def _from_timm(name: str, options: Options) -> Built:
    try:
        import timm
    except ImportError as error:
        raise ModelError("timm is not installed", hint="pip install 'fxpress[timm]'") from error
    if not timm.is_model(name):
        raise ModelError(f"timm has no model {name!r}", hint=suggest(name, timm.list_models()))
    model = _call(timm.create_model, f"timm:{name}", {"model_name": name, "pretrained": False, **options})
    return model, timm_inputs(model)


def _from_factory(place: str, name: str, options: Options) -> Built:
    module = _load_file(Path(place)) if place.endswith(".py") else _import(place)
    factory: Any = getattr(module, name, None)
    if factory is None:
        raise ModelError(f"{place} has no {name!r}", hint=suggest(name, (n for n in vars(module) if n[0] != "_")))
    made = factory if isinstance(factory, nn.Module) else _call(factory, f"{place}:{name}", options)
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, (nn.Module, Graph)):
        raise ModelError(
            f"{place}:{name} gave a {type(model).__name__}, not an nn.Module",
            hint="A factory returns an nn.Module, or (nn.Module, example inputs)",
        )
    return model, (inputs,) if isinstance(inputs, Tensor) else inputs


def _call(factory: Callable[..., Any], what: str, options: Options) -> Any:
    if not callable(factory):
        raise ModelError(f"{what} is a {type(factory).__name__}, not a function that builds an nn.Module")
    try:
        return factory(**options)
    except Exception as error:  # whatever the user's own code raises is named as such
        shown = ", ".join(f"{key}={value!r}" for key, value in options.items() if key != "model_name")
        raise ModelError(f"{what}({shown}) failed: {type(error).__name__}: {error}") from error


def _import(name: str) -> ModuleType:
    with _search_path(Path.cwd()):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is not None and not f"{name}.".startswith(f"{error.name}."):
                raise ModelError(f"import of {name!r} failed: {error}") from error
            raise ModelError(f"there is no module {name!r}", hint=f"A model is {KINDS}") from error
        except Exception as error:
            raise ModelError(f"import of {name!r} failed: {type(error).__name__}: {error}") from error


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ModelError(f"there is no file {str(path)!r}", hint=suggest(str(path), map(str, _beside(path))))
    spec = importlib.util.spec_from_file_location(f"_fxpress_model_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ModelError(f"{str(path)!r} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and inspect look the module up
    with _search_path(path.resolve().parent):
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise ModelError(f"{str(path)!r} failed: {type(error).__name__}: {error}") from error
    return module


@contextmanager
def _search_path(folder: Path) -> Iterator[None]:
    """Let the user's module import its neighbours, as a script could; at the end, so that it hides nothing."""
    sys.path.append(str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _beside(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"*{path.suffix}")) if path.parent.is_dir() else []
