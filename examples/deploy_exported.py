"""A resized network in files that need no code of the model, read in a process of their own: pip install fxwidth."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from torch import nn

import fxwidth

# What runs where the network is used: nothing there knows fxwidth, nor the class of the model.
READ = {
    "exported.pt2": "model = torch.export.load(file).module()",
    "traced.pt": "model = torch.jit.load(file)",
}
RUN = "import sys, torch; file, given, made = sys.argv[1:]; {}; torch.save(model(torch.load(given)), made)"


def main(batch: int) -> float:
    """Return the largest difference between a resized network and what other processes make of its files."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(32, 10),
    ).eval()  # fmt: skip
    images = torch.randn(4, 3, 16, 16)
    program = torch.export.export(net, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    smaller = fxwidth.evolve(program, params=0.5)
    print(f"{sum(p.numel() for p in net.parameters())} -> {sum(p.numel() for p in smaller.parameters())} parameters")

    given, differences = torch.randn(batch, 3, 16, 16), []
    module = smaller.module()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        # torch.jit is deprecated; some run times still read nothing else.
        warnings.simplefilter("ignore", FutureWarning)
        torch.export.save(smaller, Path(folder, "exported.pt2"))
        torch.jit.save(torch.jit.trace(fxwidth.trace(smaller), images), Path(folder, "traced.pt"))
        torch.save(given, Path(folder, "given.pt"))
        for name, reading in READ.items():
            command = [sys.executable, "-c", RUN.format(reading), name, "given.pt", "made.pt"]
            subprocess.run(command, check=True, cwd=folder)
            difference = float((torch.load(Path(folder, "made.pt")) - module(given)).detach().abs().max())
            print(f"{name}: another process differs by {difference:.1e} at a batch of {batch}")
            differences.append(difference)
    return max(differences)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=7)
    main(parser.parse_args().batch)
