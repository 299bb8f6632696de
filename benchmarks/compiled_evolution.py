"""Does compiled training follow an evolution, and does the backend of torch.compile make what `evolve` makes?

A small CNN is trained by `fxwidth.compile(gm)` through 50 resizes of an Evolver: what is compiled is counted, and from
time to time its steps are timed beside those of a copy that `torch.compile` has compiled afresh, in turns. Then
`fxwidth.compile_backend` is compared with `fxwidth.evolve` on four models. Run from the repository's root:

    python benchmarks/compiled_evolution.py
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import fxwidth
from benchmarks.compiled_models import MODELS, compare
from benchmarks.support.children import in_child
from benchmarks.support.machine import machine
from benchmarks.support.results import options_of, write
from benchmarks.support.tables import header, heading, line
from fxwidth.evolution.evolver import parameter_count

RESIZES, EVERY, TIMED_AT, PAIRS, WARM = 50, 4, 10, 40, 5
BATCH, SIZE = 32, 16


def network() -> nn.Module:
    """Return a small CNN with batch norms."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 48, 3, stride=2, padding=1), nn.BatchNorm2d(48), nn.ReLU(),
        nn.Conv2d(48, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def batch() -> tuple[Tensor, Tensor]:
    """Return noise, and labels that it tells."""
    x = torch.randn(BATCH, 3, SIZE, SIZE)
    return x, x.flatten(1)[:, :10].argmax(1)


def step(call: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> float:
    """Train one step; return its seconds."""
    start = time.perf_counter()
    nn.functional.cross_entropy(call(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - start


def timed(gm: fx.GraphModule, compiled: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Time steps of a graph as it is compiled, and of a copy that is compiled afresh, in turns."""
    other = copy.deepcopy(gm)
    fresh, its = torch.compile(other), torch.optim.AdamW(other.parameters(), lr=1e-3)
    found: dict[str, list[float]] = {"compiled": [], "fresh": []}
    for turn in range(WARM + PAIRS):
        x, y = batch()
        seconds = {"compiled": step(compiled, optimizer, x, y), "fresh": step(fresh, its, x, y)}
        if turn >= WARM:
            for name, value in seconds.items():
                found[name].append(value)
    medians = {name: 1e3 * statistics.median(values) for name, values in found.items()}
    return {**medians, "ratio": medians["compiled"] / medians["fresh"], "parameters": parameter_count(gm)}


def evolve() -> dict[str, Any]:
    """Train through all resizes, in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    gm = fxwidth.trace(network(), batch()[0])
    optimizer = torch.optim.AdamW(gm.parameters(), lr=1e-3)
    evolver = fxwidth.Evolver(
        gm, optimizer, params=0.4, rounds=6, every=EVERY, stop=RESIZES * EVERY, breath=1.5, align=8
    )
    compiled = fxwidth.compile(gm)
    counters = torch._dynamo.utils.counters
    times, breaks, failed = [], 0, 0
    for count in range(1, RESIZES * EVERY + 1):
        x, y = batch()
        counters.clear()
        step(compiled, optimizer, x, y)
        breaks += sum(counters["graph_break"].values())
        failed += counters["frames"]["total"] - counters["frames"]["ok"]
        evolver.step(x)
        if count % (TIMED_AT * EVERY) == 0:
            times.append({"resizes": len(evolver.history), **timed(gm, compiled, optimizer)})
            print(times[-1], compiled, file=sys.stderr, flush=True)
    return {
        "resizes": len(evolver.history),
        "networks": compiled.networks,
        "graphs": compiled.graphs,
        "graph_breaks": breaks,
        "frames_not_compiled": failed,
        "times": times,
    }


def measure(what: str, inner: str) -> dict[str, Any]:
    """Return one measurement, in this process."""
    return evolve() if what == "evolution" else compare(what, inner)


def render(evolution: dict[str, Any], models: list[dict[str, Any]], facts: dict[str, str], inner: str) -> str:
    """Return the results as markdown."""
    lines = heading("Evolution under torch.compile", {**facts, "beside": "other programs were running"})
    lines += [
        f"A small CNN in training, by `fxwidth.compile(gm)` with inductor; an Evolver with `align=8`, {EVERY} steps"
    ]
    lines += [
        "from one resize to the next. A network is a set of widths that the graph has had when it was called.",
        "",
    ]
    lines += header("resizes", "networks", "graphs compiled", "graph breaks", "frames not compiled")
    keys = ("resizes", "networks", "graphs", "graph_breaks", "frames_not_compiled")
    lines += [line(*(evolution[key] for key in keys)), ""]
    lines += [f"Medians of {PAIRS} steps, in turns with those of a copy that `torch.compile` has compiled afresh:", ""]
    lines += header("after resizes", "parameters", "followed, ms", "afresh, ms", "ratio")
    for row in evolution["times"]:
        cells = [f"{row[key]:.2f}" for key in ("compiled", "fresh", "ratio")]
        lines.append(line(row["resizes"], row["parameters"], *cells))
    lines += [
        "",
        f"`compile_backend(params=0.5, data=..., inner={inner!r})` beside `evolve` with the same options: the",
    ]
    lines += ["largest difference of outputs, at the batch of four and at one of three, and the largest output.", ""]
    lines += header("model", "parameters", "by evolve", "by the backend", "same shapes", "difference", "at 3", "output")
    for row in models:
        cells = [f"{row[key]:.1e}" for key in ("difference", "difference_at_another_batch", "largest_output")]
        counts = [row[key] for key in ("parameters", "by_evolve", "by_backend")]
        lines.append(line(row["model"], *counts, "yes" if row["same_shapes"] else "no", *cells))
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run all cases and write the results, or one case in the role of a child."""
    parser = options_of(__doc__)
    parser.add_argument("--inner", default="inductor", help="the inner backend of compile_backend")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.inner)))
        return
    evolution = in_child(__file__, "--measure", "evolution")
    models = [in_child(__file__, "--measure", name, "--inner", options.inner) for name in MODELS]
    facts = machine("torch", "torchvision", "transformers")
    record = {"machine": facts, "inner": options.inner, "evolution": evolution, "models": models}
    write("compiled-evolution", render(evolution, models, facts, options.inner), record, options.results)


if __name__ == "__main__":
    main()
