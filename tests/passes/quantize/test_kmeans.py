"""k-means in many sub-spaces against one at a time, and its corner cases."""

from __future__ import annotations

import pytest
import torch
from fxpress.passes.quantize import kmeans as module
from fxpress.passes.quantize.kmeans import kmeans, nearest, totals
from hypothesis import given
from hypothesis import strategies as st


def seeded(number=0):
    return torch.Generator().manual_seed(number)


@given(st.integers(1, 3), st.sampled_from([2, 7, 256]), st.integers(0, 9), st.integers(0, 99))
def test_nearest_is_the_first_smallest(count, words, vectors, seed):
    scores = torch.randint(-3, 3, (count, words, vectors), generator=seeded(seed)).float()
    least, labels = nearest(scores.clone())
    assert labels.dtype == torch.uint8
    if vectors:
        assert torch.equal(least, scores.min(1).values)
    for one, label in zip(scores, labels, strict=True):
        for column, found in zip(one.t(), label.tolist(), strict=True):
            assert column.tolist().index(min(column.tolist())) == found


def test_totals():
    values, labels = torch.randn(2, 3, 50), torch.randint(5, (2, 50), dtype=torch.uint8)
    sums, counts = totals(values, labels, 5)
    for space in range(2):
        for word in range(5):
            members = values[space][:, labels[space] == word]
            torch.testing.assert_close(sums[space, :, word], members.sum(1))
            assert counts[space, 0, word] == members.shape[1]


@pytest.mark.parametrize("width", [1, 4])
def test_each_sub_space_is_lloyds_algorithm(width):
    """From the same vectors scikit-learn reaches the same codewords."""
    from sklearn.cluster import KMeans

    points, words = torch.randn(3, 200, width), 8
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_first", lambda columns, k, _: columns[:, :, :k].clone())
        found = kmeans(points, words, generator=seeded(), iterations=6, tolerance=0)
    for space, some in enumerate(points.numpy()):
        theirs = KMeans(words, init=some[:words], n_init=1, max_iter=6, tol=0).fit(some)
        torch.testing.assert_close(
            found.codebook[space], torch.from_numpy(theirs.cluster_centers_), rtol=1e-4, atol=1e-5
        )
        assert float(found.distortion[space]) == pytest.approx(theirs.inertia_, rel=1e-4)


def test_the_distortion_is_that_of_the_labels_and_no_label_could_be_better():
    points = torch.randn(4, 120, 3)
    found = kmeans(points, 16, generator=seeded())
    chosen = torch.stack([book[label.long()] for book, label in zip(found.codebook, found.labels, strict=True)])
    torch.testing.assert_close((points - chosen).square().sum((1, 2)).double(), found.distortion, rtol=1e-4, atol=1e-4)
    gaps = torch.cdist(points, found.codebook)
    torch.testing.assert_close((points - chosen).norm(dim=2), gaps.amin(2), rtol=1e-4, atol=1e-5)


def test_more_iterations_never_make_it_worse():
    points = torch.randn(2, 300, 4)
    spent = [
        float(kmeans(points, 8, generator=seeded(), iterations=n, tolerance=0).distortion.sum()) for n in (1, 3, 9)
    ]
    assert spent[0] >= spent[1] >= spent[2]


def test_how_sub_spaces_are_dealt_out_does_not_matter_where_there_is_one_draw_each():
    points = torch.randn(6, 40, 2)
    whole = kmeans(points, 4, generator=seeded())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SCORES", 1)
        single = kmeans(points, 4, generator=seeded(), tolerance=0)
        again = kmeans(points, 4, generator=seeded(), tolerance=0)
    assert torch.equal(single.labels, again.labels)
    assert whole.labels.shape == single.labels.shape == (6, 40)


def test_vectors_that_are_few_or_equal():
    few = kmeans(torch.randn(2, 3, 2), 8, generator=seeded())
    assert float(few.distortion.sum()) == pytest.approx(0, abs=1e-6)
    same = kmeans(torch.ones(1, 50, 2), 4, generator=seeded())
    assert torch.equal(same.codebook, torch.ones(1, 4, 2))
    assert not same.labels.any()
    two = torch.cat([torch.zeros(1, 49, 2), torch.full((1, 1, 2), 9.0)], 1)
    assert float(kmeans(two, 2, generator=seeded()).distortion) == pytest.approx(0, abs=1e-6), "the lost codeword moves"
    none = kmeans(torch.zeros(0, 5, 2), 4, generator=seeded())
    assert none.codebook.shape == (0, 4, 2)
    assert none.labels.shape == (0, 5)
