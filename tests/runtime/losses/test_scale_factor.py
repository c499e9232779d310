"""The scale factor loss: the facts of its definition, its gradients in closed form, and its bounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fxpress.ir.errors import DataError, OptionError
from fxpress.runtime.training.losses import CrossEntropy, Lesson, ScaleFactor, mean_scale_factors, scale_factors
from fxpress.runtime.training.losses.decoupled import target_divergence
from fxpress.runtime.training.losses.distillation import soft_divergence
from fxpress.runtime.training.losses.ratios import log_scale_factors, target_classes, without_targets
from hypothesis import given
from hypothesis import strategies as st
from scipy import special

FORMS = ["kl", "logratio", "mse"]


def draw(*shape, seed=0, scale=3.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(count, classes, *space, seed=0):
    return torch.randint(classes, (count, *space), generator=torch.Generator().manual_seed(seed))


def error(z, v, y, form="kl", temperature=1.0, huber=None, **options):
    objective = ScaleFactor(form, temperature=temperature, huber=huber, **options)
    return objective.error(Lesson(z, y, v))


def reference(z, v, y, form, temperature):
    """E of every prediction, in numpy, one at a time, from the definition."""
    found = []
    for zs, vs, label in zip(z.numpy(), v.numpy(), y.numpy(), strict=True):
        others = np.arange(len(zs)) != label
        p, q = special.softmax(zs / temperature), special.softmax(vs / temperature)
        s, t = p[others] / p[others].sum(), q[others] / q[others].sum()
        d = ((zs - vs) / temperature)[others]
        found.append(
            {
                "kl": special.rel_entr(t, s).sum(),
                "logratio": 0.5 * (t * (d - (t * d).sum()) ** 2).sum(),
                "mse": 0.5 * ((s - t) ** 2).sum(),
            }[form]
        )
    return np.array(found)


def gradient_in_closed_form(z, v, y, form, temperature):
    """dE/dz of each prediction from the table of the module's docstring."""
    s, t = (scale_factors(one, y, temperature).numpy() for one in (z, v))
    d = ((z - v) / temperature).numpy()
    centre = (t * d).sum(1, keepdims=True)
    e = s - t
    found = {
        "kl": (s - t) / temperature,
        "logratio": t * (d - centre) / temperature,
        "mse": s / temperature * (e - (s * e).sum(1, keepdims=True)),
    }[form]
    found[np.arange(len(found)), y.numpy()] = 0.0
    return found


