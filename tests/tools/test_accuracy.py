"""The accuracy tables: protocols, the batches that all rows share, goals, and a run that can be continued."""

from __future__ import annotations

import math

import pytest
import torch
from fxpress.ir.errors import DataError, OptionError
from fxpress.runtime.evaluate import evaluate
from fxpress.tools.bench import accuracy, accuracy_data, accuracy_run
from fxpress.tools.bench.accuracy_latency import measure_latency, read_latency
from fxpress.tools.bench.accuracy_networks import build_network
from fxpress.tools.bench.accuracy_protocol import PROTOCOLS, Goal, Network, Protocol, load_protocol
from fxpress.tools.bench.accuracy_report import judge, page, rows_of
from fxpress.tools.bench.accuracy_teacher import RecordedTeacher
from fxpress.tools.bench.common import header
from rich.console import Console
from torch import nn

import fxpress

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Image folders of 10 classes, brighter from class to class."""
    from torchvision.transforms.v2.functional import to_pil_image

    root, generator = tmp_path_factory.mktemp("images"), torch.Generator().manual_seed(0)
    for part, count in (("train", 8), ("test", 4)):
        for number in range(10):
            place = root / part / f"class{number}"
            place.mkdir(parents=True)
            for index in range(count):
                noise = torch.randint(0, 25, (3, 8, 8), generator=generator)
                to_pil_image((noise + 25 * number).byte()).save(place / f"{index}.jpg")
    return root


def protocol(**changes):
    tune = {"distill": {"epochs": 1, "loss": "cross-entropy", "lr": 0.01, "keep": "last"}}
    content = {
        "heading": "A test",
        "images": {"batch": 16, "calibration": 16},
        "networks": {"base": {"network": "vgg-small", "width": 0.05, "passes": [tune]}},
        "seeds": [0, 1],
        "rows": [{"name": "magnitude, -50 %", "passes": [{"prune-channels": {"ratio": 0.5}}, tune]}],
        "goals": [{"row": "magnitude, -50 %", "by": -100}],
    }
    return Protocol(**(content | changes))


class TestProtocols:
    @pytest.mark.parametrize("path", sorted(PROTOCOLS.glob("*.yaml")), ids=lambda path: path.stem)
    def test_those_that_come_along_are_valid(self, path):
        load_protocol(path)

    def test_mistakes_are_named(self, tmp_path):
        with pytest.raises(OptionError, match=r"no protocol .*nothing\.yaml.*resnet56-pruning"):
            load_protocol(tmp_path / "nothing.yaml")
        (tmp_path / "bad.yaml").write_text("heading: x\nnetworks: {}\nrows: [{name: a, passes: [prune]}]\n")
        with pytest.raises(OptionError, match=r"bad\.yaml.*no pass 'prune'.*prune-channels"):
            load_protocol(tmp_path / "bad.yaml")
        with pytest.raises(OptionError, match="a goal names 'KD'; rows: magnitude"):
            protocol(goals=[{"row": "KD"}])
        rows = [{"name": "a"}, {"name": "b", "after": "a", "peer": {"macs": 0.5}}]
        with pytest.raises(OptionError, match="'b' goes on from 'a' and can have no 'model' or 'peer'"):
            protocol(rows=rows, goals=[])
        rows = [{"name": "a", "after": "b"}, {"name": "b"}]
        with pytest.raises(OptionError, match="'a' goes on from 'b', which is no row before it"):
            protocol(rows=rows, goals=[])
        with pytest.raises(OptionError, match="no column 'size'; columns: MACs"):
            page(protocol(columns=["size"]), {}, header(0), [])
        with pytest.raises(OptionError, match="no network 'big'; networks: base"):
            protocol(model="big")
        with pytest.raises(OptionError, match=r"no weights some\.pth in None.*--weights"):
            build_network(Network(network="resnet20", weights="some.pth"), 3, 0, None)


class TestViews:
    def views(self, seed, augment=True):
        images = torch.randint(0, 256, (10, 3, 12, 12), generator=torch.Generator().manual_seed(1)).byte()
        return accuracy_data.Views(images, torch.arange(10), ((0.5,) * 3, (0.25,) * 3), 4, seed, augment)

    def test_the_same_whatever_else_is_drawn(self):
        one, two = self.views(3), self.views(3)
        first = list(one)
        torch.rand(7)
        assert all(torch.equal(a, b) and torch.equal(s, t) for (a, s), (b, t) in zip(first, two, strict=True))
        second = list(one)
        assert not torch.equal(first[0][0], second[0][0])
        two.set_epoch(1)
        assert torch.equal(next(iter(two))[0], second[0][0])

    def test_without_a_seed_every_image_once_and_unchanged(self):
        views = self.views(None)
        inputs, targets = (torch.cat(parts) for parts in zip(*views, strict=True))
        assert targets.tolist() == list(range(10))
        assert torch.allclose(inputs * 0.25 + 0.5, views.images.float() / 255, atol=1e-6)
        assert len(views) == 3
        assert len(self.views(0)) == 2  # the rest of two images is left out

    def test_an_epoch_of_some_images_takes_others_each_time(self):
        images = torch.zeros(10, 3, 12, 12, dtype=torch.uint8)
        views = accuracy_data.Views(images, torch.arange(10), ((0.5,) * 3, (0.25,) * 3), 2, 0, augment=True, limit=4)
        epochs = [torch.cat([targets for _, targets in views]) for _ in range(6)]
        assert len(views) == 2
        assert all(len(epoch.unique()) == 4 for epoch in epochs)
        assert len(torch.cat(epochs).unique()) > 6

    def test_validation_images_are_training_images_that_are_not_trained_on(self, folder, tmp_path):
        plan = protocol().images.model_copy(update={"validation": 20, "augment": False})
        deal = accuracy_data.load_images(plan, folder, tmp_path, 0)
        data = deal.data
        held, test = (torch.cat([x for x, _ in views]) for views in (data.val, deal.test))
        assert (len(held), len(test), len(data.train.images)) == (20, 40, 60)
        for views in (data.train, data.calibration, deal.test):
            seen = torch.cat([x for x, _ in views])
            assert float(torch.cdist(seen.flatten(1), held.flatten(1)).min()) > 0
        plain = accuracy_data.load_images(protocol().images, folder, tmp_path, 0)
        assert plain.data.val is plain.test

    def test_a_view_is_a_shifted_perhaps_mirrored_image(self):
        views = self.views(0)
        for inputs, targets in views:
            for view, target in zip(inputs * 0.25 + 0.5, targets, strict=True):
                padded = nn.functional.pad(views.images[target].float() / 255, [4] * 4)
                crops = [padded[:, y : y + 12, x : x + 12] for y in range(9) for x in range(9)]
                found = [
                    torch.allclose(view, c, atol=1e-5) or torch.allclose(view, c.flip(2), atol=1e-5) for c in crops
                ]
                assert any(found)

    def test_missing_folders(self, tmp_path):
        with pytest.raises(DataError, match=r"no image folders in .*train and test"):
            accuracy_data.load_images(protocol().images, tmp_path, tmp_path, 0)


class TestTeacher:
    def test_asked_once_for_each_batch(self, tmp_path):
        calls = []

        class Network(nn.Module):
            def forward(self, x):
                calls.append(len(x))
                return x.mean((2, 3))

        batches = torch.randn(2, 4, 3, 5, 5)
        teacher = RecordedTeacher(Network(), tmp_path / "record.safetensors")
        answers = [teacher(batch) for batch in batches]
        assert all(torch.equal(teacher(batch), answer) for batch, answer in zip(batches, answers, strict=True))
        teacher.keep()
        again = RecordedTeacher(Network(), tmp_path / "record.safetensors")
        assert torch.equal(again(batches[1]), answers[1])
        assert calls == [4, 4]


RECORDS = {
    "base": [{"accuracy": 0.9}],
    "plain": [{"accuracy": 0.7}],
    "good": [{"accuracy": 0.82}, {"accuracy": 0.8}],
}


class TestGoals:
    @pytest.mark.parametrize(
        ("goal", "value", "met"),
        [
            ({"row": "good", "than": "plain", "by": 10}, 11, True),
            ({"row": "good", "by": -5}, -9, False),
            ({"row": "good", "than": "plain", "recovers": 0.5}, 0.55, True),
            ({"row": "good", "than": "plain", "recovers": 0.6}, 0.55, False),
            ({"row": "plain", "than": "good", "by": 0}, -11, False),
        ],
    )
    def test_judged(self, goal, value, met):
        row = judge(Goal(**goal), RECORDS)
        assert row.value == pytest.approx(value)
        assert row.met is met

    def test_missing_rows_and_numbers_meet_nothing(self):
        assert judge(Goal(row="good", than="else"), RECORDS) is None
        row = judge(Goal(row="good", than="plain", metric="ratio_error"), RECORDS)
        assert math.isnan(row.value)
        assert not row.met


class TestRun:
    def bench(self, plan, work, folder):
        return accuracy_run.Bench(plan, "test", work, folder, None, QUIET)

    def test_a_table_is_finished_and_not_measured_again(self, folder, tmp_path, monkeypatch):
        plan = protocol()
        self.bench(plan, tmp_path, folder).measure(list(plan.rows))
        bench = self.bench(plan, tmp_path, folder)
        monkeypatch.setattr(bench, "_measure", lambda case, seed: pytest.fail(f"{case.name} again"))
        bench.measure(list(plan.rows))
        records = accuracy_run.records_of(bench)
        assert [len(facts) for facts in records.values()] == [1, 2]
        for facts in records["magnitude, -50 %"]:
            assert 0 <= facts["accuracy"] <= 1
            assert 0.2 < facts["macs"] < 0.5
            assert facts["accuracy_before_training"] is not None
        rows = rows_of(plan, records)
        assert [row.met for row in rows if row.case == "goal"] == [True]
        text = page(plan, records, header(0), [row for row in rows if row.case == "goal"])
        assert "# A test" in text
        assert "| magnitude, -50 % | 0." in text
        assert "CIFAR-10 (JPEG)" in text

    def test_another_protocol_is_measured_anew(self, folder, tmp_path):
        plan = protocol(seeds=[0])
        bench = self.bench(plan, tmp_path, folder)
        bench.measure(list(plan.rows))
        other = plan.model_copy(update={"images": plan.images.model_copy(update={"batch": 8})})
        bench = self.bench(other, tmp_path, folder)
        assert bench.facts(plan.rows[0], 0) is None
        bench.measure(list(other.rows))
        assert bench.facts(plan.rows[0], 0) is not None
        measure_latency(bench)
        times = read_latency(bench)[plan.rows[0].name]
        assert set(times) == {"latency_1", "emitted_size", "emitted_bytes"}
        assert all(value > 0 for value in times.values())

    def test_a_row_goes_on_from_another(self, folder, tmp_path):
        one, tune = protocol().rows[0], protocol().rows[0].passes[1]
        small = {"product-quantize": {"subspace": 4, "codewords": 2, "correction": "none", "codebook": "int8"}}
        cut = one.model_copy(update={"passes": (small,), "name": "cut"})
        tuned = one.model_copy(update={"passes": (tune,), "name": "tuned", "after": "cut"})
        plan = protocol(seeds=[0], rows=[cut, tuned], goals=[], columns=["times smaller", "accuracy, %", "file, kB"])
        bench = self.bench(plan, tmp_path, folder)
        bench.measure([tuned])  # the row before it is measured as well
        first, second = (bench.facts(case, 0) for case in plan.rows)
        assert second["accuracy_before_training"] == first["accuracy"]
        assert second["parameters"] == first["parameters"] < 1  # the layers are still quantised ones
        assert second["size_bytes"] < 1.05 * first["size_bytes"]
        text = page(plan, accuracy_run.records_of(bench), header(0), [])
        assert "|  | times smaller | accuracy, % | file, kB |" in text
        assert f"| cut | {1 / first['bytes']:.1f} | {100 * first['accuracy']:.2f} |" in text
        other = cut.model_copy(update={"passes": ({"prune-channels": {"ratio": 0.2}},)})
        changed = self.bench(plan.model_copy(update={"rows": (other, tuned)}), tmp_path, folder)
        assert changed.facts(tuned, 0) is None  # it would have started from another network

    def test_a_base_for_each_seed_and_validation_images(self, folder, tmp_path):
        plan = protocol(goals=[])
        base = plan.networks["base"].model_copy(update={"each_seed": True})
        images = plan.images.model_copy(update={"validation": 20})
        case = plan.rows[0].model_copy(update={"name": "cut", "passes": ({"prune-channels": {"ratio": 0.5}},)})
        plan = plan.model_copy(update={"networks": {"base": base}, "images": images, "rows": (case,)})
        bench = self.bench(plan, tmp_path, folder)
        bench.measure(list(plan.rows))
        assert not torch.equal(*(bench.network("base", seed)[0].weight for seed in (0, 1)))
        records = accuracy_run.records_of(bench)
        assert [len(facts) for facts in records.values()] == [2, 2]
        for name, seed in (("base", 0), ("base", 1)):
            found = evaluate(bench.network(name, seed), bench.test(seed)).accuracy
            assert records[name][seed]["accuracy"] == found
        for seed, facts in enumerate(records["cut"]):
            network = fxpress.load(bench.result(case, seed)).module
            assert facts["accuracy"] == evaluate(network, bench.test(seed)).accuracy
            assert facts["accuracy_before_training"] is None  # that was measured on other images
        assert "Of those for training, 20 are kept for validation." in page(plan, records, header(0), [])

    def test_quick_is_the_same_table_on_few_images(self):
        small = accuracy.shrunk(protocol())
        assert (small.images.train, small.seeds) == (256, (0,))
        assert small.rows == protocol().rows
