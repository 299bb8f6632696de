"""Evolving a network in a training loop of one's own: pip install 'fxwidth[demo]'."""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn

import fxwidth


def main(epochs: int) -> float:
    """Train on digits of 8x8 pixels, and return the accuracy on those that were held out."""
    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(4, 10),
    )  # fmt: skip
    gm = fxwidth.trace(net, images[:2])
    steps = epochs * (len(images[300:]) // 32)
    optimizer = torch.optim.AdamW(gm.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    # From few parameters to 3,000 in four resizes; then channels go where they are needed, until three quarters.
    evolver = fxwidth.Evolver(
        gm, optimizer, params=3_000, rounds=4, every=max(1, steps // 16), stop=steps * 3 // 4,
        loss=nn.functional.cross_entropy, directions="tiny",
    )  # fmt: skip
    for _ in range(epochs):
        for batch in (300 + torch.randperm(len(images) - 300)).split(32):
            if len(batch) < 32:
                continue
            x, y = images[batch], labels[batch]
            nn.functional.cross_entropy(gm(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            if evolver.step(x, y) is not None:
                record = evolver.history[-1]
                print(f"step {record['step']}: {record['phase']}, {record['params_after']:,} parameters")
    gm.eval()
    with torch.no_grad():
        accuracy = float((gm(images[:300]).argmax(1) == labels[:300]).float().mean())
    print(f"accuracy {100 * accuracy:.1f} %, {sum(p.numel() for p in gm.parameters()):,} parameters")
    return accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    main(parser.parse_args().epochs)
