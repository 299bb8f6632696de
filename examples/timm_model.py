"""Half of a timm model, as a timm model: pip install 'fxwidth[demo]' timm."""

from __future__ import annotations

import argparse

import timm
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fxwidth


def train(model: nn.Module, loader: DataLoader[tuple[Tensor, ...]], epochs: int, rate: float) -> None:
    """Train as ever."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * len(loader))
    for _ in range(epochs):
        for images, labels in loader:
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of images that are told right."""
    return float((model.eval()(images).argmax(1) == labels).float().mean())


def main(epochs: int, name: str = "test_resnet") -> float:
    """Train, keep half, train a little more, and return the accuracy on digits that were held out."""
    torch.manual_seed(0)
    digits = load_digits()
    images = nn.functional.interpolate(torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, scale_factor=4)
    labels = torch.tensor(digits.target)
    loader = DataLoader(TensorDataset(images[300:], labels[300:]), batch_size=32, shuffle=True, drop_last=True)
    model = timm.create_model(name, num_classes=10, in_chans=1)
    train(model, loader, epochs, 3e-3)
    print(f"before: {100 * accuracy(model, images[:300], labels[:300]):.1f} %")

    # Labels count towards what is worth keeping; eight batches are enough.
    data = [batch for batch, _ in zip(loader, range(8), strict=False)]
    small = fxwidth.evolve(model, images[:2], params=0.5, data=data, loss=nn.functional.cross_entropy, output="module")
    print(f"resized: {100 * accuracy(small, images[:300], labels[:300]):.1f} %")
    train(small, loader, max(1, epochs // 3), 1e-3)
    after = accuracy(small, images[:300], labels[:300])
    parameters = sum(p.numel() for p in small.parameters())
    print(f"trained: {100 * after:.1f} %, {type(small).__name__} of {parameters:,} parameters")
    return after


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--model", default="test_resnet")
    arguments = parser.parse_args()
    main(arguments.epochs, arguments.model)
