"""Label rules: what is united, passed on, pinned, and why."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fxpress.ir.cut import Cut
from fxpress.ir.graph import Graph
from fxpress.ir.groups import Groups, find_groups
from fxpress.ir.labels import Labels, Slot, collapse, compress, find_labels, varying, zeros
from fxpress.ir.trace import trace
from fxpress.ir.verify import prove_cut
from torch import Tensor, nn


class Between(nn.Module):
    """conv(3 -> 8) -> an operation -> conv(? -> 4): what does the operation do to the eight channels?"""

    def __init__(self, operation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.operation = operation
        self.before = nn.Conv2d(3, 8, 1)
        channels = operation(torch.zeros(2, 8, 8, 8)).shape[1]
        self.after = nn.Conv2d(channels, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.operation(self.before(x)))  # type: ignore[no-any-return]


def groups_of(module: nn.Module, x: Tensor | None = None, **options: str) -> Groups:
    return find_groups(trace(module.eval(), torch.randn(2, 3, 8, 8) if x is None else x), **options)


def classes(groups: Groups, name: str, dim: int) -> np.ndarray:
    return groups.class_of[groups.labels.slots[Slot(name, dim)].numpy()]


PASSING: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "hardswish": F.hardswish,
    "max_pool": lambda x: F.max_pool2d(x, 2),
    "adaptive": lambda x: F.adaptive_avg_pool2d(x, 2),
    "interpolate": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "nearest": lambda x: F.interpolate(x, scale_factor=2),
    "mean over space": lambda x: x.mean((2, 3), keepdim=True),
    "flip in space": lambda x: x.flip(-1),
    "roll in space": lambda x: x.roll(1, 2),
    "pad in space": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "stride": lambda x: x[:, :, ::2, ::2],
    "cast": lambda x: x.double().float(),
    "there and back": lambda x: x.permute(0, 2, 3, 1).reshape(2, 64, 8).transpose(1, 2).reshape(2, 8, 8, 8),
    "softmax in space": lambda x: x.flatten(2).softmax(-1).view_as(x),
    "spatial norm": lambda x: F.normalize(x.flatten(2), dim=-1).view_as(x),
    "cumsum in space": lambda x: x.cumsum(-1),
    "clamp": lambda x: x.clamp(0, 1),
    "constant": lambda x: x * 2 + 1,
}


@pytest.mark.parametrize("name", PASSING)
def test_channels_pass(name: str) -> None:
    groups = groups_of(Between(PASSING[name]))
    produced = classes(groups, "before.weight", 0)
    assert len(np.unique(produced)) == 8
    assert not groups.locked[produced].any()
    np.testing.assert_array_equal(produced, classes(groups, "after.weight", 1))


PINNING: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "maximum over channels": (lambda x: x.amax(1, keepdim=True) + x, "would change its result"),
    "variance over channels": (lambda x: x.var(1, keepdim=True) + x, "would change its result"),
    "cumsum over channels": (lambda x: x.cumsum(1), "runs along the channels"),
    "roll over channels": (lambda x: x.roll(1, 1), "is rolled along its channels"),
    "layer norm": (lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (8,)).permute(0, 3, 1, 2), "statistics"),
    "one group": (lambda x: F.group_norm(x, 1), "statistics"),
    "unknown": (lambda x: torch.cdist(x, x), "has no label rule"),
    "unknown spectrum": (lambda x: torch.fft.rfft(x, dim=1).abs(), "has no label rule"),
}


@pytest.mark.parametrize("name", PINNING)
def test_channels_are_pinned_with_a_reason(name: str) -> None:
    operation, reason = PINNING[name]
    groups = groups_of(Between(operation))
    assert groups.locked[classes(groups, "before.weight", 0)].all()
    assert any(reason in pin.reason for pin in groups.labels.pins)


def test_unknown_operations_are_named() -> None:
    groups = groups_of(Between(PINNING["unknown"][0]))
    assert groups.labels.unknown
    pinned = {pin.reason for pin in groups.labels.pins if pin.node in groups.labels.unknown}
    assert all("has no label rule" in reason for reason in pinned)


TIED: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "halves": (lambda x: F.glu(x, 1), 4),
    "chunk and add": (lambda x: sum(x.chunk(2, 1)), 4),  # type: ignore[dict-item, return-value]
    "pixel shuffle": (lambda x: F.pixel_shuffle(x, 2), 2),
    "softmax over a split": (lambda x: x.view(2, 2, 4, 8, 8).softmax(1).sum(1), 4),
    "group norm": (lambda x: F.group_norm(x, 4), 4),
    "shuffle": (lambda x: x.view(2, 2, 4, 8, 8).transpose(1, 2).reshape(2, 8, 8, 8), 4),
    "native shuffle": (lambda x: F.channel_shuffle(x, 2), 4),
    "flip channels": (lambda x: x + x.flip(1), 4),
}


@pytest.mark.parametrize("name", TIED)
def test_channels_are_tied(name: str) -> None:
    operation, independent = TIED[name]
    groups = groups_of(Between(operation))
    produced = classes(groups, "before.weight", 0)
    assert len(np.unique(produced)) == independent
    assert not groups.locked[produced].any()


def test_padded_channels_are_channels_of_their_own() -> None:
    groups = groups_of(Between(lambda x: F.pad(x, (0, 0, 0, 0, 2, 3))))
    read = classes(groups, "after.weight", 1)
    assert len(np.unique(read)) == 13
    np.testing.assert_array_equal(read[2:10], classes(groups, "before.weight", 0))


def test_flatten_repeats_each_channel_over_space() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 5))
    groups = groups_of(model)
    np.testing.assert_array_equal(classes(groups, "2.weight", 1), np.repeat(classes(groups, "0.weight", 0), 36))


def test_grouped_convolution_ties_position_j_of_every_group() -> None:
    groups = groups_of(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 1, groups=4), nn.Conv2d(12, 2, 1)))
    produced = classes(groups, "0.weight", 0).reshape(4, 2)
    assert (produced == produced[0]).all()
    assert len(np.unique(produced)) == 2
    assert len(np.unique(classes(groups, "1.weight", 0))) == 3


def test_a_shared_layer_unites_what_both_calls_read() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.shared = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
            self.head = nn.Conv2d(16, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.cat([self.shared(self.a(x)), self.shared(self.b(x))], 1))  # type: ignore[no-any-return]

    groups = groups_of(Twice())
    np.testing.assert_array_equal(classes(groups, "a.weight", 0), classes(groups, "b.weight", 0))


def test_inputs_and_outputs_are_pinned() -> None:
    groups = groups_of(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)))
    assert not classes(groups, "0.weight", 1).any()
    assert not classes(groups, "1.weight", 0).any()


class Attention(nn.Module):
    """Two heads of width four."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused, self.qkv, self.proj = fused, nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(x.shape[0], -1, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v) if self.fused else (q @ k.mT).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("mode", "count"), [("width", 4), ("heads", 2)])
