"""Half of a YOLO of ultralytics, which is trained, saved and loaded as before: pip install fxwidth ultralytics."""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from ultralytics import YOLO
from ultralytics.cfg import get_cfg
from ultralytics.nn.tasks import DetectionModel

import fxwidth


def scenes(count: int) -> dict[str, Tensor]:
    """Return a batch, as ultralytics has them, of images of one bright rectangle on noise."""
    images, corner, size = (
        torch.rand(count, 3, 64, 64) / 4,
        torch.randint(0, 32, (count, 2)),
        torch.full((count, 2), 24),
    )
    for image, (left, top) in zip(images, corner.tolist(), strict=True):
        image[:, top : top + 24, left : left + 24] += 0.7
    boxes = torch.cat([corner + size / 2, size], 1) / 64
    return {"img": images, "batch_idx": torch.arange(count).float(), "cls": torch.zeros(count, 1), "bboxes": boxes}


def train(model: DetectionModel, steps: int) -> float:
    """Train with the loss of the model itself, and return the mean loss of the last steps."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses: list[float] = []
    for _ in range(steps):
        loss = model.loss(scenes(8))[0].sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    last = losses[-max(1, steps // 5) :]
    return sum(last) / len(last)


def main(steps: int, name: str = "yolo11n.yaml") -> float:
    """Train, keep half, train again, save, and return the last loss in parts of the first training's."""
    torch.manual_seed(0)
    yolo = YOLO(name)
    yolo.model.args = get_cfg()
    for module in yolo.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1  # of so short a training, running statistics would know little
    before = train(yolo.model, steps)
    print(f"loss {before:.3f}, {sum(p.numel() for p in yolo.model.parameters()):,} parameters")

    yolo.model = fxwidth.evolve(
        yolo.model.eval(), scenes(2)["img"], params=0.5, data=[scenes(8)["img"] for _ in range(8)], output="module"
    )
    after = train(yolo.model, steps)
    with TemporaryDirectory() as folder:
        yolo.save(Path(folder) / "half.pt")
        again = YOLO(Path(folder) / "half.pt")
    found = again.predict(scenes(1)["img"], verbose=False)[0]
    parameters = sum(p.numel() for p in again.model.parameters())
    print(f"loss {after:.3f}, {parameters:,} parameters, {len(found.boxes)} boxes in an image")
    return after / before


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--model", default="yolo11n.yaml")
    arguments = parser.parse_args()
    main(arguments.steps, arguments.model)
