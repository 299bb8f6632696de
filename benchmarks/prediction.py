"""Does the error that a plan predicts tell the loss of the resized network? Random plans, predicted and measured.

python benchmarks/prediction.py --data FOLDER_WITH_MNIST [--network residual-cnn] [--plans 30] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import fxwidth
from benchmarks.trained_networks import NETWORKS, Images, load_images, loss_and_accuracy, trained

# What is known when errors are predicted: no data, images, or images and the loss.
EVIDENCE = ("nothing", "images", "images and loss")


def rank_correlation(left: list[float], right: list[float]) -> float:
    """Return Spearman's coefficient of two lists without ties."""
    first, second = (np.argsort(np.argsort(values)).astype(np.float64) for values in (left, right))
    return float(np.corrcoef(first, second)[0, 1])


def random_plans(wg: fxwidth.WidthGraph, count: int, smallest: float) -> list[dict[str, int]]:
    """Return plans in which each group has a share of its channels drawn evenly from the smallest to all."""
    generator = np.random.default_rng(0)
    return [
        {group.name: max(group.least.width, round(group.width * generator.uniform(smallest, 1.0))) for group in wg.free}
        for _ in range(count)
    ]


def predictions(gm: torch.fx.GraphModule, images: Images, plans: list[dict[str, int]], evidence: str) -> list[float]:
    """Return the summed errors of all groups for each plan."""
    data = None if evidence == "nothing" else list(zip(images.images.split(128), images.labels.split(128), strict=True))
    loss = F.cross_entropy if evidence == "images and loss" else None
    found = fxwidth.spectrum(fxwidth.analyze(gm), data=data, loss=loss)
    return [sum(found[name].errors[width] for name, width in plan.items()) for plan in plans]


def run(network: str, data: Path, plans: int, images: int, smallest: float, folder: Path) -> dict[str, Any]:
    """Return predicted errors, measured losses and their rank correlations."""
    train, test = load_images(data)
    model = trained(network, train, folder)
    seen = train.first(images)
    gm = fxwidth.trace(copy.deepcopy(model), train.images[:2])
    drawn = random_plans(fxwidth.analyze(gm), plans, smallest)
    versions = {"fxwidth": fxwidth.__version__, "torch": torch.__version__, "python": platform.python_version()}
    result: dict[str, Any] = {"versions": versions, "network": network, "images": images, "rank correlation": {}}
    predicted = {evidence: predictions(gm, seen, drawn, evidence) for evidence in EVIDENCE}
    for how in ("nothing", "images"):
        measured = []
        for plan in drawn:
            resized = fxwidth.trace(copy.deepcopy(model), train.images[:2])
            fxwidth.resize(resized, plan, data=None if how == "nothing" else list(seen.images.split(128)))
            measured.append(loss_and_accuracy(resized.eval(), test.first(2000))[0])
        result[f"loss, resized with {how}"] = measured
        for evidence, errors in predicted.items():
            if (evidence == "nothing") == (how == "nothing"):
                correlation = rank_correlation(errors, measured)
                result["rank correlation"][f"predicted with {evidence}"] = round(correlation, 3)
    return {**result, "predicted": predicted, "plans": drawn}


def main() -> None:
    """Read the command line, measure, and print and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--network", choices=list(NETWORKS), default="residual-cnn")
    parser.add_argument("--plans", type=int, default=30)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--smallest", type=float, default=0.2)
    parser.add_argument("--trained", type=Path, default=Path("runs/trained"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = run(options.network, options.data, options.plans, options.images, options.smallest, options.trained)
    print(json.dumps(result["rank correlation"], indent=1))
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
