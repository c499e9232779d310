"""Whole networks with one-bit weights and two-bit activations: time beside the float network on other engines, bytes.

Weights are random, on which neither time nor size depends. The networks are those of `binarize`, whose batch norms take
their statistics from random images, so that every level of the activations occurs.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from ...passes.compile import compile as compile_network
from ...passes.compiled import Compiled, load
from ...runtime.data import Data
from .accuracy_networks import CifarResNet
from .binary_sizes import vgg
from .common import Row
from .engines import Engine, relative_distance, torch_engine
from .loads import Load
from .peak_memory import Runner, memory_rows, peer_files
from .peer_engines import peer_engines, prepare_peers
from .timed_rows import INT8, TORCH, Goals, rows_of
from .timing import Advance, take_turns
from .zoo import prepare

CALIBRATION = 8
"""Images that batch norms take their statistics from."""
MB = 1e6


@dataclass(frozen=True)
class Recipe:
    """How a network is binarized.

    Args:
        name: as the table shows it.
        options: of `binarize`.
    """

    name: str
    options: dict[str, Any]


RECIPES = (
    Recipe("fxpress binary, ends fp32", {}),
    Recipe("fxpress binary, ends int8", {"first": "int8", "last": "int8"}),
)


@dataclass(frozen=True)
class Network:
    """A network and what is wanted of it.

    Args:
        name: as the table shows it.
        make: the network as its authors initialise it.
        size: of its images, which have three channels.
        faster: how many times faster than what at batch 1 on one thread.
    """

    name: str
    make: Callable[[], nn.Module]
    size: int
    faster: dict[str, float] = field(default_factory=dict)

    def build(self, seed: int) -> nn.Module:
        """The float network with random weights, in which nothing is multiplied by zero."""
        torch.manual_seed(seed)
        return prepare(self.name, self.make(), self.images(CALIBRATION, seed)).model

    def images(self, count: int, seed: int) -> Tensor:
        """Random images, (count, 3, size, size)."""
        return torch.randn(count, 3, self.size, self.size, generator=torch.Generator().manual_seed(seed))


NETWORKS = (
    Network("vgg-small", vgg, 32, {INT8: 2.5}),
    Network("resnet18", torchvision.models.resnet18, 224, {INT8: 2.0, TORCH: 12.0}),
    Network("resnet56", partial(CifarResNet, 9), 32),
)


class Files:
    """The .fxp files of one network: float, binarized, emitted; each made once per folder.

    Args:
        network: which one.
        seed: of weights and images.
        folder: where they lie.
    """

    def __init__(self, network: Network, seed: int, folder: Path) -> None:
        self.network, self.seed, self.folder = network, seed, folder

    def dense(self) -> Path:
        """The float network as it is."""
        return self._made("float", lambda: compile_network(self._model(), [], self._images(1), verify=False))

    def binarized(self, recipe: Recipe) -> Path:
        """What `binarize` makes of it, with weights and levels in float32."""
        data = Data(calibration=[(self._images(CALIBRATION), torch.zeros(CALIBRATION, dtype=torch.long))])
        passes = [{"binarize": recipe.options}]
        return self._made(
            recipe.name, lambda: compile_network(self._model(), passes, self._images(1), data=data, verify=False)
        )

    def emitted(self, recipe: Recipe, batch: int) -> Path:
        """What `emit` makes of that, for as many images at once."""
        return self._made(
            f"{recipe.name}, emitted for batch {batch}",
            lambda: compile_network(load(self.binarized(recipe)), ["emit"], self._images(batch), verify=False),
        )

    def _made(self, name: str, make: Callable[[], Compiled]) -> Path:
        path = self.folder / f"{self.network.name}, {name}.fxp"
        if not path.exists():
            make().save(path)
            gc.collect()
        return path

    def _model(self) -> nn.Module:
        return self.network.build(self.seed)

    def _images(self, count: int) -> Tensor:
        return self.network.images(count, self.seed)


def measure_network(network: Network, asked: Load, folder: Path, seed: int, rounds: int, advance: Advance) -> list[Row]:
    """Rows of one network under one load, warm.

    Args:
        network: which one.
        asked: images at once and threads.
        folder: keeps the files of all engines from one load to the next.
        seed: of weights and images.
        rounds: of turns.
        advance: called after each round.
    """
    torch.set_num_threads(asked.threads)
    case, files = f"{network.name}, {asked}, warm", Files(network, seed, folder)
    images, model = network.images(asked.batch, seed), network.build(seed)
    ours = list(_ours(files, asked, images))
    peers = [*_torch_engines(model, images), *_other_engines(network, model, images, asked, folder)]
    distances = {engine.name: distance for engine, distance in ours}
    expected = peers[0].output()
    distances |= {engine.name: relative_distance(expected, engine.output()) for engine in peers}
    engines = [*(engine for engine, _ in ours), *peers]
    times = take_turns(engines, rounds, "warm", advance)
    goals: Goals = {engine.name: network.faster for engine, _ in ours} if (asked.batch, asked.threads) == (1, 1) else {}
    return rows_of(case, engines, times, distances, goals, asked.threads)


def measure_size(network: Network, folder: Path, seed: int, advance: Advance) -> list[Row]:
    """Bytes of the emitted files, each beside the float one, and what they hold; an example image is in all of them."""
    files, case = Files(network, seed, folder), f"{network.name}, file"
    dense = files.dense().stat().st_size
    rows = []
    for recipe in RECIPES:
        path = files.emitted(recipe, 1)
        size = path.stat().st_size
        rows += [
            Row(case, recipe.name, size / MB, "MB (1e6 bytes)", dense / MB),
            Row(case, f"{recipe.name}: times smaller", dense / size, "times"),
            Row(case, f"{recipe.name}: weights", *_contents(load(files.binarized(recipe)))),
        ]
        advance()
    return rows


def measure_memory(network: Network, folder: Path, seed: int, advance: Advance) -> list[Row]:
    """Peak memory of fresh processes that load a file and run one image, on one thread."""
    files, images = Files(network, seed, folder), network.images(1, seed)
    found: dict[str, tuple[Runner, Path]] = {recipe.name: ("fxpress", files.emitted(recipe, 1)) for recipe in RECIPES}
    found["fxpress, float network"] = ("fxpress", files.dense())
    peers = prepare_peers(network.build(seed), images, folder / f"{network.name}, batch 1")
    return memory_rows(network.name, found | peer_files(peers), network.size, advance)


def _ours(files: Files, asked: Load, images: Tensor) -> Iterator[tuple[Engine, float]]:
    """Emitted networks, as loaded from their files, and how far each is from the binarized one before `emit`.

    That one computes in double precision: in single precision rounding decides about sums on a threshold, in both.
    """
    for recipe in RECIPES:
        exact = load(files.binarized(recipe)).module.double()
        before = torch_engine("", "fxpress", exact, images.double()).output()
        engine = torch_engine(recipe.name, "fxpress", load(files.emitted(recipe, asked.batch)).module, images)
        yield engine, relative_distance(before, engine.output())


def _torch_engines(model: nn.Module, images: Tensor) -> Iterator[Engine]:
    """The float network in torch as it is, which distances are measured to, and in channels-last."""
    yield torch_engine(TORCH, "float", model, images)
    layout: Any = {"memory_format": torch.channels_last}
    yield torch_engine(f"{TORCH}, channels-last", "float", copy.deepcopy(model).to(**layout), images.to(**layout))


def _other_engines(network: Network, model: nn.Module, images: Tensor, asked: Load, folder: Path) -> Iterator[Engine]:
    """The float network and its int8 versions, calibrated on these images, in the other engines."""
    files = prepare_peers(model, images, folder / f"{network.name}, batch {asked.batch}")
    return peer_engines(files, images, asked.threads)


def _contents(binarized: Compiled) -> tuple[int, str]:
    """Number of weights of one bit, and in words of how many, and why which layers are others."""
    row = binarized.report["binarize"]
    kept = [f"{skip.node}: {skip.reason}" for skip in row.skips]
    kept += [f"{path}: 8 bits" for path in row.metrics.get("int8_layers", [])]
    return row.metrics["binary_parameters"], f"of one bit, of {row.parameters:,} parameters; {'; '.join(kept)}"
