"""A resized network in onnxruntime, at any batch: pip install 'fxwidth[deploy]'."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import onnxruntime
import torch
from torch import nn

import fxwidth


class Classifier(nn.Module):
    """Convolutions, and attention over what is left of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2))
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return scores of classes, [batch, 10]."""
        tokens = self.stem(images).flatten(2).transpose(1, 2)
        mixed: torch.Tensor = self.attention(tokens, tokens, tokens, need_weights=False)[0]
        scores: torch.Tensor = self.head((tokens + mixed).mean(1))
        return scores


def main(batch: int) -> float:
    """Return the largest difference between a resized network and onnxruntime."""
    torch.manual_seed(0)
    net, images = Classifier().eval(), torch.randn(4, 3, 16, 16)
    before = sum(parameter.numel() for parameter in net.parameters())
    gm = fxwidth.evolve(net, images, params=0.5)
    print(f"{before} -> {sum(parameter.numel() for parameter in gm.parameters())} parameters")

    given = torch.randn(batch, 3, 16, 16)
    sizes = ({0: torch.export.Dim("batch", min=1, max=1024)},)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        file = Path(folder, "network.onnx")
        written = torch.onnx.export(gm, (images,), dynamo=True, dynamic_shapes=sizes, verbose=False)
        assert written is not None
        written.save(file)
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        (made,) = session.run(None, {session.get_inputs()[0].name: given.numpy()})
        difference = float((torch.from_numpy(made) - gm(given)).abs().max())
    print(f"onnxruntime differs by {difference:.1e} at a batch of {batch}")
    return difference


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=7)
    main(parser.parse_args().batch)