class TestScaleFactors:
    def test_shares_of_the_other_classes(self):
        z, y = draw(6, 5, 2, 3), labels(6, 5, 2, 3)
        s, p = scale_factors(z, y, 2.0), torch.softmax(z / 2.0, 1)
        torch.testing.assert_close(s.sum(1), torch.ones(6, 2, 3, dtype=torch.float64))
        assert (s.gather(1, y.unsqueeze(1)) == 0).all()
        hot = torch.nn.functional.one_hot(y, 5).movedim(-1, 1).double()
        torch.testing.assert_close(s, p * (1 - hot) / (1 - (p * hot).sum(1, keepdim=True)))

    def test_the_same_as_minus_infinity_in_place_of_the_target(self):
        z, y = draw(6, 5), labels(6, 5)
        filled = z.scatter(1, y.unsqueeze(1), -torch.inf)
        expected = torch.log_softmax(filled / 3.0, 1)
        torch.testing.assert_close(log_scale_factors(z, y, 3.0), without_targets(expected, y), rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(scale_factors(z, y, 3.0), expected.exp())

    def test_target_classes(self):
        z = draw(3, 4)
        mixed = torch.tensor([[0.7, 0.0, 0.3, 0.0], [0.0, 0.5, 0.0, 0.5], [0.0, 0.0, 0.1, 0.9]])
        assert target_classes(z, mixed).tolist() == [0, 1, 3]
        assert target_classes(z, torch.tensor([1, 2, 0], dtype=torch.int32)).tolist() == [1, 2, 0]
        assert torch.equal(scale_factors(z, mixed), scale_factors(z, torch.tensor([0, 1, 3])))

    def test_targets_that_do_not_fit(self):
        with pytest.raises(OptionError, match=r"targets \(3,\) of torch.int64 do not fit outputs \(2, 4\)"):
            scale_factors(draw(2, 4), labels(3, 4))
        with pytest.raises(OptionError, match=r"targets \(2,\) of torch.float64 do not fit"):
            scale_factors(draw(2, 4), draw(2))
        with pytest.raises(OptionError, match=r"at least two classes; the outputs are \(2, 1\)"):
            scale_factors(draw(2, 1), labels(2, 1))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
class TestForms:
    def test_against_the_definition(self, form, temperature):
        z, v, y = draw(7, 6), draw(7, 6, seed=1), labels(7, 6)
        found = error(z, v, y, form, temperature).item()
        assert found == pytest.approx(reference(z, v, y, form, temperature).mean(), rel=1e-12)

    def test_gradient_in_closed_form(self, form, temperature):
        z, v, y = draw(7, 6).requires_grad_(), draw(7, 6, seed=1), labels(7, 6)
        error(z, v, y, form, temperature).backward()
        expected = gradient_in_closed_form(z.detach(), v, y, form, temperature) / 7
        np.testing.assert_allclose(z.grad.numpy(), expected, atol=1e-14)
        assert (z.grad.gather(1, y.unsqueeze(1)) == 0).all()

    def test_gradcheck(self, form, temperature):
        z, v, y = draw(3, 4, 2, scale=1.0).requires_grad_(), draw(3, 4, 2, seed=1, scale=1.0), labels(3, 4, 2)
        assert torch.autograd.gradcheck(lambda z: error(z, v, y, form, temperature), (z,))
        assert torch.autograd.gradcheck(lambda z: error(z, v, y, form, temperature, huber=0.2), (z,))


@pytest.mark.parametrize("form", FORMS)
class TestInvariances:
    def test_shifts_and_the_targets_score_do_not_matter(self, form):
        z, v, y = draw(5, 6), draw(5, 6, seed=1), labels(5, 6)
        moved = (z + draw(5, 1, seed=2)).scatter_add(1, y.unsqueeze(1), draw(5, 1, seed=3))
        torch.testing.assert_close(error(moved, v, y, form), error(z, v, y, form))
        torch.testing.assert_close(error(z, v + 7, y, form), error(z, v, y, form))

    def test_the_order_of_classes_does_not_matter(self, form):
        z, v, y = draw(5, 6).requires_grad_(), draw(5, 6, seed=1), labels(5, 6)
        order = torch.tensor([3, 5, 0, 1, 4, 2])
        error(z, v, y, form).backward()
        twin = z.detach()[:, order].requires_grad_()
        error(twin, v[:, order], order.argsort()[y], form).backward()
        torch.testing.assert_close(twin.grad, z.grad[:, order])

    def test_zero_iff_all_other_ratios_agree(self, form):
        v, y = draw(5, 6, scale=1.0), labels(5, 6)
        same = (v + draw(5, 1, seed=2)).scatter(1, y.unsqueeze(1), draw(5, 1, seed=3)).requires_grad_()
        found = error(same, v, y, form)
        found.backward()
        assert found.item() == pytest.approx(0, abs=1e-14)
        assert same.grad.abs().max() < 1e-14
        for k in range(5):  # one ratio of one prediction is enough
            other = same.detach().clone()
            other[0, (int(y[0]) + 1 + k) % 6] += 0.1
            assert error(other, v, y, form).item() > 1e-10

    def test_space_is_more_predictions(self, form):
        z, v, y = draw(2, 4, 3, 2), draw(2, 4, 3, 2, seed=1), labels(2, 4, 3, 2)
        flat = [one.movedim(1, -1).reshape(-1, 4) for one in (z, v)]
        torch.testing.assert_close(error(z, v, y, form), error(*flat, y.flatten(), form))

    def test_two_classes_leave_exactly_nothing(self, form):
        z, v, y = draw(5, 2).requires_grad_(), draw(5, 2, seed=1), labels(5, 2)
        found = error(z, v, y, form)
        found.backward()
        assert found.item() == 0.0
        assert torch.equal(z.grad, torch.zeros_like(z))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_finite_far_out(self, form, dtype):
        z = (1e4 * torch.sign(draw(6, 5))).to(dtype).requires_grad_()
        v, y = (1e4 * torch.sign(draw(6, 5, seed=1))).to(dtype), labels(6, 5)
        for temperature in (0.5, 4.0):
            found = error(z, v, y, form, temperature)
            (gradient,) = torch.autograd.grad(found, z)
            assert torch.isfinite(found)
            assert torch.isfinite(gradient).all()
            assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


class TestFacts:
    def test_decomposition_of_plain_distillation(self):
        for temperature in (0.7, 4.0):
            z, v, y = draw(1, 6), draw(1, 6, seed=1), labels(1, 6)
            q_y = torch.softmax(v / temperature, 1)[0, y[0]]
            split = target_divergence(z, v, y, temperature) + (1 - q_y) * error(z, v, y, "kl", temperature)
            torch.testing.assert_close(split, soft_divergence(z, v, temperature), rtol=1e-12, atol=0)

    def test_logratio_is_a_squared_error_of_pairwise_ratios(self):
        z, v, y = draw(4, 6), draw(4, 6, seed=1), labels(4, 6)
        log_s, log_t = (log_scale_factors(one, y, 2.0) for one in (z, v))
        t = log_t.exp()
        ratios = [one.unsqueeze(2) - one.unsqueeze(1) for one in (log_s, log_t)]
        pairs = t.unsqueeze(2) * t.unsqueeze(1) * (ratios[0] - ratios[1]) ** 2
        torch.testing.assert_close(error(z, v, y, "logratio", 2.0), 0.25 * pairs.sum((1, 2)).mean())

    def test_logratio_is_the_second_order_of_kl(self):
        v, y, step = draw(4, 6), labels(4, 6), draw(4, 6, seed=2, scale=1.0)
        gaps = []
        for size in (1e-1, 1e-2, 1e-3):
            kl, square = (error(v + size * step, v, y, form).item() for form in ("kl", "logratio"))
            gaps.append(abs(kl - square) / size**2)
        assert gaps[1] < 0.2 * gaps[0]  # what is left is of third order
        assert gaps[2] < 0.2 * gaps[1]

    def test_huber_bounds_the_gradient_and_changes_nothing_near(self):
        v, y = draw(4, 6), labels(4, 6)
        near, far = v + draw(4, 6, seed=1, scale=0.5), v + draw(4, 6, seed=1, scale=1e3)
        assert error(near, v, y, "logratio", huber=10.0) == error(near, v, y, "logratio")
        far.requires_grad_()
        free, bound = error(far, v, y, "logratio"), error(far, v, y, "logratio", huber=2.0)
        assert bound < 0.1 * free
        (gradient,) = torch.autograd.grad(bound, far)
        assert gradient.abs().max() <= 2 * 2.0 / 4  # t_k |ψ_k − ψ̄| / T, and a mean over four
        (gradient,) = torch.autograd.grad(free, far)
        assert gradient.abs().max() > 2 * 2.0 / 4

    @given(st.integers(2, 12), st.integers(0, 10**6), st.floats(0.3, 20.0))
    def test_kl_is_never_negative_and_bounds_mse(self, classes, seed, temperature):
        z, v, y = draw(3, classes, seed=seed), draw(3, classes, seed=seed + 1), labels(3, classes, seed=seed)
        kl, mse = (error(z, v, y, form, temperature).item() for form in ("kl", "mse"))
        assert kl >= -1e-12
        assert mse <= kl + 1e-12  # Pinsker: ½‖s − t‖₂² ≤ ½‖s − t‖₁² ≤ KL


class TestObjective:
    def test_the_whole_cost(self):
        z, v, y = draw(6, 5), draw(6, 5, seed=1), labels(6, 5)
        objective = ScaleFactor("mse", weight=3.0, temperature=2.0, alpha=0.4, warmup_epochs=10, label_smoothing=0.1)
        for epoch, share in ((0.0, 0.0), (2.5, 0.25), (10.0, 1.0), (99.0, 1.0)):
            expected = 0.6 * CrossEntropy(0.1)(Lesson(z, y)) + 0.4 * 4 * soft_divergence(z, v, 2.0)
            expected = expected + share * 3.0 * 4 * reference(z, v, y, "mse", 2.0).mean()
            torch.testing.assert_close(objective(Lesson(z, y, v, epoch=epoch)), expected)
        assert ScaleFactor(warmup_epochs=0)(Lesson(z, y, v)) > ScaleFactor(weight=0)(Lesson(z, y, v))

    def test_the_teacher_gets_no_gradient(self):
        z, v, y = draw(6, 5).requires_grad_(), draw(6, 5, seed=1).requires_grad_(), labels(6, 5)
        ScaleFactor(warmup_epochs=0)(Lesson(z, y, v)).backward()
        assert z.grad.abs().sum() > 0
        assert v.grad is None

    def test_soft_targets_take_the_most_probable_class(self):
        z, v = draw(6, 5), draw(6, 5, seed=1)
        mixed = torch.softmax(draw(6, 5, seed=2), 1)
        assert error(z, v, mixed) == error(z, v, mixed.argmax(1))
        whole = ScaleFactor(warmup_epochs=0)(Lesson(z, mixed.float(), v))
        hard = torch.sum(-mixed.float() * torch.log_softmax(z, 1), 1).mean()
        expected = 0.1 * hard + 0.9 * 16 * soft_divergence(z, v, 4.0) + 2 * 16 * error(z, v, mixed, temperature=4.0)
        torch.testing.assert_close(whole, expected)

    def test_bad_options(self):
        for options, text in (
            ({"form": "l2"}, "form 'l2' is unknown. One of kl, logratio, mse"),
            ({"level": "batch"}, "level 'batch' is unknown. One of sample, class, mix"),
            ({"weight": -1.0}, "weight -1.0 and warmup_epochs 20.0 must be at least 0"),
            ({"warmup_epochs": -2}, "warmup_epochs -2 must be at least 0"),
            ({"temperature": 0.0}, "temperature 0.0 must be above 0"),
            ({"alpha": 2.0}, "alpha 2.0 is out of range"),
            ({"mix": 1.5}, "mix 1.5 is out of range"),
            ({"huber": 0.0}, "huber 0.0 must be above 0, or None"),
        ):
            with pytest.raises(OptionError, match=text):
                ScaleFactor(**options)

    def test_lessons_that_do_not_fit(self):
        z, y = draw(6, 5), labels(6, 5)
        with pytest.raises(OptionError, match=r"student's shape \(6, 5\), given: none"):
            ScaleFactor()(Lesson(z, y))
        with pytest.raises(OptionError, match=r"student's shape \(6, 5\), given: \(6, 4\)"):
            ScaleFactor()(Lesson(z, y, draw(6, 4)))
        with pytest.raises(OptionError, match=r"at least two classes"):
            ScaleFactor()(Lesson(draw(6, 1), labels(6, 1), draw(6, 1)))


class TestLevels:
    def means(self, v, y, temperature=2.0):
        """The definition, class by class."""
        t = scale_factors(v, y, temperature)
        return torch.stack([t[y == c].mean(0) for c in range(v.shape[1])])

    def test_means_of_a_stream(self):
        v, y = draw(40, 4), labels(40, 4)
        whole = mean_scale_factors([(v, y)], 2.0)
        torch.testing.assert_close(whole, self.means(v, y))
        parts = list(zip(v.float().split(7), y.split(7), strict=True))
        torch.testing.assert_close(mean_scale_factors(iter(parts), 2.0), whole, rtol=1e-5, atol=1e-6)
        image = (v.reshape(10, 2, 2, 4).movedim(-1, 1), y.reshape(10, 2, 2))
        torch.testing.assert_close(mean_scale_factors([image], 2.0), whole)
        torch.testing.assert_close(whole.sum(1), torch.ones(4, dtype=torch.float64))
        assert (whole.diagonal() == 0).all()

    def test_means_over_processes(self):
        v, y = draw(40, 4), labels(40, 4)
        held = []
        mean_scale_factors([(v[:13], y[:13])], 2.0, share=lambda sums: held.append(sums) or sums)
        found = mean_scale_factors([(v[13:], y[13:])], 2.0, share=lambda sums: sums + held[0])
        torch.testing.assert_close(found, mean_scale_factors([(v, y)], 2.0))

    def test_a_class_without_samples(self):
        found = mean_scale_factors([(draw(6, 4), torch.tensor([0, 1, 3, 0, 1, 3]))], 2.0)
        torch.testing.assert_close(found[2], torch.tensor([1, 1, 0, 1], dtype=torch.float64) / 3)

    def test_bad_streams(self):
        with pytest.raises(DataError, match="at least one batch"):
            mean_scale_factors([])
        with pytest.raises(DataError, match="have 5 classes, those of the batch before 4"):
            mean_scale_factors([(draw(2, 4), labels(2, 4)), (draw(2, 5), labels(2, 4))])
        with pytest.raises(OptionError, match="temperature -1"):
            mean_scale_factors([(draw(2, 4), labels(2, 4))], -1)

    @pytest.mark.parametrize("form", FORMS)
    def test_class_and_mix_against_the_definition(self, form):
        z, v, y = draw(40, 4).requires_grad_(), draw(40, 4, seed=1), labels(40, 4)
        means = self.means(v, y)
        for level, share in (("class", 1.0), ("mix", 0.3)):
            wanted = (1 - share) * scale_factors(v, y, 2.0) + share * means[y]
            # logits whose scale factors are the wanted ones
            stand_in = wanted.scatter(1, y.unsqueeze(1), 1.0).log() * 2.0
            expected = reference(z.detach(), stand_in, y, form, 2.0).mean()
            objective = ScaleFactor(form, level, temperature=2.0, mix=0.3, huber=None, class_means=means)
            found = objective.error(Lesson(z, y, v))
            assert found.item() == pytest.approx(expected, rel=1e-10)
            (gradient,) = torch.autograd.grad(found, z)
            closed = gradient_in_closed_form(z.detach(), stand_in, y, form, 2.0) / 40
            np.testing.assert_allclose(gradient.numpy(), closed, atol=1e-13)

    @pytest.mark.parametrize("form", FORMS)
    def test_finite_where_a_class_mean_is_zero(self, form):
        means = torch.tensor([[0, 1, 0], [1, 0, 0], [1, 0, 0]], dtype=torch.float32)
        z = draw(6, 3).float().requires_grad_()
        objective = ScaleFactor(form, "class", warmup_epochs=0, class_means=means)
        found = objective(Lesson(z, labels(6, 3), draw(6, 3, seed=1).float()))
        found.backward()
        assert torch.isfinite(found)
        assert torch.isfinite(z.grad).all()

    def test_spatial_predictions(self):
        z, v, y = draw(2, 4, 3, 2), draw(2, 4, 3, 2, seed=1), labels(2, 4, 3, 2)
        means = mean_scale_factors([(v, y)], 2.0)
        objective = ScaleFactor(level="mix", temperature=2.0, class_means=means)
        flat = [one.movedim(1, -1).reshape(-1, 4) for one in (z, v)]
        torch.testing.assert_close(
            objective.error(Lesson(z, y, v)), objective.error(Lesson(flat[0], y.flatten(), flat[1]))
        )

    def test_means_that_are_missing_or_of_other_classes(self):
        lesson = Lesson(draw(6, 5), labels(6, 5), draw(6, 5))
        with pytest.raises(OptionError, match=r"'class' needs the mean scale factors of the 5 classes.*given: none"):
            ScaleFactor(level="class")(lesson)
        with pytest.raises(OptionError, match=r"'mix' needs .* \(5, 5\), given: \(4, 4\)"):
            ScaleFactor(level="mix", class_means=torch.zeros(4, 4))(lesson)
