"""Image tensors in memory, and the loaders that deal them out in batches, the same for the same seed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, Sampler


class EpochSampler(Sampler[int]):
    """A new permutation per epoch that depends on `seed` and the epoch alone, not on what was drawn before.

    Args:
        size: number of images.
        seed: of the permutations.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed, self.epoch = size, seed, 0

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        self.epoch += 1
        return iter(torch.randperm(self.size, generator=generator).tolist())

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation that the next `iter()` gives."""
        self.epoch = epoch


@dataclass(frozen=True)
class Recipe:
    """How stored images become a batch: scaled to 0-1, enlarged, augmented, normalised.

    Args:
        mean: per channel, of images scaled to 0-1.
        std: per channel.
        image_size: height and width that images are resized to (bilinear); None leaves them.
        channels: grey images are repeated to so many channels, after normalisation; None leaves them.
        crop: pixels of zero padding from which a random crop of the old size is cut; 0 for none.
        flip: mirror every second image, at random.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int | None = None
    channels: int | None = None
    crop: int = 0
    flip: bool = False

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 or 0-1 float `(N, C, H, W)` → normalised float32 `(N, C, H', W')`."""
        batch = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        size = self.image_size
        if size is not None and tuple(batch.shape[2:]) != (size, size):
            batch = functional.interpolate(
                batch, size=(size, size), mode="bilinear", align_corners=False, antialias=True
            )
        if self.crop:
            batch = random_crop(batch, self.crop)
        if self.flip:
            batch = torch.where((torch.rand(len(batch)) < 0.5)[:, None, None, None], batch.flip(-1), batch)
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        batch = (batch - mean) / std
        return batch if self.channels is None else batch.expand(-1, self.channels, -1, -1)


def random_crop(images: Tensor, padding: int) -> Tensor:
    """Move each image `(N, C, H, W)` by up to `padding` pixels each way, zeros filling the rim."""
    count, channels, height, width = images.shape
    padded = functional.pad(images, [padding] * 4)
    top = torch.randint(0, 2 * padding + 1, (count, 1)) + torch.arange(height)
    left = torch.randint(0, 2 * padding + 1, (count, 1)) + torch.arange(width)
    image = torch.arange(count)[:, None, None, None]
    return padded[image, torch.arange(channels)[:, None, None], top[:, None, :, None], left[:, None, None, :]]


class ImageTensors(Dataset[Any]):
    """Images held in memory; a whole batch is fetched and prepared at once.

    Args:
        images: uint8 or 0-1 float, `(N, C, H, W)`.
        targets: class indices `(N,)`.
        recipe: turns the stored images of a batch into inputs.
    """

    def __init__(self, images: Tensor, targets: Tensor, recipe: Recipe) -> None:
        self.images, self.targets, self.recipe = images, targets.long(), recipe

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, targets = self.__getitems__([index])
        return inputs[0], targets[0]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        chosen = torch.as_tensor(indices)
        return self.recipe(self.images[chosen]), self.targets[chosen]


def make_loader(
    dataset: Dataset[Any], batch_size: int, *, shuffle: bool = False, seed: int = 0, workers: int = 0
) -> DataLoader[Any]:
    """A loader whose order follows `seed`; when shuffled, a last batch that is not full is left out.

    Batch normalisation cannot learn from a batch of one image, which a remainder may be.
    """
    size = len(cast("ImageTensors", dataset))
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=EpochSampler(size, seed) if shuffle else None,
        drop_last=shuffle and size >= batch_size,
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=_as_is if isinstance(dataset, ImageTensors) else None,
    )


def _as_is(batch: Any) -> Any:
    """`ImageTensors` gives whole batches: there is nothing to collate."""
    return batch
