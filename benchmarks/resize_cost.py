"""What does a resize by magnitude cost, from the model to the smaller one, beside Torch-Pruning's?

    python benchmarks/resize_cost.py

Half of the channels of every free group go, without folding. Ours is `trace`, `analyze` and `resize`; Torch-Pruning's
is `MagnitudePruner` with its dependency graph, and one step at half of the channels. Every run is a process of its own
with one thread, in turns. The figures are CPU seconds, so that other work on the machine does not count: of the first
run in a process, as a user has it, and the best of those after it. Writes a JSON and a markdown table to
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import fxwidth
from benchmarks.support.children import in_child
from benchmarks.support.machine import machine
from benchmarks.support.results import options_of, write
from benchmarks.support.tables import header, heading, line
from fxwidth.evolution.evolver import parameter_count

MODELS = ("resnet18", "resnet50")
SIZE = 224
TURNS, REPEATS = 3, 3


def build(name: str) -> tuple[nn.Module, Tensor]:
    """Return a model in eval mode, and an input for it."""
    torch.manual_seed(0)
    models = importlib.import_module("torchvision.models")
    return models.get_model(name, weights=None).eval(), torch.randn(1, 3, SIZE, SIZE)


def shrink(model: nn.Module, example: Tensor) -> int:
    """Halve all free groups; return how many parameters are left."""
    gm = fxwidth.trace(model, example)
    widths = {group.name: max(1, group.width // 2) for group in fxwidth.analyze(gm).free}
    fxwidth.resize(gm, widths, selection="magnitude", fold=False)
    return parameter_count(gm)


def prune(model: nn.Module, example: Tensor) -> int:
    """Do so with Torch-Pruning, as its documentation shows."""
    pruning = importlib.import_module("torch_pruning")
    classifier = [module for module in model.modules() if isinstance(module, nn.Linear) and module.out_features == 1000]
    importance = pruning.importance.MagnitudeImportance(p=2)
    pruner = pruning.pruner.MagnitudePruner(model, example, importance, pruning_ratio=0.5, ignored_layers=classifier)
    pruner.step()
    return parameter_count(model)


def measure(name: str, who: str) -> dict[str, Any]:
    """Time one contestant, in this process."""
    torch.set_num_threads(1)
    times, left = [], 0
    for _ in range(1 + REPEATS):
        model, example = build(name)
        start = time.process_time()
        left = {"fxwidth": shrink, "torch_pruning": prune}[who](model, example)
        times.append(time.process_time() - start)
    return {"first": times[0], "later": min(times[1:]), "parameters": left}


def run_case(name: str) -> dict[str, Any]:
    """Time both contestants in turns; return medians over the turns."""
    runs: dict[str, list[dict[str, Any]]] = {"fxwidth": [], "torch_pruning": []}
    for _ in range(TURNS):
        for who, found in runs.items():
            found.append(in_child(__file__, "--measure", name, who))
    row: dict[str, Any] = {"model": name}
    for who, found in runs.items():
        row[who] = {key: statistics.median(run[key] for run in found) for key in ("first", "later", "parameters")}
    return row


def render(rows: list[dict[str, Any]], facts: dict[str, str]) -> str:
    """Return the results as markdown."""
    lines = heading("The cost of a resize by magnitude", facts)
    lines += [f"CPU seconds for one image of {SIZE} x {SIZE}; half of the channels of every free group go."]
    lines += ["First is the first run in a process, later the best of those after it; medians over processes.", ""]
    titles = [[f"fxwidth, {when}", f"Torch-Pruning, {when}", "ratio"] for when in ("first", "later")]
    lines += header("model", *titles[0], *titles[1])
    for row in rows:
        cells = [row["model"]]
        for key in ("first", "later"):
            own, other = row["fxwidth"][key], row["torch_pruning"][key]
            cells += [f"{own:.2f}", f"{other:.2f}", f"{own / other:.1f}"]
        lines.append(line(*cells))
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run all cases and write the results, or one case in the role of a child."""
    parser = options_of(__doc__)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(*options.measure)))
        return
    rows = []
    for name in MODELS:
        rows.append(run_case(name))
        print(rows[-1], flush=True)
    facts = machine("torch", "torchvision", "torch-pruning")
    write("resize-cost", render(rows, facts), {"machine": facts, "cases": rows}, options.results)


if __name__ == "__main__":
    main()
