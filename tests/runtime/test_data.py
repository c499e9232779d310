"""Loaders, their checks, and the readers behind DATA names, on tiny files written here."""

from __future__ import annotations

import gzip
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from fxpress.ir.errors import DataError
from fxpress.runtime.data import Data, check_targets, checked_batches, images_in, load_data, load_data_like
from fxpress.runtime.data.idx import read_idx
from fxpress.runtime.data.images import ImageTensors, Recipe, make_loader, random_crop
from PIL import Image

X, Y = torch.zeros(4, 1, 2, 2), torch.tensor([0, 1, 2, 1])


def read(loader, **options):
    return list(checked_batches(loader, "train", **options))


class TestChecks:
    def test_good_batches_pass_through(self):
        (inputs, targets), (two, _) = read([(X, Y), ({"a": X, "b": X}, Y.to(torch.uint8))])
        assert inputs is X
        assert torch.equal(targets, Y)
        assert images_in(two) == 4

    @pytest.mark.parametrize(
        ("batch", "text"),
        [
            (X, "batch 0 of train .epoch 1. is a Tensor, not a pair"),
            ((X, Y, Y), "tuple of 3, not a pair"),
            (("x", Y), "inputs are a str"),
            ((X, [0, 1, 2, 3]), "targets are a list"),
            ((X, Y.float()), "targets are torch.float32"),
            ((X, Y[:3]), r"4 inputs but targets of shape \(3,\)"),
            ((X, Y - 1), "target -1 is negative"),
            ((X[:0], Y[:0]), "hold no batch"),
            (((X, X[:2]), Y), "hold no batch"),
            ((X.index_fill(2, torch.tensor([1]), float("nan")), Y), r"8 of 16 input values are NaN.*\(0, 0, 1, 0\)"),
            ((X - float("inf"), Y), "16 of 16 input values"),
        ],
    )
    def test_a_bad_batch_is_named(self, batch, text):
        with pytest.raises(DataError, match=text):
            read([batch])

    def test_large_finite_values_are_not_taken_for_nan(self):
        large = torch.full((2, 3), 3e38)
        assert len(read([(large, Y[:2])])) == 1

    def test_an_empty_loader(self):
        with pytest.raises(DataError, match=r"train loader \(list\) is empty"):
            read([])

    def test_a_generator_is_used_up_on_the_second_epoch(self):
        loader = ((X, Y) for _ in range(2))
        assert len(read(loader)) == 2
        with pytest.raises(DataError, match=r"no batch on epoch 2: it is used up.*not a generator"):
            read(loader, epoch=1)

    def test_targets_must_fit_the_outputs(self):
        check_targets(Y, torch.zeros(4, 3), "batch 0")
        check_targets(torch.zeros(4, 5, 5).long(), torch.zeros(4, 3, 5, 5), "batch 0")
        with pytest.raises(DataError, match=r"target 2 is out of range, the network has 2 outputs \(0 to 1\)"):
            check_targets(Y, torch.zeros(4, 2), "batch 0")
        with pytest.raises(DataError, match=r"targets \(4,\) do not fit the network's outputs \(4, 3, 5, 5\)"):
            check_targets(Y, torch.zeros(4, 3, 5, 5), "batch 0")

    def test_data_must_be_iterable_and_given(self):
        with pytest.raises(DataError, match=r"Data.train=.... is a int, which cannot be iterated"):
            Data(train=3)
        with pytest.raises(DataError, match="pass 'distill' needs data to train on, and none was given"):
            Data(val=[(X, Y)]).need("train", who="pass 'distill'")
        loader = [(X, Y)]
        assert Data(train=loader).need("train", who="a test") is loader


