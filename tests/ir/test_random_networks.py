"""The oracle on random networks: masked equals cut, whatever the network and whatever is cut."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from fxpress.ir.cut import Cut
from fxpress.ir.groups import find_groups
from fxpress.ir.trace import trace
from fxpress.ir.verify import prove_cut
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

Step = tuple[str, int, int]

STEPS = (
    "conv", "strided", "grouped", "depthwise", "multiplier", "transposed", "bn", "gn", "ln", "prelu", "relu", "scale",
    "add", "cat", "shuffle", "split", "halves", "slice", "se", "pixel", "pad", "pool", "standardised", "attention",
)  # fmt: skip


class RandomNetwork(nn.Module):
    """Runs a random program on a pool of feature maps; every layer is made when the program first needs it."""

    def __init__(self, program: list[Step]) -> None:
        super().__init__()
        self.program = program
        self.layers = nn.ModuleDict()
        self.scales = nn.ParameterDict()

    def layer(self, name: str, make: Any) -> Any:
        if name not in self.layers:
            self.layers[name] = make()
        return self.layers[name]

    def forward(self, x: Tensor) -> Tensor:
        pool = [self.layer("stem", lambda: nn.Conv2d(3, 8, 3, padding=1))(x)]
        for index, (kind, choice, other) in enumerate(self.program):
            source = pool[choice % len(pool)]
            made = getattr(self, kind)(f"{kind}{index}", source, pool[other % len(pool)], other)
            if made.shape[1] <= 48 and made.shape[-1] >= 1:
                pool.append(made)
        maps = [nn.functional.adaptive_avg_pool2d(m, 2).flatten(1) for m in pool[-2:]]
        head = self.layer("head", lambda: nn.Linear(sum(m.shape[1] for m in maps), 5))
        return head(torch.cat(maps, 1))  # type: ignore[no-any-return]

    # one method per kind of step: (name, source, other map, number) -> new map

    def conv(self, name: str, x: Tensor, _y: Tensor, n: int) -> Tensor:
        return self.layer(name, lambda: nn.Conv2d(x.shape[1], 4 + 2 * (n % 5), (1, 3)[n % 2], padding=n % 2))(x)  # type: ignore[no-any-return]

    def strided(self, name: str, x: Tensor, _y: Tensor, n: int) -> Tensor:
        if x.shape[-1] < 4:
            return x
        return self.layer(name, lambda: nn.Conv2d(x.shape[1], 8, 3, stride=2, padding=1, bias=False))(x)  # type: ignore[no-any-return]

    def grouped(self, name: str, x: Tensor, _y: Tensor, n: int) -> Tensor:
        groups = math.gcd(x.shape[1], 2 + n % 3)
        return self.layer(name, lambda: nn.Conv2d(x.shape[1], groups * 3, 1, groups=groups))(x)  # type: ignore[no-any-return]

    def depthwise(self, name: str, x: Tensor, _y: Tensor, n: int) -> Tensor:
        return self.layer(name, lambda: nn.Conv2d(x.shape[1], x.shape[1], 3, padding=1, groups=x.shape[1]))(x)  # type: ignore[no-any-return]

    def multiplier(self, name: str, x: Tensor, _y: Tensor, n: int) -> Tensor:
        return self.layer(name, lambda: nn.Conv2d(x.shape[1], 2 * x.shape[1], 1, groups=x.shape[1]))(x)  # type: ignore[no-any-return]

    def transposed(self, name: str, x: Tensor, _y: Tensor, n: int) -> Tensor:
        if x.shape[-1] > 8:
            return x
        groups = math.gcd(x.shape[1], 1 + n % 2)
        return self.layer(name, lambda: nn.ConvTranspose2d(x.shape[1], groups * 3, 2, stride=2, groups=groups))(x)  # type: ignore[no-any-return]

    def bn(self, name: str, x: Tensor, _y: Tensor, n: int) -> Tensor:
        return self.layer(name, lambda: nn.BatchNorm2d(x.shape[1], affine=n % 3 > 0))(x)  # type: ignore[no-any-return]

    def gn(self, name: str, x: Tensor, _y: Tensor, n: int) -> Tensor:
        return self.layer(name, lambda: nn.GroupNorm(math.gcd(x.shape[1], 4), x.shape[1]))(x)  # type: ignore[no-any-return]

    def ln(self, name: str, x: Tensor, _y: Tensor, n: int) -> Tensor:
        norm = self.layer(name, lambda: nn.LayerNorm(x.shape[1]))
        return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # type: ignore[no-any-return]

    def prelu(self, name: str, x: Tensor, _y: Tensor, n: int) -> Tensor:
        return self.layer(name, lambda: nn.PReLU(x.shape[1] if n % 2 else 1))(x)  # type: ignore[no-any-return]

    def relu(self, name: str, x: Tensor, _y: Tensor, n: int) -> Tensor:
        return (torch.relu, nn.functional.hardswish, torch.sigmoid)[n % 3](x)

    def scale(self, name: str, x: Tensor, _y: Tensor, n: int) -> Tensor:
        if name not in self.scales:
            self.scales[name] = nn.Parameter(torch.randn(x.shape[1], 1, 1))
        return x * self.scales[name]

    def add(self, name: str, x: Tensor, y: Tensor, n: int) -> Tensor:
        return x + y if x.shape == y.shape else x

    def cat(self, name: str, x: Tensor, y: Tensor, n: int) -> Tensor:
        return torch.cat([x, y], 1) if x.shape[2:] == y.shape[2:] else x

    def shuffle(self, name: str, x: Tensor, _y: Tensor, n: int) -> Tensor:
        groups = math.gcd(x.shape[1], 2)
        b, c, h, w = x.shape
        return x.view(b, groups, c // groups, h, w).transpose(1, 2).reshape(b, c, h, w)

    def split(self, name: str, x: Tensor, _y: Tensor, n: int) -> Tensor:
        cut = 1 + n % (x.shape[1] - 1) if x.shape[1] > 1 else 1
        first, *rest = torch.split(x, [cut, x.shape[1] - cut] if x.shape[1] > 1 else [1], 1)
        return torch.cat([*rest, first], 1)

    def halves(self, name: str, x: Tensor, _y: Tensor, n: int) -> Tensor:
        if x.shape[1] % 2:
            return x
        first, second = x.chunk(2, 1)
        return first * torch.sigmoid(second)

    def slice(self, name: str, x: Tensor, _y: Tensor, n: int) -> Tensor:
        return x[:, n % max(1, x.shape[1] // 2) :: 1 + n % 2]

    def se(self, name: str, x: Tensor, _y: Tensor, n: int) -> Tensor:
        squeeze = self.layer(name + "a", lambda: nn.Conv2d(x.shape[1], 4, 1))
        excite = self.layer(name + "b", lambda: nn.Conv2d(4, x.shape[1], 1))
        return x * torch.sigmoid(excite(torch.relu(squeeze(x.mean((2, 3), keepdim=True)))))  # type: ignore[no-any-return]

    def pixel(self, name: str, x: Tensor, _y: Tensor, n: int) -> Tensor:
        if n % 2 and x.shape[-1] % 2 == 0:
            return nn.functional.pixel_unshuffle(x, 2)
        return nn.functional.pixel_shuffle(x, 2) if x.shape[1] % 4 == 0 and x.shape[-1] <= 8 else x

    def pad(self, name: str, x: Tensor, _y: Tensor, n: int) -> Tensor:
        return nn.functional.pad(x, (0, 0, 0, 0, n % 3, 1 + n % 2))

    def pool(self, name: str, x: Tensor, _y: Tensor, n: int) -> Tensor:
        return nn.functional.max_pool2d(x, 3, 1, 1) if n % 2 else nn.functional.avg_pool2d(x, 3, 1, 1)

    def standardised(self, name: str, x: Tensor, _y: Tensor, n: int) -> Tensor:
        layer = self.layer(name, lambda: nn.Conv2d(x.shape[1], 6, 3, padding=1))
        weight = layer.weight - layer.weight.mean((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, weight / (weight.std((1, 2, 3), keepdim=True) + 1e-3), layer.bias, padding=1)

    def attention(self, name: str, x: Tensor, _y: Tensor, n: int) -> Tensor:
        qkv = self.layer(name, lambda: nn.Linear(x.shape[1], 3 * 2 * 4))
        b, _, h, w = x.shape
        q, k, v = qkv(x.flatten(2).transpose(1, 2)).reshape(b, h * w, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v) if n % 2 else (q @ k.mT * 0.5).softmax(-1) @ v
        return y.transpose(1, 2).reshape(b, h * w, 8).transpose(1, 2).reshape(b, 8, h, w)


def build(program: list[Step]) -> nn.Module:
    """The network of a program, in double precision, with statistics and affine parameters that do something."""
    torch.manual_seed(0)
    network = RandomNetwork(program)
    network(torch.randn(2, 3, 8, 8))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.running_mean)
        if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)) and module.weight is not None:
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return network.double().eval()


def check(program: list[Step], seed: int, attention: str, norms: str) -> None:
    graph = trace(build(program), torch.randn(2, 3, 8, 8, dtype=torch.float64))
    groups = find_groups(graph, attention, norms)
    rng = np.random.default_rng(seed)
    dead = [rng.permutation(g.classes)[: rng.integers(0, g.channels)] for g in groups.groups]
    cut = Cut(groups, np.concatenate([np.zeros(0, np.int64), *dead]))
    candidate = cut.apply("test")
    candidate.lint()
    assert prove_cut(cut, candidate) <= 1e-9
    stated = sum(p.numel() for p in candidate.module.parameters())
    folded = any("_folded" in name for name, _ in candidate.module.named_parameters())
    assert folded or stated == round(groups.cost(cut.kept).params)


programs = st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 20), st.integers(0, 20)), min_size=2, max_size=9)
arguments = {
    "program": programs,
    "seed": st.integers(0, 1000),
    "attention": st.sampled_from(("width", "heads")),
    "norms": st.sampled_from(("keep", "refit")),
}


@settings(max_examples=25)
@given(**arguments)
def test_masked_equals_cut(program: list[Step], seed: int, attention: str, norms: str) -> None:
    check(program, seed, attention, norms)


@pytest.mark.slow
@settings(max_examples=400)
@given(**arguments)
def test_masked_equals_cut_on_many(program: list[Step], seed: int, attention: str, norms: str) -> None:
    check(program, seed, attention, norms)


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("number", [0, 1, 2])
def test_each_kind_of_step_in_a_residual_network(kind: str, number: int) -> None:
    program = [("conv", 0, 2), ("bn", 1, 1), (kind, 2, number), ("conv", 3, 3), ("add", 1, 4), ("cat", 5, 3)]
    check(program, number, "width", "refit")
