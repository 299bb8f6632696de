"""Evolving a network while Lightning trains it: pip install 'fxwidth[demo]' lightning."""

from __future__ import annotations

import argparse

import lightning
import torch
from sklearn.datasets import load_digits
from torch import Tensor, fx, nn
from torch.utils.data import DataLoader, TensorDataset

import fxwidth
from fxwidth.integrations.lightning import EvolverCallback


class Classifier(lightning.LightningModule):
    """A graph that is trained on labels."""

    def __init__(self, net: fx.GraphModule) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:  # noqa: ARG002
        """Return the loss of a batch."""
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer, whose state is resized with the network."""
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main(epochs: int) -> float:
    """Train on digits of 8x8 pixels, and return the accuracy on those that were held out."""
    lightning.seed_everything(0, verbose=False)
    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
    train = DataLoader(TensorDataset(images[300:], labels[300:]), batch_size=32, shuffle=True)
    net = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
    module = Classifier(fxwidth.trace(net, images[:2]))
    steps = epochs * len(train)
    # A quarter of the parameters, in four resizes within the first half of the training.
    evolver = EvolverCallback("net", params=0.25, rounds=4, every=max(1, steps // 8))
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", callbacks=[evolver], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, train)
    module.net.eval()
    with torch.no_grad():
        accuracy = float((module.net(images[:300]).argmax(1) == labels[:300]).float().mean())
    print(f"accuracy {100 * accuracy:.1f} %, {sum(p.numel() for p in module.net.parameters()):,} parameters")
    return accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    main(parser.parse_args().epochs)
