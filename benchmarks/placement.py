"""Does evolution put channels where they are needed?

    python benchmarks/placement.py --data PATH --jobs 2

Networks of one family end at the same number of parameters: some breathe from widths that are chosen badly, one grows
from a twelfth of the size, and beside them stand networks of random widths, which stay. Images are MNIST's, and
pictures of textured shapes in colours that tell nothing; both have as many steps. Writes a table and a record to
benchmarks/results/, after each run; `--resume` goes on from them after an interruption.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor, fx, nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import fxwidth
from benchmarks.support.machine import processor
from benchmarks.support.results import earlier_runs, options_of, write
from benchmarks.support.tables import header, heading, line
from fxwidth.evolution.evolver import parameter_count
from fxwidth.training.datasets import load_dataset
from fxwidth.training.images import ImageData, Split
from fxwidth.training.loop import all_widths, fit
from fxwidth.training.networks import seed_resnet
from fxwidth.training.runs import TrainingConfig

BUDGET, SMALL = 12_500, 1_000
RANDOM = 20
# By what the widths of the groups are multiplied, from the first to the last, before all are scaled to the budget.
BAD = {"all at the front": 0.55, "all at the back": 1.8, "even": 1.0}
SPREAD = 4.0  # random widths differ by up to this factor, up and down
DATA = ("mnist", "shapes")
SHAPES = 12_000


@dataclass(frozen=True)
class Case:
    """What is trained: the relative widths of groups, the size at the start, and whether it evolves."""

    name: str
    data: str
    shares: tuple[float, ...]
    start: int
    evolves: bool


@dataclass(frozen=True)
class Run:
    """What a case has reached with one seed."""

    name: str
    data: str
    seed: int
    test_accuracy: float
    params: int
    seconds: float
    resizes: int
    widths: dict[str, int]


def main() -> None:
    """Train all cases and write the results."""
    options = _parse_options()
    work = [(case, seed) for data in options.images for case in cases(data) for seed in _seeds(case, options.seeds)]
    facts = {"device": f"{processor()}, one thread a run, {options.jobs} runs at once", "epochs": str(options.epochs)}
    facts |= {name: version(name) for name in ("fxwidth", "torch")}
    runs = [Run(**run) for run in earlier_runs("placement", facts, options.results)] if options.resume else []
    done = {(run.name, run.data, run.seed) for run in runs}
    missing = [(case, seed) for case, seed in work if (case.name, case.data, seed) not in done]
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for future in as_completed([pool.submit(train, options, case, seed) for case, seed in missing]):
            runs.append(future.result())
            record = {"machine": facts, "runs": [asdict(run) for run in runs]}
            write("placement", render(runs, facts, options.seeds), record, options.results)


def cases(data: str) -> list[Case]:
    """Return what is compared on some images."""
    groups, result = 12, []
    for name, ratio in BAD.items():
        shares = tuple(ratio**place for place in range(groups))
        result += [Case(f"{name}, stays", data, shares, BUDGET, evolves=False)]
        result += [Case(f"{name}, breathes", data, shares, BUDGET, evolves=True)]
    result += [Case(f"from {SMALL:,}", data, tuple(1.08**place for place in range(groups)), SMALL, evolves=True)]
    chance = random.Random(0)
    for number in range(RANDOM):
        shares = tuple(SPREAD ** chance.uniform(-1, 1) for _ in range(groups))
        result += [Case(f"random {number}", data, shares, BUDGET, evolves=False)]
    return result


def _seeds(case: Case, count: int) -> range:
    """Return the seeds of a case: random widths are many by themselves."""
    return range(1 if case.name.startswith("random") else count)


def train(options: argparse.Namespace, case: Case, seed: int) -> Run:
    """Return what a case reaches with a seed."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    images = _images(case.data, options.data)
    gm = network(images, case)
    epochs = options.epochs * (60_000 // SHAPES if case.data == "shapes" else 1)
    config = TrainingConfig(
        epochs=epochs, target_params=BUDGET if case.evolves else None, breathe=case.evolves, seed=seed,
        rounds=8 if case.start < BUDGET else 1,
    )  # fmt: skip
    result = fit(gm, images, config)
    assert result.test_accuracy is not None
    run = Run(case.name, case.data, seed, result.test_accuracy, parameter_count(gm), result.seconds,
              len(result.resizes), all_widths(gm))  # fmt: skip
    print(f"{case.data}, {case.name}, seed {seed}: {100 * run.test_accuracy:.2f} %, {run.params:,}", flush=True)
    return run


def network(images: ImageData, case: Case) -> fx.GraphModule:
    """Return a seed network with widths in the proportions of a case, at most as large as it says, newly drawn."""
    seed = seed_resnet(images.channels, len(images.classes), images.image_size)
    gm = fxwidth.untie_copies(fxwidth.trace(seed, images.normalize(images.test.images[:2])))
    width_graph = fxwidth.analyze(gm)
    size = fxwidth.cost_polynomial(width_graph, "params")
    groups = list(width_graph.free)
    assert len(groups) == len(case.shares)

    def widths(scale: float) -> dict[str, int]:
        pairs = zip(groups, case.shares, strict=True)
        return {group.name: min(group.width, max(1, round(scale * share))) for group, share in pairs}

    def params(scale: float) -> int:
        given: Mapping[str, int] = widths(scale)
        return int(size({group.factor: given[group.name] for group in groups}))

    low, high = 1e-6, 1e6
    for _ in range(80):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if params(middle) <= case.start else (low, middle)
    fxwidth.resize(gm, widths(low), selection="magnitude", fold=False)
    for module in gm.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.reset_parameters()
    return gm


@cache
def _images(name: str, folder: Path) -> ImageData:
    if name == "mnist":
        return load_dataset("mnist", folder)
    train, test = shapes(SHAPES, 0), shapes(4_000, 1)
    pixels = train.images.float()
    names = tuple(f"{shape} {texture}" for shape in ("disc", "square", "triangle", "cross", "ring") for texture in "ab")
    mean, std = pixels.mean((0, 2, 3)).view(-1, 1, 1), pixels.std((0, 2, 3)).view(-1, 1, 1)
    return ImageData("shapes", names, train, test, mean, std, shift=2)


def shapes(count: int, seed: int) -> Split:
    """Return pictures of 3 x 32 x 32 pixels: five shapes, each with one of two textures, anywhere, in any colours."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *size: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *size, generator=generator)

    labels = torch.randint(10, (count,), generator=generator)
    grid = torch.arange(32.0)
    y = grid.view(1, 32, 1) - uniform(11, 21, 1, 1)
    x = grid.view(1, 1, 32) - uniform(11, 21, 1, 1)
    radius = uniform(6, 10, 1, 1)
    distance = (x.square() + y.square()).sqrt()
    inside = torch.stack([
        distance < radius,
        (x.abs() < 0.85 * radius) & (y.abs() < 0.85 * radius),
        (y < 0.7 * radius) & (y > 2 * x.abs() - radius),
        ((x.abs() < 0.35 * radius) | (y.abs() < 0.35 * radius)) & (distance < 1.1 * radius),
        (distance < radius) & (distance > 0.55 * radius),
    ])[labels // 2, torch.arange(count)]  # fmt: skip
    angle = uniform(-0.5, 0.5, 1, 1) + 0.5 * math.pi * (labels % 2).view(-1, 1, 1)
    waves = torch.sin(1.6 * (x * torch.cos(angle) + y * torch.sin(angle)))
    front, back = uniform(0, 1, 3, 1, 1), uniform(0, 1, 3, 1, 1)
    pictures = torch.where(inside[:, None], front * (0.65 + 0.35 * waves[:, None]), back)
    pictures = pictures + 0.12 * torch.randn(count, 3, 32, 32, generator=generator)
    return Split(pictures.clamp(0, 1).mul(255).round().to(torch.uint8), labels)


def render(runs: list[Run], facts: Mapping[str, str], seeds: int) -> str:
    """Return the results as markdown."""
    lines = heading("Where evolution puts channels", facts)
    lines += [
        (
            f"The seed network of `fxwidth train` at {BUDGET:,} parameters, means of {seeds} seeds; {RANDOM} random "
            "splits, one seed each. Networks that evolve breathe until three quarters of the training. Epochs are of "
            f"60,000 images: {SHAPES:,} shapes are seen {60_000 // SHAPES} times in each."
        ),
        "",
        *header(
            "images", "widths", "runs", "test accuracy (%)", "lowest", "highest", "parameters", "resizes", "seconds"
        ),
    ]
    for data in dict.fromkeys(run.data for run in runs):
        own = [run for run in runs if run.data == data]
        names = [case.name for case in cases(data) if not case.name.startswith("random")]
        parts = {name: [run for run in own if run.name == name] for name in names}
        parts["random"] = [run for run in own if run.name.startswith("random")]
        lines += [_row(data, name, part) for name, part in parts.items() if part]
    return "\n".join(lines) + "\n"


def _row(data: str, name: str, runs: list[Run]) -> str:
    accuracies = [100 * run.test_accuracy for run in runs]
    seconds = statistics.fmean(run.seconds for run in runs)
    return line(
        data, name, len(runs), *(f"{of(accuracies):.2f}" for of in (statistics.fmean, min, max)),
        round(statistics.fmean(run.params for run in runs)), max(run.resizes for run in runs), f"{seconds:.0f}",
    )  # fmt: skip


def _parse_options() -> argparse.Namespace:
    parser = options_of(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of MNIST's files")
    parser.add_argument("--images", nargs="+", choices=DATA, default=list(DATA))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--resume", action="store_true", help="keep the runs that the record holds")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, each with one thread")
    return parser.parse_args()


if __name__ == "__main__":
    main()
