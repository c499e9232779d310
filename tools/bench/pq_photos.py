"""Crops of photographs: of one part of them for calibration, of the other for judging."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ...ir.errors import DataError
from ...runtime.data import Batch

SIZE, SHORT, SMALLEST = 224, 448, 160
"""Pixels: of a crop as the network sees it, of a photograph's shorter side, of a crop's side at least."""
MEAN, STD = 127 / 255, 128 / 255
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
CALIBRATION_EACH = 3
"""Every third photograph, by name, is for calibration."""


class Crops:
    """Batches of square crops, mirrored at random, and the number of the photograph as target.

    A crop's side is between 160 pixels and the photograph's shorter side; a photograph that is smaller is taken whole.
    Which crops these are depends on seed, epoch and number of the batch alone; the photographs take turns.

    Args:
        photos: uint8 (3, H, W).
        count: crops in an epoch.
        batch: crops in a batch.
        seed: of the choice.
        fixed: the same crops in every epoch.
    """

    def __init__(self, photos: Sequence[Tensor], count: int, batch: int, seed: int, *, fixed: bool = True) -> None:
        self.photos, self.count, self.batch, self.seed, self.fixed = photos, count, batch, seed, fixed
        self.epoch = 0

    def __len__(self) -> int:
        return -(-self.count // self.batch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next `iter()` gives."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Batch]:
        epoch, self.epoch = 0 if self.fixed else self.epoch, self.epoch + 1
        for index in range(len(self)):
            generator = torch.Generator().manual_seed((self.seed * 10_007 + epoch) * 100_003 + index)
            numbers = [
                n % len(self.photos) for n in range(index * self.batch, min(self.count, (index + 1) * self.batch))
            ]
            crops = torch.cat([_crop(self.photos[number], generator) for number in numbers])
            inputs = ((crops / 255 - MEAN) / STD).contiguous(memory_format=torch.channels_last)
            yield inputs, torch.tensor(numbers)


class Photos(NamedTuple):
    """Photographs for calibration and fine-tuning, for judging, and folders of further images for the former."""

    known: list[Tensor]
    unseen: list[Tensor]
    more: list[list[Tensor]]

    def mixed(self) -> list[Tensor]:
        """Photographs and each folder's images in turns, until all have been there."""
        parts = [self.known, *self.more]
        return [part[turn % len(part)] for turn in range(max(map(len, parts))) for part in parts]

    def __str__(self) -> str:
        more = f" and in turns {', '.join(str(len(part)) for part in self.more)} other images" if self.more else ""
        return f"{len(self.known)} photographs{more} for calibration and fine-tuning, {len(self.unseen)} for judging"


def read_photos(folder: Path) -> tuple[list[Tensor], list[Tensor]]:
    """Photographs of a folder, in the order of their names: those for calibration, and the others.

    Returns:
        uint8 (3, H, W), the shorter side 448 pixels, or what it has if it has less.

    Raises:
        DataError: there are fewer than three.
    """
    files = sorted((path for path in folder.glob("*") if path.suffix.lower() in SUFFIXES), key=lambda path: path.name)
    if len(files) < CALIBRATION_EACH:
        raise DataError(
            f"{folder} holds {len(files)} photographs ({', '.join(SUFFIXES)}), at least {CALIBRATION_EACH} are needed"
        )
    photos = [_read(file) for file in files]
    others = [photo for index, photo in enumerate(photos) if index % CALIBRATION_EACH]
    return photos[::CALIBRATION_EACH], others


def read_some(folder: Path, most: int) -> list[Tensor]:
    """Images from anywhere below a folder: all, or so many, evenly spaced in the order of their paths.

    Raises:
        DataError: there are none.
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not files:
        raise DataError(f"there are no images below {folder} ({', '.join(SUFFIXES)})")
    count = min(most, len(files))
    return [_read(files[index * len(files) // count]) for index in range(count)]


def _read(file: Path) -> Tensor:
    from PIL import Image
    from torchvision.transforms.v2.functional import pil_to_tensor

    with Image.open(file) as image:
        scale = SHORT / min(image.size)
        image.draft("RGB", (round(image.width * scale), round(image.height * scale)))
        image = image.convert("RGB")
    if scale < 1:
        image = image.resize(
            (round(image.width * SHORT / min(image.size)), round(image.height * SHORT / min(image.size)))
        )
    photo: Tensor = pil_to_tensor(image)
    return photo


def _crop(photo: Tensor, generator: torch.Generator) -> Tensor:
    """One crop as float (1, 3, 224, 224), values 0-255."""
    share, down, across, mirror = torch.rand(4, generator=generator).tolist()
    height, width = photo.shape[1:]
    short = min(height, width)
    least = min(SMALLEST, short)
    side = round(least + share * (short - least))
    top, left = round(down * (height - side)), round(across * (width - side))
    crop = photo[None, :, top : top + side, left : left + side].float()
    crop = functional.interpolate(crop, (SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False)
    return crop.flip(3) if mirror < 0.5 else crop
