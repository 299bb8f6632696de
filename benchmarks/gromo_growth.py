"""Beside gromo 0.1.0, on one of its own containers: how good is a network that has grown, and what does growth cost?

    pip install --no-deps gromo==0.1.0 && pip install torchmetrics
    python benchmarks/gromo_growth.py [--data FOLDER_WITH_MNIST]

A `GrowingMLP` of gromo grows both of its hidden layers by half, twice, while it trains: by gromo's own methods, with
the scale of new neurons that is best on held-out batches, and, traced, by fxwidth's. All see the same batches in the
same order and end at the same widths; a network that starts at these stands beside them. gromo makes new parameters, so
that Adam begins anew with each of its events. Without a folder the networks train on the 8 x 8 digits of scikit-learn.
Seconds are those of one event, gathering included. Writes a JSON and a markdown table to benchmarks/results/.
"""

from __future__ import annotations

import importlib
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import fxwidth
from benchmarks.directions import Split, batches, digits, mnist
from benchmarks.support.machine import machine
from benchmarks.support.results import options_of, write
from benchmarks.support.tables import header, heading, line

HIDDEN, EVENTS, LOOKS = 8, (0.25, 0.4), 8
SCALES = (0.03, 0.1, 0.3, 1.0, 3.0)  # those that gromo's new neurons may have
GROMO: dict[str, dict[str, Any]] = {
    "gromo, TINY": {"compute_delta": False},
    "gromo, GradMax": {
        "compute_delta": False,
        "use_covariance": False,
        "alpha_zero": True,
        "use_projection": False,
        "ignore_singular_values": True,
    },
}
FXWIDTH: dict[str, dict[str, Any]] = {
    "fxwidth, orthogonal": {"directions": "orthogonal"},
    "fxwidth, gradmax": {"directions": "gradmax"},
    "fxwidth, tiny": {"directions": "tiny"},
    "fxwidth, tiny, step": {"directions": "tiny", "reader_step": True},
}
LAST = "last widths from the first step"


@dataclass(frozen=True)
class Run:
    """What a network reaches by a method with one seed, and what its events did.

    `moved` is by how much outputs change at an event, as a share of their greatest size; `fell` by how much the loss on
    held-out images does.
    """

    method: str
    seed: int
    accuracy: float
    test_loss: float
    params: int
    event_seconds: float
    moved: float
    fell: float


def container(width: int, pixels: int) -> nn.Module:
    """Return gromo's network of two hidden layers."""
    mlp = importlib.import_module("gromo.containers.growing_mlp")
    made: nn.Module = mlp.GrowingMLP(pixels, 10, width, 2, activation=nn.SELU(), device=torch.device("cpu"))
    return made


def grow_by_gromo(net: Any, more: int, method: dict[str, Any], looks: list[Split]) -> None:
    """Grow each hidden layer, one behind the other, as gromo's documentation does."""
    held = looks[-2:]
    for index in range(2):
        net.set_growing_layers(index=index)
        net.init_computation()
        for x, y in looks[:-2]:
            net.zero_grad()
            F.cross_entropy(net(x), y, reduction="sum").backward()
            net.update_computation()
        net.compute_optimal_updates(maximum_added_neurons=more, **method)
        net.reset_computation()
        net.select_update(0)

        def loss_at(scale: float) -> float:
            net.set_scaling_factor(scale)
            with torch.no_grad():
                return sum(float(F.cross_entropy(net.extended_forward(x), y)) for x, y in held)

        net.set_scaling_factor(min(SCALES, key=loss_at))
        net.apply_change()


