"""Measures of what a student has learned: against loops over class pairs and scipy's rank correlation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from fxpress.ir.errors import OptionError
from fxpress.runtime.training.losses import rank_correlation, ratio_error, scale_factors
from scipy import stats


def draw(*shape, seed=0, scale=3.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(count, classes, *space, seed=0):
    return torch.randint(classes, (count, *space), generator=torch.Generator().manual_seed(seed))


def pairwise(z, v, y, top):
    """Mean over predictions of the mean over class pairs, from the probabilities themselves."""
    p, q = (torch.softmax(one, 1).numpy() for one in (z, v))
    errors = []
    for row in range(len(z)):
        others = [c for c in np.argsort(-q[row], kind="stable") if c != y[row]][:top]
        pairs = itertools.combinations(others, 2)
        errors.append(np.mean([abs(math.log(p[row, i] / p[row, j] / (q[row, i] / q[row, j]))) for i, j in pairs]))
    return np.mean(errors)


@pytest.mark.parametrize("top", [2, 5, 50])
def test_ratio_error_against_the_definition(top):
    z, v, y = draw(20, 8), draw(20, 8, seed=1), labels(20, 8)
    assert ratio_error(z, v, y, top) == pytest.approx(pairwise(z, v, y, top), rel=1e-10)


def test_what_the_ratio_error_sees():
    v, y = draw(20, 8), labels(20, 8)
    same = (v + 3).scatter_add(1, y.unsqueeze(1), draw(20, 1))
    assert ratio_error(same, v, y) == pytest.approx(0, abs=1e-12)
    far = v.scatter_add(1, v.scatter(1, y.unsqueeze(1), torch.inf).argmin(1, keepdim=True), draw(20, 1))
    assert ratio_error(far, v, y) == 0.0  # the least likely class is not among the top five
    assert ratio_error(far, v, y, top=7) > 0.1
    assert ratio_error(draw(4, 2), draw(4, 2, seed=1), labels(4, 2)) == 0.0
    hot = torch.nn.functional.one_hot(y, 8).double()
    assert ratio_error(draw(20, 8, seed=2), v, hot) == ratio_error(draw(20, 8, seed=2), v, y)


def test_rank_correlation_against_scipy():
    z, v, y = draw(20, 8).round(), draw(20, 8, seed=1), labels(20, 8)  # rounded: ties
    s, t = scale_factors(z, y, 4.0), scale_factors(v, y, 4.0)
    expected = []
    for row in range(20):
        others = np.arange(8) != int(y[row])
        expected.append(stats.spearmanr(s[row].numpy()[others], t[row].numpy()[others]).statistic)
    assert rank_correlation(z, v, y) == pytest.approx(np.mean(expected), rel=1e-9)


def test_what_the_rank_correlation_sees():
    v, y = draw(20, 8), labels(20, 8)
    moved = (v.exp() * 5).scatter(1, y.unsqueeze(1), -100.0)
    assert rank_correlation(moved, v, y) == pytest.approx(1)
    assert rank_correlation(-v, v, y) == pytest.approx(-1)
    assert math.isnan(rank_correlation(torch.zeros(4, 5), draw(4, 5), labels(4, 5)))
    partly = torch.cat([torch.zeros(10, 8, dtype=v.dtype), v[10:]])
    assert rank_correlation(partly, v, y) == pytest.approx(1)  # rows without an order do not count


def test_spatial_predictions():
    z, v, y = draw(2, 6, 3, 2), draw(2, 6, 3, 2, seed=1), labels(2, 6, 3, 2)
    flat = [one.movedim(1, -1).reshape(-1, 6) for one in (z, v)]
    for measure in (ratio_error, rank_correlation):
        assert measure(z, v, y) == pytest.approx(measure(*flat, y.flatten()))


def test_bad_arguments():
    with pytest.raises(OptionError, match="top 1: a ratio needs two classes"):
        ratio_error(draw(4, 5), draw(4, 5), labels(4, 5), top=1)
    with pytest.raises(OptionError, match=r"\(4, 5\) and teacher \(4, 6\) differ"):
        rank_correlation(draw(4, 5), draw(4, 6), labels(4, 5))
    with pytest.raises(OptionError, match=r"targets \(3,\)"):
        ratio_error(draw(4, 5), draw(4, 5), labels(3, 5))
