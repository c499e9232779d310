"""Agreement on photographs: which crops, which numbers, and the whole run on a network that a test can afford."""

from __future__ import annotations

import json
import math

import pytest
import torch
from fxpress.ir.errors import DataError
from fxpress.tools.bench import pq_agreement, pq_photos
from fxpress.tools.bench.pq_agreement import Bench, Plan
from fxpress.tools.bench.pq_agreement_rows import agreement
from fxpress.tools.bench.pq_efficientnet import Early, Late
from fxpress.tools.bench.pq_photos import Crops, Photos, read_photos, read_some
from fxpress.tools.bench.pq_settings import options
from rich.console import Console
from torch import nn
from torchvision.transforms.v2.functional import to_pil_image


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Seven pictures, photo N of brightness 30 N, and a file that is none."""
    root = tmp_path_factory.mktemp("photos")
    for number in range(7):
        pixels = torch.full((3, 200, 240), 30 * number) + torch.randint(0, 20, (3, 200, 240))
        to_pil_image(pixels.byte()).save(root / f"{number}.png")
    (root / "readme.txt").write_text("no photograph")
    (root / "below").mkdir()
    to_pil_image(torch.zeros(3, 16, 16).byte()).save(root / "below" / "small.jpg")
    return root


class TestPhotos:
    def test_every_third_is_for_calibration(self, folder):
        known, unseen = read_photos(folder)
        assert [round(float(photo.float().mean() / 30)) for photo in known] == [0, 3, 6]
        assert [round(float(photo.float().mean() / 30)) for photo in unseen] == [1, 2, 4, 5]

    def test_large_ones_are_read_smaller(self, tmp_path):
        for number in range(3):
            to_pil_image(torch.zeros(3, 900, 1800).byte()).save(tmp_path / f"{number}.jpg")
        assert {tuple(photo.shape) for part in read_photos(tmp_path) for photo in part} == {(3, 448, 896)}

    def test_further_images(self, folder):
        assert [len(read_some(folder, most)) for most in (3, 8, 9)] == [3, 8, 8]
        photos = Photos(*read_photos(folder), [read_some(folder / "below", 1), read_some(folder, 4)])
        sizes = [tuple(image.shape[1:]) for image in photos.mixed()]
        assert sizes[:3] == [(200, 240), (16, 16), (200, 240)]
        assert len(sizes) == 3 * 4
        assert str(photos).startswith("3 photographs and in turns 1, 4 other images for calibration")
        assert len(Photos(*read_photos(folder), []).mixed()) == 3

    def test_a_folder_without_images(self, tmp_path):
        with pytest.raises(DataError, match="there are no images below"):
            read_some(tmp_path, 1)

    def test_too_few(self, tmp_path):
        with pytest.raises(DataError, match=r"holds 0 photographs .*at least 3"):
            read_photos(tmp_path)


class TestCrops:
    def test_the_same_whatever_else_is_drawn(self, folder):
        known, _ = read_photos(folder)
        one, two = Crops(known, 5, 2, 0), Crops(known, 5, 2, 0)
        first = list(one)
        torch.rand(3)
        assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first, two, strict=True))
        assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first, one, strict=True))  # fixed: no other epoch
        assert [tuple(images.shape) for images, _ in first] == [(2, 3, 224, 224)] * 2 + [(1, 3, 224, 224)]
        assert torch.cat([numbers for _, numbers in first]).tolist() == [0, 1, 2, 0, 1]

    def test_epochs_differ_and_can_be_chosen(self, folder):
        crops = Crops(read_photos(folder)[0], 2, 2, 0, fixed=False)
        first, second = (next(iter(crops))[0] for _ in range(2))
        assert not torch.equal(first, second)
        crops.set_epoch(1)
        assert torch.equal(next(iter(crops))[0], second)

    def test_a_small_image_is_taken_whole(self):
        image = torch.randint(0, 256, (3, 32, 32)).byte()
        crop = pq_photos._crop(image, torch.Generator().manual_seed(0))
        whole = nn.functional.interpolate(image[None].float(), (224, 224), mode="bilinear", align_corners=False)
        assert min(float((crop - other).abs().max()) for other in (whole, whole.flip(3))) < 1e-2


class TestAgreement:
    def test_numbers_by_hand(self):
        wanted = torch.zeros(2, 7)
        wanted[0, 3] = wanted[1, 0] = 5.0
        found = torch.arange(7.0).expand(2, 7)  # first class 6; 3 is among the best five, 0 is not
        result = agreement(wanted, found)
        assert (result.top_1, result.top_5) == (0.0, 0.5)
        p, q = wanted.double().softmax(1), found.double().softmax(1)
        assert result.kl == pytest.approx(float((p * (p / q).log()).sum(1).mean()))
        same = agreement(wanted, wanted)
        assert (same.top_1, same.top_5, same.kl) == (1.0, 1.0, pytest.approx(0.0))

    @pytest.mark.parametrize("ratio", pq_agreement.RATIOS)
    def test_options_are_those_of_the_pass(self, ratio):
        from fxpress.passes.quantize.product_quantize import ProductQuantize

        assert ProductQuantize(**options(ratio)).codebook == "int8"

    def test_a_whole_run(self, folder, monkeypatch):
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(3, 16, 8, 8, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16),
            nn.Conv2d(16, 64, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
        ).eval()  # fmt: skip
        few = {"codebook": "int8", "subspace": 4, "codewords": 4, "last": {"subspace": 4, "codewords": 4}}
        monkeypatch.setattr(pq_agreement, "options", lambda ratio: few)
        plan = Plan(calibration=16, tuning=16, judged=8, more=0, ratios=(16,))
        photos = Photos(*read_photos(folder), [])
        halves = lambda whole: (whole[:3], whole[3:])  # noqa: E731
        rows = list(Bench(network, photos, plan, 0, Console(quiet=True), halves).rows())
        json.dumps([row.value for row in rows])
        cases = [row.case for row in rows if row.metric == "KL" and row.case.startswith("16x")]
        assert cases == [f"16x, {kind}" for kind in (*pq_agreement.KINDS, pq_agreement.TUNED)]
        values = {(row.case, row.metric): row.value for row in rows}
        assert all(math.isfinite(value) for (_, metric), value in values.items() if metric == "KL")
        assert values["original", "depthwise weights"] == 16 * 9
        smaller = [values[case, "quantised weights"] for case in cases[:3]]
        assert min(smaller) == max(smaller) > 3
        assert values["16x, k-means", "KL"] > values["16x, error correction", "KL"]
        assert len([row for row in rows if row.case == "goal, 16x"]) == 3
        assert values["original, its second half in bfloat16", "KL"] < values["16x, k-means", "KL"]

    def test_halves_are_the_whole(self):
        network = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0").eval()
        images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            assert torch.allclose(Late(network)(Early(network)(images)), network(images), atol=1e-5)
