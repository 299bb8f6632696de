"""What is left of trained networks when they are shrunk to a budget, beside Torch-Pruning and beside uniform widths?

    python benchmarks/shrinking.py --data PATH --tune all

Networks trained on MNIST to their plateau are shrunk at once to shares of their parameters: by fxwidth without data and
with images, by Torch-Pruning as it comes and with batch norm re-estimated on the same images, and by fxwidth with one
ratio for all groups. Test accuracy is measured at once and after one epoch of fine-tuning. Writes a JSON, a markdown
table and a plot to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import itertools
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, astuple, dataclass, replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import fxwidth
from benchmarks import peers
from benchmarks.trained_networks import NETWORKS, Images, load_images, loss_and_accuracy, train_epochs, trained
from fxwidth import costs
from fxwidth.evolution import parameter_count

RESULTS = Path(__file__).parent / "results"
SHARES = (0.75, 0.5, 0.25)
COUNTS = (32, 128, 1024)
BATCH = 128
# Of the MNIST networks: ten classes.
CHANCE = 0.1
OURS, UNIFORM, PEER, PEER_AGAIN = "fxwidth", "fxwidth, uniform", "Torch-Pruning", "Torch-Pruning, re-estimated"
_BISECTIONS = 12


@dataclass(frozen=True)
class Case:
    """One way to shrink: the tool, its method, and how many images it sees."""

    tool: str
    method: str
    images: int


@dataclass(frozen=True)
class Row:
    """What came of one case; accuracies in [0, 1], `tuned` after one epoch, None where that was not asked for.

    `loss` is the cross entropy before that epoch, `precision` what the epoch was computed in, `cut` whether gradients
    were cut to length one in it.
    """

    network: str
    share: float
    tool: str
    method: str
    images: int
    params: int
    accuracy: float
    tuned: float | None
    seconds: float
    loss: float | None = None
    precision: str = "float32"
    cut: bool = False

    def of(self, network: str, case: Case, share: float) -> bool:
        """Tell whether this is what came of a case."""
        return (self.network, self.share, self.tool, self.method, self.images) == (network, share, *astuple(case))


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
        plan = fxwidth.Plan({group.name: max(1, int(ratio * group.width)) for group in graph.free})
        if costs.parameter_count(graph, {graph[name].factor: width for name, width in plan.items()}) <= budget:
            low, best = ratio, plan
        else:
            high = ratio
    return best


def measure(
    network: str, case: Case, share: float, model: nn.Module, data: tuple[Images, Images], tune: str | None
) -> Row:
    """Shrink a model and measure what is left of it; `tune` is the precision of its epoch of fine-tuning, if any."""
    train, test = data
    started = time.perf_counter()
    result = shrunk(model, case, share, train)
    seconds = time.perf_counter() - started
    params = parameter_count(result)
    assert params <= share * parameter_count(model), f"{case} keeps {params} parameters of {network}"
    loss, accuracy = loss_and_accuracy(result.eval(), test)
    row = Row(network, share, case.tool, case.method, case.images, params, accuracy, None, seconds, loss)
    if tune is None:
        return row
    torch.manual_seed(0)
    train_epochs(result, train, epochs=1, rate=1e-3, tunes=True, mixed=tune == "bfloat16")
    return replace(row, tuned=loss_and_accuracy(result.eval(), test)[1], precision=tune, cut=True)


# -- tables --------------------------------------------------------------------------------------------------------

# What is said of the fine-tuning of a network's rows, and of which rows it is true.
_FORMS: dict[str, Callable[[Row], bool]] = {
    "in bfloat16": lambda row: row.precision == "bfloat16",
    "with gradients cut to length one": lambda row: row.cut,
}


def verdicts(rows: list[Row], base: dict[str, float]) -> list[str]:
    """Return what the comparison says of the goals, a line each."""
    lines: list[str] = []
    for network, share in itertools.product(base, SHARES):
        own = [row for row in rows if row.network == network and row.share == share]
        if own:
            lines += _verdicts_at(f"{network} at {share:.0%}", own, share, base[network])
    return lines


def _verdicts_at(place: str, rows: list[Row], share: float, before: float) -> Iterator[str]:
    def best(images: int | None, *tools: str) -> float:
        return max((r.accuracy for r in rows if r.tool in tools and images in (None, r.images)), default=0.0)

    yield _verdict(f"{place}, no data, against the best of {PEER}", best(0, OURS), best(None, PEER))
    for count in COUNTS:
        peer = best(count, PEER, PEER_AGAIN)
        yield _verdict(f"{place}, {count} images, against {PEER} with the same", best(count, OURS), peer)
    losses = {(row.tool, row.images): row.loss for row in rows}
    for count in (0, *COUNTS) if share < max(SHARES) else ():
        verdict = _verdict(f"{place}, {count} images, against uniform widths", best(count, OURS), best(count, UNIFORM))
        ours, other = losses.get((OURS, count)), losses.get((UNIFORM, count))
        note = "" if ours is None or other is None else f" (loss {ours:.4f} / {other:.4f})"
        yield verdict + note
    if share == 0.5:
        yield _verdict(f"{place}, 128 images, against 95 % of what was", best(128, OURS), 0.95 * before)


def _verdict(what: str, ours: float, other: float) -> str:
    if max(ours, other) < CHANCE + 0.05:
        word = "both near chance"
    else:
        word = "above" if ours > other else "equal" if ours == other else "BELOW"
    return f"- {what}: {100 * ours:.2f} / {100 * other:.2f}: {word}"


def render(rows: list[Row], base: dict[str, float], machine: str) -> str:
    """Return the results as markdown."""
    lines = ["# Shrinking trained networks at once", "", f"- {machine}"]
    lines += [f"- {name}: {100 * accuracy:.2f} % before" for name, accuracy in base.items()]
    lines += ["- test accuracy in %, before and after one epoch of fine-tuning"]
    for what, belongs in _FORMS.items():
        named = [name for name in base if any(belongs(row) for row in rows if row.network == name)]
        lines += [f"- fine-tuned {what}: {', '.join(named)}"] if named else []
    lines += ["- planned against uniform widths on the MLP over 8 networks: allocations.md", ""]
    for network in base:
        lines += [f"## {network}", "", "| tool | method | images | " + " | ".join(f"{s:.0%}" for s in SHARES) + " |"]
        lines += ["|---" * (3 + len(SHARES)) + "|"]
        own = {(r.tool, r.method, r.images, r.share): r for r in rows if r.network == network}
        for key in dict.fromkeys(key[:3] for key in own):
            cells = [_cell(own.get((*key, share))) for share in SHARES]
            lines.append(f"| {key[0]} | {key[1]} | {key[2]} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += ["## After one epoch of fine-tuning, the worst and the best row", "", *_tuned_table(rows, base), ""]
    return "\n".join([*lines, "## Against the goals", "", *verdicts(rows, base), ""])


def _tuned_table(rows: list[Row], base: dict[str, float]) -> Iterator[str]:
    tools = {OURS: (OURS,), UNIFORM: (UNIFORM,), PEER: (PEER, PEER_AGAIN)}
    yield "| network | parameters | " + " | ".join(tools) + " |"
    yield "|---" * (2 + len(tools)) + "|"
    for network, share in itertools.product(base, SHARES):
        own = [row for row in rows if row.network == network and row.share == share and row.tuned is not None]
        cells = []
        for names in tools.values():
            found = [100 * row.tuned for row in own if row.tool in names and row.tuned is not None]
            cells.append(f"{min(found):.2f} to {max(found):.2f}" if found else "")
        yield f"| {network} | {share:.0%} | " + " | ".join(cells) + " |"


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    return f"{100 * row.accuracy:.2f}" + (f" ({100 * row.tuned:.2f})" if row.tuned is not None else "")


def draw(rows: list[Row], base: dict[str, float], path: Path) -> None:
    """Draw accuracy over the share of parameters, a panel per network."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(base), figsize=(4 * len(base), 3.6), sharey=True, squeeze=False)
    kinds: dict[str, Callable[[Row], bool]] = {
        "fxwidth, 1024 images": lambda row: row.tool == OURS and row.images == 1024,
        "fxwidth, 128 images": lambda row: row.tool == OURS and row.images == 128,
        "fxwidth, no data": lambda row: row.tool == OURS and row.images == 0,
        "Torch-Pruning, best re-estimated, 1024 images": lambda row: row.tool == PEER_AGAIN and row.images == 1024,
        "Torch-Pruning, best as it comes": lambda row: row.tool == PEER,
    }
    for panel, (network, before) in zip(panels[0], base.items(), strict=True):
        for number, (label, belongs) in enumerate(kinds.items()):
            best = [
                max((100 * row.accuracy for row in rows if (row.network, row.share) == (network, s) and belongs(row)),
                    default=float("nan")) for s in SHARES
            ]  # fmt: skip
            style = "-" if label.startswith("fxwidth") else "--"
            panel.plot([100, *(100 * s for s in SHARES)], [100 * before, *best], style, marker="o", label=label,
                       color=f"C{number}")  # fmt: skip
        panel.set_title(network)
        panel.set_xlabel("parameters kept (%)")
        panel.invert_xaxis()
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("test accuracy, not fine-tuned (%)")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=3, frameon=False)
    figure.tight_layout(rect=(0, 0.14, 1, 1))
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run all cases and write the results, network by network."""
    options = _parse_options()
    torch.set_num_threads(options.threads)
    data = load_images(options.data)
    networks = options.networks or list(NETWORKS)
    rows, base = _known(options.results / "shrinking.json")
    for network in networks:
        model = trained(network, data[0], options.models)
        _, base[network] = loss_and_accuracy(model, data[1])
        chosen = [case for case in cases(model) if fnmatch.fnmatch(case.tool, options.tools)]
        chosen = [case for case in chosen if not fnmatch.fnmatch(f"{case.method} {case.images}", options.without)]
        for share, case in itertools.product(SHARES, chosen):
            tune = options.tune == "all" or (options.tune == "some" and case.images in (0, 128))
            known = [row for row in rows if row.of(network, case, share)]
            if options.resume and any(row.tuned is not None or not tune for row in known):
                continue
            row = measure(network, case, share, model, data, options.precision if tune else None)
            rows = [*(one for one in rows if one not in known), row]
            print(row, flush=True)
            _write(options.results, rows, base, f"{_machine()}, {options.threads} threads")
    print(*verdicts(rows, base), sep="\n")


def _known(path: Path) -> tuple[list[Row], dict[str, float]]:
    """Return the rows and the accuracies of the last result: what is not run again stays."""
    if not path.is_file():
        return [], {}
    record = json.loads(path.read_text(encoding="utf-8"))
    return [Row(**row) for row in record["rows"]], record["before"]


def _write(folder: Path, rows: list[Row], base: dict[str, float], machine: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # As a whole run would have them, whatever was run again.
    base = {name: base[name] for name in NETWORKS if name in base}
    places = [(name, *astuple(case)) for name in base for case in cases(NETWORKS[name]())]
    rows = sorted(rows, key=lambda row: places.index((row.network, row.tool, row.method, row.images)))
    record = {"machine": machine, "before": base, "rows": [asdict(row) for row in rows]}
    (folder / "shrinking.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (folder / "shrinking.md").write_text(render(rows, base, machine), encoding="utf-8")
    draw(rows, base, folder / "shrinking.png")


def _machine() -> str:
    versions = [f"{name} {version(name)}" for name in ("torch", "torch-pruning")]
    return ", ".join([platform.machine(), f"fxwidth {fxwidth.__version__}", *versions])


def _parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", help=f"of {', '.join(NETWORKS)}; all by default")
    parser.add_argument("--data", type=Path, required=True, help="folder of MNIST's files")
    parser.add_argument("--models", type=Path, default=Path("benchmark-models"), help="where trained networks are kept")
    parser.add_argument("--tune", choices=("none", "some", "all"), default="none", help="which rows are fine-tuned")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="of fine-tuning")
    parser.add_argument("--tools", default="*", help="pattern of the tools to run; of others the last rows stay")
    parser.add_argument("--without", default="", help='pattern of method and images to leave out: "Hessian 1024"')
    parser.add_argument("--resume", action="store_true", help="leave out what the last results have already")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
