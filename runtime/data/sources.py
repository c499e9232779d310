"""Data sets by name: `digits`, `mnist[:DIR]`, `fashion-mnist[:DIR]`, `cifar10:DIR`, `folder:DIR`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ...ir.errors import DataError
from .data import Data
from .folders import folder_data
from .idx import find_idx, read_idx
from .images import ImageTensors, Recipe, make_loader

CALIBRATION_IMAGES = 1024
"""How many training images, without augmentation, the calibration loader holds."""

DATASETS = ("digits", "mnist[:DIR]", "fashion-mnist[:DIR]", "cifar10:DIR", "folder:DIR")
"""What `load_data` understands."""


@dataclass(frozen=True)
class Split:
    """Training and test images in memory, uint8 or 0-1 float `(N, C, H, W)`, with their class indices `(N,)`."""

    train_images: Tensor
    train_targets: Tensor
    test_images: Tensor
    test_targets: Tensor


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
        root = _required(folder, spec)
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


def _digits(folder: Path | None) -> Split:
    """The 1,797 8x8 digits that come with scikit-learn; every fifth image of each class is for testing."""
    from sklearn.datasets import load_digits

    if folder is not None:
        raise DataError(f"digits takes no folder, {str(folder)!r} was given", hint="Write just: digits.")
    images, targets = load_digits(return_X_y=True)
    pixels = torch.from_numpy(images).float().reshape(-1, 1, 8, 8) / 16
    labels = torch.from_numpy(targets)
    test = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(10):
        test[(labels == digit).nonzero().flatten()[::5]] = True
    return Split(pixels[~test], labels[~test], pixels[test], labels[test])


def _idx(name: str, default: Path, how: str) -> Callable[[Path | None], Split]:
    def read(folder: Path | None) -> Split:
        root = folder or default
        places = (root, root / "MNIST" / "raw", root / "FashionMNIST" / "raw")
        stems = [f"{part}-{kind}" for part in ("train", "t10k") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]
        for place in places:
            found = [find_idx(place, stem) for stem in stems]
            if all(found):
                parts = [_idx_part(*pair) for pair in (found[:2], found[2:])]
                return Split(*parts[0], *parts[1])
        raise DataError(
            f"{name} was not found: looked in {root} for {', '.join(stems)} (each plain or .gz)",
            hint=f"{how}, or give the folder that holds them as {name}:DIR.",
        )

    return read


def _idx_part(images_path: Path | None, labels_path: Path | None) -> tuple[Tensor, Tensor]:
    assert images_path is not None
    assert labels_path is not None
    images, labels = read_idx(images_path, dims=3), read_idx(labels_path, dims=1)
    if len(images) != len(labels):
        raise DataError(f"{images_path} holds {len(images)} images, {labels_path} {len(labels)} labels")
    if int(labels.max()) > 9:
        raise DataError(f"{labels_path} holds label {int(labels.max())}", hint="The ten classes are numbered 0 to 9.")
    return images[:, None], labels.long()


def _cifar10(folder: Path | None) -> Split:
    from torchvision.datasets import CIFAR10

    root = _required(folder, "cifar10")
    root = root.parent if root.name == CIFAR10.base_folder else root
    try:
        parts = [CIFAR10(str(root), train=train, download=False) for train in (True, False)]
    except RuntimeError as error:  # torchvision: "Dataset not found or corrupted"
        raise DataError(
            f"cifar10 was not found or is damaged: looked in {root / CIFAR10.base_folder} for data_batch_1 to 5, "
            "test_batch and batches.meta with the published checksums",
            hint="Unpack https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz there.",
        ) from error
    tensors = [(torch.from_numpy(part.data).permute(0, 3, 1, 2), torch.tensor(part.targets)) for part in parts]
    return Split(*tensors[0], *tensors[1])


def _required(folder: Path | None, spec: str) -> Path:
    name = spec.partition(":")[0]
    if folder is None:
        raise DataError(f"{name} needs a folder", hint=f"Write {name}:DIR.")
    return folder


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_FOLDER = Path("/usr/share/datasets")  # where Debian installs data sets
_SOURCES: dict[str, tuple[Callable[[Path | None], Split], Recipe]] = {
    "digits": (_digits, Recipe((0.305,), (0.376,), crop=1)),
    "mnist": (
        _idx("mnist", _FOLDER / "mnist", "Fetch the four files of MNIST"),
        Recipe((0.1307,), (0.3081,), crop=2),
    ),
    "fashion-mnist": (
        _idx("fashion-mnist", _FOLDER / "fashion-mnist", "Install Debian's package dataset-fashion-mnist"),
        Recipe((0.286,), (0.353,), crop=2, flip=True),
    ),
    "cifar10": (_cifar10, Recipe((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616), crop=4, flip=True)),
}
