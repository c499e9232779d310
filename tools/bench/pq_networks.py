"""AlexNet and VGG-16 with every layer product-quantized: bytes, time, memory."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any

import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from ...ir.graph import Graph
from ...passes.compile import compile as compile_network
from ...passes.compiled import Compiled, load
from ...runtime import artifact
from ...runtime.layers.pq_layer import PQLayer, Precision
from .common import Row
from .engines import Engine, relative_distance, torch_engine
from .loads import Load
from .node_times import profile
from .peak_memory import Runner, memory_rows, peer_files
from .peer_engines import peer_engines, prepare_peers
from .pq_cases import Tables
from .timed_rows import INT8, TORCH, Goals, rows_of
from .timing import CACHES, Advance, take_turns

MB = 1e6
SIZE = 224


@dataclass(frozen=True)
class Recipe:
    """How a network is quantised, stored and emitted.

    Args:
        name: as the table shows it.
        options: of `product-quantize`.
        tables: numbers in the tables of what is timed, one row each.
        laplace: whether weights have the Laplace distribution and not the normal one.
        rate_weight: of the indices' bits; with one, files are entropy coded.
    """

    name: str
    options: dict[str, Any]
    tables: tuple[Tables, ...] = ("fp32", "int8")
    laplace: bool = False
    rate_weight: float = 0.0

    @property
    def storages(self) -> tuple[tuple[Precision, bool], ...]:
        """What files keep of the codewords, and whether indices are entropy coded: all in which it may be stored."""
        return tuple((p, entropy) for p in PRECISIONS for entropy in (False, True) if entropy or not self.rate_weight)

    def passes(self) -> list[dict[str, dict[str, Any]]]:
        """The pipeline that quantises."""
        rated = {"entropy": True, "rate_weight": self.rate_weight} if self.rate_weight else {}
        return [{"product-quantize": {**self.options, **rated}}]


PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")

PLAIN = {"correction": "none", "iterations": 3}
"""k-means alone: neither time nor size depend on how good the codewords are."""
PUBLISHED = Recipe("published", PLAIN)
"""Convolutions K=128 d=8, linear layers K=32 d=4, the last one K=16 d=1: the defaults of `product-quantize`."""
FAST = Recipe("fast", {**PLAIN, "codewords": 64, "linear": {"subspace": 4, "codewords": 16}})
"""Convolutions K=64 d=8, linear layers K=16 d=4, the last one K=16 d=1."""

HEAVY = Recipe("published, Laplace weights", PLAIN, laplace=True)
"""Heavy tails, as trained weights have them: codes are used less evenly, which entropy coding makes use of."""

RATED = Recipe("published, rate weight 1", PLAIN, rate_weight=1.0)
HEAVY_RATED = Recipe("published, Laplace weights, rate weight 0.5", PLAIN, laplace=True, rate_weight=0.5)
"""With their bits in what k-means minimises, as far as the weights' error stays about what it was without."""


@dataclass(frozen=True)
class Network:
    """A network of torchvision and what is wanted of it.

    Args:
        name: as in torchvision.
        file_mb: bytes of the file in millions, at most, in the published settings.
        entropy_mb: the same with entropy coding.
        faster: times faster than (the better int8 engine, torch) at batch 1.
    """

    name: str
    file_mb: float
    entropy_mb: float | None = None
    faster: dict[str, float] = field(default_factory=dict)

    def build(self, seed: int, *, laplace: bool = False) -> tuple[nn.Module, Tensor]:
        """The network with random weights of the normal or of the Laplace distribution, and an image."""
        torch.manual_seed(seed)
        with torch.device("meta"):
            model: nn.Module = getattr(torchvision.models, self.name)(weights=None)
        model = model.to_empty(device="cpu").eval()
        for layer in model.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)
        image = torch.randn(1, 3, SIZE, SIZE)
        if laplace:
            to_laplace(model)
        return model, image


NETWORKS = (Network("alexnet", 13.0, 11.0, {INT8: 2.0, TORCH: 10.0}), Network("vgg16", 28.0))


