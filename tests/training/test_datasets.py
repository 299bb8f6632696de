"""Data sets, where their files must be, and the batches made of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fxwidth import FxwidthError
from fxwidth.training.datasets import load_dataset
from fxwidth.training.images import ImageData, augment


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_dataset("digits").subsample(96)


def test_digits_are_divided_the_same_in_every_run() -> None:
    first, second = load_dataset("digits"), load_dataset("digits")
    assert torch.equal(first.test.images, second.test.images)
    assert len(first.train) + len(first.test) == 1797
    assert first.test.labels.bincount().min() >= 34  # every class is tested
    assert (first.channels, first.image_size, len(first.classes)) == (1, 8, 10)


def test_normalised_images_have_mean_zero_and_variance_one() -> None:
    data = load_dataset("digits")
    images = data.normalize(data.train.images)
    assert images.mean().abs() < 1e-4
    assert abs(images.std() - 1) < 1e-3


def test_batches_cover_an_epoch_and_follow_the_seed(digits: ImageData) -> None:
    def epoch(seed: int) -> list[torch.Tensor]:
        return [labels for _, labels in digits.training_batches(40, torch.Generator().manual_seed(seed))]

    assert [len(labels) for labels in epoch(0)] == [40, 40]
    assert digits.steps_per_epoch(40) == 2
    assert torch.equal(torch.cat(epoch(0)), torch.cat(epoch(0)))
    assert not torch.equal(torch.cat(epoch(0)), torch.cat(epoch(1)))
    assert sum(len(labels) for _, labels in digits.test_batches(40)) == len(digits.test)


def test_shifts_move_whole_images_within_a_frame_of_zeros(digits: ImageData) -> None:
    shifting = replace(digits, shift=2)
    images = torch.zeros(50, 3, 9, 9, dtype=torch.uint8)
    images[:, :, 4, 4] = torch.tensor([1, 2, 3], dtype=torch.uint8)
    shifted = augment(images, shifting.shift, False, torch.Generator().manual_seed(0))
    assert shifted.shape == images.shape
    rows, columns = shifted[:, 2].eq(3).nonzero()[:, 1:].unbind(1)
    assert len(rows) == 50  # no image lost its dot
    assert {*rows.tolist()} == {*columns.tolist()} == {2, 3, 4, 5, 6}
    assert torch.equal(shifted[:, 0] * 2, shifted[:, 1])


def test_flips_mirror_about_half_of_the_images(digits: ImageData) -> None:
    images = digits.train.images
    flipped = augment(images, 0, True, torch.Generator().manual_seed(0))
    mirrored = sum(torch.equal(new, old.flip(2)) for new, old in zip(flipped, images, strict=True))
    kept = sum(torch.equal(new, old) for new, old in zip(flipped, images, strict=True))
    assert mirrored + kept == len(images)
    assert min(mirrored, kept) > len(images) // 4


def test_grey_images_are_repeated_without_more_memory(digits: ImageData) -> None:
    coloured = digits.with_channels(3)
    assert coloured.channels == 3
    assert coloured.train.images.data_ptr() == digits.train.images.data_ptr()
    images, _ = next(coloured.training_batches(8, torch.Generator().manual_seed(0)))
    assert torch.equal(images[:, 0], images[:, 2])
    with pytest.raises(FxwidthError, match="images of 3 channels cannot be given 1 channels"):
        coloured.with_channels(1)


def test_images_are_scaled() -> None:
    assert load_dataset("digits", image_size=16).train.images.shape[1:] == (1, 16, 16)


def write_mnist(path: Path, count: int = 12) -> None:
    """Write `count` images in MNIST's file format, in place of the real ones."""
    path.mkdir(parents=True)
    for part in ("train", "t10k"):
        images = np.arange(count * 784, dtype=np.uint32).astype(np.uint8)
        header = np.array([2051, count, 28, 28], dtype=">u4")
        (path / f"{part}-images-idx3-ubyte").write_bytes(header.tobytes() + images.tobytes())
        labels = np.arange(count, dtype=np.uint8) % 10
        (path / f"{part}-labels-idx1-ubyte").write_bytes(
            np.array([2049, count], dtype=">u4").tobytes() + labels.tobytes()
        )


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_mnist_is_read_from_its_files(name: str, folder: str, tmp_path: Path) -> None:
    write_mnist(tmp_path / folder / "raw")
    data = load_dataset(name, tmp_path)
    assert (len(data.train), len(data.test), data.channels, data.image_size) == (12, 12, 1, 28)
    assert data.train.labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert data.shift == 2


@pytest.mark.parametrize(
    ("name", "torchvision_name", "where"),
    [
        ("mnist", "MNIST", r"train-images-idx3-ubyte.*\) into .*MNIST/raw and run again with --data"),
        (
            "cifar10",
            "CIFAR10",
            r"data_batch_1 to data_batch_5.*\) into .*cifar-10-batches-py and run again with --data",
        ),
    ],
)
def test_missing_files_say_where_they_belong(
    name: str, torchvision_name: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torchvision.datasets

    def download(_: object) -> None:
        raise RuntimeError("no network")

    monkeypatch.setattr(getattr(torchvision.datasets, torchvision_name), "download", download)
    with pytest.raises(
        FxwidthError, match=rf"the data set {name} is not in .*\(no network\)\. Put its files \({where}"
    ):
        load_dataset(name, tmp_path)


def write_images(folder: Path, count: int, color: tuple[int, int, int]) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (20 + i, 30), color).save(folder / f"{i}.png")


def test_undivided_image_folder(tmp_path: Path) -> None:
    write_images(tmp_path / "blue", 10, (0, 0, 255))
    write_images(tmp_path / "red", 6, (255, 0, 0))
    data = load_dataset(str(tmp_path), image_size=16)
    assert data.classes == ("blue", "red")
    assert data.train.images.shape == (12, 3, 16, 16)
    assert data.test.labels.tolist() == [0, 0, 1, 1]
    assert data.test.images[0, :, 0, 0].tolist() == [0, 0, 255]


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_divided_image_folder(held_out: str, tmp_path: Path) -> None:
    for part, count in (("train", 3), (held_out, 2)):
        for name in ("a", "b"):
            write_images(tmp_path / part / name, count, (9, 9, 9))
    data = load_dataset(str(tmp_path))
    assert (len(data.train), len(data.test), data.image_size) == (6, 4, 64)


def test_image_folder_errors(tmp_path: Path) -> None:
    with pytest.raises(
        FxwidthError, match=r"'nowhere' is neither a data set \(digits, mnist, .*must have one sub-folder"
    ):
        load_dataset("nowhere")
    with pytest.raises(FxwidthError, match=r"cannot be read .*must have one sub-folder of images for each class"):
        load_dataset(str(tmp_path))
    write_images(tmp_path / "a", 1, (1, 2, 3))
    with pytest.raises(FxwidthError, match="one image a class, which leaves none to train on"):
        load_dataset(str(tmp_path))
    write_images(tmp_path / "train" / "a", 1, (1, 2, 3))
    write_images(tmp_path / "val" / "b", 1, (1, 2, 3))
    with pytest.raises(FxwidthError, match=r"has the classes a, but .* has b: both must have the same sub-folders"):
        load_dataset(str(tmp_path))
