"""Histograms and moments: against numpy, and the same however the stream is cut into pieces."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from fxpress.passes.analyse.histogram import Histogram
from fxpress.passes.analyse.moments import Moments
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

finite = st.floats(-1e6, 1e6, width=32)
streams = st.lists(st.lists(finite, min_size=1, max_size=12), min_size=1, max_size=6)


def of(*pieces: Tensor, bins: int = 8) -> Histogram:
    histogram = Histogram.empty(len(pieces[0]), bins)
    for piece in pieces:
        histogram.add(piece.double())
    return histogram


def same(a: Histogram, b: Histogram) -> bool:
    return all(torch.equal(getattr(a, f), getattr(b, f)) for f in ("low", "high", "exponent", "first", "counts"))


@given(streams)
def test_pieces_in_any_order_and_merges_give_the_same_bins(pieces: list[list[float]]) -> None:
    tensors = [torch.tensor([piece, [-x for x in piece]]) for piece in pieces]
    whole = of(torch.cat(tensors, 1))
    assert same(of(*tensors), whole)
    assert same(of(*reversed(tensors)), whole)
    half = len(tensors) // 2
    left, right = of(torch.zeros(2, 0), *tensors[:half]), of(*tensors[half:])
    left.merge(right)
    assert same(left, whole)
    right.merge(of(torch.zeros(2, 0), *tensors[:half]))
    assert same(right, whole)


@given(streams)
def test_counts_are_numpys_on_the_same_edges(pieces: list[list[float]]) -> None:
    tensors = [torch.tensor([piece]) for piece in pieces]
    histogram, values = of(*tensors), torch.cat(tensors, 1)[0].double().numpy()
    edges = histogram.edges(0)
    assert (np.diff(edges) > 0).all()
    assert edges[0] <= values.min()
    assert values.max() < edges[-1]
    expected = [int(((a <= values) & (values < b)).sum()) for a, b in pairwise(edges)]
    assert histogram.counts[0].tolist() == expected


@given(st.lists(finite, min_size=2, max_size=30), st.integers(3, 40))
def test_width_is_within_the_documented_error(values: list[float], bins: int) -> None:
    histogram = of(torch.tensor([values]), bins=bins)
    spread = max(values) - min(values)
    finest = 2.0 ** (np.frexp(max(map(abs, values)))[1] - 40)
    assert histogram.widths()[0] <= max(2 * spread / (bins - 2), finest)


def test_channels_have_ranges_of_their_own() -> None:
    histogram = of(torch.tensor([[0.0, 0.0], [1e-30, 3e-30], [-1e30, 1e30], [7.0, 7.0]]))
    assert histogram.counts.sum(1).tolist() == [2, 2, 2, 2]
    assert (histogram.counts > 0).sum(1).tolist() == [1, 2, 2, 1]


def test_entropy_by_hand() -> None:
    # bins of width 1: four, two and one of them filled alike; what spreads over 1e-3 is one value beside them
    values = torch.tensor([[0.5, 1.5, 2.5, 3.5], [0.5, 0.6, 1.5, 1.6], [2.0, 2.1, 2.2, 2.3], [1.0, 1.0, 1.001, 1.001]])
    histogram = of(values, bins=4)
    np.testing.assert_allclose(histogram.entropy(), np.log([4, 2, 1, 1]), atol=1e-12)
    assert of(values[3:], bins=4).entropy()[0] == pytest.approx(np.log(2))  # alone it has a yardstick of its own


def test_no_values() -> None:
    assert Histogram.empty(2, 4).entropy().tolist() == [0, 0]


@given(streams)
def test_moments_are_numpys_however_they_are_merged(pieces: list[list[float]]) -> None:
    tensors = [torch.tensor(piece, dtype=torch.float64) for piece in pieces]
    values = torch.cat(tensors).numpy()
    total = Moments.empty()
    for tensor in tensors:
        total.merge(Moments.of(tensor))
    assert total.count == len(values)
    np.testing.assert_allclose(total.mean, values.mean(), rtol=1e-10, atol=1e-9)
    np.testing.assert_allclose(total.variance, values.var(), rtol=1e-9, atol=1e-6)


def test_moments_far_from_zero() -> None:
    """Σx² − (Σx)²/n would give noise here: the values differ in their tenth digit."""
    values = 1e9 + torch.randn(1000, dtype=torch.float64)
    total = Moments.empty()
    for piece in values.split(7):
        total.merge(Moments.of(piece))
    np.testing.assert_allclose(total.variance, values.numpy().var(), rtol=1e-6)


def test_merging_nothing_changes_nothing() -> None:
    one = Moments.of(torch.arange(4.0, dtype=torch.float64))
    one.merge(Moments.empty())
    assert (one.count, float(one.mean), float(one.variance)) == (4, 1.5, 1.25)
