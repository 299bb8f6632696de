"""Do directions that look at the task help? Small networks grow while they train, by each method, at equal cost.

python benchmarks/directions.py [--data FOLDER_WITH_MNIST] [--seeds 5] [--steps 600] [--write]

Without a folder the networks train on the 8 x 8 digits of scikit-learn. All methods see the same batches, grow the same
groups to the same widths at the same steps, and a network that starts at the last widths stands beside them. Seconds
are those of the growth events alone, gathering included. `--write` puts the table among the results.
"""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import fxwidth
from benchmarks.support.results import options_of, write
from benchmarks.support.tables import heading
from benchmarks.trained_networks import TransformerBlock, load_images

Split = tuple[Tensor, Tensor]

METHODS: dict[str, dict[str, Any]] = {
    "no growth": {},
    "orthogonal": {"directions": "orthogonal"},
    "random": {"directions": "random"},
    "split": {"directions": "split"},
    "gradmax": {"directions": "gradmax"},
    "tiny": {"directions": "tiny"},
    "orthogonal, step": {"directions": "orthogonal", "reader_step": True},
    "tiny, step": {"directions": "tiny", "reader_step": True},
    "last widths from the first step": {},
}
# At which shares of the steps all groups grow, and by what share of their widths.
EVENTS, MORE = (0.25, 0.4), 0.5


class Vit(nn.Module):
    """Two transformer blocks over rows of pixels."""

    def __init__(self, pixels: int, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Linear(pixels, width)
        self.blocks = nn.Sequential(*(TransformerBlock(width, 2, width) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of the classes for images, (N, 1, size, size)."""
        output: Tensor = self.head(self.norm(self.blocks(self.embed(x.squeeze(1)))).mean(1))
        return output


def mlp(size: int) -> nn.Module:
    """Return two narrow hidden layers."""
    return nn.Sequential(nn.Flatten(), nn.Linear(size**2, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 10))


def cnn(_: int) -> nn.Module:
    """Return three narrow convolutions with batch norms, for images of any size."""
    layers: list[nn.Module] = []
    for into, out, stride in ((1, 3, 1), (3, 4, 2), (4, 6, 2)):
        layers += [nn.Conv2d(into, out, 3, stride, 1), nn.BatchNorm2d(out), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 10))


NETWORKS: dict[str, tuple[Callable[[int], nn.Module], float]] = {
    "MLP": (mlp, 3e-3),
    "CNN": (cnn, 3e-3),
    "ViT": (Vit, 2e-3),
}


def digits() -> tuple[Split, Split]:
    """Return the digits of scikit-learn, four fifths and the rest."""
    from sklearn.datasets import load_digits

    found = load_digits()
    x, y = torch.tensor(found.images).float().unsqueeze(1) / 8 - 1, torch.tensor(found.target)
    held = torch.arange(len(x)) % 5 == 0
    return (x[~held], y[~held]), (x[held], y[held])


def mnist(folder: Path) -> tuple[Split, Split]:
    """Return MNIST at 14 x 14 pixels."""
    train, test = ((F.avg_pool2d(split.images, 2), split.labels) for split in load_images(folder))
    return train, test


def batches(data: Split, size: int, seed: int) -> Iterator[Split]:
    """Yield batches without end, in an order of the seed."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for places in torch.randperm(len(data[0]), generator=generator).split(size):
            yield data[0][places], data[1][places]


def grown(widths: dict[str, int]) -> dict[str, int]:
    """Return the widths after one event."""
    return {name: width + max(1, round(width * MORE)) for name, width in widths.items()}


def growing(gm: fx.GraphModule) -> dict[str, int]:
    """Return the widths of the groups that grow exactly."""
    return {group.name: group.width for group in fxwidth.analyze(gm).free if group.inexact_growth is None}


def widened(gm: fx.GraphModule) -> fx.GraphModule:
    """Return a network at its last widths, drawn anew."""
    for _ in EVENTS:
        fxwidth.resize(gm, grown(growing(gm)))
    for part in gm.modules():
        if callable(reset := getattr(part, "reset_parameters", None)):
            reset()
    return gm


def measured(name: str, method: str, data: tuple[Split, Split], seed: int, steps: int) -> dict[str, float]:
    """Train a network that grows by a method, and return its losses, its accuracy and the seconds of its growth."""
    torch.manual_seed(seed)
    make, rate = NETWORKS[name]
    train, test = data
    gm = fxwidth.trace(make(train[0].shape[-1]), train[0][:4])
    if method.startswith("last"):
        gm = widened(gm)
    optimizer = torch.optim.Adam(gm.parameters(), lr=rate)
    drawn, seen, spent = batches(train, 64, seed), batches(train, 64, seed + 100), 0.0
    options = METHODS[method]
    for step in range(steps):
        if options and step in [round(share * steps) for share in EVENTS]:
            start = time.perf_counter()
            looks = options["directions"] in ("gradmax", "tiny") or options.get("reader_step")
            task: dict[str, Any] = {"data": [next(seen) for _ in range(8)], "loss": F.cross_entropy} if looks else {}
            fxwidth.resize(gm, grown(growing(gm)), optimizer=optimizer, **options, **task)
            spent += time.perf_counter() - start
        x, y = next(drawn)
        F.cross_entropy(gm.train()(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        fitted, scores = gm.eval()(train[0][:2000]), gm(test[0])
    return {
        "train loss": float(F.cross_entropy(fitted, train[1][:2000])),
        "test loss": float(F.cross_entropy(scores, test[1])),
        "accuracy": float((scores.argmax(1) == test[1]).float().mean()) * 100,
        "parameters": float(sum(parameter.numel() for parameter in gm.parameters())),
        "growth s": spent,
    }


def table(data: tuple[Split, Split], seeds: int, steps: int) -> Iterator[str]:
    """Yield the lines of the table, mean and deviation over the seeds."""
    columns = ("train loss", "test loss", "accuracy", "parameters", "growth s")
    yield f"| network | directions | {' | '.join(columns)} |"
    yield f"|{'---|' * (len(columns) + 2)}"
    for name in NETWORKS:
        for method in METHODS:
            runs = [measured(name, method, data, seed, steps) for seed in range(seeds)]
            cells = []
            for column in columns:
                values = [run[column] for run in runs]
                spread = f" ± {stdev(values):.3f}" if seeds > 1 and column in columns[:3] else ""
                cells.append(f"{mean(values):,.{0 if column == 'parameters' else 3}f}{spread}")
            yield f"| {name} | {method} | {' | '.join(cells)} |"


def main() -> None:
    """Read the command line, measure, and print what was found; write it among the results where that is asked for."""
    parser = options_of(__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = digits() if options.data is None else mnist(options.data)
    facts = {
        "images": "digits of scikit-learn" if options.data is None else "MNIST at 14 x 14",
        "runs": f"{options.seeds} seeds, {options.steps} steps of 64 images, one thread",
        "versions": f"fxwidth {fxwidth.__version__}, torch {torch.__version__}, Python {platform.python_version()}",
    }
    lines = heading("Directions of growth", facts)
    for line in table(data, options.seeds, options.steps):
        print(line, flush=True)
        lines.append(line)
    if options.write:
        write("directions", "\n".join(lines) + "\n", folder=options.results)


if __name__ == "__main__":
    main()
