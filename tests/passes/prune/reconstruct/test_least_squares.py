"""Least squares from Gram matrices against numpy on the rows themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fxpress.passes.layerwise.moments import SecondMoments
from fxpress.passes.prune.reconstruct.least_squares import fit
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def moments_of(x: Tensor, y: Tensor, parts: int = 1) -> SecondMoments:
    moments = SecondMoments(x.shape[1], x.shape[2], y.shape[2])
    for part_x, part_y in zip(x.chunk(parts), y.chunk(parts), strict=True):
        moments.add(part_x, part_y)
    return moments


def relative_error(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> float:
    guess = torch.einsum("mgf,gof->mgo", x, weight) + bias
    return float((y - guess).norm() / y.norm())


def by_numpy(x: Tensor, y: Tensor, start: Tensor, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    """The same problem of one group as an overdetermined system: centred rows, and √λ I for the ridge."""
    x_mean, y_mean = x.mean(0), y.mean(0)
    centred = (x - x_mean).numpy()
    features = centred.shape[1]
    weight_of_ridge = np.sqrt(ridge * (centred**2).sum() / features)
    rows = np.vstack([centred, weight_of_ridge * np.eye(features)])
    wanted = np.vstack([(y - y_mean).numpy(), weight_of_ridge * start.numpy().T])
    weight = np.linalg.lstsq(rows, wanted, rcond=None)[0].T
    return weight, y_mean.numpy() - weight @ x_mean.numpy()


@pytest.mark.parametrize("ridge", [1e-12, 1e-3, 1.0])
@pytest.mark.parametrize("groups", [1, 3])
def test_against_lstsq(groups: int, ridge: float) -> None:
    x, y, start = random(60, groups, 7) + 2, random(60, groups, 4), random(groups, 4, 7)
    weight, bias = fit(moments_of(x, y), start, ridge)
    for g in range(groups):
        expected = by_numpy(x[:, g], y[:, g], start[g], ridge)
        np.testing.assert_allclose(weight[g].numpy(), expected[0], rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(bias[g].numpy(), expected[1], rtol=1e-7, atol=1e-9)


def test_a_linear_response_is_found_exactly() -> None:
    x, weight, bias = random(100, 2, 5), random(2, 3, 5), random(2, 3)
    y = torch.einsum("mgf,gof->mgo", x, weight) + bias
    found = fit(moments_of(x, y), torch.zeros(2, 3, 5), 1e-13)
    torch.testing.assert_close(found, (weight, bias), rtol=1e-8, atol=1e-8)


@settings(max_examples=40)
@given(
    rows=st.integers(1, 30),
    features=st.integers(1, 12),
    dead=st.integers(0, 3),
    ridge=st.sampled_from([1e-9, 1e-3, 10.0]),
    seed=st.integers(0, 99),
)
def test_never_worse_than_the_weights_before(rows: int, features: int, dead: int, ridge: float, seed: int) -> None:
    torch.manual_seed(seed)
    x, y, start, bias = random(rows, 1, features), random(rows, 1, 3), random(1, 3, features), random(1, 3)
    x[..., :dead] = 0
    moments = moments_of(x, y)
    weight, constant = fit(moments, start, ridge)
    assert torch.isfinite(weight).all()
    assert relative_error(x, y, weight, constant) <= relative_error(x, y, start, bias) + 1e-9
    assert moments.error(start, bias) == pytest.approx(relative_error(x, y, start, bias), rel=1e-6)
    assert moments.error(weight, constant) == pytest.approx(relative_error(x, y, weight, constant), abs=1e-6)


def test_dead_features_and_missing_data_leave_weights_as_they_are() -> None:
    x, y, start = random(4, 1, 9), random(4, 1, 2), random(1, 2, 9)
    x[..., 3] = 0
    weight, _ = fit(moments_of(x, y), start)
    assert torch.allclose(weight[..., 3], start[..., 3], rtol=0, atol=1e-12)
    away = torch.linalg.svd(x[:, 0] - x[:, 0].mean(0))[2][4:]  # directions of which four rows say nothing
    torch.testing.assert_close((weight - start)[0] @ away.T, torch.zeros(2, 5, dtype=torch.float64))


def test_inputs_that_are_all_zero_leave_the_mean_to_the_bias() -> None:
    x, y, start = torch.zeros(5, 2, 3), random(5, 2, 4), random(2, 4, 3)
    weight, bias = fit(moments_of(x, y), start)
    assert torch.equal(weight, start)
    torch.testing.assert_close(bias, y.mean(0))


def test_a_rounded_covariance_is_still_solved() -> None:
    """Nearly equal features of a large mean: the centred Gram matrix has negative eigenvalues of rounding alone."""
    x = 1e8 + random(50, 1, 1).expand(50, 1, 6) + 1e-9 * random(50, 1, 6)
    weight, bias = fit(moments_of(x, random(50, 1, 2)), random(1, 2, 6), 1e-14)
    assert torch.isfinite(weight).all()
    assert torch.isfinite(bias).all()


def test_ragged_parts_add_up_to_the_whole() -> None:
    x, y = random(17, 2, 4), random(17, 2, 3)
    whole, parts = moments_of(x, y), moments_of(x, y, parts=5)
    for one, other in zip(whole.tensors, parts.tensors, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert parts.count == 17


def test_half_precision_rows_are_summed_in_double() -> None:
    x, y = torch.randn(20_000, 1, 2).half(), torch.randn(20_000, 1, 1).half()
    moments = moments_of(x, y, parts=10)
    expected = x[:, 0].double().T @ y[:, 0].double()
    torch.testing.assert_close(moments.cross[0, :2], expected, rtol=1e-12, atol=1e-12)


def test_memory_is_what_the_sums_take() -> None:
    moments = SecondMoments(2, 5, 3)
    assert SecondMoments.bytes(2, 5, 3) == sum(t.numel() * t.element_size() for t in moments.tensors)
