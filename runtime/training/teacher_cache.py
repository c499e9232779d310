"""The teacher's outputs, kept per image: it is asked only about what it has not seen."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ...ir.errors import OptionError
from ..data import Inputs, images_in
from .feed import pick

_KEY_BYTES = 16
_ENTRY_BYTES = 150  # what a key and its place take in a dictionary, about
_TRIAL_BATCHES = 8
_WRONG = "cache_teacher needs inputs that are the same in every epoch"
_HINT = "Take a loader without random augmentation, or leave cache_teacher out."


@dataclass(frozen=True)
class CacheReport:
    """What the cache did.

    Args:
        images: kept.
        size_bytes: of their outputs and keys.
        hits: how often an output was taken from it.
        asked: how often the teacher was asked about an image.
        full: whether it stopped taking in images at its limit.
    """

    images: int
    size_bytes: int
    hits: int
    asked: int
    full: bool


class TeacherCache:
    """Outputs by content: the key of an image is the BLAKE2b hash of its bytes.

    So an output is never taken for another input, whatever the loader does: a declaration that does not hold costs
    time and memory, not correctness. It is nevertheless an error, found in the first batches of the second epoch, if
    more than two thirds of their images are new. In each epoch the first batch that could be answered from the cache is
    asked again and compared: a teacher whose outputs depend on chance or on the rest of the batch is an error as well.

    Args:
        limit_bytes: no image is added beyond that.
        rtol: how far, relative to the largest output, an answer may be from the kept one.
    """

    def __init__(self, limit_bytes: int, rtol: float = 1e-3) -> None:
        self.limit_bytes, self.rtol = limit_bytes, rtol
        self.hits, self.asked = 0, 0
        self.keys: dict[bytes, int] = {}
        self.values: Tensor | None = None
        self._shared = 0
        self._checked_epoch = 0
        self._trial = [0, 0, 0]

    def ask(self, inputs: Inputs, teacher: Callable[[Inputs], Tensor], epoch: int) -> Tensor:
        """The teacher's outputs `(N, ...)` on a batch.

        Raises:
            OptionError: the inputs change from epoch to epoch, or the teacher's answers do.
        """
        keys = _keys(inputs)
        new = [place for place, key in enumerate(keys) if key not in self.keys]
        self._try_declaration(epoch, len(keys), len(new))
        self.hits, self.asked = self.hits + len(keys) - len(new), self.asked + len(new)
        if len(new) == len(keys):
            outputs = teacher(inputs)
            self._add(keys, outputs)
            return outputs
        assert self.values is not None
        known = torch.tensor([self.keys.get(key, 0) for key in keys])
        device = next(iter(_tensors(inputs))).device
        outputs = self.values[known].to(device)
        if new:
            index = torch.tensor(new)
            answers = teacher(pick(inputs, index))
            outputs[index] = answers.to(outputs.dtype)
            self._add([keys[place] for place in new], answers)
        elif epoch > self._checked_epoch:
            self._checked_epoch = epoch
            self._compare(outputs, teacher(inputs))
        return outputs

    @property
    def size_bytes(self) -> int:
        """What is kept takes so much."""
        return 0 if self.values is None else len(self.keys) * (_ENTRY_BYTES + self._row_bytes())

    @property
    def report(self) -> CacheReport:
        """What it did so far, in this process."""
        full = self.values is not None and self._room() == 0
        return CacheReport(len(self.keys), self.size_bytes, self.hits, self.asked, full)

    def share(self, accelerator: Accelerator) -> None:
        """Give every process what the others have learned since the last time."""
        fresh = list(self.keys)[self._shared :]
        if accelerator.num_processes > 1:
            counts = accelerator.gather(torch.tensor([len(fresh)], device=accelerator.device)).tolist()
            if self.values is not None and max(counts):
                self._merge(accelerator, fresh, counts)
        self._shared = len(self.keys)

    def state_dict(self) -> dict[str, Any]:
        """Everything, in the order in which it came."""
        keys = torch.frombuffer(bytearray(b"".join(self.keys)) or bytearray(1), dtype=torch.uint8)
        values = None if self.values is None else self.values[: len(self.keys)]
        return {"keys": keys if self.keys else None, "values": values}

    def load_state_dict(self, state: dict[str, Any], count: int) -> None:
        """Take up the first `count` images of what `state_dict` gave."""
        if count:
            raw = state["keys"].numpy().tobytes()
            self.keys = {raw[k * _KEY_BYTES : (k + 1) * _KEY_BYTES]: k for k in range(count)}
            self.values = state["values"][:count].clone()
        self._shared = count

    def _add(self, keys: list[bytes], outputs: Tensor) -> None:
        outputs = outputs.detach().cpu()
        if self.values is None:
            self.values = outputs.new_empty((0, *outputs.shape[1:]))
        fresh = [place for place, key in enumerate(keys) if key not in self.keys]
        fresh = list({keys[place]: place for place in reversed(fresh)}.values())[::-1][: self._room()]
        first = len(self.keys)
        if first + len(fresh) > len(self.values):
            size = min(max(2 * first, first + len(fresh)), first + self._room())
            grown = self.values.new_empty((size, *self.values.shape[1:]))
            grown[:first] = self.values[:first]
            self.values = grown
        self.values[first : first + len(fresh)] = outputs[fresh].to(self.values.dtype)
        self.keys.update({keys[place]: first + number for number, place in enumerate(fresh)})

    def _merge(self, accelerator: Accelerator, fresh: list[bytes], counts: list[int]) -> None:
        assert self.values is not None
        base, most = list(self.keys)[: self._shared], max(counts)
        rows = self.values.new_zeros((most, *self.values.shape[1:]))
        rows[: len(fresh)] = self.values[self._shared : len(self.keys)]
        names = torch.zeros((most, _KEY_BYTES), dtype=torch.uint8)
        for number, key in enumerate(fresh):
            names[number] = torch.frombuffer(bytearray(key), dtype=torch.uint8)
        device = accelerator.device
        all_rows = accelerator.gather(rows.to(device)).cpu().unflatten(0, (len(counts), most))
        all_names = accelerator.gather(names.to(device)).cpu().unflatten(0, (len(counts), most))
        self.keys = {key: number for number, key in enumerate(base)}
        for count, theirs, values in zip(counts, all_names, all_rows, strict=True):
            self._add([bytes(key.tolist()) for key in theirs[:count]], values[:count])

    def _room(self) -> int:
        return max(0, self.limit_bytes // (_ENTRY_BYTES + self._row_bytes()) - len(self.keys))

    def _row_bytes(self) -> int:
        assert self.values is not None
        return self.values[:0].new_empty((1, *self.values.shape[1:])).nbytes

    def _try_declaration(self, epoch: int, images: int, new: int) -> None:
        """Count what is new in the first batches of the second epoch."""
        batches, seen, fresh = self._trial
        if epoch != 1 or batches >= _TRIAL_BATCHES or (self.values is not None and self._room() == 0):
            return
        self._trial = [batches + 1, seen + images, fresh + new]
        if 3 * (fresh + new) > 2 * (seen + images):
            raise OptionError(
                f"{_WRONG}: of the first {seen + images} images of epoch 2, {fresh + new} were not there in epoch 1",
                hint=_HINT,
            )

    def _compare(self, kept: Tensor, answers: Tensor) -> None:
        far = float((kept.float() - answers.float()).abs().max() / answers.float().abs().max().clamp_min(1e-12))
        if far > self.rtol:
            raise OptionError(
                f"cache_teacher: the teacher's outputs on the same images differ by {far:.1e} of the largest",
                hint="It draws random numbers or depends on the other images of a batch: leave cache_teacher out.",
            )


def _keys(inputs: Inputs) -> list[bytes]:
    """A hash per image."""
    rows = [tensor.detach().cpu().contiguous().flatten(1).numpy() for tensor in _tensors(inputs)]
    return [_hash([part[number] for part in rows]) for number in range(images_in(inputs))]


def _hash(parts: list[Any]) -> bytes:
    digest = hashlib.blake2b(digest_size=_KEY_BYTES)
    for part in parts:
        digest.update(part)
    return digest.digest()


def _tensors(inputs: Inputs) -> list[Tensor]:
    if isinstance(inputs, dict):
        return list(inputs.values())
    return list(inputs) if isinstance(inputs, (tuple, list)) else [inputs]
