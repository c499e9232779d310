"""Snapshot: whether tensors are still those of which something was made."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


class Snapshot:
    """Which tensors, where they lie, and how often they were written to.

    Writes through `.data` go unseen, as do those to tensors of inference mode, whose writes torch does not count.

    Args:
        tensors: may be None, too.
    """

    def __init__(self, tensors: Iterable[Tensor | None]) -> None:
        self._states = [_state(tensor) for tensor in tensors]

    def is_of(self, tensors: Iterable[Tensor | None]) -> bool:
        """Whether these are the same tensors, unchanged."""
        for now, (known, _, place, version) in zip(tensors, self._states, strict=True):
            if now is not known:
                return False
            if now is not None and (now.data_ptr() != place or (version is not None and now._version != version)):
                return False
        return True


def _state(tensor: Tensor | None) -> tuple[Tensor | None, Tensor | None, int, int | None]:
    """The tensor, a view that keeps its memory (nothing else can get its address), the address, the count of writes."""
    if tensor is None:
        return None, None, 0, None
    return tensor, tensor.detach(), tensor.data_ptr(), None if tensor.is_inference() else tensor._version
