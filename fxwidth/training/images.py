"""Labelled images, held in memory as tensors on one device, and the batches made of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from fxwidth.errors import FxwidthError


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
        """Return uint8 images (N, C, H, W) as float32 of mean 0 and variance 1 per channel, channels last in memory."""
        return ((images.float() - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def training_batches(self, batch_size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield one epoch of augmented, normalised batches of equal size, in an order drawn from `generator`."""
        # All random numbers come from the CPU: a seed means the same batches on every device.
        order = torch.randperm(len(self.train), generator=generator)
        size = min(batch_size, len(self.train))
        for start in range(0, len(order) - size + 1, size):
            index = order[start : start + size].to(self.train.labels.device)
            images = augment(self.train.images[index], self.shift, self.flip, generator)
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


def augment(images: Tensor, shift: int, flip: bool, generator: torch.Generator) -> Tensor:
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
