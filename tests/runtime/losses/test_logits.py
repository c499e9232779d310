"""Losses on class scores: cross entropy with mixed targets, standardised distillation, decoupled distillation, sums."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fxpress.ir.errors import OptionError
from fxpress.runtime.training.losses import (
    AttentionTransfer,
    CrossEntropy,
    DecoupledDistillation,
    KnowledgeDistillation,
    Lesson,
    ScaleFactor,
    Sum,
    standardised,
)
from scipy import special


def draw(*shape, seed=0, scale=3.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(count, classes, *space, seed=0):
    return torch.randint(classes, (count, *space), generator=torch.Generator().manual_seed(seed))


class TestMixedTargets:
    @pytest.mark.parametrize("space", [(), (3, 2)])
    def test_cross_entropy_against_numpy(self, space):
        z, y = draw(4, 5, *space), torch.softmax(draw(4, 5, *space, seed=1), 1)
        smooth = 0.9 * y.numpy() + 0.1 / 5
        expected = -(smooth * special.log_softmax(z.numpy(), axis=1)).sum(1).mean()
        assert CrossEntropy(0.1)(Lesson(z, y)).item() == pytest.approx(expected, rel=1e-12)

    def test_one_hot_is_an_index(self):
        z, y = draw(4, 5).float(), labels(4, 5)
        hot = torch.nn.functional.one_hot(y, 5).double()
        for objective in (CrossEntropy(0.1), KnowledgeDistillation(), DecoupledDistillation(), ScaleFactor()):
            soft, hard = (objective(Lesson(z, t, z.flip(0), epoch=5.0)) for t in (hot, y))
            torch.testing.assert_close(soft, hard)

    def test_gradcheck(self):
        z, y = draw(3, 4).requires_grad_(), torch.softmax(draw(3, 4, seed=1), 1)
        assert torch.autograd.gradcheck(lambda z: CrossEntropy(0.1)(Lesson(z, y)), (z,))


class TestStandardisedDistillation:
    def test_z_scores(self):
        z = standardised(draw(6, 5, 2, 2))
        torch.testing.assert_close(z.mean(1), torch.zeros(6, 2, 2, dtype=torch.float64), atol=1e-12, rtol=0)
        torch.testing.assert_close(z.std(1), torch.ones(6, 2, 2, dtype=torch.float64), atol=1e-6, rtol=0)
        assert torch.isfinite(standardised(torch.ones(2, 3))).all()

    def test_shift_and_range_of_either_do_not_matter(self):
        z, v, y = draw(6, 5), draw(6, 5, seed=1), labels(6, 5)
        objective = KnowledgeDistillation(2.0, 1.0, standardise=True)
        expected = 4 * special.rel_entr(
            special.softmax(standardised(v).numpy() / 2, axis=1), special.softmax(standardised(z).numpy() / 2, axis=1)
        ).sum(1).mean()  # fmt: skip
        assert objective(Lesson(z, y, v)).item() == pytest.approx(expected, rel=1e-12)
        assert objective(Lesson(3 * z + 1, y, 0.2 * v - 7)).item() == pytest.approx(expected, rel=1e-5)
        hard = KnowledgeDistillation(2.0, 0.0, standardise=True)  # the targets' term sees the scores as they are
        torch.testing.assert_close(hard(Lesson(z, y, v)), CrossEntropy()(Lesson(z, y)))

    def test_gradcheck(self):
        z, v = draw(3, 4).requires_grad_(), draw(3, 4, seed=1)
        objective = KnowledgeDistillation(2.0, 0.9, standardise=True)
        assert torch.autograd.gradcheck(lambda z: objective(Lesson(z, labels(3, 4), v)), (z,))


class TestDecoupledDistillation:
    def reference(self, z, v, y, alpha, beta, temperature):
        """The published formula in numpy, one prediction at a time."""
        found = []
        for zs, vs, label in zip(z.numpy(), v.numpy(), y.numpy(), strict=True):
            p, q = special.softmax(zs / temperature), special.softmax(vs / temperature)
            others = np.arange(len(p)) != label
            target = special.rel_entr([q[label], 1 - q[label]], [p[label], 1 - p[label]]).sum()
            rest = special.rel_entr(q[others] / q[others].sum(), p[others] / p[others].sum()).sum()
            found.append(alpha * target + beta * rest)
        return -special.log_softmax(z.numpy(), axis=1)[np.arange(len(y)), y].mean(), temperature**2 * np.mean(found)

    def test_against_the_formula(self):
        z, v, y = draw(6, 5), draw(6, 5, seed=1), labels(6, 5)
        hard, soft = self.reference(z, v, y, 1.5, 3.0, 2.0)
        objective = DecoupledDistillation(1.5, 3.0, 2.0, warmup_epochs=4)
        for epoch, share in ((0.0, 0.0), (1.0, 0.25), (9.0, 1.0)):
            assert objective(Lesson(z, y, v, epoch=epoch)).item() == pytest.approx(hard + share * soft, rel=1e-12)

    def test_published_settings(self):
        objective = DecoupledDistillation()
        found = (objective.alpha, objective.beta, objective.temperature, objective.warmup_epochs)
        assert found == (1.0, 8.0, 4.0, 20.0)

    def test_with_the_doubt_of_the_teacher_as_beta_it_is_plain_distillation(self):
        z, v, y = draw(1, 5), draw(1, 5, seed=1), labels(1, 5)
        doubt = 1 - torch.softmax(v / 2, 1)[0, y[0]].item()
        found = DecoupledDistillation(1.0, doubt, 2.0, warmup_epochs=0)(Lesson(z, y, v))
        plain = CrossEntropy()(Lesson(z, y)) + KnowledgeDistillation(2.0, 1.0)(Lesson(z, y, v))
        torch.testing.assert_close(found, plain, rtol=1e-12, atol=0)

    def test_gradcheck_and_far_out(self):
        z, v, y = draw(3, 4, 2, scale=1.0).requires_grad_(), draw(3, 4, 2, seed=1), labels(3, 4, 2)
        objective = DecoupledDistillation(warmup_epochs=0)
        assert torch.autograd.gradcheck(lambda z: objective(Lesson(z, y, v)), (z,))
        far = (1e4 * torch.sign(draw(6, 5))).float().requires_grad_()
        loss = objective(Lesson(far, labels(6, 5), -far.detach()))
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(far.grad).all()

    def test_two_classes_leave_the_target_alone(self):
        z, v, y = draw(6, 2), draw(6, 2, seed=1), labels(6, 2)
        found = [DecoupledDistillation(1.0, beta, warmup_epochs=0)(Lesson(z, y, v)) for beta in (0.0, 50.0)]
        assert found[0] == found[1]

    def test_bad_options(self):
        for options, text in (
            ({"alpha": -1.0}, "alpha -1.0, beta 8.0 and warmup_epochs 20.0 must be at least 0"),
            ({"beta": float("nan")}, "beta nan"),
            ({"temperature": -1.0}, "temperature -1.0 must be above 0"),
        ):
            with pytest.raises(OptionError, match=text):
                DecoupledDistillation(**options)
        with pytest.raises(OptionError, match="given: none"):
            DecoupledDistillation()(Lesson(draw(2, 3), labels(2, 3)))


class TestSum:
    def test_values_and_gradients(self):
        z, v, y = draw(6, 5).requires_grad_(), draw(6, 5, seed=1), labels(6, 5)
        one, two = CrossEntropy(), KnowledgeDistillation(2.0, 1.0)
        lesson = Lesson(z, y, v)
        found = Sum([one, two], [0.5, 2.0])(lesson)
        torch.testing.assert_close(found, 0.5 * one(lesson) + 2 * two(lesson))
        torch.testing.assert_close(Sum([one, two])(lesson), one(lesson) + two(lesson))
        gradient, parts = (torch.autograd.grad(f, z)[0] for f in (found, 0.5 * one(lesson) + 2 * two(lesson)))
        torch.testing.assert_close(gradient, parts)

    def test_what_it_needs_is_what_its_terms_need(self):
        def needs(objective):
            return objective.needs_teacher, objective.needs_features

        assert needs(Sum([CrossEntropy()])) == (False, False)
        assert needs(Sum([CrossEntropy(), KnowledgeDistillation()])) == (True, False)
        assert needs(Sum([CrossEntropy(), AttentionTransfer()])) == (True, True)
        assert needs(Sum([CrossEntropy(), AttentionTransfer()], [1.0, 0.0])) == (False, False)
        assert Sum([CrossEntropy(), AttentionTransfer()], [1.0, 0.0])(Lesson(draw(2, 3), labels(2, 3))) > 0

    def test_half_precision_outputs_give_a_whole_loss(self):
        found = Sum([CrossEntropy()])(Lesson(draw(6, 5).bfloat16(), labels(6, 5)))
        assert found.dtype == torch.float32

    def test_bad_options(self):
        for objectives, weights in (([], None), ([CrossEntropy()], [1.0, 2.0]), ([CrossEntropy()], [-1.0])):
            with pytest.raises(OptionError, match=f"a sum of {len(objectives)} objectives cannot have the weights"):
                Sum(objectives, weights)
