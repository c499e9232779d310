"""Image folders: `DIR/train/CLASS/*.jpg` and `DIR/test` or `DIR/val`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from ...ir.errors import DataError
from .data import Data
from .images import make_loader

CALIBRATION_IMAGES = 1024
RESIZE = 256 / 224
"""Test images are resized so that the cut-out centre is 224 of 256 pixels, as is usual for ImageNet."""


class _Images(Dataset[Any]):
    """torchvision's ImageFolder; a file that is no image gets an error that names it."""

    def __init__(self, root: Path, transform: Any) -> None:
        from torchvision.datasets import ImageFolder

        try:
            self.folder = ImageFolder(str(root), transform=transform)
        except FileNotFoundError as error:  # torchvision: no class folders, or one without an image
            raise DataError(
                f"no image folder in {root}: {error}",
                hint="It must hold a folder with images for each class.",
            ) from error

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        try:
            image: Tensor
            image, target = self.folder[index]
        except OSError as error:
            raise DataError(f"{self.folder.samples[index][0]} is not a readable image: {error}") from error
        return image, int(target)


def folder_data(
    root: Path,
    batch_size: int,
    seed: int,
    image_size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    augment: bool,
    limit: int | None,
    workers: int,
) -> Data:
    """Loaders for `root/train` and `root/test` or `root/val`; the arguments are those of `load_data`.

    Raises:
        DataError: a folder is missing or holds no images, or the classes of the two parts differ.
    """
    plain, varied = _transforms(image_size, mean, std)
    test = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if test is None or not (root / "train").is_dir():
        raise DataError(
            f"no image folders in {root}: looked for train, and for test or val",
            hint="Each holds a folder per class with its images.",
        )
    train, val = _Images(root / "train", varied if augment else plain), _Images(test, plain)
    if train.folder.classes != val.folder.classes:
        odd = sorted(set(train.folder.classes) ^ set(val.folder.classes))
        raise DataError(f"the classes of {root / 'train'} and {test} differ: only one of them has {', '.join(odd[:5])}")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()[:limit]
    few: Dataset[Any] = Subset(_Images(root / "train", plain), order[:CALIBRATION_IMAGES])
    return Data(
        train=make_loader(Subset(train, order), batch_size, shuffle=True, seed=seed, workers=workers),
        val=make_loader(val, batch_size, workers=workers),
        calibration=make_loader(few, batch_size, workers=workers),
    )


def _transforms(image_size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Any, Any]:
    """Preparation for testing and for training."""
    from torchvision.transforms import v2

    finish = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]
    plain = v2.Compose([v2.Resize(round(image_size * RESIZE), antialias=True), v2.CenterCrop(image_size), *finish])
    varied = v2.Compose([v2.RandomResizedCrop(image_size, antialias=True), v2.RandomHorizontalFlip(), *finish])
    return plain, varied