def quantise(network: Network, recipe: Recipe, seed: int, file: Path) -> Path:
    """The quantised network as an .fxp file, emitted for nothing yet; made once."""
    if not file.exists():
        model, image = network.build(seed, laplace=recipe.laplace)
        artifact.save(file, compile_network(model, recipe.passes(), image, verify=False).graph)
        gc.collect()
    return file


def to_laplace(model: nn.Module) -> None:
    """Draw the weights anew from the Laplace distribution with the same variance."""
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                scale = float(layer.weight.std()) / 2**0.5
                sign = torch.randint(2, layer.weight.shape).mul_(2).sub_(1)
                layer.weight.exponential_(1 / scale).mul_(sign)


def measure_size(network: Network, folder: Path, seed: int, advance: Advance) -> list[Row]:
    """Bytes of the files of all recipes in every storage, and of the dense network; how far weights are from it."""
    rows = []
    for recipe in sized():
        model = network.build(seed, laplace=recipe.laplace)[0]
        dense = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
        graph = artifact.load(quantise(network, recipe, seed, place(folder, network, recipe))).graph
        for precision, entropy in recipe.storages:
            for layer in quantised_layers(graph):
                layer.precision, layer.entropy = precision, entropy
            size = artifact.save(folder / "size.fxp", graph) / MB
            goal = None if recipe is FAST else network.entropy_mb if entropy else network.file_mb
            stored = f"codewords {precision}{', entropy coded' if entropy else ''}"
            case = f"{network.name}, file, {recipe.name}"
            met = None if goal is None else size <= goal
            rows.append(
                Row(case, stored, size, "MB (1e6 bytes)", dense / MB, None if goal is None else f"≤ {goal:g}", met)
            )
            rows.append(Row(case, f"{stored}: times smaller", dense / MB / size, "times"))
            advance()
        rows.append(Row(f"{network.name}, file, {recipe.name}", "weight error", weight_error(model, graph), "relative"))
    return rows


def sized() -> tuple[Recipe, ...]:
    """The recipes whose files are measured."""
    return (PUBLISHED, RATED, HEAVY, HEAVY_RATED, FAST)


def weight_error(model: nn.Module, graph: Graph) -> float:
    """Relative error ‖W − Ŵ‖ / ‖W‖ of all quantised layers together, codewords as they are stored."""
    error, size = 0.0, 0.0
    for name, layer in graph.module.named_modules():
        if isinstance(layer, PQLayer):
            weight: Any = model.get_submodule(name).weight
            error += float((weight - layer.decoded()).detach().norm()) ** 2
            size += float(weight.detach().norm()) ** 2
    return sqrt(error / size)


def quantised_layers(graph: Graph) -> list[PQLayer]:
    """The product-quantized layers of a graph."""
    return [layer for layer in graph.module.modules() if isinstance(layer, PQLayer)]


def place(folder: Path, network: Network, recipe: Recipe, suffix: str = "") -> Path:
    """File of a quantised network."""
    return folder / f"{network.name}, {recipe.name}{suffix}.fxp"


def emitted(
    network: Network, recipe: Recipe, tables: Tables, seed: int, folder: Path, image: Tensor
) -> tuple[Path, Compiled]:
    """The emitted network (file, and as loaded from it); kernels are chosen for this image, once per folder."""
    path = place(folder, network, recipe, f", {tables} tables")
    if not path.exists():
        source = quantise(network, recipe, seed, place(folder, network, recipe))
        graph = artifact.load(source).graph
        compile_network(graph, [{"emit": {"tables": tables}}], image, verify=False).save(path)
    return path, load(path)