class TestDigits:
    def test_the_split_is_fixed_and_every_image_is_in_one_part(self):
        one, two = load_data("digits", augment=False), load_data("digits", seed=7, augment=False)
        test = torch.cat([x for x, _ in one.val])
        assert torch.equal(test, torch.cat([x for x, _ in two.val]))
        assert test.shape == (len(test), 1, 8, 8)
        train = one.train.dataset
        assert len(train) + len(test) == 1797
        assert 0.19 < len(test) / 1797 < 0.21
        assert len(torch.cat([train[i][0][None] for i in range(50)] + [test]).unique(dim=0)) == 50 + len(test)

    def test_normalised_and_enlarged(self):
        data = load_data("digits", image_size=16, batch_size=1000, augment=False)
        inputs, _ = next(iter(data.train))
        assert inputs.shape == (1000, 1, 16, 16)
        assert abs(float(inputs.mean())) < 0.05
        assert 0.7 < float(inputs.std()) < 1.1

    def test_order_follows_seed_and_epoch_alone(self):
        def targets(seed, epoch, before=0):
            loader = load_data("digits", seed=seed, limit=200).train
            for _ in range(before):
                next(iter(loader))
            loader.sampler.set_epoch(epoch)
            return torch.cat([y for _, y in loader])

        assert torch.equal(targets(3, 1), targets(3, 1, before=2))
        assert not torch.equal(targets(3, 1), targets(3, 2))
        assert not torch.equal(targets(3, 1), targets(4, 1))

    def test_limit_and_last_batch(self):
        data = load_data("digits", limit=100, batch_size=64)
        assert [len(y) for _, y in data.train] == [64]  # the remainder of 36 is left out
        assert sum(len(y) for _, y in data.calibration) == 100

    def test_no_folder(self):
        with pytest.raises(DataError, match="digits takes no folder"):
            load_data("digits:here")


