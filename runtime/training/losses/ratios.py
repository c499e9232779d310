"""Scale factors: how close the classes are to each other, in the eyes of a network.

With logits z, temperature T and target class y, the scale factor of a class j ≠ y is its share of the mass that is not
the target's:

    p = softmax(z / T),    s_j = p_j / Σ_{k≠y} p_k = softmax over k ≠ y of z_k / T.

Ratios among the other classes are kept as they are, s_i / s_j = p_i / p_j, and s is bounded, unlike p_j / p_y.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ....ir.errors import OptionError
from .lesson import precise


def target_classes(outputs: Tensor, targets: Tensor) -> Tensor:
    """Class of each prediction's target, int64 `(N, *space)`; of soft targets (mixed images) the most probable class.

    Args:
        outputs: `(N, classes, *space)`.
        targets: class indices `(N, *space)`, or probabilities `(N, classes, *space)`; of equal ones the first counts.

    Raises:
        OptionError: shapes that do not fit, or fewer than two classes.
    """
    if outputs.ndim < 2 or outputs.shape[1] < 2:
        raise OptionError(f"scale factors need at least two classes; the outputs are {tuple(outputs.shape)}")
    if targets.is_floating_point() and targets.shape == outputs.shape:
        return targets.argmax(1)
    if targets.is_floating_point() or targets.shape != (outputs.shape[0], *outputs.shape[2:]):
        raise OptionError(
            f"targets {tuple(targets.shape)} of {targets.dtype} do not fit outputs {tuple(outputs.shape)}",
            hint="Give class indices (N, *space), or probabilities of the shape of the outputs.",
        )
    return targets.long()


def without_targets(values: Tensor, classes: Tensor) -> Tensor:
    """`(N, C, *space)` without the entry of each prediction's target class: `(N, C − 1, *space)`, order kept."""
    return values.gather(1, other_classes(classes, values.shape[1]))


def other_classes(classes: Tensor, count: int) -> Tensor:
    """The classes that are not the target, in order: `(N, *space)` to `(N, count − 1, *space)`."""
    index = torch.arange(count - 1, device=classes.device).reshape(1, -1, *[1] * (classes.ndim - 1))
    return index + (index >= classes.unsqueeze(1))


def log_scale_factors(outputs: Tensor, classes: Tensor, temperature: float) -> Tensor:
    """log s over the classes that are not the target, `(N, C − 1, *space)`, at least float32.

    The target's logit is taken out of the softmax, which is the same as −inf in its place and leaves no infinity for
    a gradient to meet; with two classes what is left is exactly 0. Nothing is subtracted instead: logits may be large.
    """
    return functional.log_softmax(without_targets(precise(outputs), classes) / temperature, dim=1)


def scale_factors(outputs: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """s of every class, `(N, C, *space)`: sums to 1 over the classes, 0 at the target's.

    Args:
        outputs: class scores `(N, C, *space)`.
        targets: as in `target_classes`.
        temperature: T, above 0.

    Raises:
        OptionError: as `target_classes`.
    """
    classes = target_classes(outputs, targets)
    shares = log_scale_factors(outputs, classes, temperature).exp()
    empty = shares.new_zeros(outputs.shape)
    return empty.scatter(1, other_classes(classes, outputs.shape[1]), shares)
