"""Data sets by name: `digits`, `mnist[:DIR]`, `fashion-mnist[:DIR]`, `cifar10:DIR`, `folder:DIR`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ...ir.errors import DataError
from .data import Data
from .folders import folder_data
from .images import ImageTensors, Recipe, make_loader
from .readers import Split, idx_reader, read_cifar10, read_digits, required_folder

CALIBRATION_IMAGES = 1024
"""How many training images, without augmentation, the calibration loader holds."""

DATASETS = ("digits", "mnist[:DIR]", "fashion-mnist[:DIR]", "cifar10:DIR", "folder:DIR")
"""What `load_data` understands."""

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_FOLDER = Path("/usr/share/datasets")  # where Debian installs data sets
_SOURCES: dict[str, tuple[Callable[[Path | None], Split], Recipe]] = {
    "digits": (read_digits, Recipe((0.305,), (0.376,), crop=1)),
    "mnist": (
        idx_reader("mnist", _FOLDER / "mnist", "Fetch the four files of MNIST"),
        Recipe((0.1307,), (0.3081,), crop=2),
    ),
    "fashion-mnist": (
        idx_reader("fashion-mnist", _FOLDER / "fashion-mnist", "Install Debian's package dataset-fashion-mnist"),
        Recipe((0.286,), (0.353,), crop=2, flip=True),
    ),
    "cifar10": (read_cifar10, Recipe((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616), crop=4, flip=True)),
}


def load_data(
    spec: str,
    *,
    batch_size: int = 64,
    seed: int = 0,
    image_size: int | None = None,
    channels: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    augment: bool = True,
    limit: int | None = None,
    workers: int = 0,
) -> Data:
    """Load a data set: `train` is shuffled and augmented, `val` is its test part, `calibration` is neither.

    Args:
        spec: one of `DATASETS`; nothing is downloaded. `cifar10` unpickles torchvision's files, after torchvision has
            compared their checksums with the published ones.
        batch_size: images per batch.
        seed: of the order of the training images and of the choice of `limit`.
        image_size: height and width to resize to; None keeps the images' own (`digits` 8, `folder` 224).
        channels: of the images; grey ones are repeated. None keeps the images' own.
        mean: per channel of images scaled to 0-1; None takes the data set's own (ImageNet's for `folder`).
        std: per channel, likewise.
        augment: whether training images are shifted at random (and mirrored, except digits of any kind).
        limit: use only this many training images.
        workers: processes that decode image folders.

    Raises:
        DataError: an unknown name or a bad number, files that are missing or damaged; says what was looked for and
            how to get it.
    """
    name, _, place = spec.partition(":")
    folder = Path(place).expanduser() if place else None
    for label, number in (
        ("batch_size", batch_size),
        ("image_size", image_size),
        ("channels", channels),
        ("limit", limit),
    ):
        if number is not None and number < 1:
            raise DataError(f"{label} {number} is out of range", hint="Give 1 or more.")
    if name == "folder":
        _check_channels(channels, 3)
        root = required_folder(folder, spec)
        stats = (mean or IMAGENET_MEAN, std or IMAGENET_STD)
        return folder_data(root, batch_size, seed, image_size or 224, *stats, augment, limit, workers)
    if name not in _SOURCES:
        raise DataError(f"unknown data {spec!r}", hint=f"Known: {', '.join(DATASETS)}.")
    read, recipe = _SOURCES[name]
    recipe = replace(recipe, mean=mean or recipe.mean, std=std or recipe.std, image_size=image_size, channels=channels)
    return _in_memory(read(folder), recipe, batch_size, seed, augment, limit)


def load_data_like(spec: str, example: Tensor, *, batch_size: int = 64, seed: int = 0, workers: int = 0) -> Data:
    """`load_data` with images of the size and channels of a network's example input `(N, C, S, S)`.

    Raises:
        DataError: as `load_data`, or the network does not take square images of that many channels.
    """
    if example.ndim != 4 or example.shape[2] != example.shape[3]:
        raise DataError(
            f"the network takes inputs {tuple(example.shape)}, data {spec!r} are square images (N, C, S, S)",
            hint="In Python, Data(val=...) takes any loader.",
        )
    channels, size = example.shape[1:3]
    return load_data(spec, batch_size=batch_size, seed=seed, image_size=size, channels=channels, workers=workers)


def _in_memory(split: Split, recipe: Recipe, batch_size: int, seed: int, augment: bool, limit: int | None) -> Data:
    """Loaders for a split; `recipe` is the training one, the others do without its crop and flip."""
    channels = split.train_images.shape[1]
    _check_channels(recipe.channels, channels)
    if {len(recipe.mean), len(recipe.std)} - {1, channels}:
        raise DataError(f"mean {recipe.mean} and std {recipe.std} do not fit images of {channels} channels")
    plain = replace(recipe, crop=0, flip=False)
    chosen = torch.randperm(len(split.train_images), generator=torch.Generator().manual_seed(seed))[:limit]
    images, targets = split.train_images[chosen], split.train_targets[chosen]
    few = ImageTensors(images[:CALIBRATION_IMAGES], targets[:CALIBRATION_IMAGES], plain)
    train = ImageTensors(images, targets, recipe if augment else plain)
    val = ImageTensors(split.test_images, split.test_targets, plain)
    return Data(
        train=make_loader(train, batch_size, shuffle=True, seed=seed),
        val=make_loader(val, batch_size),
        calibration=make_loader(few, batch_size),
    )


def _check_channels(wanted: int | None, channels: int) -> None:
    if wanted not in (None, channels) and channels != 1:
        raise DataError(
            f"images of {channels} channels cannot become images of {wanted}", hint="Only grey images can be repeated."
        )
