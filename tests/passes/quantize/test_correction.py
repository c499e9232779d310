"""Error correction on Gram matrices against brute force on activations, and that no sweep ever makes it worse."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from fxpress.passes.layerwise.moments import SecondMoments
from fxpress.passes.layerwise.patches import weight_rows
from fxpress.passes.quantize import correction as correction_module
from fxpress.passes.quantize import subspace as subspace_module
from fxpress.passes.quantize.codes import first_codes, in_order
from fxpress.passes.quantize.correction import Correction
from fxpress.passes.quantize.plan import layout_of
from fxpress.passes.quantize.problem import inner, make_problem, shrinkage
from fxpress.passes.quantize.settings import Setting
from fxpress.passes.quantize.subspace import Subspace
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

LAYERS = {
    "linear": lambda: nn.Linear(6, 7),
    "linear, ragged": lambda: nn.Linear(7, 5),
    "conv": lambda: nn.Conv2d(4, 6, (2, 3), padding=1, bias=False),
    "conv, groups, ragged, stride": lambda: nn.Conv2d(6, 4, 2, stride=2, groups=2),
    "1x1": lambda: nn.Conv2d(5, 8, 1),
}


@pytest.mark.parametrize("centred", [False, True], ids=["bias kept", "bias refitted"])
@pytest.mark.parametrize("noise", [0.0, 0.3], ids=["own inputs", "other inputs"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_error_of_gram_matrices_is_that_of_the_activations(make_case, name, noise, centred):
    case = make_case(LAYERS[name], noise=noise, centred=centred)
    problem, gap = case.problem, case.problem.weight - case.codes.decoded()
    assert problem.error(gap) == pytest.approx(case.reference.error(), rel=1e-9)
    plain = case.reference.error() - problem.ridge * float(gap.square().sum())
    energy = (case.reference.y**2).sum()
    assert problem.energy == pytest.approx(energy, rel=1e-9)
    assert problem.response_error(gap, problem.error(gap)) == pytest.approx((plain / energy) ** 0.5, rel=1e-7)
    assert (problem.floor > 0) == (noise > 0)


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("name", LAYERS)
def test_codewords_are_the_least_squares_solution(make_case, name, noise, monkeypatch):
    monkeypatch.setattr(subspace_module, "STEPS", 200)
    monkeypatch.setattr(subspace_module, "PRECISION", 1e-12)
    case = make_case(LAYERS[name], noise=noise)
    for index in range(case.layout.count):
        space = subspace_of(case, index)
        space._update_words()
        wanted = case.reference.best_words(index)
        used = np.unique(case.reference.labels[index])
        size = wanted.shape[1]
        np.testing.assert_allclose(space.words.numpy()[used][:, :size], wanted[used], rtol=1e-6, atol=1e-8)
        assert not space.words[:, size:].any(), "what fills up the last sub-space stays zero"


def subspace_of(case, index, prices=None):
    """One sub-space with its residual made from scratch."""
    height = case.layout.rows
    own = slice(index * height, (index + 1) * height)
    residual = case.problem.gram[:, own] @ (case.problem.weight - case.codes.decoded())
    if case.problem.drift is not None:
        residual += case.problem.drift[:, own]
    gram = case.problem.gram[:, own, own]
    return Subspace(gram, residual, case.codes.codebook[index], case.codes.labels[index], prices)


def test_a_linear_layer_takes_one_step_which_is_the_closed_form(make_case, monkeypatch):
    monkeypatch.setattr(subspace_module, "STEPS", 1)
    case = make_case(LAYERS["linear"])
    space = subspace_of(case, 1)
    old, labels = space.words.clone(), space.labels.flatten().long()
    gram, residual = space.gram[0], space.start[0]
    space._update_words()
    for word in labels.unique():
        # D_k = A⁻¹ mean of b_c over the outputs with that codeword, b_c = Q_c + A D_k
        wanted = residual[:, labels == word].mean(1) + gram @ old[word]
        torch.testing.assert_close(space.words[word], torch.linalg.solve(gram, wanted))


@pytest.mark.parametrize("prices", [None, [0.1, 0.4, 0.4, 2.0]])
@pytest.mark.parametrize("name", LAYERS)
def test_each_label_is_the_best_of_all(make_case, name, prices):
    case = make_case(LAYERS[name], noise=0.3)
    space, reference = subspace_of(case, 0, None if prices is None else torch.tensor(prices).double()), case.reference
    counts = np.bincount(reference.labels[0].flatten(), minlength=4)
    by_word = np.zeros(4) if prices is None else np.array(prices)[np.argsort(np.argsort(-counts, kind="stable"))]
    space._update_labels()
    for tap in range(case.layout.taps):  # tap by tap: those before have their new labels by then
        for group in range(case.layout.groups):
            for out in range(case.layout.outputs):
                errors = reference.errors_by_label(0, group, tap, out) + by_word
                chosen = int(space.labels[group, tap, out])
                assert errors[chosen] == pytest.approx(errors.min(), rel=1e-9)
        reference.labels[0, :, tap] = space.labels[:, tap].numpy()


@pytest.mark.parametrize("name", LAYERS)
def test_what_a_sweep_reports_is_what_the_activations_say(make_case, name, monkeypatch):
    monkeypatch.setattr(correction_module, "ROWS", 5)  # several blocks
    case = make_case(LAYERS[name], noise=0.2, centred=True)
    correction = Correction(case.problem, case.codes)
    for _ in range(3):
        reported = correction.sweep()
        case.reference.codebook, case.reference.labels = case.codes.codebook.numpy(), case.codes.labels.numpy()
        assert reported == pytest.approx(case.reference.error(), rel=1e-8)
    assert correction.errors[-1] < correction.errors[0]
    torch.testing.assert_close(correction.gap, case.problem.weight - case.codes.decoded())


@pytest.mark.parametrize("name", LAYERS)
def test_with_a_price_on_the_rate_a_sweep_reports_error_and_bits(make_case, name, monkeypatch):
    monkeypatch.setattr(correction_module, "ROWS", 5)
    case = make_case(LAYERS[name], noise=0.2, centred=True, rate=0.5)
    correction = Correction(case.problem, case.codes)
    assert correction.multiplier > 0
    spent = [correction.errors[0], *(correction.sweep() for _ in range(4))]
    assert spent == correction.errors == sorted(correction.errors, reverse=True)
    case.reference.codebook, case.reference.labels = case.codes.codebook.numpy(), case.codes.labels.numpy()
    assert case.codes.code_bits == pytest.approx(case.reference.bits())
    assert spent[-1] == pytest.approx(case.reference.error() + correction.multiplier * case.reference.bits(), rel=1e-8)
    assert spent[-1] < spent[0]


def test_the_price_of_a_bit_is_that_of_the_weights_in_units_of_the_response(make_case):
    case = make_case(LAYERS["linear"], rate=0.5)
    mean_square = (case.reference.x**2).sum((0, 1, 2)).mean() + case.problem.ridge
    correction = Correction(case.problem, case.codes)
    assert correction.multiplier == pytest.approx(case.codes.multiplier * mean_square)
    assert correction.first == pytest.approx(case.reference.error())


@settings(max_examples=15)
@given(
    st.sampled_from(sorted(LAYERS)), st.sampled_from([0.0, 0.5]), st.booleans(), st.integers(1, 3),
    st.sampled_from([2, 4, 16]), st.sampled_from([torch.float32, torch.float64]), st.integers(0, 50),
    st.sampled_from([0.0, 0.1, 1.0]),
)  # fmt: skip
def test_no_sweep_raises_what_is_minimised(make_case, name, noise, centred, width, words, dtype, seed, rate):
    sizes = {"width": width, "words": words, "dtype": dtype, "rate": rate}
    case = make_case(LAYERS[name], noise=noise, centred=centred, seed=seed, **sizes)
    correction = Correction(case.problem, case.codes)
    true = [case.reference.error() + correction.multiplier * case.reference.bits()]
    for _ in range(3):
        correction.sweep()
        case.reference.codebook, case.reference.labels = case.codes.codebook.numpy(), case.codes.labels.numpy()
        true.append(case.reference.error() + correction.multiplier * case.reference.bits())
    assert correction.errors == sorted(correction.errors, reverse=True)
    slack = (1e-12 if dtype == torch.float64 else 1e-6) * case.problem.energy
    assert all(after <= before + slack for before, after in pairwise(true))
    assert correction.errors[-1] == pytest.approx(true[-1], rel=1e-2, abs=slack)


def test_a_codeword_without_members_comes_back_and_lowers_the_error(make_case):
    case = make_case(LAYERS["conv"])
    space = subspace_of(case, 0)
    space.labels[space.labels == 3] = 2  # as if nothing named the last one
    case.codes.labels[0] = space.labels
    space = subspace_of(case, 0)
    space._update_words()
    kept = space.words[:3].clone()
    space._refill()
    assert torch.equal(space.words[:3], kept)
    before = space.residual.clone()
    space._update_labels()
    assert (space.labels == 3).any()
    assert not torch.equal(space.residual, before)
    again = subspace_of(case, 0)
    _, gain = again.improved(1)
    assert gain > 0


def test_one_used_codeword_and_many_empty_ones(make_case):
    case = make_case(lambda: nn.Linear(2, 3), width=2, words=16)
    space = subspace_of(case, 0)
    change, gain = space.improved(2)
    assert torch.isfinite(change).all()
    assert gain >= 0


def test_inputs_that_are_never_on_leave_their_weights_to_k_means():
    torch.manual_seed(0)
    layer, x = nn.Linear(4, 9), torch.randn(50, 4)
    x[:, 2:] = 0
    moments = SecondMoments(1, 4, 9, dtype=torch.float32, crossed=False)
    moments.add(x[:, None], layer(x).detach()[:, None])
    layout = layout_of(layer, Setting(2, 4))
    weight = weight_rows(layer).detach()
    problem = make_problem(layout, moments, weight, layer.bias.detach()[None], ridge=1e-3, centred=True)
    codes = first_codes(layout, problem.weight, torch.Generator().manual_seed(0), 50)
    before = float((weight[0, :, 2:].t() - codes.columns(1)[0]).square().sum())
    correction = Correction(problem, codes)
    for _ in range(4):
        correction.sweep()
    assert float((weight[0, :, 2:].t() - codes.columns(1)[0]).square().sum()) <= before * (1 + 1e-5)


def test_a_layer_of_zeros(make_case):
    def zeros():
        layer = nn.Linear(4, 3)
        nn.init.zeros_(layer.weight)
        return layer

    case = make_case(zeros, centred=True)
    correction = Correction(case.problem, case.codes)
    assert correction.sweep() == 0.0
    assert not case.codes.codebook.any()


def test_shrinkage_is_the_published_formula_and_falls_with_more_images():
    torch.manual_seed(0)
    x = torch.randn(40, 6, dtype=torch.float64) * torch.arange(1, 7)
    s = np.cov(x.numpy(), rowvar=False, bias=True)
    p, n, t1, t2 = 6, 40, np.trace(s), np.trace(s @ s)
    rho = min(((1 - 2 / p) * t2 + t1**2) / ((n + 1 - 2 / p) * (t2 - t1**2 / p)), 0.5)
    gram = torch.from_numpy(s)[None]
    assert shrinkage(gram, 40) == pytest.approx(rho / (1 - rho))
    assert shrinkage(gram * 7, 40) == pytest.approx(rho / (1 - rho)), "scale does not matter"
    from sklearn.covariance import OAS

    theirs = OAS(assume_centered=True).fit((x - x.mean(0)).numpy()).shrinkage_
    assert rho == pytest.approx(theirs, rel=0.15), "scikit-learn leaves out the terms of order 1/p"
    assert shrinkage(gram, 4000) < shrinkage(gram, 40) < shrinkage(gram, 10)
    assert shrinkage(torch.eye(3)[None], 5) > 0
    assert shrinkage(torch.zeros(1, 3, 3), 5) > 0


def test_features_in_the_order_of_the_layout():
    layer = nn.Conv2d(6, 4, (1, 2), groups=2)
    layout = layout_of(layer, Setting(2, 4))
    columns = in_order(layout, weight_rows(layer).detach())
    for group, space, tap, place, out in np.ndindex(2, 2, 2, 2, 2):
        channel = 2 * space + place
        found = float(columns[group, (space * 2 + tap) * 2 + place, out])
        assert found == (float(layer.weight.detach()[2 * group + out, channel, 0, tap]) if channel < 3 else 0.0)
    assert inner(torch.ones(3), torch.arange(3)) == 3.0
