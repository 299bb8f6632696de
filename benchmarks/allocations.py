"""How flat is the choice of widths on the batch-norm MLP: is there a split of a budget that beats uniform widths?

    python benchmarks/allocations.py --data PATH

The MLP of benchmarks/trained_networks.py, trained on MNIST from several seeds, is shrunk to a share of its parameters
with many splits of them between its three groups: the first and the last at multiples of their uniform width, the one
in between at what the budget leaves; and with the widths that `fxwidth.plan` chooses. Means over the seeds of test loss
and accuracy, without fine-tuning, and of what planned widths gain over uniform ones on the same network, with its
standard error. Writes a markdown table to benchmarks/results/.
"""

from __future__ import annotations

import copy
import itertools
import statistics
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch
from torch import fx

sys.path.insert(0, str(Path(__file__).parent.parent))
import fxwidth
from benchmarks.shrinking import uniform
from benchmarks.support.results import options_of, write
from benchmarks.support.tables import header, line
from benchmarks.trained_networks import Images, load_images, loss_and_accuracy, trained
from fxwidth.costs.counts import parameter_count

NETWORK = "batch-norm-mlp"
SHARES, COUNTS = (0.5, 0.25), (0, 32, 128, 1024)
FIRST, LAST = (0.8, 0.88, 0.94, 1.0, 1.04), (0.6, 0.8, 1.0, 1.3, 1.7)
BATCH = 128
Figures = tuple[float, float]


def splits(graph: fxwidth.WidthGraph, share: float) -> Iterator[tuple[str, list[int]]]:
    """Yield splits of a share of the parameters between the three groups, with their names."""
    budget = round(share * _count(graph, [group.width for group in graph.free]))
    even = list(uniform(graph, budget).widths.values())
    yield "uniform", even
    for first, last in itertools.product(FIRST, LAST):
        ends = int(even[0] * first), int(even[2] * last)
        fitting = [w for w in range(1, graph.free[1].width + 1) if _count(graph, [ends[0], w, ends[1]]) <= budget]
        if fitting and (first, last) != (1.0, 1.0):
            yield f"{first:.2f}, {last:.2f}", [ends[0], fitting[-1], ends[1]]


def _count(graph: fxwidth.WidthGraph, widths: list[int]) -> int:
    return parameter_count(graph, {group.factor: width for group, width in zip(graph.free, widths, strict=True)})


def measure(gm: fx.GraphModule, share: float, images: int, data: tuple[Images, Images]) -> dict[str, Figures]:
    """Return test loss and accuracy of one network for every split and for the plan."""
    batches = data[0].first(images).images.split(BATCH) if images else None
    graph = fxwidth.analyze(gm)
    names = [group.name for group in graph.free]
    plans = {key: fxwidth.Plan(dict(zip(names, widths, strict=True))) for key, widths in splits(graph, share)}
    plans["planned"] = fxwidth.plan(graph, params=share, data=batches)
    return {
        key: loss_and_accuracy(fxwidth.resize(copy.deepcopy(gm), plan, data=batches).eval(), data[1])
        for key, plan in plans.items()
    }


def render(rows: dict[tuple[float, int], list[dict[str, Figures]]], seeds: int) -> str:
    """Return the results as markdown."""
    lines = ["# Splits of a budget on the batch-norm MLP", ""]
    lines += [f"torch {version('torch')}, 1 thread; means over {seeds} seeds; loss, and accuracy in %. Splits are"]
    lines += ["named by the first and the last group's multiple of its uniform width. The gain is the loss of uniform"]
    lines += ["widths less that of planned ones on the same network, with its standard error.", ""]
    titles = ("share", "images", "uniform", "planned", "gain", "split of least loss", "split of best accuracy")
    lines += header(*titles)
    for (share, images), runs in rows.items():
        keys = set.intersection(*map(set, runs))
        mean = {key: tuple(statistics.mean(run[key][i] for run in runs) for i in range(2)) for key in sorted(keys)}
        given = {key: figures for key, figures in mean.items() if key != "planned"}
        least, best = min(given, key=lambda key: given[key][0]), max(given, key=lambda key: given[key][1])
        gains = [run["uniform"][0] - run["planned"][0] for run in runs]
        error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else float("nan")
        cells = [_cell(mean["uniform"]), _cell(mean["planned"]), f"{statistics.mean(gains):.4f} ± {error:.4f}"]
        cells += [f"{key}: {_cell(mean[key])}" for key in (least, best)]
        lines.append(line(f"{share:.0%}", images or "none", *cells))
    return "\n".join(lines) + "\n"


def _cell(figures: tuple[float, ...]) -> str:
    return f"{figures[0]:.4f}, {100 * figures[1]:.2f}"


def main() -> None:
    """Train the networks, measure all splits, and write the table."""
    parser = options_of(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of MNIST's files")
    parser.add_argument("--models", type=Path, default=Path("benchmark-models"), help="where trained networks are kept")
    parser.add_argument("--seeds", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = load_images(options.data)
    rows: dict[tuple[float, int], list[dict[str, Figures]]] = {}
    for seed in range(options.seeds):
        gm = fxwidth.trace(trained(NETWORK, data[0], options.models, seed), data[0].images[:2])
        for share, images in itertools.product(SHARES, COUNTS):
            rows.setdefault((share, images), []).append(measure(gm, share, images, data))
    table = render(rows, options.seeds)
    write("allocations", table, folder=options.results)


if __name__ == "__main__":
    main()
