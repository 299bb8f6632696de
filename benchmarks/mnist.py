"""How good is the network that evolution ends at on MNIST, beside the same network trained directly for the same time?

    python benchmarks/mnist.py --data PATH --seeds 3 --epochs 20 --device cpu --jobs 2 --threads 1

Each seed runs `fxwidth train`, as a user would; then the parameters of the evolved network are drawn anew, and it is
trained for the same seconds with the same settings. Beside them `fxwidth train --thresholds`, which is how
SVD-evolutive-CNN changes widths, from the same full network: it has no target, and ends after 20 minutes. Writes a
JSON and a markdown table to benchmarks/results/, after each seed; `--resume` goes on from them after an interruption.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

sys.path.insert(0, str(Path(__file__).parent.parent))
import fxwidth
from benchmarks.support.machine import processor
from benchmarks.support.results import earlier_runs, options_of, write
from benchmarks.support.tables import header, heading, line
from fxwidth.evolution.evolver import parameter_count
from fxwidth.training.datasets import load_dataset
from fxwidth.training.loop import fit
from fxwidth.training.outputs import HISTORY_FILE, MODEL_FILE
from fxwidth.training.runs import TrainingConfig

# Accuracies that were set as goals, by the most parameters that a network may end with.
GOALS = {12_500: 0.9940, 3_500: 0.9905, 2_500: 0.9890}
MINUTES = 20
CASES = {
    "evolved": "from the full network, while it trains",
    "direct": "the final network from new random parameters",
    "thresholds": "from the full network by `--thresholds`, which has no target",
}


@dataclass(frozen=True)
class Run:
    """One case with one seed; `seconds` are those of the training, `wall_seconds` those of the whole command.

    Without a target, thresholds decide.
    """

    case: str
    target: int | None
    seed: int
    test_accuracy: float
    params: int
    seconds: float
    wall_seconds: float
    epochs: int
    widths: dict[str, int]


def main() -> None:
    """Run both cases with every size and seed, and write the results."""
    options = _parse_options()
    name = f"mnist-{options.device}" + ("-compile" if options.compile else "")
    facts = _facts(options)
    runs = [Run(**run) for run in earlier_runs(name, facts, options.results)] if options.resume else []
    pairs = [(target, seed) for target in [*options.targets, None] for seed in range(options.seeds)]
    missing = [pair for pair in pairs if pair not in {(run.target, run.seed) for run in runs}]
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for future in as_completed([pool.submit(run_pair, options, pair) for pair in missing]):
            own, settings = future.result()
            runs = sorted([*runs, *own], key=lambda run: (-(run.target or 0), run.case, run.seed))
            record = {"machine": facts, "settings": settings, "runs": [asdict(run) for run in runs]}
            write(name, render(runs, facts), record, options.results)


def run_pair(options: argparse.Namespace, pair: tuple[int | None, int]) -> tuple[list[Run], dict[str, Any]]:
    """Return the cases of one size, or of none, with one seed, and the settings of the command."""
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        evolved, settings = run_evolved(options, *pair, Path(folder) / "run")
        runs = [evolved]
        if pair[0] is not None:
            runs += [run_direct(options, pair[1], Path(folder) / "run", evolved, settings)]
    told = (f"{run.case}: {100 * run.test_accuracy:.2f} % in {run.seconds:.0f} s" for run in runs)
    print(f"{evolved.params:,} parameters, seed {pair[1]}:", *told, flush=True)
    return runs, settings


def run_evolved(options: argparse.Namespace, target: int | None, seed: int, out: Path) -> tuple[Run, dict[str, Any]]:
    """Return what `fxwidth train` reaches, and the settings it used."""
    command = [sys.executable, "-m", "fxwidth.cli", "train", "--dataset", "mnist", "--data", str(options.data)]
    ends = ["--thresholds", "--max-minutes", str(MINUTES)] if target is None else ["--target-params", str(target)]
    command += ends
    command += ["--device", options.device, "--seed", str(seed)]
    command += ["--threads", str(options.threads), "--out", str(out), *(["--compile"] if options.compile else [])]
    command += ["--epochs", str(options.epochs)] if options.epochs else []
    started = time.perf_counter()
    # What it shows of several runs at once is of no use.
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    wall_seconds = time.perf_counter() - started
    history = json.loads((out / HISTORY_FILE).read_text(encoding="utf-8"))
    run = Run(
        case="evolved" if target else "thresholds",
        target=target,
        seed=seed,
        test_accuracy=history["test_accuracy"],
        params=history["params_after"],
        seconds=history["seconds"],
        wall_seconds=wall_seconds,
        epochs=len(history["epochs"]),
        widths=history["widths_after"],
    )
    return run, history["settings"]


def run_direct(
    options: argparse.Namespace,
    seed: int,
    out: Path,
    evolved: Run,
    settings: dict[str, Any],
) -> Run:
    """Return what the evolved network reaches with new random parameters in the seconds that evolution took."""
    torch.manual_seed(seed)
    data = load_dataset("mnist", options.data).to(torch.device(options.device))
    gm = fxwidth.trace(
        fxwidth.load(out / MODEL_FILE, trusted=True).to(options.device), data.normalize(data.test.images[:2])
    )
    reset_parameters(gm)
    fields = {name: settings[name] for name in TrainingConfig.__dataclass_fields__}
    # The schedule follows the clock, so epochs only have to be enough.
    config = replace(TrainingConfig(**fields), target_params=None, epochs=1000, max_minutes=evolved.seconds / 60)
    result = fit(gm, data, config)
    assert result.test_accuracy is not None
    return Run(
        "direct", evolved.target, seed, result.test_accuracy, parameter_count(gm), result.seconds, result.seconds,
        len(result.epochs), evolved.widths,
    )  # fmt: skip


def reset_parameters(gm: GraphModule) -> None:
    """Draw the parameters of every layer anew, as a new layer of its sizes would."""
    for module in gm.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.reset_parameters()


def render(runs: list[Run], facts: dict[str, str]) -> str:
    """Return the results as markdown."""
    title = "MNIST: evolved while training, and the same final network trained directly for the same time"
    goals = [f"{100 * goal:.2f} % at {size:,} parameters" for size, goal in GOALS.items()]
    lines = heading(title, {**facts, "goals": f"{', '.join(goals)}, each within {MINUTES} minutes"})
    lines += [*(f"- {case}: {text}" for case, text in CASES.items()), ""]
    names = ("test accuracy (%)", "parameters", "training (s)", "whole command (s)", "epochs")
    lines += header("most parameters", "case", "seed", *names)
    targets = list(dict.fromkeys(run.target for run in runs))
    for target in targets:
        for case in CASES:
            own = [run for run in runs if (run.case, run.target) == (case, target)]
            lines += [_row(run, str(run.seed), [_figures(run)]) for run in own]
            lines += [_row(own[0], "mean", [_figures(run) for run in own])] if own else []
    for target in targets:
        evolved = [run for run in runs if run.case != "direct" and run.target == target]
        most = "by thresholds" if target is None else f"at most {target:,} parameters"
        lines += ["", f"Widths at the end, {most}:", ""]
        lines += header("channel group", *(f"seed {run.seed}" for run in evolved))
        lines += [line(group, *(run.widths.get(group, "-") for run in evolved)) for group in evolved[0].widths]
    return "\n".join(lines) + "\n"


def _figures(run: Run) -> tuple[float, ...]:
    return (100 * run.test_accuracy, run.params, run.seconds, run.wall_seconds, run.epochs)


def _row(run: Run, seed: str, figures: list[tuple[float, ...]]) -> str:
    """Return a row of the table with the means of some runs' figures."""
    accuracy, *others = (statistics.fmean(column) for column in zip(*figures, strict=True))
    most = "" if run.target is None else f"{run.target:,}"
    return line(most, run.case, seed, f"{accuracy:.2f}", *(f"{value:,.0f}" for value in others))


def _facts(options: argparse.Namespace) -> dict[str, str]:
    """Return the versions and the hardware that the results depend on."""
    device = torch.cuda.get_device_name() if options.device == "cuda" else f"{processor()}, {options.threads} threads"
    versions = {"fxwidth": fxwidth.__version__, "torch": torch.__version__, "python": platform.python_version()}
    epochs = str(options.epochs or "those of the command")
    return {"device": device, **versions, "epochs": epochs, "compiled": "yes" if options.compile else "no"}


def _parse_options() -> argparse.Namespace:
    parser = options_of(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of MNIST's files")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--targets", type=int, nargs="*", default=list(GOALS), help="most parameters at the end")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, each with its own threads")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--epochs", type=int, help="default: that of the command line")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--resume", action="store_true", help="keep the runs that the record holds")
    return parser.parse_args()


if __name__ == "__main__":
    main()
