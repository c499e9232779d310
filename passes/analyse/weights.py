"""Statistics of filters: how large, how varied the weights are that make one channel.

A filter is one row of a weight: what makes one output channel of a convolution or linear layer, (channels, weights).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from ...ir.errors import ModelError
from ...ir.graph import Graph

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class FilterStatistics:
    """Of the filters of one weight; arrays are (filters,) in float64, n is the number of weights of a filter.

    Attributes:
        mean_abs: Σ|w| / n.
        std: sqrt(Σ (w − mean w)² / n) (Li et al. 2019).
        mean: Σ w / n.
        l1: Σ|w| (Li et al. 2017).
        l2: sqrt(Σ w²).
        minimum, maximum: of the weights.
        zeros: share of weights that are exactly zero, 0-1.
    """

    mean_abs: FloatArray
    std: FloatArray
    mean: FloatArray
    l1: FloatArray
    l2: FloatArray
    minimum: FloatArray
    maximum: FloatArray
    zeros: FloatArray

    @classmethod
    def of(cls, rows: Tensor) -> FilterStatistics:
        """Of filters (filters, weights) of any precision."""
        rows = rows.detach().double()
        values = {
            "mean_abs": rows.abs().mean(1),
            "std": rows.std(1, correction=0),
            "mean": rows.mean(1),
            "l1": rows.abs().sum(1),
            "l2": rows.norm(dim=1),
            "minimum": rows.amin(1),
            "maximum": rows.amax(1),
            "zeros": (rows == 0).double().mean(1),
        }
        return cls(**{field.name: values[field.name].cpu().numpy() for field in fields(cls)})


def weight_statistics(network: nn.Module | Graph) -> dict[str, FilterStatistics]:
    """Statistics of every convolution's and linear layer's filters, by the name of the weight (`conv1.weight`)."""
    module = network.module if isinstance(network, Graph) else network
    return {name: FilterStatistics.of(rows) for name, rows in filters_of(module).items()}


def filters_of(module: nn.Module, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The filters of every convolution and linear layer, (filters, weights), by the name of the weight.

    Args:
        module: the network: says which weights there are and along which dimension their filters lie.
        state: a state dict to take the weights from, instead of the network's own.

    Raises:
        ModelError: a weight is not in the state or has another shape there.
    """
    found: dict[str, Tensor] = {}
    for path, layer in module.named_modules():
        dim = filter_dim(layer)
        if dim is None:
            continue
        name = f"{path}.weight" if path else "weight"
        weight = layer.get_parameter("weight").detach()
        if state is not None:
            weight = _of_state(state, name, weight)
        found[name] = weight.movedim(dim, 0).flatten(1)
    return found


def filter_dim(layer: nn.Module) -> int | None:
    """Along which dimension of a layer's weight its filters lie; None where it has no filters.

    0, but 1 where a transposed convolution is not depthwise.
    """
    if isinstance(layer, nn.modules.conv._ConvNd):
        depthwise = layer.groups > 1 and layer.groups == layer.in_channels
        return 1 if layer.transposed and not depthwise else 0
    return 0 if isinstance(layer, nn.Linear) else None


def _of_state(state: Mapping[str, Tensor], name: str, weight: Tensor) -> Tensor:
    other = state.get(name)
    if not isinstance(other, Tensor) or other.shape != weight.shape:
        shape = f"has shape {tuple(other.shape)}" if isinstance(other, Tensor) else "is missing"
        raise ModelError(
            f"{name!r} {shape} in the checkpoint, the network's has {tuple(weight.shape)}",
            hint="Give checkpoints of the very network, with its names.",
        )
    return other.detach()
