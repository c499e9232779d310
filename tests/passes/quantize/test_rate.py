"""Entropy-constrained vector quantization against its formulas in numpy, and what a price on bits does."""

from __future__ import annotations

from itertools import pairwise
from math import log

import numpy as np
import pytest
import torch
from fxpress.passes.quantize.codes import first_codes, in_order
from fxpress.passes.quantize.kmeans import assign, kmeans
from fxpress.passes.quantize.plan import Layout
from fxpress.passes.quantize.rate import code_lengths, coded, constrained, of_words
from hypothesis import given, settings
from hypothesis import strategies as st

SEEDS = st.integers(0, 10**6)


def seeded(number=0):
    return torch.Generator().manual_seed(number)


def lengths_of(labels, words):
    """Bits of each codeword (M, K) by the labels (M, n) of all sub-spaces: −log2 of the share of its rank."""
    counts = np.stack([np.bincount(some, minlength=words) for some in np.asarray(labels)])
    order = np.argsort(-counts, axis=1, kind="stable")
    with np.errstate(divide="ignore"):
        by_rank = -np.log2(np.take_along_axis(counts, order, 1).sum(0) / counts.sum())
    lengths = np.empty(counts.shape)
    np.put_along_axis(lengths, order, np.broadcast_to(by_rank, counts.shape), 1)
    return lengths


def rank_bits(labels, words=8):
    """Bits of all labels (M, n) with the code that suits them."""
    return np.take_along_axis(lengths_of(labels, words), np.asarray(labels).astype(int), 1).sum()


def begun(seed=0, count=2, vectors=150, width=2, words=8):
    """Vectors in double precision, and what k-means makes of them."""
    points = torch.randn(count, vectors, width, dtype=torch.float64, generator=seeded(seed))
    return points, kmeans(points, words, generator=seeded(seed), iterations=200, tolerance=0)


def lagrangian(points, found, multiplier):
    """Squared error and price of the bits, from codewords and labels alone."""
    total = multiplier * rank_bits(found.labels, found.codebook.shape[1])
    for some, book, labels in zip(points.numpy(), found.codebook.numpy(), found.labels.numpy(), strict=True):
        total += ((some - book[labels]) ** 2).sum()
    return total


def test_lengths_and_bits_of_a_code():
    counts = torch.tensor([[4.0, 2.0, 1.0, 1.0, 0.0], [0.0, 8.0, 0.0, 0.0, 0.0]])
    lengths = code_lengths(counts)
    inf = float("inf")
    torch.testing.assert_close(lengths, -torch.tensor([12 / 16, 2 / 16, 1 / 16, 1 / 16, 0]).double().log2())
    by_word = of_words(torch.tensor([1.0, 2.0, 3.0, 4.0, inf]), counts)
    assert by_word.tolist() == [[1.0, 2.0, 3.0, 4.0, inf], [2.0, 1.0, 3.0, 4.0, inf]]
    assert of_words(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0])).tolist() == [2.0, 1.0]
    assert coded(lengths, counts) == pytest.approx(-12 * np.log2(12 / 16) + 2 * 3 + 2 * 4)


@pytest.mark.parametrize("multiplier", [0.01, 0.2, 1.0])
def test_iterations_are_those_of_the_formula(multiplier):
    points, start = begun(count=3)
    found = constrained(points, start, multiplier, iterations=4, tolerance=0)
    books, labels = start.codebook.numpy().copy(), start.labels.numpy().astype(int)
    for _ in range(4):
        lengths = lengths_of(labels, books.shape[1])
        costs = ((points.numpy()[:, :, None] - books[:, None]) ** 2).sum(3) + multiplier * lengths[:, None]
        labels = costs.argmin(2)
        for space, book in enumerate(books):
            for word in np.unique(labels[space]):
                book[word] = points[space].numpy()[labels[space] == word].mean(0)
    np.testing.assert_array_equal(found.labels.numpy(), labels)
    np.testing.assert_allclose(found.codebook.numpy(), books, rtol=1e-9)
    gaps = points.numpy() - np.take_along_axis(books, labels[:, :, None], 1)
    np.testing.assert_allclose(found.distortion.numpy(), (gaps**2).sum((1, 2)))


@given(SEEDS, st.sampled_from([1, 3]), st.sampled_from([2, 5, 16]), st.floats(1e-3, 3))
@settings(deadline=None)
def test_the_lagrangian_never_rises(seed, width, words, multiplier):
    points, start = begun(seed, vectors=60, width=width, words=words)
    steps = [constrained(points, start, multiplier, iterations=n, tolerance=0) for n in range(1, 6)]
    spent = [lagrangian(points, found, multiplier) for found in (start, *steps)]
    assert all(after <= before * (1 + 1e-9) for before, after in pairwise(spent))


