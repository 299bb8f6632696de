"""Image classification data sets by name: digits, MNIST and its like, CIFAR-10, image folders."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fxwidth.errors import FxwidthError
from fxwidth.training.images import ImageData, Split

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
    return replace(_image_data("digits", tuple(str(name) for name in digits.target_names), train, test), shift=1)


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
        FxwidthError: there is no such folder, it holds no or too few images, or train/ and test/ have other classes.
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
        if len(train) == 0:
            raise FxwidthError(f"{path} has one image a class, which leaves none to train on: add images")
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
