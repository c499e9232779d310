"""Attention transfer: the student is to look where the teacher looks."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from ....ir.errors import OptionError
from .lesson import Lesson, Objective, feature_pairs


class AttentionTransfer(Objective):
    """L = weight · Σ_k mean_{n, positions} (a(F_k^S) − a(F_k^T))².

    a(F) = A / ‖A‖₂ with A = mean_c F_c², the attention map of a sample, flattened: it does not depend on the number of
    channels, so that it outlives pruning. Where the maps differ in size, the larger A is averaged down to the smaller.

    Source: Zagoruyko and Komodakis 2017, https://arxiv.org/abs/1612.03928; mean over positions and weight 1000 (half of
    the paper's β) as in the authors' code. This is the term alone: add it to others with `Sum`.

    Args:
        weight: at least 0.
    """

    needs_teacher = True
    needs_features = True

    def __init__(self, weight: float = 1000.0) -> None:
        super().__init__()
        if not weight >= 0:
            raise OptionError(f"weight {weight} must be at least 0")
        self.weight = weight

    def forward(self, lesson: Lesson) -> Tensor:
        """The loss.

        Raises:
            OptionError: no features, not as many of both, or features without positions.
        """
        terms = [attention_distance(*pair) for pair in feature_pairs(lesson)]
        return self.weight * sum(terms[1:], terms[0])


def attention_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over samples and positions of (a(F^S) − a(F^T))²; features `(N, channels, *space)`."""
    one, two = attention_map(student), attention_map(teacher)
    if one.ndim != two.ndim:
        raise OptionError(f"features {tuple(student.shape)} and {tuple(teacher.shape)} differ in their dimensions")
    size = tuple(min(pair) for pair in zip(one.shape[1:], two.shape[1:], strict=True))
    one, two = _fitted(one, size), _fitted(two, size)
    return (functional.normalize(one, dim=1) - functional.normalize(two, dim=1)).square().mean()


def attention_map(features: Tensor) -> Tensor:
    """A = mean_c F_c², `(N, *space)`, not normalised.

    Raises:
        OptionError: features `(N, channels)`: with one position there is nothing to look at.
    """
    if features.ndim < 3:
        raise OptionError(
            f"attention needs features with positions (N, channels, ...), given: {tuple(features.shape)}",
            hint="Name an earlier place, before pooling.",
        )
    return features.square().mean(1)


def _fitted(attention: Tensor, size: tuple[int, ...]) -> Tensor:
    """`(N, *space)` averaged down to `(N, size)`, then flattened."""
    if tuple(attention.shape[1:]) != size:
        pool: nn.Module = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[len(size) - 1](size)
        attention = pool(attention.unsqueeze(1)).squeeze(1)
    return attention.flatten(1)
