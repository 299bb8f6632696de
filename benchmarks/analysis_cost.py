"""What does an analysis cost, beside one FakeTensorProp of the same graph and beside Torch-Pruning's dependency graph?

    python benchmarks/analysis_cost.py

Each case runs in a process of its own with one thread, where the contestants take turns; the figures are medians of
CPU seconds, so that other work on the machine does not count. Torch-Pruning runs first in a process with a time and a
memory limit; it takes part only where it ends. Peaks of memory are read as Linux gives them. Writes a JSON and a
markdown table to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import resource
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

sys.path.insert(0, str(Path(__file__).parent.parent))
import fxwidth
from benchmarks.support.children import ChildError, in_child
from benchmarks.support.machine import machine
from benchmarks.support.measures import GIB, MIB, exponent, forget_peak, peak
from benchmarks.support.results import options_of, write
from benchmarks.support.tables import header, heading, line

MODELS = ("resnet50", "densenet121", "densenet201", "vit_b_16", "swin_t", "convnext_tiny")
CHAINS = (125, 250, 500, 1000)  # residual blocks of four ops each
DENSE = (50, 100, 200, 400)  # layers; each reads all that came before
ROUNDS = 3  # of turns
REPEATS = 5  # in one turn
PRUNING_SECONDS = 60  # of CPU time
PRUNING_GIB = 8


class Chain(nn.Module):
    """Residual blocks of convolution, batch norm, ReLU and sum, one behind another."""

    def __init__(self, blocks: int, width: int = 16) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, width, 3, padding=1), nn.Linear(width, 10)
        self.convolutions = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(blocks))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of images."""
        x = self.stem(x)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = x + torch.relu(norm(convolution(x)))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


