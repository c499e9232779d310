"""Statistics of activations, per node and channel, from one pass over a loader.

Nothing is kept but sums and bins: memory does not depend on the number of images. Sums run in double precision, so that
a network in bfloat16 or half precision gets statistics as good as its activations. Under `torchrun` every process
looks at its share of the images and all get the same result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, fx

from ...ir.errors import ModelError, OptionError
from ...ir.graph import Graph, TensorSpec
from ...ir.groups import find_groups
from ...runtime.data import Loader
from .histogram import FloatArray, Histogram
from .moments import Moments
from .sharing import shared_list
from .streaming import find_tensor, stream_each

BINS = 128
_AT_ONCE = 1 << 22  # elements in double precision: 32 MB


@dataclass(frozen=True)
class ChannelStatistics:
    """What one node's tensor held, per channel; arrays are (channels,) in float64.

    Attributes:
        dim: dimension of the tensor along which its channels lie.
        count: values per channel: images times positions.
        mean: of the values.
        variance: Σ (x − mean)² / count.
        zeros: share (0-1) of values that are exactly zero: APoZ behind a ReLU (Hu et al. 2016).
        minimum, maximum: of the values.
        entropy: −Σ_b p_b log p_b in nats of the histogram of an image's mean over its positions (Luo & Wu 2017);
            all channels of the node with bins of one width.
        histogram: of the values.
        pooled: histogram of an image's mean over its positions.
    """

    dim: int
    count: int
    mean: FloatArray
    variance: FloatArray
    zeros: FloatArray
    minimum: FloatArray
    maximum: FloatArray
    entropy: FloatArray
    histogram: Histogram
    pooled: Histogram

    @property
    def std(self) -> FloatArray:
        """Square root of the variance."""
        return np.sqrt(self.variance)


@dataclass(frozen=True)
class ActivationStatistics:
    """Statistics of several nodes: `statistics[node].mean`.

    Attributes:
        images: how many were looked at, by all processes together.
        nodes: the statistics by name, in the order of the network unless places were named.
    """

    images: int
    nodes: dict[str, ChannelStatistics]

    def __getitem__(self, node: str) -> ChannelStatistics:
        """Statistics of one node."""
        return self.nodes[node]

    def __iter__(self) -> Iterator[str]:
        return iter(self.nodes)

    def __len__(self) -> int:
        return len(self.nodes)


class ChannelAccumulator:
    """Collects the statistics of one node, image by image; see `ChannelStatistics`.

    Args:
        channels: how many the node's tensor has.
        dim: where they lie.
        bins: of both histograms.
    """

    def __init__(self, channels: int, dim: int, bins: int = BINS) -> None:
        self.dim = dim
        self.moments = Moments.empty(channels)
        self.zeros = torch.zeros(channels, dtype=torch.int64)
        self.values, self.pooled = Histogram.empty(channels, bins), Histogram.empty(channels, bins)

    def add(self, tensor: Tensor) -> None:
        """Look at a tensor `(N, ...)` of any precision."""
        per_image = max(1, tensor[0].numel())
        for part in torch.split(tensor.detach(), max(1, _AT_ONCE // per_image)):
            self._add(part.double().movedim(self.dim, 1).flatten(2) if part.ndim > 2 else part.double()[..., None])

    def _add(self, x: Tensor) -> None:
        """Of values (images, channels, positions)."""
        own = Moments.of(x, 2)  # of each image
        over_images = Moments.of(own.mean)
        images, _, positions = x.shape
        deviations = own.deviations.sum(0) + positions * over_images.deviations
        self.moments.merge(Moments(images * positions, over_images.mean.cpu(), deviations.cpu()))
        self.zeros += (x == 0).sum((0, 2)).cpu()
        self.values.add(x.transpose(0, 1).flatten(1))
        self.pooled.add(own.mean.T)

    def merge(self, other: ChannelAccumulator) -> None:
        """Take in all that another of the same node has seen; that one stays as it is."""
        self.moments.merge(other.moments)
        self.zeros += other.zeros
        self.values.merge(other.values)
        self.pooled.merge(other.pooled)

    def result(self) -> ChannelStatistics:
        """The statistics of all that was seen."""
        return ChannelStatistics(
            dim=self.dim,
            count=self.moments.count,
            mean=self.moments.mean.numpy(),
            variance=self.moments.variance.numpy(),
            zeros=self.zeros.numpy() / max(self.moments.count, 1),
            minimum=self.values.low.numpy(),
            maximum=self.values.high.numpy(),
            entropy=self.pooled.entropy(),
            histogram=self.values,
            pooled=self.pooled,
        )


def activation_statistics(
    graph: Graph,
    loader: Loader,
    *,
    places: Sequence[str] | None = None,
    limit: int | None = None,
    bins: int = BINS,
    console: Console | None = None,
) -> ActivationStatistics:
    """Statistics of the channels of some nodes' tensors, from one eval forward pass per batch.

    Args:
        graph: the network.
        loader: iterable of `(inputs, targets)`; targets are not looked at.
        places: nodes or modules; None takes `activation_places`.
        limit: look at no more than so many images.
        bins: of each histogram.
        console: where a progress bar is shown, if it is a terminal.

    Raises:
        DataError: an empty loader or a bad batch.
        OptionError: a place that does not exist, or whose channels cannot be told from its images.
        ModelError: activations that are NaN or infinite; names the node.
    """
    places = activation_places(graph) if places is None else list(places)
    found: dict[str, ChannelAccumulator] = {}
    for place in places:
        node = find_tensor(graph.module.graph, place)
        dim = channel_dim(graph, node)
        found[place] = ChannelAccumulator(node.meta["spec"].shape[dim], dim, bins)

    def look(place: str, tensor: Tensor) -> None:
        if not bool(torch.isfinite(tensor.sum(dtype=torch.float64))):
            _refuse_non_finite(place, tensor)
        found[place].add(tensor)

    images = stream_each(graph, loader, look, nodes=places, limit=limit, title="activation statistics", console=console)
    return ActivationStatistics(images, {place: one.result() for place, one in _together(found).items()})


def activation_places(graph: Graph) -> list[str]:
    """Nodes whose channels a later layer mixes: what a cut takes away is what these tensors no longer hold.

    Of convolution, norm and ReLU that is the ReLU; of a residual stream every sum that something reads.
    """
    groups = graph.analyse(find_groups)
    sources = {source for several in groups.labels.readers.values() for source in several}
    return [
        node.name
        for node in graph.nodes
        if node in sources and (axis := groups.channels(node)) is not None and axis[0] > 0
    ]


def channel_dim(graph: Graph, node: fx.Node) -> int:
    """Where a node's channels lie: as its labels say; else in dimension 1 of `(N, C)` and of images, and in the last
    of tokens `(N, tokens, C)`.

    Raises:
        OptionError: there is no such dimension behind that of the images.
    """
    spec = node.meta["spec"]
    assert isinstance(spec, TensorSpec)
    axis = graph.analyse(find_groups).channels(node)
    dim = axis[0] if axis is not None else (2 if len(spec.shape) == 3 else 1)
    if dim == 0 or dim >= len(spec.shape):
        raise OptionError(
            f"node {node.name!r} of shape {spec.shape} has no channels beside its images",
            hint="Name a node before the images and channels are joined.",
        )
    return dim


def _together(found: dict[str, ChannelAccumulator]) -> dict[str, ChannelAccumulator]:
    """What all processes found."""
    first, *others = shared_list(found)
    for other in others:
        for place, one in first.items():
            one.merge(other[place])
    return first


def _refuse_non_finite(place: str, tensor: Tensor) -> None:
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise ModelError(
            f"{bad} of {tensor.numel()} activations of node {place!r} are NaN or infinite",
            hint="Look for NaN in the weights before it; half precision overflows above 65504.",
        )
