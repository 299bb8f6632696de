"""The curves of a training run: accuracy, loss, parameters and widths over steps, as one picture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fxwidth.training.runs import TrainingResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LEGEND_ROWS = 16  # more groups than this are drawn without a legend
_SMOOTHING = 50  # the loss curve is a mean over a window of one in so many steps


def save_curves(result: TrainingResult, path: Path) -> None:
    """Write the curves of a training run to `path` as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    _draw_accuracy(axes[0, 0], result)
    _draw_loss(axes[0, 1], result)
    _draw_parameters(axes[1, 0], result)
    _draw_widths(axes[1, 1], result)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("step")
    figure.savefig(path, dpi=120, format="png")


def _draw_accuracy(axis: Axes, result: TrainingResult) -> None:
    axis.plot([r.step for r in result.epochs], [100 * r.test_accuracy for r in result.epochs], marker="o", markersize=3)
    axis.set_title("test accuracy (%)")


def _draw_loss(axis: Axes, result: TrainingResult) -> None:
    losses = np.asarray(result.losses)
    window = max(1, len(losses) // _SMOOTHING)
    if len(losses):
        smooth = np.convolve(losses, np.full(window, 1 / window), mode="valid")
        axis.plot(np.arange(window, len(losses) + 1), smooth, label="training")
    if result.epochs:
        axis.plot([r.step for r in result.epochs], [r.test_loss for r in result.epochs], label="test")
    if axis.lines:
        axis.legend()
    axis.set_yscale("log")
    axis.set_title("loss")


def _draw_parameters(axis: Axes, result: TrainingResult) -> None:
    steps = [0, *(resize["step"] for resize in result.resizes), result.steps]
    values = [result.params_before, *(resize["params_after"] for resize in result.resizes), result.params_after]
    axis.step(steps, values, where="post")
    axis.set_yscale("log")
    axis.set_title("parameters")


def _draw_widths(axis: Axes, result: TrainingResult) -> None:
    paths = list(_width_paths(result))
    for group, steps, widths in paths:
        axis.step(steps, widths, where="post", label=group, linewidth=1)
    axis.set_yscale("log")
    axis.set_title("widths of the channel groups")
    if 0 < len(paths) <= _LEGEND_ROWS:
        axis.legend(fontsize="x-small", ncols=2)


def _width_paths(result: TrainingResult) -> Iterator[tuple[str, list[int], list[int]]]:
    """Yield each channel group that was resized, with the steps of its changes and the widths from then on."""
    for group, width in result.widths_before.items():
        steps, widths = [0], [width]
        for resize in result.resizes:
            if group in resize["widths"]:
                steps.append(resize["step"])
                widths.append(resize["widths"][group][1])
        if len(steps) > 1:
            yield group, [*steps, result.steps], [*widths, widths[-1]]
