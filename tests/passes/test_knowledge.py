"""Places of knowledge: found in real architectures, matched between two of them, or named."""

from __future__ import annotations

import pytest
import torch
import torchvision
from fxpress.ir.errors import OptionError
from fxpress.passes.train.knowledge import find_places, stage_ends
from fxpress.runtime.training import AttentionTransfer, Lesson
from fxpress.runtime.training.features import tapped
from torch import nn
from torch.nn import functional

import fxpress


class Block(nn.Module):
    """Residual block with a shortcut that pads with zeros, and functional activations."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.pad = width - before

    def forward(self, x):
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        if self.pad:
            x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad // 2, self.pad - self.pad // 2))
        return functional.relu(y + x)


class Residual(nn.Module):
    """A residual network for small images, 2 blocks in each of its three stages."""

    def __init__(self, width: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        widths = [width, width, 2 * width, 4 * width]
        for i in (1, 2, 3):
            blocks = [Block(widths[i - 1], widths[i], 1 + (i > 1))]
            blocks += [Block(widths[i], widths[i], 1) for _ in range(depth - 1)]
            setattr(self, f"layer{i}", nn.Sequential(*blocks))
        self.fc = nn.Linear(widths[3], 10)

    def forward(self, x):
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


def images(size=32):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


# architecture: (image size, resolution and module of each place, "" where it lies between modules)
EXPECTED = {
    "resnet18": (32, ["16 relu", "8 layer1.1.relu", "4 layer2.1.relu", "2 layer3.1.relu"]),
    "vgg11_bn": (32, ["32 features.2", "16 features.6", "8 features.13", "4 features.20", "2 features.27"]),
    "mobilenet_v2": (
        32,
        ["16 features.2.conv.0.2", "8 features.4.conv.0.2", "4 features.7.conv.0.2", "2 features.14.conv.0.2"],
    ),
    "densenet121": (
        64,
        ["32 features.relu0", *(f"{16 >> i} features.transition{i + 1}.relu" for i in range(3)), "2 "],
    ),
}


@pytest.mark.parametrize(
    "name",
    ["resnet18", "vgg11_bn", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mobilenet_v2", "densenet121"))],
)
def test_a_pruned_student_and_its_teacher(name):
    size, expected = EXPECTED[name]
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(num_classes=10).eval()
    if name == "vgg11_bn":  # without its hundred million weights behind the last place
        model.avgpool, model.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(512, 10)
    teacher = fxpress.trace(model, images(size))
    ends = stage_ends(teacher)
    assert [f"{key[0]} {node.meta.get('path') or ''}" for key, node in ends.items()] == expected
    cut = [{"prune-channels": {"ratio": 0.3}}]
    student = fxpress.compile(teacher, cut, images(size), verify=False).graph
    taps = find_places(student, teacher)
    assert list(taps.teacher) == [node.name for node in ends.values()]
    with torch.no_grad():
        outputs, mine = tapped(student.module, taps.student)(images(size))
        _, theirs = tapped(teacher.module, taps.teacher)(images(size))
    assert [one.shape[2:] for one in mine] == [two.shape[2:] for two in theirs]
    assert sum(one.shape[1] for one in mine) < sum(two.shape[1] for two in theirs)
    loss = AttentionTransfer()(Lesson(outputs, torch.zeros(2).long(), outputs, mine, theirs))
    assert 0 < loss < torch.inf
    if name == "densenet121":  # its last activation is a function call between modules
        with pytest.raises(
            OptionError, match=r"'relu_120' .* is not the output of any of its modules. Give the teacher"
        ):
            find_places(student, model)
        return
    by_module = find_places(student, model)
    assert by_module.teacher == [place.split()[1] for place in expected]
    with torch.no_grad():
        features = tapped(model, by_module.teacher)(images(size))[1]
    for one, two in zip(features, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_a_residual_network_for_small_images():
    teacher = Residual(width=8, depth=3)
    student = fxpress.trace(Residual(), images())
    taps = find_places(student, teacher)  # the teacher as it is: its places are modules
    assert taps.teacher == ["layer1.2", "layer2.2", "layer3.2"]
    _, mine = tapped(student.module, taps.student)(images())
    _, theirs = tapped(teacher, taps.teacher)(images())
    assert [one.shape[1:] for one in mine] == [(4, 32, 32), (8, 16, 16), (16, 8, 8)]
    assert [two.shape[1:] for two in theirs] == [(8, 32, 32), (16, 16, 16), (32, 8, 8)]
    assert teacher.training
    assert not any(child._forward_hooks for child in teacher.modules())
    as_graph = fxpress.trace(teacher, images())
    for one in (as_graph, as_graph.module):
        assert find_places(student, one).student == taps.student
    by_graph = tapped(as_graph.module, find_places(student, as_graph.module).teacher).eval()(images())[1]
    by_module = tapped(teacher.eval(), taps.teacher)(images())[1]
    for one, two in zip(by_graph, by_module, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_masks_do_not_hide_the_places():
    graph = fxpress.compile(Residual().eval(), ["insert-masks"], images()).graph
    assert [key[0] for key in stage_ends(graph)] == [32, 16, 8]
    assert len(find_places(graph, Residual()).student) == 3


def test_other_activations_and_concatenations():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)
            self.c, self.prelu, self.d = nn.Conv2d(8, 4, 3, 2, 1), nn.PReLU(4), nn.Conv2d(4, 4, 3, 2, 1)

        def forward(self, x):
            both = torch.cat([functional.silu(self.a(x)), functional.gelu(self.b(x))], 1)
            y = self.d(self.prelu(self.c(both)))
            gate = functional.relu(y.mean((2, 3), keepdim=True))
            high = functional.hardswish(y * gate)
            partly = torch.cat([y, high], 1)  # no activation: y is none
            return partly.mean((2, 3))

    ends = stage_ends(fxpress.trace(Mixed(), images(8)))
    assert [(key[0], node.name) for key, node in ends.items()] == [(8, "cat"), (4, "prelu_1"), (2, "hardswish")]


def test_matched_by_order_where_no_resolution_is_shared():
    def network(stride):
        first = [nn.Conv2d(3, 4, 3, stride, 1), nn.ReLU()]
        return nn.Sequential(*first, nn.Conv2d(4, 4, 3, 3, 1), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))

    one, two = network(1), network(2)
    one(images(12)), two(images(12))
    taps = find_places(fxpress.trace(one, images(12)), two)
    assert (taps.student, taps.teacher) == (["relu", "relu_1"], ["1", "3"])


class TestNames:
    def test_paths_and_patterns(self):
        student, teacher = fxpress.trace(Residual(), images()), Residual(depth=3)
        taps = find_places(student, teacher, places=["layer?"])
        assert taps.teacher == ["layer1", "layer2", "layer3"]
        assert taps.student == find_places(student, teacher).student
        taps = find_places(student, teacher, places=["layer*.1", "relu"], teacher_places=["layer?.2", "bn1"])
        assert taps.teacher == ["layer1.2", "layer2.2", "layer3.2", "bn1"]
        assert taps.student[-1] == "relu"
        nodes = find_places(student, student, places=["relu_[13]"])
        assert nodes.student == nodes.teacher == ["relu_1", "relu_3"]

    def test_what_matches_nothing_or_not_as_much(self):
        student, teacher = fxpress.trace(Residual(), images()), Residual(depth=3)
        with pytest.raises(OptionError, match=r"no module and no node of the network matches 'stage\*'. Name the"):
            find_places(student, teacher, places=["stage*"])
        with pytest.raises(OptionError, match="matches 'relu_1'"):  # nodes are names in graphs alone
            find_places(student, teacher, places=["relu_1"])
        with pytest.raises(OptionError, match="6 places in the student and 9 in the teacher"):
            find_places(student, teacher, places=["layer?.*"])
        with pytest.raises(OptionError, match="named in the teacher and not in the student"):
            find_places(student, teacher, teacher_places=["layer1"])


def test_no_match():
    student = fxpress.trace(Residual(), images())
    with pytest.raises(OptionError, match=r"in the student, 32x32, 16x16, 8x8; in the teacher, none. Name the places"):
        find_places(student, nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(3600, 10)))
    with pytest.raises(OptionError, match=r"in the teacher, 30x30"):
        find_places(student, nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3600, 10)))


def test_an_activation_between_the_modules_of_a_teacher():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 10)

        def forward(self, x):
            return self.fc(functional.relu(self.conv(x)).mean((2, 3)))

    student = fxpress.trace(Residual(), images())
    with pytest.raises(
        OptionError, match=r"'relu' \(2, 4, 32, 32\) \(test_knowledge.py:\d+ .* is not the output of any"
    ):
        find_places(student, Bare())
    assert find_places(student, fxpress.trace(Bare(), images())).teacher == ["relu"]