def write_idx(path: Path, values: np.ndarray) -> None:
    header = bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape)
    data = header + values.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def write_mnist(folder: Path, suffix: str = "") -> tuple[np.ndarray, np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for part, count in (("t10k", 6), ("train", 12)):
        images, labels = generator.integers(0, 256, (count, 28, 28)), np.arange(count) % 10
        write_idx(folder / f"{part}-images-idx3-ubyte{suffix}", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte{suffix}", labels)
    return images, labels


class TestIdx:
    @pytest.mark.parametrize("suffix", ["", ".gz"])
    @pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
    def test_reads_what_was_written(self, tmp_path, suffix, name):
        images, labels = write_mnist(tmp_path, suffix)
        data = load_data(f"{name}:{tmp_path}", batch_size=4, mean=(0.0,), std=(1.0,), augment=False)
        stored = data.train.dataset
        found = {int(y): x for x, y in (stored[i] for i in range(len(stored))) if int(y) > 1}
        for index in range(2, 10):
            np.testing.assert_allclose(found[index][0].numpy(), images[index] / 255, atol=1e-6)
        assert [tuple(x.shape) for x, _ in data.val] == [(4, 1, 28, 28), (2, 1, 28, 28)]
        assert len(labels) == len(stored)

    def test_torchvision_layout(self, tmp_path):
        write_mnist(tmp_path / "MNIST" / "raw")
        assert len(load_data(f"mnist:{tmp_path}", batch_size=2).val) == 3

    def test_missing_files_say_what_and_how(self, tmp_path):
        with pytest.raises(
            DataError, match=rf"looked in {tmp_path} for train-images-idx3-ubyte.*dataset-fashion-mnist"
        ):
            load_data(f"fashion-mnist:{tmp_path}")

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            (lambda data: data[:-1], "is truncated: its header announces 24 bytes .*holds 23"),
            (lambda data: data + b"x", "is too long"),
            (lambda data: data[:9], "its header ends after 9 bytes"),
            (lambda data: b"\0\0\x0b\x03" + data[4:], "begins with 00000b03, not 00000803"),
            (lambda data: b"", "begins with nothing"),
            (lambda data: data[:4] + b"\xff" * 12, "not plausible"),
            (lambda data: data[:4] + b"\0" * 12, "not plausible"),
        ],
    )
    def test_damage_is_found(self, tmp_path, change, text):
        path = tmp_path / "images"
        write_idx(path, np.zeros((2, 3, 4)))
        path.write_bytes(change(path.read_bytes()))
        with pytest.raises(DataError, match=text):
            read_idx(path, dims=3)

    def test_damaged_gzip(self, tmp_path):
        path = tmp_path / "images.gz"
        write_idx(path, np.random.default_rng(0).integers(0, 256, (20, 30, 40)))
        whole = path.read_bytes()
        for damaged in (whole[: len(whole) // 2], b"not gzip", whole[:600] + b"\xff\x00\xff" + whole[603:]):
            path.write_bytes(damaged)
            with pytest.raises(DataError, match=r"images\.gz"):
                read_idx(path, dims=3)

    def test_counts_and_labels_are_compared(self, tmp_path):
        write_mnist(tmp_path)
        write_idx(tmp_path / "train-labels-idx1-ubyte", np.arange(11))
        with pytest.raises(DataError, match=r"12 images.*11 labels"):
            load_data(f"mnist:{tmp_path}")
        write_idx(tmp_path / "train-labels-idx1-ubyte", np.arange(12))
        with pytest.raises(DataError, match="label 11"):
            load_data(f"mnist:{tmp_path}")


class TestImages:
    def test_random_crop_shifts_each_image(self):
        torch.manual_seed(0)
        images = torch.zeros(64, 2, 5, 5)
        images[:, :, 2, 2] = torch.tensor([1.0, 2.0])
        moved = random_crop(images, 1)
        assert moved.shape == images.shape
        assert torch.equal(moved.sum((2, 3)), images.sum((2, 3)))  # the bright pixel stays inside
        places = {tuple(row.tolist()) for row in moved[:, 0].nonzero()[:, 1:]}
        assert places == {(i, j) for i in (1, 2, 3) for j in (1, 2, 3)}
        assert torch.equal(moved[:, 0] * 2, moved[:, 1])  # channels move together

    def test_flip_mirrors_some(self):
        torch.manual_seed(0)
        images = torch.rand(64, 1, 3, 3)
        out = Recipe((0.0,), (1.0,), flip=True)(images)
        same = (out == images).flatten(1).all(1)
        mirrored = (out == images.flip(-1)).flatten(1).all(1)
        assert bool((same | mirrored).all())
        assert 16 < int(mirrored.sum()) < 48

    def test_bytes_are_scaled(self):
        out = Recipe((0.5,), (0.25,))(torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1))
        assert out.flatten().tolist() == [-2.0, 2.0]

    def test_one_image_and_a_small_set(self):
        dataset = ImageTensors(torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 2]), Recipe((0.0,), (1.0,)))
        assert dataset[1][0].shape == (1, 2, 2)
        assert [len(y) for _, y in make_loader(dataset, 8, shuffle=True)] == [3]  # nothing is left out of too little


def write_folder(root: Path, parts=("train", "val"), classes=("cat", "dog")) -> None:
    for part in parts:
        for shade, name in enumerate(classes):
            folder = root / part / name
            folder.mkdir(parents=True)
            for index in range(3):
                Image.new("RGB", (20, 16), (100 * shade, 10 * index, 0)).save(folder / f"{index}.png")