@given(SEEDS, st.sampled_from([1, 2, 4]))
@settings(deadline=None)
def test_a_higher_price_chooses_shorter_codes_that_are_farther(seed, width):
    """For the same codewords and lengths, and for all that follows from them."""
    points, start = begun(seed, count=1, vectors=400, width=width)
    columns = points.mT.contiguous()
    lengths = torch.from_numpy(lengths_of(start.labels, 8))
    spent = []
    for multiplier in (0.0, 0.05, 0.2, 0.8):
        labels = assign(columns, columns.square().sum(1), start.codebook.mT, multiplier * lengths)[0].long()
        gaps = (columns - start.codebook.mT.gather(2, labels[:, None].expand_as(columns))).square().sum()
        spent.append((-float(lengths.gather(1, labels).sum()), float(gaps)))
    assert all(after >= before - 1e-9 for one, two in pairwise(spent) for before, after in zip(one, two, strict=True))


@given(SEEDS, st.sampled_from([1, 2, 4]))
@settings(deadline=None, max_examples=30)
def test_a_larger_weight_gives_fewer_bits_and_a_larger_error(seed, width):
    points, start = begun(seed, count=4, vectors=400, width=width)
    error = float(start.distortion.sum())
    bits, errors = [rank_bits(start.labels)], [error]
    for weight in (0.3, 1.0, 3.0):
        found = constrained(points, start, weight * error / 1600 / width)
        bits.append(rank_bits(found.labels))
        errors.append(float(found.distortion.sum()))
    assert bits == sorted(bits, reverse=True)
    assert errors[3] > 1.05 * max(errors[:3])
    assert max(errors[:3]) < 1.05 * error, "from one local optimum to the next it may fall a little as well"


def test_a_price_beyond_all_distances_leaves_one_codeword():
    points, start = begun(count=1)
    found = constrained(points, start, 1e6)
    assert len(found.labels.unique()) == 1
    torch.testing.assert_close(found.codebook[0, int(found.labels[0, 0])], points[0].mean(0))
    assert torch.isfinite(found.codebook).all()


def test_how_many_sub_spaces_are_done_at_a_time_does_not_matter(monkeypatch):
    points, start = begun(count=5)
    whole = constrained(points, start, 0.2, tolerance=0)
    monkeypatch.setattr("fxpress.passes.quantize.rate.SCORES", 1)
    single = constrained(points, start, 0.2, tolerance=0)
    assert torch.equal(whole.labels, single.labels)
    none = constrained(points[:0], kmeans(points[:0], 8, generator=seeded()), 0.2)
    assert none.labels.shape == (0, 150)


LAYOUT = Layout(groups=2, taps=3, inputs=4, outputs=20, width=2, words=8)


def codes_of(weight, rate_weight=0.0):
    return first_codes(LAYOUT, in_order(LAYOUT, weight), seeded(), 10, rate_weight)


def test_codes_without_a_weight_on_the_rate_are_those_of_k_means():
    weight = torch.randn(2, 20, 12, generator=seeded(1))
    columns = in_order(LAYOUT, weight).view(2, 2, 3, 2, 20)  # groups, sub-spaces, taps, width, outputs
    points = columns.permute(1, 0, 2, 4, 3).reshape(2, -1, 2)
    plain, codes = kmeans(points, 8, generator=seeded(), iterations=10), codes_of(weight)
    assert torch.equal(codes.codebook, plain.codebook)
    assert torch.equal(codes.labels.flatten(1), plain.labels)
    assert codes.multiplier == 0.0
    assert codes.code_bits == pytest.approx(rank_bits(plain.labels))
    error = float(plain.distortion.sum())
    assert codes_of(weight, 0.7).multiplier == pytest.approx(0.7 * 2 * log(2) / 2 * error / plain.labels.numel())


def test_the_weight_knows_no_scale():
    weight = torch.randn(2, 20, 12, generator=seeded(1), dtype=torch.float64)
    small, large = codes_of(weight, 1.0), codes_of(weight * 2.0**20, 1.0)
    assert torch.equal(small.labels, large.labels)
    assert small.code_bits < codes_of(weight).code_bits
    zeros = codes_of(torch.zeros(2, 20, 12), 1.0)
    assert zeros.code_bits == zeros.multiplier == 0.0
