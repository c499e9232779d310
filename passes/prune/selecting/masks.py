"""The masks of a network by dependency class: what lives and dies together is weighed and switched together."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from ....ir.groups import Group, Groups
from ....runtime.layers.selection_mask import SelectionMask
from ..selection import BoolArray, FloatArray


class ClassMasks:
    """All selection masks of a graph.

    A class may be held by several masks: with shortcuts that pad channels, those of the first residual stage are held
    by the masks of all stages. Their factors are free, their switch is one.

    Args:
        groups: of the graph with its masks.
        selectable: which classes may be cut, shape (groups.count,).
        layers: each mask once, with the classes of its channels (C,).
    """

    def __init__(self, groups: Groups, selectable: BoolArray, layers: list[tuple[SelectionMask, Tensor]]) -> None:
        self.groups, self.selectable = groups, selectable
        self.layers = [layer for layer, _ in layers]
        self._classes = [classes for _, classes in layers]
        self._index = torch.cat(self._classes)
        held = torch.bincount(self._index, minlength=groups.count)
        self._places = held.clamp(min=1).double().numpy()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The factors of every mask."""
        return [layer.mask for layer in self.layers]

    @property
    def eligible(self) -> list[Group]:
        """Groups of which all channels may be cut."""
        return [group for group in self.groups.groups if self.selectable[group.classes].all()]

    def magnitudes(self) -> FloatArray:
        """Mean |m| over the places that hold a class, shape (count,)."""
        mean: FloatArray = self._sums([layer.mask.detach().abs() for layer in self.layers]) / self._places
        return mean

    def influences(self) -> FloatArray:
        """Σ m ∂L/∂m over the places of a class: the slope of the loss along a common factor on all of it, (count,)."""
        gradients = [(layer.mask, layer.mask.grad) for layer in self.layers]
        return self._sums([torch.zeros_like(m) if g is None else m.detach() * g for m, g in gradients])

    def kept(self) -> BoolArray:
        """Which classes are switched on, shape (count,)."""
        on = np.ones(self.groups.count, dtype=bool)
        for layer, classes in zip(self.layers, self._classes, strict=True):
            on[classes[~layer.keep.cpu()].numpy()] = False
        return on

    @torch.no_grad()
    def switch(self, kept: BoolArray) -> None:
        """Switch channels on and off by class; `kept` has shape (count,)."""
        on = torch.from_numpy(kept)
        for layer, classes in zip(self.layers, self._classes, strict=True):
            layer.keep.copy_(on[classes])

    @torch.no_grad()
    def restrain(self) -> None:
        """Factors of what is off do not exceed the largest of what is on in the same mask.

        The loss does not fall when they grow, so its slope would drive them, and through them the norms, without end.
        """
        for layer in self.layers:
            if bool(layer.keep.any()) and not bool(layer.keep.all()):
                ceiling = float(layer.mask[layer.keep].abs().max())
                layer.mask[~layer.keep] = layer.mask[~layer.keep].clamp(-ceiling, ceiling)

    def harden(self) -> None:
        """Make every cut hard."""
        for layer in self.groups.graph.module.modules():
            if isinstance(layer, SelectionMask):
                layer.alive = "none"

    @torch.no_grad()
    def shrink(self, amounts: FloatArray) -> None:
        """The proximal step of an L1 term: m ← sign(m) · max(|m| − amount, 0), amounts by class, shape (count,)."""
        by_class = torch.from_numpy(amounts)
        for layer, classes in zip(self.layers, self._classes, strict=True):
            mask = layer.mask
            mask.copy_(mask.sign() * (mask.abs() - by_class[classes].to(mask)).clamp(min=0))

    def _sums(self, values: list[Tensor]) -> FloatArray:
        """Sums over the channels of each class, shape (count,)."""
        flat = torch.cat([value.double().cpu() for value in values])
        total: FloatArray = torch.zeros(self.groups.count, dtype=torch.float64).index_add_(0, self._index, flat).numpy()
        return total