class TestFolder:
    def test_reads_images(self, tmp_path):
        write_folder(tmp_path, parts=("train", "test"))
        data = load_data(f"folder:{tmp_path}", image_size=8, batch_size=2, mean=(0, 0, 0), std=(1, 1, 1), augment=False)
        inputs, targets = next(iter(data.val))
        assert inputs.shape == (2, 3, 8, 8)
        assert targets.tolist() == [0, 0]
        assert torch.allclose(inputs[1, 1], torch.tensor(10 / 255))
        images, labels = (torch.cat(parts) for parts in zip(*data.train, strict=True))
        assert torch.allclose(images[:, 0].mean((1, 2)), labels * 100 / 255)
        assert len(torch.cat([y for _, y in data.calibration])) == 6

    def test_normalised_like_imagenet_by_default(self, tmp_path):
        write_folder(tmp_path)
        inputs, _ = next(iter(load_data(f"folder:{tmp_path}").val))
        assert inputs.shape == (6, 3, 224, 224)
        assert torch.allclose(inputs[0, 0], torch.tensor(-0.485 / 0.229))

    def test_missing_and_differing_parts(self, tmp_path):
        with pytest.raises(DataError, match="looked for train, and for test or val"):
            load_data(f"folder:{tmp_path}")
        write_folder(tmp_path, parts=("train",))
        write_folder(tmp_path, parts=("val",), classes=("cat", "cow"))
        with pytest.raises(DataError, match="differ: only one of them has cow, dog"):
            load_data(f"folder:{tmp_path}")

    def test_empty_class_and_broken_image(self, tmp_path):
        write_folder(tmp_path)
        (tmp_path / "val" / "cat" / "1.png").write_bytes(b"no image")
        data = load_data(f"folder:{tmp_path}", image_size=8)
        with pytest.raises(DataError, match=r"cat/1\.png is not a readable image"):
            list(data.val)
        (tmp_path / "train" / "emu").mkdir()
        with pytest.raises(DataError, match=r"no image folder in.*emu"):
            load_data(f"folder:{tmp_path}")


class TestCifar10:
    def test_reads_torchvision_format(self, tmp_path, monkeypatch):
        from torchvision.datasets import CIFAR10, cifar

        monkeypatch.setattr(cifar, "check_integrity", lambda path, md5=None: Path(path).is_file())
        folder = tmp_path / CIFAR10.base_folder
        folder.mkdir()
        pixels = np.arange(2 * 3072).reshape(2, 3072).astype(np.uint8)
        for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
            (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": [3, 9]}))
        (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
        for root in (tmp_path, folder):
            data = load_data(f"cifar10:{root}", mean=(0, 0, 0), std=(1, 1, 1))
            inputs, targets = next(iter(data.val))
            np.testing.assert_allclose(inputs.numpy(), pixels.reshape(2, 3, 32, 32) / 255, atol=1e-6)
            assert targets.tolist() == [3, 9]
            assert len(data.train.dataset) == 10

    def test_missing_or_damaged(self, tmp_path):
        with pytest.raises(DataError, match=r"looked in .*cifar-10-batches-py for data_batch_1"):
            load_data(f"cifar10:{tmp_path}")
        with pytest.raises(DataError, match=r"cifar10 needs a folder. Write cifar10:DIR"):
            load_data("cifar10")


def test_images_as_a_network_takes_them(tmp_path):
    inputs, _ = next(iter(load_data_like("digits", torch.zeros(1, 3, 16, 16), batch_size=5).val))
    assert inputs.shape == (5, 3, 16, 16)
    assert torch.equal(inputs[:, 0], inputs[:, 2])
    with pytest.raises(DataError, match=r"takes inputs \(1, 1, 8, 9\)"):
        load_data_like("digits", torch.zeros(1, 1, 8, 9))
    write_folder(tmp_path)
    with pytest.raises(DataError, match="images of 3 channels cannot become images of 1"):
        load_data_like(f"folder:{tmp_path}", torch.zeros(1, 1, 8, 8))


def test_unknown_names_and_numbers():
    with pytest.raises(DataError, match=r"unknown data 'digitz'. Known: digits, mnist\[:DIR\]"):
        load_data("digitz")
    for option in ("batch_size", "image_size", "channels", "limit"):
        with pytest.raises(DataError, match=f"{option} 0 is out of range"):
            load_data("digits", **{option: 0})
    with pytest.raises(DataError, match="do not fit images of 1 channels"):
        load_data("digits", mean=(0.0, 0.0, 0.0))
