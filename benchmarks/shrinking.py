"""What is left of trained networks when they are shrunk to a budget, beside Torch-Pruning and beside uniform widths?

    python benchmarks/shrinking.py --data PATH --tune all

Networks trained on MNIST to their plateau are shrunk at once to shares of their parameters: by fxwidth without data and
with images, by Torch-Pruning as it comes and with batch norm re-estimated on the same images, and by fxwidth with one
ratio for all groups. Test accuracy is measured at once, over several networks of each kind that differ in their seed,
and for the first of them after one epoch of fine-tuning. Writes a JSON, a markdown table and a plot to
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import itertools
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import fxwidth
from benchmarks import peers
from benchmarks.shrinking_tables import COUNTS, OURS, PEER, PEER_AGAIN, SHARES, UNIFORM, Case, Place, Results, Row
from benchmarks.support.results import options_of
from benchmarks.trained_networks import NETWORKS, Images, load_images, loss_and_accuracy, train_epochs, trained
from fxwidth.costs import counts
from fxwidth.evolution.evolver import parameter_count

BATCH = 128
_BISECTIONS = 12


def cases(model: nn.Module) -> Iterator[Case]:
    """Yield what is compared on a network."""
    for count in (0, *COUNTS):
        yield Case(OURS, "planned", count)
        yield Case(UNIFORM, "uniform", count)
    for kind in peers.IMPORTANCES:
        if kind not in peers.NEEDS_IMAGES:
            yield Case(PEER, kind, 0)
        for count in COUNTS:
            if kind in peers.NEEDS_IMAGES:
                yield Case(PEER, kind, count)
            if peers.has_batch_norm(model):
                yield Case(PEER_AGAIN, kind, count)


def shrunk(model: nn.Module, case: Case, share: float, train: Images) -> nn.Module:
    """Return a copy of a model with at most a share of its parameters."""
    images = train.first(case.images) if case.images else None
    if case.tool in (PEER, PEER_AGAIN):
        seen = case.images if case.method in peers.NEEDS_IMAGES else 0
        result = _pruned(model, case.method, share, train, seen)
        return copy.deepcopy(result) if case.tool == PEER or images is None else peers.re_estimated(result, images)
    module = fxwidth.trace(copy.deepcopy(model), train.images[:2])
    data = None if images is None else images.images.split(BATCH)
    graph = fxwidth.analyze(module)
    if case.tool == OURS:
        plan = fxwidth.plan(graph, params=share, data=data)
    else:
        plan = uniform(graph, round(share * parameter_count(module)))
    return fxwidth.resize(module, plan, data=data)


@lru_cache(maxsize=1)
def _pruned(model: nn.Module, kind: str, share: float, train: Images, count: int) -> nn.Module:
    return peers.pruned(model, kind, share, train.first(count) if count else None)


def uniform(graph: fxwidth.WidthGraph, budget: int) -> fxwidth.Plan:
    """Return the plan that keeps the largest common share of every group within a budget of parameters."""
    low, high, best = 0.0, 1.0, fxwidth.Plan({})
    for _ in range(_BISECTIONS):
        ratio = (low + high) / 2
        plan = fxwidth.Plan({group.name: max(group.least.width, int(ratio * group.width)) for group in graph.free})
        if counts.parameter_count(graph, {graph[name].factor: width for name, width in plan.widths.items()}) <= budget:
            low, best = ratio, plan
        else:
            high = ratio
    return best


def measure(
    network: str, seed: int, case: Case, share: float, model: nn.Module, data: tuple[Images, Images], tune: str | None
) -> Row:
    """Shrink a model and measure what is left of it; `tune` is the precision of its epoch of fine-tuning, if any."""
    train, test = data
    started = time.perf_counter()
    result = shrunk(model, case, share, train)
    seconds = time.perf_counter() - started
    params = parameter_count(result)
    assert params <= share * parameter_count(model), f"{case} keeps {params} parameters of {network}"
    loss, accuracy = loss_and_accuracy(result.eval(), test)
    row = Row(network, share, case.tool, case.method, case.images, params, accuracy, None, seconds, loss, seed=seed)
    if tune is None:
        return row
    torch.manual_seed(0)
    train_epochs(result, train, epochs=1, rate=1e-3, tunes=True, mixed=tune == "bfloat16")
    return replace(row, tuned=loss_and_accuracy(result.eval(), test)[1], precision=tune, cut=True)


def main() -> None:
    """Run all cases and write the results, network by network."""
    options = _parse_options()
    torch.set_num_threads(options.threads)
    data = load_images(options.data)
    results = Results.read(options.results / "shrinking.json", f"{_machine()}, {options.threads} threads")
    order = {name: list(cases(build())) for name, build in NETWORKS.items()}
    for network, seed in itertools.product(options.networks, options.seeds):
        model = trained(network, data[0], options.models, seed)
        results.before.setdefault(network, {})[seed] = loss_and_accuracy(model, data[1])[1]
        chosen = [case for case in cases(model) if fnmatch.fnmatch(case.tool, options.tools)]
        chosen = [case for case in chosen if not fnmatch.fnmatch(f"{case.method} {case.images}", options.without)]
        for share, case in itertools.product(SHARES, chosen):
            tune = seed == 0 and (options.tune == "all" or (options.tune == "some" and case.images in (0, 128)))
            known = [row for row in results.rows if row.place == (network, seed, share, case)]
            if options.resume and any(row.tuned is not None or not tune for row in known):
                continue
            same = _tuned_alike(results, (network, seed, share, case)) if tune else None
            row = measure(network, seed, case, share, model, data, options.precision if tune and same is None else None)
            if same is not None:
                row = replace(row, tuned=same.tuned, precision=same.precision, cut=same.cut)
            print(row, flush=True)
            results.put(row)
            results.sort(order)
            results.write(options.results)
    print(*results.verdicts(), sep="\n")


def _tuned_alike(results: Results, place: Place) -> Row | None:
    """Return the row of the same weights with other statistics in their batch norms, which training does not read."""
    network, seed, share, case = place
    if case.tool != PEER_AGAIN:
        return None
    alike = Case(PEER, case.method, case.images if case.method in peers.NEEDS_IMAGES else 0)
    found = (row for row in results.rows if row.place == (network, seed, share, alike) and row.tuned is not None)
    return next(found, None)


def _machine() -> str:
    versions = [f"{name} {version(name)}" for name in ("torch", "torch-pruning")]
    return ", ".join([platform.machine(), f"fxwidth {fxwidth.__version__}", *versions])


def _parse_options() -> argparse.Namespace:
    parser = options_of(__doc__)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), help="which; all by default")
    parser.add_argument("--data", type=Path, required=True, help="folder of MNIST's files")
    parser.add_argument("--models", type=Path, default=Path("benchmark-models"), help="where trained networks are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3], help="what networks are trained from")
    parser.add_argument(
        "--tune", choices=("none", "some", "all"), default="none", help="which rows of seed 0 are fine-tuned"
    )
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="of fine-tuning")
    parser.add_argument("--tools", default="*", help="pattern of the tools to run; of others the last rows stay")
    parser.add_argument("--without", default="", help='pattern of method and images to leave out: "Hessian 1024"')
    parser.add_argument("--resume", action="store_true", help="leave out what the last results have already")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
