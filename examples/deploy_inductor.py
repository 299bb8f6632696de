"""A resized network compiled by inductor, at once and ahead of time: pip install fxwidth, and a C++ compiler."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch import nn

import fxwidth


def main(batch: int) -> float:
    """Return the largest difference between a resized network and what is compiled of it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10)).eval()
    rows = torch.randn(4, 32)
    before = sum(parameter.numel() for parameter in net.parameters())
    gm = fxwidth.evolve(net, rows, params=0.5, align=8)
    print(f"{before} -> {sum(parameter.numel() for parameter in gm.parameters())} parameters")

    given, differences = torch.randn(batch, 32), []
    with torch.no_grad():
        wanted = gm(given)
        compiled = torch.compile(gm, dynamic=True)
        differences.append(float((compiled(given) - wanted).abs().max()))
        print(f"torch.compile differs by {differences[-1]:.1e} at a batch of {batch}")
        program = torch.export.export(gm, (rows,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=1024)},))
        with tempfile.TemporaryDirectory() as folder:
            package = str(Path(folder, "network.pt2"))
            torch._inductor.aoti_compile_and_package(program, package_path=package)
            packaged = torch._inductor.aoti_load_package(package)
            differences.append(float((packaged(given) - wanted).abs().max()))
        print(f"the AOTInductor package differs by {differences[-1]:.1e} at a batch of {batch}")
    return max(differences)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=7)
    main(parser.parse_args().batch)