class Dense(nn.Module):
    """Batch norm, ReLU and convolution, each reading the concatenation of all that came before."""

    def __init__(self, layers: int, width: int = 8) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, width, 3, padding=1), nn.Linear(width * (layers + 1), 10)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width * (i + 1)) for i in range(layers))
        self.convolutions = nn.ModuleList(nn.Conv2d(width * (i + 1), width, 3, padding=1) for i in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of images."""
        features = [self.stem(x)]
        for norm, convolution in zip(self.norms, self.convolutions, strict=True):
            features.append(convolution(torch.relu(norm(torch.cat(features, 1)))))
        logits: Tensor = self.head(torch.cat(features, 1).mean((2, 3)))
        return logits


def build(kind: str, name: str) -> tuple[nn.Module, Tensor]:
    """Return the model of a case, in eval mode, and its input."""
    torch.manual_seed(0)
    if kind == "model":
        models = importlib.import_module("torchvision.models")
        return models.get_model(name, weights=None).eval(), torch.randn(2, 3, 224, 224)
    return {"chain": Chain, "dense": Dense}[kind](int(name)).eval(), torch.randn(2, 3, 8, 8)


def propagate_fakes(gm: fx.GraphModule, example: Tensor) -> None:
    """Run FakeTensorProp as its users do."""
    with torch.no_grad():
        FakeTensorProp(gm, FakeTensorMode(allow_non_fake_inputs=True)).propagate(example)


def build_pruning_groups(model: nn.Module, example: Tensor) -> int:
    """Run Torch-Pruning's analysis as its documentation shows, all groups listed; return how many there are."""
    pruning = importlib.import_module("torch_pruning")
    graph = pruning.DependencyGraph().build_dependency(model, example_inputs=example)
    return sum(1 for _ in graph.get_all_groups())


def measure(kind: str, name: str, with_pruning: bool, repeats: int) -> dict[str, Any]:
    """Time the contestants in turns, in this process."""
    torch.set_num_threads(1)
    model, example = build(kind, name)
    gm = fxwidth.trace(model, example)
    found: list[fxwidth.WidthGraph] = []
    contestants: dict[str, Callable[[], Any]] = {
        "fake_tensor_prop": lambda: propagate_fakes(gm, example),
        "analyze": lambda: found.append(fxwidth.analyze(gm)),
    }
    if with_pruning:
        contestants["torch_pruning"] = lambda: build_pruning_groups(model, example[:1])
    with tempfile.TemporaryDirectory() as folder:
        fxwidth.save(gm, path := Path(folder) / "trace.pt")
        memory = in_child(__file__, "--memory-of", path)
    contestants["analyze"]()
    graph = found[0]
    result: dict[str, Any] = {
        "ops": len(graph.analysis.calls),
        "groups": len(graph.groups),
        "sites": sum(len(group.sites) for group in graph.groups),
        "analyze_mib": memory["mib"],
    }
    del graph
    result |= {name: statistics.median(times) for name, times in _take_turns(contestants, found, repeats).items()}
    return result


def _take_turns(
    contestants: dict[str, Callable[[], Any]], found: list[fxwidth.WidthGraph], repeats: int
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(ROUNDS):
        for name, run in contestants.items():
            for repeat in range(repeats + 1):
                found.clear()
                gc.collect()
                started = time.process_time()
                run()
                if repeat:  # the first warms caches up
                    times[name].append(time.process_time() - started)
    return times


def measure_memory(path: str) -> dict[str, Any]:
    """Analyse a loaded trace in a process that has traced nothing of its size: what is freed would be used again."""
    torch.set_num_threads(1)
    small, image = build("chain", "1")
    fxwidth.analyze(fxwidth.trace(small, image))
    gm = fxwidth.load(path, trusted=True)
    before = forget_peak()
    graph = fxwidth.analyze(gm)
    return {"groups": len(graph.groups), "mib": (peak() - before) / MIB}


def measure_pruning(kind: str, name: str) -> dict[str, Any]:
    """Run Torch-Pruning alone, once: does it end within the limits, and in what memory?"""
    torch.set_num_threads(1)
    limit = PRUNING_GIB * GIB
    model, example = build(kind, name)
    small, image = build("chain", "1")
    build_pruning_groups(small, image)
    before = forget_peak()
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    seconds = int(time.process_time()) + PRUNING_SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    groups = build_pruning_groups(model, example[:1])
    return {"groups": groups, "mib": (peak() - before) / MIB}


def run_case(kind: str, name: str, repeats: int) -> dict[str, Any]:
    """Return all figures of one case."""
    pruning = alone(name) if kind == "model" else "not run"
    flags = ["--with-pruning"] if isinstance(pruning, dict) else []
    result = in_child(__file__, "--measure", kind, name, "--repeats", repeats, *flags)
    return {"kind": kind, "case": name, **result, "torch_pruning_alone": pruning}


def alone(name: str) -> dict[str, Any] | str:
    """Return what Torch-Pruning takes for a model in a process of its own, or why there is no answer."""
    try:
        return in_child(__file__, "--pruning-alone", "model", name)
    except ChildError as error:
        if error.status in (-signal.SIGXCPU, -signal.SIGKILL):
            return f"no end after {PRUNING_SECONDS} s"
        return f"out of memory at {PRUNING_GIB} GiB" if "emory" in error.last else error.last


def render(rows: list[dict[str, Any]], facts: dict[str, str]) -> str:
    """Return the results as markdown."""
    models, chains, dense = ([row for row in rows if row["kind"] == kind] for kind in ("model", "chain", "dense"))
    lines = heading("The cost of an analysis", facts)
    lines += [
        "Medians of CPU seconds; memory is how far an analysis of a loaded trace goes above what was held before it."
    ]
    own = ("analyze (s)", "FakeTensorProp (s)", "ratio")
    peers = ("Torch-Pruning (s)", "times as long", "analyze, memory (MiB)", "Torch-Pruning, memory (MiB)")
    lines += ["", *header("model", "ops", "groups", *own, *peers)]
    for row in models:
        by_itself = row["torch_pruning_alone"]
        ours, other = row["analyze"], row.get("torch_pruning")
        pruning = [f"{other:.3f}", f"{other / ours:.1f}"] if other else [by_itself, ""]
        memory = f"{by_itself['mib']:.0f}" if isinstance(by_itself, dict) else ""
        lines += [line(row["case"], row["ops"], row["groups"], *_beside_fakes(row), *pruning, _mib(row), memory)]
    for title, own_rows, word in (("Residual chains", chains, "blocks"), ("Dense networks", dense, "layers")):
        titles = header(word, "ops", "couplings", *own, "analyze, ms per op", "memory (MiB)")
        lines += ["", f"## {title}", "", *titles]
        for row in own_rows:
            per_op = f"{1000 * row['analyze'] / row['ops']:.2f}"
            lines += [line(row["case"], row["ops"], row["sites"], *_beside_fakes(row), per_op, _mib(row))]
    slopes = [exponent([row["ops"] for row in own], [row["analyze"] for row in own]) for own in (chains, dense)]
    lines += ["", f"The time of a chain grows with ops^{slopes[0]:.2f}, that of a dense network with"]
    lines += [f"ops^{slopes[1]:.2f}: each layer reads the groups of all before it, so that the couplings, which"]
    lines += ["are the result, grow with the square."]
    return "\n".join(lines) + "\n"


def _beside_fakes(row: dict[str, Any]) -> list[str]:
    own, other = row["analyze"], row["fake_tensor_prop"]
    return [f"{own:.3f}", f"{other:.3f}", f"{own / other:.2f}"]


def _mib(row: dict[str, Any]) -> str:
    return f"{row['analyze_mib']:.0f}"


def main() -> None:
    """Run all cases and write the results, or one case in the role of a child."""
    parser = options_of(__doc__)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--pruning-alone", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--with-pruning", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        kind, name = options.measure
        print(json.dumps(measure(kind, name, options.with_pruning, options.repeats)))
        return
    if options.memory_of:
        print(json.dumps(measure_memory(options.memory_of)))
        return
    if options.pruning_alone:
        print(json.dumps(measure_pruning(*options.pruning_alone)))
        return
    cases = [("model", name) for name in MODELS]
    cases += [(kind, str(size)) for kind, sizes in (("chain", CHAINS), ("dense", DENSE)) for size in sizes]
    rows = []
    for kind, name in cases:
        rows.append(run_case(kind, name, options.repeats if kind == "model" else 1))
        print(rows[-1], flush=True)
    facts = machine("torch", "torchvision", "torch-pruning")
    write("analysis-cost", render(rows, facts), {"machine": facts, "cases": rows}, options.results)


if __name__ == "__main__":
    main()
