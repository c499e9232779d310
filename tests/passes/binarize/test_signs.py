"""The mathematics of `alternate-update`: against brute force, closed forms and a plain loop."""

from __future__ import annotations

import time
from itertools import pairwise, product

import pytest
import torch
from fxpress.ir.errors import VerifyError
from fxpress.passes.binarize import signs as module
from fxpress.passes.binarize.signs import SignFit, fit_signs
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

SEEDS = st.integers(0, 2**31)


def problem(seed: int, n: int, outputs: int = 3, rows: int = 40) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Correlated inputs on few levels, responses of real-valued weights: X, Y, G, h, and these weights (n, O)."""
    numbers = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=numbers, dtype=torch.float64)
    x = (torch.randn(rows, n, generator=numbers, dtype=torch.float64) @ mix).clamp(0, 2).round() + 0.1
    weight = torch.randn(n, outputs, generator=numbers, dtype=torch.float64)
    y = x @ weight + 0.1 * torch.randn(rows, outputs, generator=numbers, dtype=torch.float64)
    return x, y, x.T @ x, x.T @ y, weight


def start(weight: Tensor) -> tuple[Tensor, Tensor]:
    return weight.abs().mean(0), torch.where(weight >= 0, 1.0, -1.0).double()


def fitted(seed: int, n: int, sweeps: int = 50) -> tuple[SignFit, Tensor, Tensor, Tensor, Tensor]:
    x, y, gram, cross, weight = problem(seed, n)
    return fit_signs(gram, cross, *start(weight), sweeps), x, y, gram, cross


def errors(x: Tensor, y: Tensor, alpha: Tensor, signs: Tensor) -> Tensor:
    """‖y − α X b‖² per filter."""
    return (y - alpha * (x @ signs)).square().sum(0)


@given(SEEDS, st.integers(1, 9))
def test_no_single_flip_and_no_other_factor_is_better(seed: int, n: int) -> None:
    fit, x, y, _, _ = fitted(seed, n)
    found = errors(x, y, fit.alpha, fit.signs)
    assert fit.flips[-1:] in ([0], [])
    for scale in (0.99, 1.01):
        assert bool((errors(x, y, fit.alpha * scale, fit.signs) >= found - 1e-9).all())
    for i in range(n):
        other = fit.signs.clone()
        other[i] *= -1
        assert bool((errors(x, y, fit.alpha, other) >= found * (1 - 1e-9) - 1e-9).all())


@given(SEEDS, st.integers(1, 7))
def test_monotone_and_never_below_the_best_of_all_sign_vectors(seed: int, n: int) -> None:
    fit, x, y, _, _ = fitted(seed, n)
    energy = float(y.square().sum())
    assert all(behind <= before + 1e-9 * energy for before, behind in pairwise(fit.losses))
    assert abs(energy + fit.losses[-1] - float(errors(x, y, fit.alpha, fit.signs).sum())) < 1e-8 * energy
    best = torch.full((y.shape[1],), float("inf"), dtype=torch.float64)
    for b in product((-1.0, 1.0), repeat=n):
        vector = (x @ torch.tensor(b, dtype=torch.float64))[:, None]
        alpha = (vector * y).sum(0) / vector.square().sum()
        best = torch.minimum(best, (y - alpha * vector).square().sum(0))
    assert bool((errors(x, y, fit.alpha, fit.signs) >= best - 1e-9 * energy).all())


def test_it_mostly_finds_the_best_of_all() -> None:
    hits = total = 0
    for seed in range(30):
        fit, x, y, _, _ = fitted(seed, 6)
        found = errors(x, y, fit.alpha, fit.signs)
        for filter_, error in enumerate(found):
            every = []
            for b in product((-1.0, 1.0), repeat=6):
                vector = x @ torch.tensor(b, dtype=torch.float64)
                alpha = vector @ y[:, filter_] / vector.square().sum()
                every.append(float((y[:, filter_] - alpha * vector).square().sum()))
            hits, total = hits + (float(error) <= min(every) * (1 + 1e-9) + 1e-9), total + 1
    assert hits > 0.6 * total


@given(SEEDS, st.integers(1, 12), st.floats(0.1, 9))
def test_uncorrelated_inputs_give_the_closed_form_of_xnor(seed: int, n: int, c: float) -> None:
    cross = torch.randn(n, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    begin = torch.ones(n, 4, dtype=torch.float64)
    fit = fit_signs(c * torch.eye(n, dtype=torch.float64), cross, torch.ones(4), begin, 50)
    best = cross.abs().mean(0) / c
    # from any start, a filter ends at sign(h): with G diagonal no sign depends on another (unless α is 0 at the start)
    alive = fit.alpha > 0
    assert torch.allclose(fit.alpha[alive], best[alive])
    assert torch.equal(fit.signs[:, alive], torch.sign(cross[:, alive]))


@given(SEEDS, st.integers(2, 20), st.integers(1, 9))
def test_blocks_change_nothing(seed: int, n: int, block: int) -> None:
    """The same as one coordinate after the other on the whole matrix."""
    _, _, gram, cross, weight = problem(seed, n)
    alpha, b = start(weight)
    before = module.BLOCK
    module.BLOCK = block
    try:
        fit = fit_signs(gram, cross, alpha, b, 1)
    finally:
        module.BLOCK = before
    for o in range(b.shape[1]):
        sign = b[:, o].clone()
        factor = sign @ cross[:, o] / (sign @ gram @ sign)
        sign = sign * torch.sign(factor)
        for i in range(n):
            rest = gram[i] @ sign - gram[i, i] * sign[i]
            wish = factor.abs() * (cross[i, o] - factor.abs() * rest)
            sign[i] = sign[i] if abs(float(wish)) < 1e-9 else torch.sign(wish)
        assert torch.equal(sign, fit.signs[:, o])


def test_the_error_falls_as_it_should() -> None:
    """Sign and mean, best factors, one sweep, two: each better than the last, and most in the first sweep."""
    x, y, gram, cross, weight = problem(1, 72, 32, rows=600)
    fit = fit_signs(gram, cross, *start(weight), 20)
    energy = float(y.square().sum())
    share = [(energy + loss) / energy for loss in fit.losses]
    assert share[0] > share[1] > share[2] >= share[3]
    assert share[2] < 0.8 * share[1]
    assert share[0] == pytest.approx(float(errors(x, y, *start(weight)).sum()) / energy)
    assert fit.flips[0] > fit.flips[-1] == 0


def test_dead_filters_and_inputs() -> None:
    x, y, _, _, weight = problem(3, 6)
    x[:, 2], y[:, 1] = 0, 0
    fit = fit_signs(x.T @ x, x.T @ y, *start(weight), 20)
    assert float(fit.alpha[1]) == 0
    assert bool((fit.signs.abs() == 1).all())
    nothing = torch.zeros(4, 4, dtype=torch.float64)
    empty = fit_signs(nothing, nothing, torch.ones(4), torch.ones(4, 4), 5)
    assert (empty.alpha.tolist(), empty.flips) == ([0.0] * 4, [])


def test_a_filter_that_points_the_wrong_way_is_turned() -> None:
    _, _, gram, _, weight = problem(4, 8)
    fit = fit_signs(gram, -gram @ weight, *start(weight), 20)
    assert bool((fit.alpha > 0).all())
    assert fit.losses[1] < fit.losses[0]


def test_matrices_that_do_not_belong_together() -> None:
    gram = torch.tensor([[1.0, 3.0], [-3.0, 1.0]], dtype=torch.float64)  # no Gram matrix: not symmetric
    cross = torch.randn(2, 400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with pytest.raises(VerifyError, match="error of the signs rose from"):
        fit_signs(gram, cross, torch.ones(400), torch.ones(2, 400), 5)


@pytest.mark.slow
def test_a_large_layer_takes_seconds() -> None:
    n, outputs = 512 * 9, 512
    numbers = torch.Generator().manual_seed(0)
    x = torch.randn(n + 500, n, generator=numbers).clamp(min=0)
    weight = torch.randn(n, outputs, generator=numbers).double()
    gram = (x.T @ x).double()
    begin = time.thread_time()
    fit = fit_signs(gram, gram @ weight, *start(weight), 3)
    assert time.thread_time() - begin < 30  # 4 s on a core with AVX-512
    assert fit.losses[2] < fit.losses[1]
