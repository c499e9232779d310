"""Images of the accuracy tables: read once, held in memory, and dealt out alike to every row of a seed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn import functional

from ...ir.errors import DataError
from ...runtime.atomic import write_atomically
from ...runtime.data import Batch, Data
from ...runtime.data.readers import Split, idx_reader
from .accuracy_protocol import Images

LABELS = {"cifar10-jpeg": "CIFAR-10 (JPEG)", "fashion-mnist": "Fashion-MNIST"}
"""What a table calls its images: those of CIFAR-10 went through JPEG, which costs accuracy."""
_STATISTICS = {
    "cifar10-jpeg": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "fashion-mnist": ((0.286,), (0.353,)),
}
SHIFT = 4


class Views:
    """Batches of uint8 images, normalised, and, where asked for, shifted and mirrored.

    Order and augmentation of a batch depend on `seed`, the epoch and its number alone: rows that are compared see the
    same batches whatever else they draw.

    Args:
        images: uint8 `(N, C, H, W)`.
        targets: class indices `(N,)`.
        statistics: mean and standard deviation per channel, of images scaled to 0-1.
        batch: images in a batch.
        seed: of order and augmentation; None keeps the order and augments nothing.
        augment: with a seed.
        limit: images in an epoch, where that is not all of them.
    """

    def __init__(
        self,
        images: Tensor,
        targets: Tensor,
        statistics: Any,
        batch: int,
        seed: int | None = None,
        augment: bool = False,
        limit: int | None = None,
    ) -> None:
        self.images, self.targets, self.batch, self.seed, self.augment = images, targets, batch, seed, augment
        self.count = min(limit or len(images), len(images))
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in statistics)
        self.epoch = 0

    def __len__(self) -> int:
        whole, rest = divmod(self.count, self.batch)
        return whole + (1 if rest and self.seed is None else 0)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next `iter()` gives."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Batch]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        order = torch.arange(len(self.images))
        if self.seed is not None:
            order = torch.randperm(len(order), generator=_generator(self.seed, epoch, -1))
        order = order[: self.count]
        for index in range(len(self)):
            chosen = order[index * self.batch : (index + 1) * self.batch]
            images = self.images[chosen]
            if self.augment and self.seed is not None:
                images = _augmented(images, _generator(self.seed, epoch, index))
            inputs = ((images.float() / 255 - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
            yield inputs, self.targets[chosen]


@dataclass(frozen=True)
class Deal:
    """The images of a table, dealt out.

    Attributes:
        data: what passes see.
        test: the test images; `data.val` are these where no training images are kept for validation.
    """

    data: Data
    test: Views


def load_images(plan: Images, folder: Path | None, scratch: Path, seed: int) -> Deal:
    """Loaders of a table's images; `train` follows the seed, all others are the same for every seed.

    Args:
        plan: which images, and how many.
        folder: image folders `train/CLASS/*.jpg` and `test/CLASS/*.jpg`, or of IDX files.
        scratch: where decoded images are kept.
        seed: of order and augmentation.

    Raises:
        DataError: files are missing.
    """
    split = _read_folders(folder, scratch) if plan.data == "cifar10-jpeg" else _read_fashion(folder)
    statistics = _STATISTICS[plan.data]
    shuffled = torch.randperm(len(split.train_images), generator=torch.Generator().manual_seed(0))
    held, rest = shuffled[: plan.validation], shuffled[plan.validation :]
    chosen = rest[: plan.train]
    few = chosen[: plan.calibration]

    def training(indices: Tensor, batch: int, **options: Any) -> Views:
        return Views(split.train_images[indices], split.train_targets[indices], statistics, batch, **options)

    test = Views(split.test_images[: plan.test], split.test_targets[: plan.test], statistics, 500)
    return Deal(
        Data(
            train=training(chosen, plan.batch, seed=seed, augment=plan.augment, limit=plan.epoch),
            val=training(held, 500) if plan.validation else test,
            calibration=training(few, plan.batch),
        ),
        test,
    )


def _read_fashion(folder: Path | None) -> Split:
    default = Path("/usr/share/datasets/fashion-mnist")
    return idx_reader("fashion-mnist", default, "Install Debian's package dataset-fashion-mnist")(folder)


def _read_folders(folder: Path | None, scratch: Path) -> Split:
    if folder is None or not (folder / "train").is_dir() or not (folder / "test").is_dir():
        raise DataError(
            f"no image folders in {folder}: looked for train and test", hint="Give their folder with --images DIR."
        )
    kept = scratch / "images.safetensors"
    if not kept.is_file():
        train, test = _decode(folder / "train"), _decode(folder / "test")
        names = ("train_images", "train_targets", "test_images", "test_targets")
        scratch.mkdir(parents=True, exist_ok=True)
        write_atomically(kept, [save(dict(zip(names, (*train, *test), strict=True)))])
    return Split(**load_file(kept))


def _decode(folder: Path) -> tuple[Tensor, Tensor]:
    """All images below a folder of classes, `(N, 3, H, W)`, and the number of their class in alphabetical order."""
    from PIL import Image
    from torchvision.transforms.v2.functional import pil_to_tensor

    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    files = [(file, number) for number, path in enumerate(classes) for file in sorted(path.glob("*.jpg"))]
    if not files:
        raise DataError(f"{folder} holds no CLASS/*.jpg")
    images = torch.stack([pil_to_tensor(Image.open(file).convert("RGB")) for file, _ in files])
    return images, torch.tensor([number for _, number in files])


def _augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    count, channels, height, width = images.shape
    padded = functional.pad(images, [SHIFT] * 4)
    top, left = (torch.randint(0, 2 * SHIFT + 1, (count, 1), generator=generator) for _ in range(2))
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    mirrored = torch.rand(count, generator=generator) < 0.5
    columns[mirrored] = columns[mirrored].flip(1)
    one, channel = torch.arange(count)[:, None, None, None], torch.arange(channels)[:, None, None]
    return padded[one, channel, rows[:, None, :, None], columns[:, None, None, :]]


def _generator(seed: int, epoch: int, index: int) -> torch.Generator:
    return torch.Generator().manual_seed(((seed * 10_007 + epoch) * 100_003 + index + 1) % 2**63)
