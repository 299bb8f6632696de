"""Image classification data sets, held in memory as tensors: digits, MNIST and its like, CIFAR-10, image folders."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fxwidth.errors import FxwidthError

DATASETS = ("digits", "mnist", "fashion-mnist", "cifar10")

_TORCHVISION_CLASSES = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10"}
_FILES = {
    "mnist": (
        "MNIST/raw",
        "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte",
    ),
    "fashion-mnist": (
        "FashionMNIST/raw",
        "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte",
    ),
    "cifar10": ("cifar-10-batches-py", "data_batch_1 to data_batch_5, test_batch, batches.meta"),
}
_FOLDER_IMAGE_SIZE = 64
_TEST_EVERY = 5  # one image in five of an undivided folder (or of digits) is a test image


@dataclass(frozen=True)
class Split:
    """Images (N, C, H, W) as uint8 and their labels (N) as int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class ImageData:
    """A data set in memory, with the statistics that normalise it and the augmentation that suits it."""

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split
    mean: Tensor  # (C, 1, 1), in units of the uint8 values, as is std
    std: Tensor
    shift: int = 0  # training images move by up to so many pixels
    flip: bool = False  # training images are mirrored at random

    @property
    def channels(self) -> int:
        """Return the number of channels of an image."""
        return self.train.images.shape[1]

    @property
    def image_size(self) -> int:
        """Return the height, which is the width, of an image."""
        return self.train.images.shape[-1]

    def normalize(self, images: Tensor) -> Tensor:
        """Return uint8 images (N, C, H, W) as float32, per channel of mean 0 and variance 1, channels last in memory."""
        return ((images.float() - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def training_batches(self, batch_size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield one epoch of augmented, normalised batches of equal size, in an order drawn from `generator`."""
        # All random numbers come from the CPU: a seed means the same batches on every device.
        order = torch.randperm(len(self.train), generator=generator)
        size = min(batch_size, len(self.train))
        for start in range(0, len(order) - size + 1, size):
            index = order[start : start + size].to(self.train.labels.device)
            images = _augment(self.train.images[index], self.shift, self.flip, generator)
            yield self.normalize(images), self.train.labels[index]

    def test_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the test images, normalised and in their order, with their labels."""
        for images, labels in zip(self.test.images.split(batch_size), self.test.labels.split(batch_size), strict=True):
            yield self.normalize(images), labels

    def steps_per_epoch(self, batch_size: int) -> int:
        """Return the number of batches in one epoch of training."""
        return len(self.train) // min(batch_size, len(self.train))

    def to(self, device: torch.device) -> ImageData:
        """Return the same data with all tensors on `device`."""
        return replace(
            self,
            train=Split(self.train.images.to(device), self.train.labels.to(device)),
            test=Split(self.test.images.to(device), self.test.labels.to(device)),
            mean=self.mean.to(device),
            std=self.std.to(device),
        )

    def with_channels(self, channels: int) -> ImageData:
        """Return the same data with grey images repeated to `channels` channels, without using more memory.

        Raises:
            FxwidthError: the images are neither grey nor of `channels` channels.
        """
        if self.channels == channels:
            return self
        if self.channels != 1:
            raise FxwidthError(f"{self.name}: images of {self.channels} channels cannot be given {channels} channels")
        return replace(
            self,
            train=replace(self.train, images=self.train.images.expand(-1, channels, -1, -1)),
            test=replace(self.test, images=self.test.images.expand(-1, channels, -1, -1)),
            mean=self.mean.expand(channels, -1, -1),
            std=self.std.expand(channels, -1, -1),
        )

    def subsample(self, count: int) -> ImageData:
        """Return the same data with the first `count` training images and the first `count` test images."""
        return replace(
            self,
            train=Split(self.train.images[:count], self.train.labels[:count]),
            test=Split(self.test.images[:count], self.test.labels[:count]),
        )


def load_dataset(name: str, path: Path | None = None, image_size: int | None = None) -> ImageData:
    """Return a data set by name, or the image folder of that name, scaled to `image_size` if given.

    `path` is the folder in which torchvision finds the files of MNIST and its like, or to which it downloads them.

    Raises:
        FxwidthError: no such data set or folder, or its files are missing and cannot be downloaded.
    """
    if name == "digits":
        data = _load_digits()
    elif name in _TORCHVISION_CLASSES:
        data = _load_torchvision(name, Path("data") if path is None else path)
    else:
        return _load_folder(Path(name), image_size or _FOLDER_IMAGE_SIZE)
    return data if image_size in (None, data.image_size) else _scale(data, image_size)


def _load_digits() -> ImageData:
    """Return scikit-learn's 1,797 handwritten digits of 8x8 pixels; every fifth image is a test image."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    train, test = _divide(images, labels)
    return _image_data("digits", tuple(str(name) for name in digits.target_names), train, test)


def _load_torchvision(name: str, path: Path) -> ImageData:
    """Return one of torchvision's data sets from the files under `path`, downloaded if they are not there."""
    from torchvision import datasets

    dataset_class = getattr(datasets, _TORCHVISION_CLASSES[name])
    folder, files = _FILES[name]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchvision's own; none concerns the caller
            parts = [_open_torchvision(dataset_class, path, train) for train in (True, False)]
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise FxwidthError(
            f"the data set {name} is not in {path} and cannot be downloaded or read ({error}). Put its files ({files}) "
            f"into {path / folder} and run again with --data {path}"
        ) from error
    train, test = (_torchvision_split(part) for part in parts)
    shift, flip = (4, True) if name == "cifar10" else (2, False)
    return replace(_image_data(name, tuple(parts[0].classes), train, test), shift=shift, flip=flip)


def _open_torchvision(dataset_class: Any, path: Path, train: bool) -> Any:
    """Return a part of a torchvision data set; a download is tried only where the files are not there."""
    try:
        return dataset_class(root=path, train=train, download=False)
    except RuntimeError:
        return dataset_class(root=path, train=train, download=True)


def _torchvision_split(part: Any) -> Split:
    """Return the tensors of a torchvision data set that holds all its images in memory."""
    images = torch.as_tensor(part.data)
    images = images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2)
    return Split(images.contiguous(), torch.as_tensor(part.targets).long())


def _load_folder(path: Path, image_size: int) -> ImageData:
    """Return a folder of images, one sub-folder a class: train/ and test/ (or val/), or undivided.

    Raises:
        FxwidthError: there is no such folder, it holds no images, or train/ and test/ have other classes.
    """
    layout = "one sub-folder of images for each class, or train/ and test/ (or val/) that have such sub-folders"
    if not path.is_dir():
        raise FxwidthError(
            f"{str(path)!r} is neither a data set ({', '.join(DATASETS)}) nor a folder. "
            f"A folder of images must have {layout}"
        )
    held_out = next((path / part for part in ("test", "val") if (path / part).is_dir()), None)
    train_path = path / "train" if (path / "train").is_dir() and held_out is not None else path
    classes, train = _read_folder(train_path, image_size, layout)
    if held_out is None or train_path == path:
        train, test = _divide(train.images, train.labels)
    else:
        test_classes, test = _read_folder(held_out, image_size, layout)
        if test_classes != classes:
            raise FxwidthError(
                f"{train_path} has the classes {', '.join(classes)}, but {held_out} has {', '.join(test_classes)}: "
                "both must have the same sub-folders"
            )
    return replace(_image_data(str(path), classes, train, test), shift=image_size // 16, flip=True)


def _read_folder(path: Path, image_size: int, layout: str) -> tuple[tuple[str, ...], Split]:
    """Return the class names and the images of a folder, resized and cropped to squares."""
    from torchvision import datasets, transforms

    transform = transforms.Compose(
        [transforms.Resize(image_size), transforms.CenterCrop(image_size), transforms.PILToTensor()]
    )
    try:
        folder = datasets.ImageFolder(str(path), transform=transform)
        images = torch.stack([image for image, _ in folder])
    except (OSError, RuntimeError) as error:
        raise FxwidthError(f"the image folder {path} cannot be read ({error}). It must have {layout}") from error
    return tuple(folder.classes), Split(images, torch.tensor(folder.targets))


def _divide(images: Tensor, labels: Tensor) -> tuple[Split, Split]:
    """Return training and test images: the latter are every fifth one of each class, the same in every run."""
    in_test = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        in_test[torch.nonzero(labels == label).flatten()[::_TEST_EVERY]] = True
    return Split(images[~in_test], labels[~in_test]), Split(images[in_test], labels[in_test])


def _image_data(name: str, classes: tuple[str, ...], train: Split, test: Split) -> ImageData:
    """Return the data set with the mean and standard deviation of each channel of its training images."""
    values = train.images.float()
    mean = values.mean((0, 2, 3)).view(-1, 1, 1)
    std = values.std((0, 2, 3)).clamp_min(1.0).view(-1, 1, 1)
    return ImageData(name, classes, train, test, mean, std)


def _scale(data: ImageData, image_size: int) -> ImageData:
    """Return the data with its images scaled, bilinearly, to another size."""

    def scaled(split: Split) -> Split:
        size = (image_size, image_size)
        images = F.interpolate(split.images.float(), size, mode="bilinear", antialias=True, align_corners=False)
        return replace(split, images=images.round().clamp(0, 255).to(torch.uint8))

    return replace(data, train=scaled(data.train), test=scaled(data.test))


def _augment(images: Tensor, shift: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Return the images (N, C, H, W), each moved by up to `shift` pixels both ways and mirrored at random."""
    if shift:
        images = _shift(images, torch.randint(2 * shift + 1, (2, len(images)), generator=generator), shift)
    if flip:
        mirrored = torch.rand(len(images), generator=generator).lt(0.5).to(images.device)
        images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)
    return images


def _shift(images: Tensor, offsets: Tensor, shift: int) -> Tensor:
    """Return the images with each cut at its own offset (2, N) out of a frame of zeros of `shift` pixels."""
    count, _, height, width = images.shape
    padded = F.pad(images, (shift, shift, shift, shift))
    top, left = offsets.to(images.device)
    rows = top.view(-1, 1) + torch.arange(height, device=images.device)
    columns = left.view(-1, 1) + torch.arange(width, device=images.device)
    sample = torch.arange(count, device=images.device)
    # Indexing with tensors around a slice moves the channels last.
    return padded[sample.view(-1, 1, 1), :, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)
