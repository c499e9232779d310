"""`fxpress.distill` and the options of the pass: any pair of networks, every loss, knowledge from inside."""

from __future__ import annotations

import pytest
import torch
from fxpress.ir.errors import DataError, OptionError
from fxpress.passes.train.distill import Distill
from fxpress.passes.train.loss_options import class_means
from fxpress.runtime.training import Callback, TrainResult
from fxpress.runtime.training import losses as kinds
from torch import nn

import fxpress


class Plain(nn.Module):
    """No graph: traced only where places must be found."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv, self.norm, self.act = nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()
        self.head = nn.Linear(width * 9, 3)

    def forward(self, x):
        return self.head(self.act(self.norm(self.conv(x))).flatten(1))


def batches(count: int = 6, seed: int = 0):
    inputs = torch.rand(count * 16, 1, 3, 3, generator=torch.Generator().manual_seed(seed))
    return list(zip((inputs * 4 - 2).split(16), inputs.sum((1, 3)).argmax(1).split(16), strict=True))


DATA = fxpress.Data(train=batches(), val=batches(2, seed=1))
EXAMPLE = torch.zeros(2, 1, 3, 3)


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "scale-factor"},
        {"loss": "scale-factor", "form": "mse", "level": "mix", "mix": 0.3},
        {"loss": "dkd", "dkd_beta": 2.0},
        {"loss": "kd", "standardise": True, "temperature": 2.0},
        {"loss": "cross-entropy", "label_smoothing": 0.1},
        {"attention": 100.0, "hint": 1.0},
        {"attention": 100.0, "places": ["act"]},
        {"mixup": 0.2, "cutmix": 1.0, "ema": 0.9, "accumulate": 2, "schedule": "step", "milestones": [2, 3]},
    ],
)
def test_every_option_learns_and_spares_the_teacher(options):
    student, teacher = Plain(4, 0), Plain(6, 1)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    result = fxpress.distill(student, teacher, DATA, epochs=4, lr=0.05, **options)
    assert isinstance(result, TrainResult)
    assert result.epochs[-1].loss < result.epochs[0].loss
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert student.training
    assert teacher.training


def test_it_is_the_pass():
    """One way to do each thing: the same options give the same weights, on a graph and on a plain network."""
    options = {"epochs": 2, "loss": "scale-factor", "attention": 10.0, "ema": 0.5}
    model, teacher = Plain(4, 0).eval(), Plain(6, 1).eval()
    compiled = fxpress.compile(model, [{"distill": options}], EXAMPLE, data=DATA, teacher=teacher)
    from fxpress.passes.seeding import pass_seed

    fxpress.distill(model, teacher, DATA, seed=pass_seed(0, 1, "distill"), **options)
    for name, value in compiled.module.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_class_means_are_those_of_the_training_set():
    teacher = Plain(6, 1)
    found = class_means(teacher, DATA, 4.0, seed=0)
    inputs, targets = (torch.cat(part) for part in zip(*DATA.train, strict=True))
    teacher.eval()
    with torch.no_grad():
        shares = torch.softmax(teacher(inputs).double() / 4, 1)
    shares[torch.arange(len(targets)), targets] = 0
    shares = shares / shares.sum(1, keepdim=True)
    for target in range(3):
        torch.testing.assert_close(found[target].double(), shares[targets == target].mean(0), atol=1e-5, rtol=1e-5)


def test_objectives_are_what_the_options_say():
    pair = Plain(4, 0), Plain(6, 1)

    def build(**options):
        one = Distill(epochs=50, **options)
        taps = fxpress.runtime.training.Taps(["act"], ["act"]) if one.compares_features else None
        return one.objective(*pair, taps, EXAMPLE, DATA, one.epochs, 0)

    scale = build(loss="scale-factor", form="logratio", lam=3.0, temperature=2.0, alpha=0.5)
    assert isinstance(scale, kinds.ScaleFactor)
    assert (scale.form, scale.weight, scale.temperature, scale.warmup_epochs) == ("logratio", 3.0, 2.0, 5.0)
    assert build(loss="scale-factor", level="class").class_means.shape == (3, 3)
    assert isinstance(build(loss="dkd", loss_warmup=0.0), kinds.DecoupledDistillation)
    terms = list(build(attention=7.0, hint=2.0).terms)
    assert [type(term) for term in terms] == [kinds.KnowledgeDistillation, kinds.AttentionTransfer, kinds.Hint]
    assert [term.weight for term in terms[1:]] == [7.0, 2.0]
    assert [(layer.in_channels, layer.out_channels) for layer in terms[2].adapters] == [(4, 6)]
    same = [build(hint=1.0).state_dict() for _ in range(2)]
    assert all(torch.equal(value, same[1][name]) for name, value in same[0].items())


def test_killed_and_resumed(tmp_path, monkeypatch):
    options = {"epochs": 3, "checkpoint_every": 1, "hint": 1.0, "loss": "scale-factor", "level": "class"}
    whole = Plain(4, 0)
    result = fxpress.distill(whole, Plain(6, 1), DATA, **options)

    class Killed(Exception):
        pass

    def broken(self, batches, seeds, where, epoch, *, step=fxpress.runtime.training.learner.Learner.step):
        if epoch > 1.4:
            raise Killed
        return step(self, batches, seeds, where, epoch)

    with monkeypatch.context() as patch:
        patch.setattr("fxpress.runtime.training.learner.Learner.step", broken)
        with pytest.raises(Killed):
            fxpress.distill(Plain(4, 0), Plain(6, 1), DATA, workdir=tmp_path, **options)
    resumed = Plain(4, 99)  # what a fresh process begins with does not matter
    again = fxpress.distill(resumed, Plain(6, 1), DATA, workdir=tmp_path, resume=True, **options)
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in resumed.state_dict().items())
    assert again.epochs == result.epochs
    with pytest.raises(OptionError, match=r"belongs to another run \(seed: 0, not 1\)"):
        fxpress.distill(Plain(4, 0), Plain(6, 1), DATA, workdir=tmp_path, resume=True, seed=1, **options)
    other = fxpress.distill(Plain(4, 0), Plain(6, 1), DATA, workdir=tmp_path, epochs=1, log=str(tmp_path / "l"))
    assert other.steps == 6  # started over
    assert (tmp_path / "l" / "epochs.csv").exists()
    assert (tmp_path / "log" / "epochs.csv").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"epoch": 3}, "no option 'epoch': did you mean 'epochs'"),
        ({"loss": "scale"}, "option 'loss': given 'scale'"),
        ({"places": ["act"]}, "places are named and nothing compares them"),
        ({"patience": 2, "keep": "last"}, "pass 'distill': training option 'patience' looks at data.val"),
        ({"cache_teacher": True, "mixup": 0.1}, "mixup and cutmix change them"),
        ({"cache_teacher": True, "attention": 1.0}, "outputs and not its features"),
        ({"hint": 1.0, "places": ["nothing"]}, "no module .* matches 'nothing'"),
        ({"resume": True}, "resume=True needs a workdir"),
        ({"workdir": 3}, "workdir=3 is a int; allowed: the path of a directory"),
        ({"seed": 0.5}, "seed=0.5 is a float"),
    ],
)
def test_mistakes_are_named(options, words):
    with pytest.raises(OptionError, match=words):
        fxpress.distill(Plain(4, 0), Plain(6, 1), DATA, **{"epochs": 1, **options})


def test_networks_and_data_that_are_none():
    with pytest.raises(OptionError, match=r"student=.* is a Graph; allowed: an nn.Module; of a graph .* its \.module"):
        fxpress.distill(fxpress.trace(Plain(4, 0), EXAMPLE), Plain(6, 1), DATA)
    with pytest.raises(OptionError, match=r"data=.* is a list"):
        fxpress.distill(Plain(4, 0), Plain(6, 1), batches())
    with pytest.raises(DataError, match="distill needs data to train on"):
        fxpress.distill(Plain(4, 0), Plain(6, 1), fxpress.Data())
    student = Plain(4, 0)
    with pytest.raises(OptionError, match="share parameters"):
        fxpress.distill(student, student, DATA)


def test_the_pass_tells_what_it_did(tmp_path):
    options = {"epochs": 3, "cache_teacher": True, "log": str(tmp_path / "log")}
    compiled = fxpress.compile(Plain(4, 0).eval(), [{"distill": options}], EXAMPLE, data=DATA, workdir=tmp_path / "w")
    (note,) = compiled.report["distill"].notes
    assert "18 steps" in note
    assert "teacher asked about 96 of 288 images" in note
    assert (tmp_path / "log" / "steps.csv").exists()
    assert not (tmp_path / "w" / "01-distill" / "log").exists()
    assert Callback().state_dict() == {}
