"""What does a network lose in each of twenty evolutions while it trains, and what do they cost?

    python benchmarks/evolving.py --data PATH

A convolutional network with batch norm is trained on MNIST and evolved every 200 steps, from above and from below; at
its target it breathes. The loss on 2,000 test images is taken before and after each event. Writes a table, a record
and a picture to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import fxwidth
from benchmarks.support.machine import machine
from benchmarks.support.results import options_of, write
from benchmarks.support.tables import header, heading, line
from fxwidth.evolution.evolver import parameter_count
from fxwidth.runtime.contexts import evaluating
from fxwidth.training.datasets import load_dataset
from fxwidth.training.images import ImageData

EVENTS, EVERY = 20, 200
TARGET = 8_000
# Widths of the convolutions at the start.
STARTS = {"from above": (32, 64, 64), "from below": (6, 8, 8)}
KINDS = ("shrinks to the target", "grows to the target", "grows at the target", "folds back")


@dataclass(frozen=True)
class Event:
    """One evolution: what it did, the loss before and after it, and how long it took."""

    start: str
    step: int
    kind: str
    before: float
    after: float
    params: int
    seconds: float


@dataclass(frozen=True)
class Curve:
    """A training: the test loss every 50 steps, and the median seconds of a step."""

    start: str
    steps: list[int]
    losses: list[float]
    step_seconds: float
    accuracy: float


def main() -> None:
    """Train from both sides and write the results."""
    options = _parse_options()
    torch.set_num_threads(options.threads)
    data = load_dataset("mnist", options.data)
    runs = [run(start, data) for start in STARTS]
    events = [event for own, _ in runs for event in own]
    curves = [curve for _, curve in runs]
    record = {"machine": machine(), "events": [asdict(e) for e in events], "curves": [asdict(c) for c in curves]}
    write("evolving", render(events, curves), record, options.results)
    draw(events, curves, options.results / "evolving.png")


def network(widths: tuple[int, int, int]) -> nn.Module:
    """Return a network of three convolutions with batch norm."""
    layers: list[nn.Module] = []
    channels = 1
    for width in widths:
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [nn.MaxPool2d(2)]
        channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(9 * channels, 10))


def run(start: str, data: ImageData) -> tuple[list[Event], Curve]:
    """Train and evolve a network from one side."""
    torch.manual_seed(0)
    gm = fxwidth.trace(network(STARTS[start]), data.normalize(data.test.images[:2])).train()
    optimizer = torch.optim.AdamW(gm.parameters(), lr=2e-3)
    steps = (EVENTS + 1) * EVERY
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    evolver = fxwidth.Evolver(gm, optimizer, every=EVERY, params=TARGET, stop=EVENTS * EVERY)
    events: list[Event] = []
    seconds, at, losses = [], [], []
    batches = (batch for epoch in count() for batch in _epoch(data, epoch))
    for step, (x, y) in zip(range(1, steps + 1), batches, strict=False):
        started = time.perf_counter()
        F.cross_entropy(gm(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        seconds.append(time.perf_counter() - started)
        is_due = step % EVERY == 0 and not evolver.finished
        before, params = loss_on_test_images(gm, data) if is_due else 0.0, parameter_count(gm)
        started = time.perf_counter()
        plan = evolver.step(x, y)
        took = time.perf_counter() - started
        if plan is not None:
            kind = _kind(evolver.history[-1]["phase"], parameter_count(gm) > params)
            events.append(Event(start, step, kind, before, loss_on_test_images(gm, data), parameter_count(gm), took))
        if step % 50 == 0:
            at.append(step)
            losses.append(loss_on_test_images(gm, data))
    return events, Curve(start, at, losses, statistics.median(seconds), _accuracy(gm, data))


def _kind(phase: str, grows: bool) -> str:
    shrinks_to, grows_to, grows_at, folds = KINDS
    return {"grow": grows_at, "fold": folds}.get(phase, grows_to if grows else shrinks_to)


def _epoch(data: ImageData, epoch: int) -> Any:
    return data.training_batches(64, torch.Generator().manual_seed(epoch))


@torch.no_grad()
def loss_on_test_images(gm: fx.GraphModule, data: ImageData) -> float:
    """Return the loss on 2,000 test images."""
    with evaluating(gm):
        images, labels = data.normalize(data.test.images[:2000]), data.test.labels[:2000]
        return float(F.cross_entropy(gm(images), labels))


@torch.no_grad()
def _accuracy(gm: fx.GraphModule, data: ImageData) -> float:
    with evaluating(gm):
        right = [gm(images).argmax(1) == labels for images, labels in data.test_batches(500)]
    return float(torch.cat(right).float().mean())


def render(events: list[Event], curves: list[Curve]) -> str:
    """Return the results as markdown."""
    lines = heading("What evolving costs while a network trains", machine())
    lines += [
        (
            f"MNIST, batch size 64, an event every {EVERY} steps, {TARGET:,} parameters at the end; losses are of "
            "2,000 test images."
        ),
        "",
    ]
    for curve in curves:
        own = [event for event in events if event.start == curve.start]
        lines += [
            (
                f"- {curve.start}: {len(own)} events, {100 * curve.accuracy:.2f} % in the end, a step takes "
                f"{1000 * curve.step_seconds:.1f} ms (median)"
            )
        ]
    lines += ["", *header("start", "kind", "events", "greatest rise of the loss", "greatest difference of the loss",
                          "median, s", f"of {EVERY} steps")]  # fmt: skip
    for curve in curves:
        for kind in KINDS:
            own = [event for event in events if (event.start, event.kind) == (curve.start, kind)]
            if own:
                seconds = statistics.median(event.seconds for event in own)
                rise = max(event.after / event.before - 1 for event in own)
                apart = max(abs(event.after - event.before) for event in own)
                share = seconds / (EVERY * curve.step_seconds)
                lines += [line(curve.start, kind, len(own), f"{100 * rise:.2f} %", f"{apart:.1e}", f"{seconds:.2f}",
                               f"{100 * share:.1f} %")]  # fmt: skip
    lines += ["", *header("start", "step", "kind", "parameters", "loss before", "loss after", "s")]
    lines += [
        line(e.start, e.step, e.kind, e.params, f"{e.before:.4f}", f"{e.after:.4f}", f"{e.seconds:.2f}") for e in events
    ]
    return "\n".join([*lines, "", "![Test loss and parameters over steps](evolving.png)"]) + "\n"


def draw(events: list[Event], curves: list[Curve], path: Path) -> None:
    """Draw the loss and the parameters over steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(2, len(curves), sharex=True, sharey="row", squeeze=False)
    for column, curve in enumerate(curves):
        own = [event for event in events if event.start == curve.start]
        loss, params = axes[0, column], axes[1, column]
        loss.plot(curve.steps, curve.losses, linewidth=1)
        for event in own:
            loss.plot([event.step, event.step], [event.before, event.after], color="tab:red", marker=".", linewidth=1)
        loss.set(title=f"{curve.start}: test loss (red: before and after an event)", yscale="log")
        params.step([event.step for event in own], [event.params for event in own], where="post")
        params.set(title="parameters", yscale="log", xlabel="step")
    figure.savefig(path, dpi=110)


def _parse_options() -> argparse.Namespace:
    parser = options_of(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of MNIST's files")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
