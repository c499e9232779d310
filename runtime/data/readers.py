"""Readers of the data sets that are held in memory: each gives a `Split`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...ir.errors import DataError
from .idx import find_idx, read_idx


@dataclass(frozen=True)
class Split:
    """Training and test images in memory, uint8 or 0-1 float `(N, C, H, W)`, with their class indices `(N,)`."""

    train_images: Tensor
    train_targets: Tensor
    test_images: Tensor
    test_targets: Tensor


def read_digits(folder: Path | None) -> Split:
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


def idx_reader(name: str, default: Path, how: str) -> Callable[[Path | None], Split]:
    """A reader of the four IDX files of a data set like MNIST: ten classes of grey images.

    Args:
        name: of the data set, for errors.
        default: where to look if no folder is given.
        how: how to get the files, for errors.
    """

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


def read_cifar10(folder: Path | None) -> Split:
    """CIFAR-10 in torchvision's format; unpickles files whose checksums torchvision knows.

    Raises:
        DataError: no folder, or files that are missing or changed.
    """
    from torchvision.datasets import CIFAR10

    root = required_folder(folder, "cifar10")
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


def required_folder(folder: Path | None, spec: str) -> Path:
    """The folder behind `NAME:`.

    Raises:
        DataError: none was given.
    """
    name = spec.partition(":")[0]
    if folder is None:
        raise DataError(f"{name} needs a folder", hint=f"Write {name}:DIR.")
    return folder
