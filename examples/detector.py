"""A detector of torchvision that is resized between two trainings: pip install 'fxwidth[demo]'."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torchvision.models.detection import ssdlite320_mobilenet_v3_large

import fxwidth

Target = dict[str, Tensor]


def scenes(count: int) -> tuple[list[Tensor], list[Target]]:
    """Return images of one bright rectangle on noise, and where it is."""
    images, targets = [], []
    for _ in range(count):
        image = torch.rand(3, 96, 96) / 4
        left, top = torch.randint(0, 48, (2,)).tolist()
        width, height = torch.randint(24, 48, (2,)).tolist()
        image[:, top : top + height, left : left + width] += 0.7
        box = torch.tensor([[left, top, left + width, top + height]], dtype=torch.float32)
        images.append(image)
        targets.append({"boxes": box, "labels": torch.tensor([1])})
    return images, targets


def train(detector: nn.Module, steps: int) -> float:
    """Train as ever, and return the mean loss of the last steps."""
    detector.train()
    optimizer = torch.optim.AdamW(detector.parameters(), lr=1e-3)
    losses: list[float] = []
    for _ in range(steps):
        loss = sum(detector(*scenes(8)).values())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    last = losses[-max(1, steps // 5) :]
    return sum(last) / len(last)


def main(steps: int, detector: nn.Module | None = None) -> float:
    """Train, resize to 60 %, train again, and return the last loss in parts of the first training's."""
    torch.manual_seed(0)
    if detector is None:
        detector = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=2, image_size=96)
    before = train(detector, steps)
    parameters = sum(p.numel() for p in detector.parameters())
    print(f"loss {before:.3f}, {parameters:,} parameters")

    # What a detector runs depends on what it finds: it is analysed along the way that these images take.
    images, _ = scenes(2)
    gm = fxwidth.trace(detector.eval(), (images,))
    data = [(scenes(8)[0],) for _ in range(2)]
    plan = fxwidth.plan(fxwidth.analyze(gm), params=0.6, data=data)
    fxwidth.resize(gm, plan, data=data)

    # The detector itself has the new widths, and its losses with them.
    after = train(detector, steps)
    parameters = sum(p.numel() for p in detector.parameters())
    boxes = detector.eval()(images)[0]["boxes"]
    print(f"loss {after:.3f}, {parameters:,} parameters, {len(boxes)} boxes in the first image")
    return after / before


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    main(parser.parse_args().steps)
