"""The batches of a run, from any place on: what a resumed run reads is what an uninterrupted one would have read.

Every batch has a seed of its own, `seed_of(seed, "batch", epoch, index, rank)`, with which python, numpy and torch are
seeded before it is read, in whichever process that is; and every epoch has one for its order. So random augmentation
depends on the place alone, and no generator's state has to travel from batch to batch. A `DataLoader` with a length
goes to any batch without reading those before it, and its augmentation does not depend on the number of workers; any
other iterable is read again from the start of the epoch, and what is read is thrown away.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ...ir.errors import DataError
from ..data import Batch, Inputs, Loader, checked_batches, images_in
from .seeds import seed_all, seed_of

_OTHER = "the train loader gives other batches than before the run was interrupted"
_HINT = (
    "Its order must depend on the random states or on `sampler.set_epoch(epoch)` alone, and its data must be the same."
)


def make_feed(loader: Loader, seed: int, rank: int = 0, world: int = 1) -> Feed:
    """The feed that suits a loader; of each batch, this process gets the share `rank` of `world`.

    Raises:
        DataError: the batch size is no multiple of the number of processes.
    """
    size = getattr(loader, "batch_size", None)
    if isinstance(loader, DataLoader) and size is not None and size % world:
        raise DataError(
            f"batches of {size} cannot be shared by {world} processes",
            hint="Take a batch size that is a multiple of the number of processes.",
        )
    # a subclass with an __iter__ of its own may do anything; without a length nothing can be planned
    kind = _PlannedFeed if isinstance(loader, DataLoader) and _can_plan(loader) else Feed
    return kind(loader, seed, rank, world)


class Feed:
    """Batches of any iterable."""

    def __init__(self, loader: Loader, seed: int, rank: int, world: int) -> None:
        self.loader, self.seed, self.rank, self.world = loader, seed, rank, world
        self.length = _length(loader)
        self._generators = _generators(loader)
        self._before: list[Tensor] = []
        self._last: Any = None
        self._expected: int | None = None

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """This process's share of the batches of an epoch, from batch number `start` on; checked, on the CPU.

        Raises:
            DataError: as `checked_batches`; or a resumed run finds that the loader's order is another one.
        """
        self._before = [generator.get_state() for generator in self._generators]
        seed_all(seed_of(self.seed, "order", epoch))
        for one in (self.loader, getattr(self.loader, "sampler", None), getattr(self.loader, "batch_sampler", None)):
            if hasattr(one, "set_epoch"):
                one.set_epoch(epoch)  # type: ignore[union-attr]
        items = self._items(epoch, start)
        return self._shares(checked_batches(self.loader, "train", epoch=epoch, items=items, first=start))

    def state_dict(self) -> dict[str, Any]:
        """The states of the loader's generators, before this epoch and now, and a check sum of what was read."""
        now = [generator.get_state() for generator in self._generators]
        return {"before": self._before, "now": now, "check": self._check()}

    def load_state_dict(self, state: dict[str, Any], *, within: bool) -> None:
        """Take up what `state_dict` gave `within` an epoch, which `epoch` will begin again, or between two."""
        for generator, one in zip(self._generators, state["before" if within else "now"], strict=True):
            generator.set_state(one)
        self._expected = state["check"] if within else None

    def _items(self, epoch: int, start: int) -> Iterator[Any]:
        # now, not when the first batch is wanted: it may draw the order
        return self._read(iter(self.loader), epoch, start)

    def _read(self, iterator: Iterator[Any], epoch: int, start: int) -> Iterator[Any]:
        index = 0
        while True:
            # every process reads the whole batch, and it must be the same one
            seed_all(seed_of(self.seed, "batch", epoch, index, 0))
            try:
                self._last = next(iterator)
            except StopIteration:
                return
            index += 1
            if index == start:
                self._compare()
            if index > start:
                yield self._last

    def _check(self) -> int | None:
        return None if self._last is None else check_sum(self._last)

    def _compare(self) -> None:
        if self._expected is not None and self._check() != self._expected:
            raise DataError(_OTHER, hint=_HINT)
        self._expected = None

    def _shares(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for inputs, targets in batches:
            index = None
            if self.world > 1:
                index = torch.tensor(_share(images_in(inputs), self.rank, self.world))
            yield pick(inputs, index), targets if index is None else targets[index]


class _PlannedFeed(Feed):
    """Batches of a `DataLoader` whose order is known before anything is read."""

    loader: DataLoader[Any]

    def __init__(self, loader: Loader, seed: int, rank: int, world: int) -> None:
        super().__init__(loader, seed, rank, world)
        self._plan = _Plan()
        self._replica = _replica(self.loader, self._plan)
        self._order: list[list[Any]] = []

    def _items(self, epoch: int, start: int) -> Iterator[Any]:
        assert self.loader.batch_sampler is not None
        self._order = [list(batch) for batch in self.loader.batch_sampler]
        self._compare()
        self._plan.lots = [
            (seed_of(self.seed, "batch", epoch, index, self.rank), self._my(batch))
            for index, batch in enumerate(self._order)
        ][start:]
        return iter(self._replica)

    def _my(self, batch: list[Any]) -> list[Any]:
        return [batch[place] for place in _share(len(batch), self.rank, self.world)]

    def _check(self) -> int | None:
        return zlib.crc32(repr(self._order).encode())

    def _shares(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        return batches  # only this process's part was read


class _Plan:
    """A batch sampler that gives, per batch, a seed and what to read."""

    def __init__(self) -> None:
        self.lots: list[tuple[int, list[Any]]] = []

    def __iter__(self) -> Iterator[Any]:
        return iter(self.lots)

    def __len__(self) -> int:
        return len(self.lots)


class _Seeded(Dataset[Any]):
    """Reads the lots of a `_Plan` from another data set."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitems__(self, lot: tuple[int, list[Any]]) -> Any:
        seed, places = lot
        seed_all(seed)
        whole = getattr(self.dataset, "__getitems__", None)
        return whole(places) if whole is not None else [self.dataset[place] for place in places]

    def __getitem__(self, index: Any) -> Any:
        return self.dataset[index]


def _replica(loader: DataLoader[Any], plan: _Plan) -> DataLoader[Any]:
    """The same loader in all but its order."""
    return DataLoader(
        _Seeded(loader.dataset),
        batch_sampler=plan,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )


def check_sum(item: Any) -> int:
    """CRC-32 over all tensors in a batch."""
    if isinstance(item, Tensor):
        return zlib.crc32(item.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    parts = item.values() if isinstance(item, dict) else item if isinstance(item, (tuple, list)) else ()
    return zlib.crc32(repr([check_sum(part) for part in parts]).encode())


def pick(inputs: Inputs, index: Tensor | None) -> Inputs:
    """The images of these numbers; all if None."""
    if index is None:
        return inputs
    if isinstance(inputs, dict):
        return {name: tensor[index] for name, tensor in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return tuple(tensor[index] for tensor in inputs)
    return inputs[index]


def _share(images: int, rank: int, world: int) -> list[int]:
    """Numbers of this process's images; every process gets as many, a remainder is filled up from the start."""
    return [place % images for place in range(rank, -(-images // world) * world, world)]


def _can_plan(loader: DataLoader[Any]) -> bool:
    usual = type(loader).__iter__ is DataLoader.__iter__ and not isinstance(loader.dataset, IterableDataset)
    return usual and loader.batch_sampler is not None and _length(loader) is not None


def _length(loader: Loader) -> int | None:
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:  # no __len__, or one that has nothing to say
        return None


def _generators(loader: Loader) -> list[torch.Generator]:
    """The generators that a loader's order is drawn from, if it has some of its own."""
    batches = getattr(loader, "batch_sampler", None)
    holders = (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None))
    found = [getattr(holder, "generator", None) for holder in holders]
    return list({id(one): one for one in found if isinstance(one, torch.Generator)}.values())
