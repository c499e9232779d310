"""Mean scale factors per class: how close the classes of a whole training set are in a teacher's eyes."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ....ir.errors import DataError
from .distillation import check_temperature
from .ratios import scale_factors, target_classes


def mean_scale_factors(
    stream: Iterable[tuple[Tensor, Tensor]],
    temperature: float = 4.0,
    *,
    share: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """S_{c,j}: the mean of the teacher's scale factor t_j over the samples of class c, `(classes, classes)`, float64.

    Rows sum to 1 and the diagonal is 0. A class of which the stream holds no sample gets equal shares; no lesson of
    that stream asks for its row.

    Args:
        stream: `(teacher_outputs, targets)` of each batch, from one pass of the teacher over the training set (in eval
            mode, without gradient); the shapes are those of `scale_factors`. Only the sums are kept.
        temperature: T of the objective that is going to use them.
        share: sums a tensor over processes that read different parts of the data (`all_reduce`).

    Raises:
        DataError: the stream is empty, or the number of classes changes on the way.
        OptionError: as `scale_factors`.
    """
    check_temperature(temperature)
    sums: Tensor | None = None
    for outputs, targets in stream:
        found = _sums(outputs.detach(), targets, temperature)
        if sums is not None and sums.shape != found.shape:
            raise DataError(f"the teacher's outputs have {len(found)} classes, those of the batch before {len(sums)}")
        sums = found if sums is None else sums + found
    if sums is None:
        raise DataError("the mean scale factors need at least one batch", hint="The loader gave none.")
    sums = share(sums) if share is not None else sums
    counts = sums.sum(1, keepdim=True)  # the shares of one sample sum to 1
    equal = (1 - torch.eye(len(sums), dtype=sums.dtype, device=sums.device)) / (len(sums) - 1)
    return torch.where(counts > 0, sums / counts.clamp_min(1e-300), equal)


def _sums(outputs: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Σ t over the predictions of each class, `(classes, classes)`."""
    classes = target_classes(outputs, targets)
    rows = scale_factors(outputs.double(), targets, temperature).movedim(1, -1).flatten(0, -2)
    return rows.new_zeros(rows.shape[1], rows.shape[1]).index_add_(0, classes.flatten(), rows)
