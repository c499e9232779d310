"""Attention transfer and hints: values against numpy, gradients by finite differences, what they do not depend on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fxpress.ir.errors import OptionError
from fxpress.runtime.training.losses import AttentionTransfer, Hint, Lesson, Sum


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lesson(mine, theirs):
    return Lesson(torch.zeros(3, 2), torch.zeros(3).long(), None, tuple(mine), tuple(theirs))


class TestAttentionTransfer:
    def reference(self, one, two):
        maps = [(f.numpy() ** 2).mean(1).reshape(len(f), -1) for f in (one, two)]
        maps = [m / np.linalg.norm(m, axis=1, keepdims=True) for m in maps]
        return ((maps[0] - maps[1]) ** 2).mean()

    @pytest.mark.parametrize("space", [(4, 5), (6,), (2, 3, 2)])
    def test_against_numpy(self, space):
        mine = [draw(3, 4, *space), draw(3, 2, *space, seed=1)]
        theirs = [draw(3, 7, *space, seed=2), draw(3, 5, *space, seed=3)]
        expected = 10 * sum(self.reference(one, two) for one, two in zip(mine, theirs, strict=True))
        assert AttentionTransfer(10.0)(lesson(mine, theirs)).item() == pytest.approx(expected, rel=1e-12)

    def test_gradcheck(self):
        one, two = draw(3, 4, 2, 2).requires_grad_(), draw(3, 5, 2, 2, seed=1)
        assert torch.autograd.gradcheck(lambda one: AttentionTransfer(10.0)(lesson([one], [two])), (one,))
        larger = draw(3, 4, 4, 4).requires_grad_()
        assert torch.autograd.gradcheck(lambda one: AttentionTransfer(10.0)(lesson([one], [two])), (larger,))

    def test_scale_order_and_repetition_of_channels_do_not_matter(self):
        one, two = draw(3, 4, 5, 5), draw(3, 6, 5, 5, seed=1)
        expected = AttentionTransfer()(lesson([one], [two]))
        for same in (-3 * one, one[:, [2, 0, 3, 1]], one.repeat(1, 2, 1, 1)):
            torch.testing.assert_close(AttentionTransfer()(lesson([same], [two])), expected)
        assert AttentionTransfer()(lesson([one], [5 * one])).item() == pytest.approx(0, abs=1e-12)
        assert expected > 0

    def test_the_larger_map_is_averaged_down(self):
        one, two = draw(3, 4, 8, 6), draw(3, 6, 4, 3, seed=1)
        pooled = torch.nn.functional.avg_pool2d(one.square().mean(1, keepdim=True), 2).sqrt()
        expected = AttentionTransfer()(lesson([pooled], [two]))
        torch.testing.assert_close(AttentionTransfer()(lesson([one], [two])), expected)
        torch.testing.assert_close(AttentionTransfer()(lesson([two], [one])), expected)

    def test_dead_features_and_half_precision(self):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            dead = torch.zeros(3, 4, 5, 5, dtype=dtype).requires_grad_()
            far = (3e2 * draw(3, 4, 5, 5)).to(dtype)  # squares beyond float16
            loss = AttentionTransfer()(lesson([dead, far], [far, far]))
            loss.backward()
            assert loss.dtype == torch.float32
            assert 0 < loss < torch.inf
            assert torch.isfinite(dead.grad).all()

    def test_the_teacher_gets_no_gradient(self):
        one, two = draw(3, 4, 5, 5).requires_grad_(), draw(3, 4, 5, 5, seed=1).requires_grad_()
        AttentionTransfer()(lesson([one], [two])).backward()
        assert one.grad.abs().sum() > 0
        assert two.grad is None

    def test_what_does_not_fit(self):
        one = draw(3, 4, 5, 5)
        for mine, theirs, text in (
            ([], [], r"features needs those of student and teacher; given: 0 and 0. Name the places"),
            ([one], [one, one], "given: 1 and 2"),
            ([draw(3, 4)], [draw(3, 4)], r"features with positions .*given: \(3, 4\). Name an earlier place"),
            ([one], [draw(3, 4, 5)], "differ in their dimensions"),
            ([one], [one[:2]], r"features 0 of student \(3, .* and teacher \(2, .* of other batches"),
        ):
            with pytest.raises(OptionError, match=text):
                AttentionTransfer()(lesson(mine, theirs))
        with pytest.raises(OptionError, match=r"weight -1.0 must be at least 0"):
            AttentionTransfer(-1.0)


class TestHint:
    def test_against_numpy(self):
        mine, theirs = [draw(3, 4, 5, 2), draw(3, 2)], [draw(3, 6, 5, 2, seed=1), draw(3, 5, seed=2)]
        hint = Hint([4, 2], [6, 5], weight=10.0).double()
        errors = []
        for adapter, one, two in zip(hint.adapters, mine, theirs, strict=True):
            weight, bias = (p.detach().numpy() for p in (adapter.weight[:, :, 0], adapter.bias))
            adapted = np.moveaxis(np.moveaxis(one.numpy(), 1, -1) @ weight.T + bias, -1, 1)
            errors.append(((adapted - two.numpy()) ** 2).mean())
        assert hint(lesson(mine, theirs)).item() == pytest.approx(10 * np.mean(errors), rel=1e-12)

    def test_gradcheck_of_features_and_adapters(self):
        one, two = draw(3, 4, 2, 2).requires_grad_(), draw(3, 5, 2, 2, seed=1)
        hint = Hint([4], [5]).double()
        weight, bias = hint.adapters[0].weight, hint.adapters[0].bias

        def loss(one, weight, bias):
            parameters = {"adapters.0.weight": weight, "adapters.0.bias": bias}
            return torch.func.functional_call(hint, parameters, (lesson([one], [two]),))

        assert torch.autograd.gradcheck(loss, (one, weight, bias))

    def test_adapters_are_parameters_and_learn(self):
        target = draw(16, 5, 3, 3, seed=1).float()
        source = torch.einsum("ncij,cd->ndij", target, torch.linalg.qr(draw(5, 5).float())[0])
        hint = Sum([Hint([5], [5], weight=1.0)])
        assert [p.shape for p in hint.parameters()] == [(5, 5, 1), (5,)]
        optimizer = torch.optim.Adam(hint.parameters(), lr=0.05)
        for _ in range(200):
            loss = hint(lesson([source], [target]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert loss < 1e-3

    def test_half_precision(self):
        loss = Hint([4], [5])(lesson([draw(3, 4, 2, 2).bfloat16()], [draw(3, 5, 2, 2).bfloat16()]))
        assert loss.dtype == torch.float32

    def test_what_does_not_fit(self):
        one = draw(3, 4, 5, 5).float()
        with pytest.raises(OptionError, match="given: 1 and 2 places"):
            Hint([4], [5, 6])
        with pytest.raises(OptionError, match="given: 0 and 0 places"):
            Hint([], [])
        with pytest.raises(OptionError, match=r"weight -1 must be at least 0"):
            Hint([4], [5], weight=-1)
        with pytest.raises(OptionError, match="hints for 2 places were given the features of 1"):
            Hint([4, 4], [5, 5])(lesson([one], [one]))
        with pytest.raises(OptionError, match=r"from 4 to 5 channels was given features \(3, 4, 5, 5\) and \(3, 4, 5"):
            Hint([4], [5])(lesson([one], [one]))
        with pytest.raises(OptionError, match="positions must agree"):
            Hint([4], [4])(lesson([one], [one[:, :, :3]]))
