"""Reading a loader batch by batch, with every mistake named before it becomes a strange number or a crash."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ...ir.errors import DataError
from .data import Loader

Inputs: TypeAlias = "Tensor | tuple[Tensor, ...] | list[Tensor] | dict[str, Tensor]"
Batch: TypeAlias = tuple[Inputs, Tensor]

_AGAIN = "Give an object that starts anew on each iter(): a DataLoader, a list of batches, not a generator."


def checked_batches(
    loader: Loader, name: str, *, epoch: int = 0, items: Iterable[Any] | None = None, first: int = 0
) -> Iterator[Batch]:
    """Yield each batch of one epoch after checking its form and its values.

    Args:
        loader: iterable of `(inputs, targets)`.
        name: what to call it in an error, e.g. `train`.
        epoch: counts from 0; only the text of an error depends on it.
        items: what the loader gives, if someone else reads it.
        first: number of the first batch in `items`; above 0 there may be no further one.

    Raises:
        DataError: no batch at all, a used-up iterator, an item that is no pair, shapes that do not fit each other,
            NaN or infinite inputs, or negative or fractional targets.
    """
    count = first
    for item in loader if items is None else items:
        yield _checked(item, f"batch {count} of {name} (epoch {epoch + 1})")
        count += 1
    if count == 0:
        raise _empty(loader, name, epoch)


def images_in(inputs: Inputs) -> int:
    """Size of dimension 0 of the first tensor of `inputs`."""
    return len(next(iter(_tensors(inputs))))


def check_targets(targets: Tensor, outputs: Tensor, where: str) -> None:
    """Class indices `(N, *space)` must fit the outputs `(N, classes, *space)`.

    Raises:
        DataError: the shapes do not fit or an index is not below the number of classes.
    """
    if outputs.ndim < 2 or targets.shape != (outputs.shape[0], *outputs.shape[2:]):
        raise DataError(
            f"{where}: targets {tuple(targets.shape)} do not fit the network's outputs {tuple(outputs.shape)}",
            hint="Targets are class indices (N,) for outputs (N, classes), or (N, *space) for (N, classes, *space).",
        )
    classes, highest = outputs.shape[1], int(targets.max())
    if highest >= classes:
        raise DataError(
            f"{where}: target {highest} is out of range, the network has {classes} outputs (0 to {classes - 1})",
            hint="Number the classes from 0, or give a network with as many outputs as there are classes.",
        )


def _empty(loader: Loader, name: str, epoch: int) -> DataError:
    """The error for a loader that gave nothing."""
    what = f"the {name} loader ({type(loader).__name__})"
    if epoch > 0:
        return DataError(f"{what} gave no batch on epoch {epoch + 1}: it is used up", hint=_AGAIN)
    if inspect.isgenerator(loader) or iter(loader) is loader:
        return DataError(f"{what} gave no batch: it is empty or was used up before", hint=_AGAIN)
    return DataError(
        f"{what} is empty",
        hint="Check the size of the data set; with drop_last=True a batch larger than the data set leaves nothing.",
    )


def _checked(item: Any, where: str) -> Batch:
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        size = f" of {len(item)}" if isinstance(item, (tuple, list)) else ""
        raise DataError(f"{where} is a {type(item).__name__}{size}, not a pair", hint="Yield (inputs, targets).")
    inputs, targets = item
    _check_inputs(inputs, where)
    if not isinstance(targets, Tensor):
        raise DataError(f"{where}: targets are a {type(targets).__name__}", hint="Give a tensor of class indices.")
    if targets.is_floating_point() or targets.is_complex():
        raise DataError(f"{where}: targets are {targets.dtype}", hint="Give class indices as torch.int64.")
    if targets.ndim == 0 or targets.shape[0] != images_in(inputs):
        raise DataError(f"{where}: {images_in(inputs)} inputs but targets of shape {tuple(targets.shape)}")
    if int(targets.min()) < 0:
        raise DataError(f"{where}: target {int(targets.min())} is negative", hint="Number the classes from 0.")
    return inputs, targets.long()


def _check_inputs(inputs: Any, where: str) -> None:
    tensors = _tensors(inputs)
    if not tensors or not all(isinstance(t, Tensor) for t in tensors):
        raise DataError(
            f"{where}: inputs are a {type(inputs).__name__}",
            hint="Give a tensor, a tuple of tensors, or a dict of tensors by argument name.",
        )
    sizes = {t.shape[0] if t.ndim else 0 for t in tensors}
    if sizes == {0} or len(sizes) > 1:
        raise DataError(f"{where}: inputs of shapes {', '.join(str(tuple(t.shape)) for t in tensors)} hold no batch")
    for tensor in tensors:
        _check_finite(tensor, where)


def _check_finite(tensor: Tensor, where: str) -> None:
    # the sum of a tensor costs a fraction of isfinite().all() and is finite in all but pathological good batches
    if not tensor.is_floating_point() or bool(torch.isfinite(tensor.sum())):
        return
    bad = ~torch.isfinite(tensor)
    if bool(bad.any()):
        place = tuple(int(i) for i in bad.nonzero()[0])
        raise DataError(
            f"{where}: {int(bad.sum())} of {tensor.numel()} input values are NaN or infinite, the first at {place}",
            hint="Look at that image and at the normalisation (a standard deviation of 0?).",
        )


def _tensors(inputs: Any) -> list[Any]:
    if isinstance(inputs, dict):
        return list(inputs.values())
    return list(inputs) if isinstance(inputs, (tuple, list)) else [inputs]