def test_attention_is_cut_by_width_or_by_head(mode: str, count: int, fused: bool) -> None:
    groups = groups_of(Attention(fused), torch.randn(2, 5, 8), attention=mode)
    produced = classes(groups, "qkv.weight", 0).reshape(3, 2, 4)
    assert len(np.unique(produced)) == count
    assert not groups.locked[produced].any()
    expected = produced[:, :1] if mode == "width" else produced[..., :1]
    assert (produced == expected).all()


def test_layer_norm_can_be_refitted() -> None:
    operation = PINNING["layer norm"][0]
    groups = groups_of(Between(operation), norms="refit")
    assert len(np.unique(classes(groups, "before.weight", 0))) == 8
    assert groups.labels.refitted


@pytest.mark.parametrize("norms", ["keep", "refit"])
def test_a_norm_that_is_written_out_is_cut_exactly(norms: str) -> None:
    def written(x: Tensor) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        return centred * torch.rsqrt(centred.square().mean(1, keepdim=True) + 1e-5)

    groups = groups_of(Between(written), norms=norms)
    cut = Cut(groups, classes(groups, "before.weight", 0)[:3])
    candidate = cut.apply("test")
    assert prove_cut(cut, candidate) < 1e-5
    scaled = [node for node in candidate.nodes if node.target is torch.ops.aten.mul.Scalar]
    assert len(scaled) == (2 if norms == "keep" else 0)


def test_a_filter_along_the_channels_keeps_their_places() -> None:
    class ChannelAttention(nn.Module):
        """x times a gate that a filter over neighbouring channels computes (ECA-Net, Wang et al. 2020)."""

        def __init__(self) -> None:
            super().__init__()
            self.before, self.after = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
            self.filter = nn.Conv1d(1, 1, 3, padding=1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            x = self.before(x)
            gate = torch.sigmoid(self.filter(x.mean((2, 3)).unsqueeze(1)))
            return self.after(x * gate.transpose(1, 2).unsqueeze(-1))  # type: ignore[no-any-return]

    groups = groups_of(ChannelAttention())
    assert len(np.unique(classes(groups, "before.weight", 0))) == 8
    cut = Cut(groups, classes(groups, "before.weight", 0)[[1, 2, 5]])
    candidate = cut.apply("test")
    candidate.lint()
    assert prove_cut(cut, candidate) < 1e-6
    again = find_groups(candidate)
    second = Cut(again, again.groups[0].classes[:2])
    assert prove_cut(second, second.apply("test")) < 1e-6


def test_labels_have_the_shape_of_their_node() -> None:
    graph: Graph = trace(Between(TIED["shuffle"][0]).eval(), torch.randn(2, 3, 8, 8))
    labels: Labels = find_labels(graph)
    for node, value in labels.values.items():
        if isinstance(value, Tensor):
            assert tuple(value.shape) == node.meta["spec"].shape, node.name


def test_compress_finds_constant_dimensions() -> None:
    dense = torch.arange(4).view(1, 4, 1).expand(3, 4, 5).contiguous()
    assert varying(dense) == [0, 1, 2]
    assert varying(compress(dense)) == [1]
    assert torch.equal(compress(dense), dense)
    assert tuple(collapse(zeros((3, 4))).shape) == (1, 1)


def test_labels_cost_less_than_a_forward_pass_in_elements() -> None:
    """No label tensor of a CNN is ever laid out in full: channels only."""
    graph = trace(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval(),
                  torch.randn(2, 3, 8, 8))  # fmt: skip
    labels = find_labels(graph)
    stored = {v.data_ptr(): v.untyped_storage().nbytes() for v in labels.values.values() if isinstance(v, Tensor)}
    assert sum(stored.values()) < 8 * 64
