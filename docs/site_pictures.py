"""The pictures of the site: groups of a network, a spectrum with its cut, and widths while a network trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, fx, nn

import fxwidth

mpl.use("Agg")
mpl.rcParams["svg.hashsalt"] = "fxwidth"  # the same file each time


class Block(nn.Module):
    """A residual block between a stem and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(12, 16)
        self.first, self.second = nn.Linear(16, 24), nn.Linear(24, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Return the head's outputs, [batch, 4]."""
        x = self.stem(x)
        written: Tensor = self.head(x + self.second(torch.relu(self.first(x))))
        return written


def draw_groups(path: Path) -> None:
    """Draw the channel groups of a residual block."""
    fxwidth.analyze(fxwidth.trace(Block(), torch.randn(2, 12))).draw(path)


def draw_spectrum(path: Path) -> None:
    """Draw the singular values of what a trained layer writes."""
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    show_spectrum(axes)
    _save(figure, path)


def draw_widths(path: Path) -> None:
    """Draw the widths of a network while it trains."""
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    show_widths(axes)
    _save(figure, path)


def show_spectrum(axes: Axes) -> None:
    """Show the singular values of what a trained layer writes, and where half of the parameters are cut."""
    gm, batches, _ = _trained(None)
    wg = fxwidth.analyze(gm)
    width: Any = fxwidth.plan(wg, params=0.5, data=batches)["2"]
    activations = _hidden(gm, batches[0][0])
    values = torch.linalg.svdvals(activations - activations.mean(0)).tolist()
    axes.semilogy(range(1, len(values) + 1), values, marker=".", color="#2b7bba")
    axes.axvline(width + 0.5, color="#c44e52", linestyle="--", label=f"cut to {width} of {len(values)}")
    axes.set(xlabel="direction", ylabel="singular value")
    axes.legend(frameon=False)


def show_widths(axes: Axes) -> None:
    """Show the widths of a network that an Evolver resizes while it learns digits."""
    _, _, evolver = _trained(700)
    assert evolver is not None
    steps: list[int] = [0]
    widths: dict[str, list[int]] = {"0": [64], "2": [64]}
    for record in evolver.history:
        steps.append(record["step"])
        for name, own in widths.items():
            own.append(record["widths"].get(name, [0, own[-1]])[1])
    for name, own in widths.items():
        axes.step([*steps, 700], [*own, own[-1]], where="post", label=f"layer {name}")
    axes.set(xlabel="training step", ylabel="width", ylim=(0, None))
    axes.legend(frameon=False)


PICTURES: dict[str, Callable[[Path], None]] = {
    "groups.svg": draw_groups,
    "spectrum.svg": draw_spectrum,
    "widths.svg": draw_widths,
}


def _trained(evolved_by: int | None) -> tuple[fx.GraphModule, list[tuple[Tensor, Tensor]], fxwidth.Evolver | None]:
    """Return a small network trained on digits, batches of them, and the Evolver that resized it, if one has."""
    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    gm = fxwidth.trace(net, images[:2])
    optimizer = torch.optim.AdamW(gm.parameters(), lr=3e-3)
    evolver = None
    if evolved_by is not None:
        evolver = fxwidth.Evolver(gm, optimizer, params=0.2, rounds=5, every=50, stop=600)
    for _ in range(evolved_by or 400):
        batch = torch.randint(len(images), (64,))
        nn.functional.cross_entropy(gm(images[batch]), labels[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
        if evolver is not None:
            evolver.step(images[batch])
    return gm, [(images[:512], labels[:512])], evolver


def _hidden(gm: fx.GraphModule, images: Tensor) -> Tensor:
    """Return what the second layer writes after its activation, [images, 64]."""
    with torch.no_grad():
        for name in ("0", "1", "2", "3"):
            images = gm.get_submodule(name)(images)
    return images


def _save(figure: Figure, path: Path) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, facecolor="white", metadata={"Date": None})
    plt.close(figure)


def draw_overview(path: Path) -> None:
    """Draw the spectrum and the widths beside each other, for README."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
    show_spectrum(left)
    show_widths(right)
    _save(figure, path)


if __name__ == "__main__":
    draw_overview(Path(__file__).parent / "overview.svg")
