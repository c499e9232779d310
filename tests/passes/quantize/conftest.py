"""Layers with their problems, and error correction as its formulas say: in float64, on stored activations, plain."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fxpress.passes.layerwise.moments import SecondMoments
from fxpress.passes.layerwise.patches import rows, weight_rows
from fxpress.passes.quantize.codes import first_codes
from fxpress.passes.quantize.plan import layout_of
from fxpress.passes.quantize.problem import make_problem
from fxpress.passes.quantize.settings import Setting
from torch import nn


class Reference:
    """A layer by groups, taps and inputs; loops instead of Gram matrices.

    Args:
        x: what each output reads, (groups, n, taps, inputs).
        y: wanted, (groups, n, outputs).
        weight: (groups, taps, inputs, outputs).
        codebook: (M, K, d); shared by groups and taps.
        labels: (M, groups, taps, outputs).
        ridge: λ.
    """

    def __init__(self, x, y, weight, codebook, labels, ridge):
        self.x, self.y, self.weight, self.ridge = (np.asarray(v, dtype=np.float64) for v in (x, y, weight, ridge))
        self.codebook, self.labels = np.asarray(codebook, dtype=np.float64).copy(), np.asarray(labels).copy()

    def decoded(self):
        groups, taps, inputs, outputs = self.weight.shape
        width = self.codebook.shape[2]
        result = np.zeros((groups, taps, inputs, outputs))
        for group, tap, channel, out in product(range(groups), range(taps), range(inputs), range(outputs)):
            space, place = divmod(channel, width)
            result[group, tap, channel, out] = self.codebook[space, self.labels[space, group, tap, out], place]
        return result

    def error(self):
        now = self.decoded()
        response = np.einsum("gnti,gtio->gno", self.x, now)
        return ((self.y - response) ** 2).sum() + self.ridge * ((self.weight - now) ** 2).sum()

    def bits(self):
        """Bits of all indices with an ideal code for the ranks of codewords, by how often a sub-space uses them."""
        words = self.codebook.shape[1]
        counts = sum(-np.sort(-np.bincount(labels.flatten(), minlength=words)) for labels in self.labels)
        used = counts[counts > 0]
        return -(used * np.log2(used / used.sum())).sum()

    def best_words(self, space):
        """All codewords of a sub-space by least squares on stacked equations, everything else fixed."""
        groups, taps, inputs, outputs = self.weight.shape
        words, width = self.codebook.shape[1:]
        own = slice(space * width, min((space + 1) * width, inputs))
        size = own.stop - own.start
        others = self.decoded()
        others[:, :, own] = 0
        rest = self.y - np.einsum("gnti,gtio->gno", self.x, others)
        rows, wanted = [], []
        for group, out in product(range(groups), range(outputs)):
            design = np.zeros((self.x.shape[1], words, size))
            for tap in range(taps):
                word = self.labels[space, group, tap, out]
                design[:, word] += self.x[group, :, tap, own]
                pull = np.zeros((size, words, size))
                pull[:, word] = np.eye(size) * self.ridge**0.5
                rows.append(pull)
                wanted.append(self.weight[group, tap, own, out] * self.ridge**0.5)
            rows.append(design)
            wanted.append(rest[group, :, out])
        stacked = np.concatenate(rows).reshape(-1, words * size)
        return np.linalg.lstsq(stacked, np.concatenate(wanted), rcond=None)[0].reshape(words, size)

    def errors_by_label(self, space, group, tap, out):
        """The error with each codeword at one place, all tried."""
        errors, old = [], self.labels[space, group, tap, out]
        for word in range(self.codebook.shape[1]):
            self.labels[space, group, tap, out] = word
            errors.append(self.error())
        self.labels[space, group, tap, out] = old
        return np.array(errors)


def setting_up(
    make, *, noise=0.0, centred=False, ridge=1e-3, width=2, words=4, dtype=torch.float64, seed=0, images=12, rate=0.0
):
    """A layer, its problem and first codes, and the same for the reference."""
    torch.manual_seed(seed)
    layer = make().to(dtype)
    is_linear = isinstance(layer, nn.Linear)
    x = torch.randn(
        images * 4 if is_linear else images, *((layer.in_features,) if is_linear else (layer.in_channels, 5, 5))
    )
    x = (x.abs() + 0.2 * torch.randn_like(x)).to(dtype)
    with torch.no_grad():
        y = layer(x)
    x = x + noise * torch.randn_like(x)
    layout = layout_of(layer, Setting(width, words))
    moments = SecondMoments(layout.groups, layout.inputs * layout.taps, layout.outputs, dtype=dtype, crossed=noise > 0)
    pairs = list(rows(layer, x, y, 10**6))
    for part_x, part_y in pairs:
        moments.add(part_x, part_y)
    bias = torch.zeros(layer.weight.shape[0], dtype=dtype) if layer.bias is None else layer.bias.detach()
    weight, bias = weight_rows(layer).detach(), bias.view(layout.groups, -1)
    problem = make_problem(layout, moments, weight, bias, ridge=ridge, centred=centred)
    codes = first_codes(layout, problem.weight, torch.Generator().manual_seed(seed), 5, rate)
    all_x, all_y = (torch.cat(part).transpose(0, 1).double() for part in zip(*pairs, strict=True))
    all_x, all_y = (v - v.mean(1, keepdim=True) if centred else v for v in (all_x, all_y))
    if not centred:
        all_y = all_y - bias.double()[:, None]
    by_tap = all_x.unflatten(2, (layout.inputs, layout.taps)).transpose(2, 3)
    by_tap_weight = weight.double().unflatten(2, (layout.inputs, layout.taps)).permute(0, 3, 2, 1)
    reference = Reference(by_tap, all_y, by_tap_weight, codes.codebook, codes.labels, problem.ridge)
    return SimpleNamespace(layer=layer, layout=layout, problem=problem, codes=codes, reference=reference)


@pytest.fixture(scope="session")
def make_case():
    """Gives a layer, its problem and first codes, and the same for the reference."""
    return setting_up