def measure_network(network: Network, asked: Load, folder: Path, seed: int, rounds: int, advance: Advance) -> list[Row]:
    """Rows of one network under one load, warm and cold."""
    torch.set_num_threads(asked.threads)
    model, image = network.build(seed)
    images = image.repeat(asked.batch, 1, 1, 1)
    engines = list(_ours(network, folder, seed, images))
    rows = _choices(network, asked, engines)
    files = prepare_peers(decoded(model, engines[0][1].graph), images, folder / f"{network.name}, batch {asked.batch}")
    timed = [engine for engine, _ in engines]
    timed += [torch_engine(TORCH, "float", model, images), *peer_engines(files, images, asked.threads)]
    distances = _distances(timed, engines, model, images)
    goals: Goals = {engine.name: network.faster for engine, _ in engines if "int8" in engine.name}
    for cache in CACHES:
        times = take_turns(timed, rounds if cache == "warm" else -(-rounds // 2), cache, advance)
        case = f"{network.name}, {asked}, {cache}"
        rows += rows_of(case, timed, times, distances, goals if cache == "warm" else {}, asked.threads)
    return rows


def name_of(recipe: Recipe, tables: Tables) -> str:
    """Name of an emitted network among the engines."""
    return f"fxpress {recipe.name}, {tables} tables"


def _ours(network: Network, folder: Path, seed: int, images: Tensor) -> Iterator[tuple[Engine, Compiled]]:
    for recipe in (PUBLISHED, FAST):
        for tables in recipe.tables:
            _, compiled = emitted(network, recipe, tables, seed, folder, images)
            yield torch_engine(name_of(recipe, tables), "fxpress", compiled.module, images), compiled


def _choices(network: Network, asked: Load, engines: list[tuple[Engine, Compiled]]) -> list[Row]:
    """What `emit` has chosen, one row per engine."""
    rows = []
    for engine, compiled in engines:
        metrics = compiled.report["emit"].metrics
        named = [(kernel, _run_by(metrics, kernel)) for kernel in ("dense", "dense-int8")]
        text = "; ".join([metrics["layout"], *(f"{kernel}: {names}" for kernel, names in named)])
        rows.append(Row(f"{network.name}, {asked}, choices", engine.name, text))
    return rows


def _run_by(metrics: dict[str, Any], kernel: str) -> str:
    """Names of the layers that run by a kernel."""
    return ", ".join(name for name, choice in metrics["kernels"].items() if choice["kernel"] == kernel) or "none"


def decoded(model: nn.Module, graph: Graph) -> nn.Module:
    """The network with the decoded weights of a quantised one."""
    with torch.no_grad():
        for name, layer in graph.module.named_modules():
            if isinstance(layer, PQLayer):
                dense: Any = model.get_submodule(name)
                dense.weight.copy_(layer.decoded())
                dense.bias.copy_(layer.bias)
    return model


def _distances(
    timed: list[Engine], engines: list[tuple[Engine, Compiled]], model: nn.Module, images: Tensor
) -> dict[str, float]:
    """Of each engine to the decoded network of its own codes; peers run the codes of the first of ours."""
    found = {}
    for engine, compiled in reversed(engines):  # ends with the first: that is what the peers run
        expected = torch_engine("", "float", decoded(model, compiled.graph), images).output()
        found[engine.name] = relative_distance(expected, engine.output())
    rest = [engine for engine in timed if engine.name not in found]
    return found | {engine.name: relative_distance(expected, engine.output()) for engine in rest}


def measure_memory(network: Network, folder: Path, seed: int, advance: Advance) -> list[Row]:
    """Peak memory of fresh processes that load a file and run one image, on one thread."""
    model, image = network.build(seed)
    files: dict[str, tuple[Runner, Path]] = {}
    for recipe in (PUBLISHED, FAST):
        for tables in recipe.tables:
            path, compiled = emitted(network, recipe, tables, seed, folder, image)
            files[name_of(recipe, tables)] = ("fxpress", path)
    peers = prepare_peers(decoded(model, compiled.graph), image, folder / f"{network.name}, batch 1")
    save_file(model.state_dict(), folder / f"{network.name}.safetensors")
    files["torch fp32"] = ("torch", folder / f"{network.name}.safetensors")
    return memory_rows(network.name, files | peer_files(peers), SIZE, advance)


def measure_nodes(network: Network, folder: Path, seed: int, rounds: int, advance: Advance) -> list[Row]:
    """Where the time of the emitted networks goes, batch 1, one thread."""
    torch.set_num_threads(1)
    image = network.build(seed)[1]
    rows = []
    for recipe in (PUBLISHED, FAST):
        for tables in recipe.tables:
            module = emitted(network, recipe, tables, seed, folder, image)[1].module
            rows += profile(f"{network.name}, nodes, {recipe.name}, {tables} tables", module, image, rounds, advance)
    return rows