def run(method: str, data: tuple[Split, Split], seed: int, steps: int) -> Run:
    """Train a network that grows by a method."""
    torch.manual_seed(seed)
    train, test = data
    more = HIDDEN // 2
    start = HIDDEN + more * len(EVENTS) if method == LAST else HIDDEN
    net = container(start, train[0][0].numel())
    if method in FXWIDTH:
        net = fxwidth.trace(net, train[0][:4])
    optimizer: torch.optim.Optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    drawn, seen = batches(train, 64, seed), batches(train, 64, seed + 100)
    seconds, moved, fell = [], [], []
    probe = train[0][:500], train[1][:500]
    for step in range(steps):
        if method != LAST and step in [round(share * steps) for share in EVENTS]:
            looks = [next(seen) for _ in range(LOOKS)]
            before = _scores(net, probe)
            started = time.perf_counter()
            optimizer = _grow(net, method, more, looks, optimizer)
            seconds.append(time.perf_counter() - started)
            after = _scores(net, probe)
            moved.append(float((after - before).abs().max() / before.abs().max()))
            fell.append(float(F.cross_entropy(before, probe[1]) - F.cross_entropy(after, probe[1])))
        x, y = next(drawn)
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    scores = _scores(net, test)
    return Run(
        method,
        seed,
        accuracy=100 * float((scores.argmax(1) == test[1]).float().mean()),
        test_loss=float(F.cross_entropy(scores, test[1])),
        params=sum(parameter.numel() for parameter in net.parameters()),
        event_seconds=statistics.fmean(seconds or [0]),
        moved=max(moved, default=0),
        fell=statistics.fmean(fell or [0]),
    )


def _grow(
    net: Any, method: str, more: int, looks: list[Split], optimizer: torch.optim.Optimizer
) -> torch.optim.Optimizer:
    if method in GROMO:
        grow_by_gromo(net, more, GROMO[method], looks)
        return torch.optim.Adam(net.parameters(), lr=3e-3)
    options = dict(FXWIDTH[method])
    if options["directions"] != "orthogonal":  # which refuses data, since it would not look at them
        options |= {"data": looks, "loss": F.cross_entropy}
    widths = {group.name: group.width + more for group in fxwidth.analyze(net).free}
    fxwidth.resize(net, widths, optimizer=optimizer, **options)
    return optimizer


def _scores(net: Callable[..., torch.Tensor], data: Split) -> torch.Tensor:
    with torch.no_grad():
        return net(data[0])


def render(runs: list[Run], facts: dict[str, str]) -> str:
    """Return the results as markdown."""
    lines = heading("Growth of gromo's own container, by gromo and by fxwidth", facts)
    lines += ["Means over the seeds; accuracy with the standard deviation.", ""]
    lines += header(
        "method", "test accuracy (%)", "test loss", "parameters", "an event (s)", "outputs move by at most",
        "loss falls at an event by",
    )  # fmt: skip
    for method in dict.fromkeys(run.method for run in runs):
        own = [run for run in runs if run.method == method]
        accuracies = [run.accuracy for run in own]
        spread = statistics.stdev(accuracies) if len(own) > 1 else 0.0
        loss, params = (
            statistics.fmean(figures) for figures in zip(*((run.test_loss, run.params) for run in own), strict=True)
        )
        cells = [f"{statistics.fmean(accuracies):.2f} ± {spread:.2f}", f"{loss:.4f}", round(params)]
        if method == LAST:
            lines.append(line(method, *cells, "", "", ""))
            continue
        seconds, fell = (
            statistics.fmean(figures) for figures in zip(*((run.event_seconds, run.fell) for run in own), strict=True)
        )
        cells += [f"{seconds:.3f}", f"{max(run.moved for run in own):.1e}", f"{fell:.4f}"]
        lines.append(line(method, *cells))
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run all methods with all seeds, and write what was found."""
    parser = options_of(__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=600)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = digits() if options.data is None else mnist(options.data)
    methods = [*GROMO, *FXWIDTH, LAST]
    runs = [run(method, data, seed, options.steps) for method in methods for seed in range(options.seeds)]
    facts = machine("torch", "gromo") | {
        "images": "digits of scikit-learn" if options.data is None else "MNIST at 14 x 14",
        "runs": f"{options.seeds} seeds, {options.steps} steps of 64 images",
    }
    write(
        "gromo-growth", render(runs, facts), {"machine": facts, "runs": [asdict(one) for one in runs]}, options.results
    )


if __name__ == "__main__":
    main()
