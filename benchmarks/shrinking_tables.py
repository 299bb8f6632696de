"""What came of shrinking trained networks: rows, and the tables, comparisons and plot made of them."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

SHARES = (0.75, 0.5, 0.25)
COUNTS = (32, 128, 1024)
# Of the MNIST networks: ten classes.
CHANCE = 0.1
OURS, UNIFORM, PEER, PEER_AGAIN = "fxwidth", "fxwidth, uniform", "Torch-Pruning", "Torch-Pruning, re-estimated"
BySeed = Mapping[int, float]


@dataclass(frozen=True)
class Case:
    """One way to shrink: the tool, its method, and how many images it sees."""

    tool: str
    method: str
    images: int


# A kind of network, its seed, the share of its parameters, and what was done.
Place = tuple[str, int, float, Case]


@dataclass(frozen=True)
class Row:
    """What came of one case; accuracies in [0, 1], `tuned` after one epoch, None where that was not asked for.

    `loss` is the cross entropy before that epoch, `precision` what the epoch was computed in, `cut` whether gradients
    were cut to length one in it, `seed` what the network was trained from.
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
    loss: float
    precision: str = "float32"
    cut: bool = False
    seed: int = 0

    @property
    def case(self) -> Case:
        """What was done."""
        return Case(self.tool, self.method, self.images)

    @property
    def place(self) -> Place:
        """Whose figures these are: there is one row of each."""
        return self.network, self.seed, self.share, self.case


# What is said of the fine-tuning of a network's rows, and of which rows it is true.
_FORMS: dict[str, Callable[[Row], bool]] = {
    "in bfloat16": lambda row: row.precision == "bfloat16",
    "with gradients cut to length one": lambda row: row.cut,
}


@dataclass
class Results:
    """All rows, and the accuracies of the networks before, by their kind and seed.

    Args:
        machine: where and with what they were measured.
    """

    machine: str
    before: dict[str, dict[int, float]] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path, machine: str) -> Results:
        """Return what a file holds, nothing if there is none: what is not run again stays."""
        if not path.is_file():
            return cls(machine)
        record = json.loads(path.read_text(encoding="utf-8"))
        before = {network: {int(seed): a for seed, a in seeds.items()} for network, seeds in record["before"].items()}
        return cls(machine, before, [Row(**row) for row in record["rows"]])

    def put(self, row: Row) -> None:
        """Put a row in the place of the one that there was."""
        self.rows = [*(one for one in self.rows if one.place != row.place), row]

    def sort(self, networks: Mapping[str, Iterable[Case]]) -> None:
        """Bring everything into the order of networks and of the cases on them, whatever was run last."""
        self.before = {name: dict(sorted(self.before[name].items())) for name in networks if name in self.before}
        places = {(name, case): place for name, cases in networks.items() for place, case in enumerate(cases)}
        names = list(networks)
        self.rows.sort(key=lambda row: (names.index(row.network), row.seed, places[row.network, row.case], -row.share))

    def write(self, folder: Path) -> None:
        """Write the JSON, the table and the plot."""
        folder.mkdir(parents=True, exist_ok=True)
        record = {"machine": self.machine, "before": self.before, "rows": [asdict(row) for row in self.rows]}
        # A row a line.
        text = json.dumps(record).replace("}, {", "},\n{") + "\n"
        (folder / "shrinking.json").write_text(text, encoding="utf-8")
        (folder / "shrinking.md").write_text(self.render(), encoding="utf-8")
        self.draw(folder / "shrinking.png")

    def by_case(self, network: str, share: float) -> dict[Case, dict[int, Row]]:
        """Return the rows of one kind of network at one size, by case and seed."""
        result: dict[Case, dict[int, Row]] = {}
        for row in self.rows:
            if (row.network, row.share) == (network, share):
                result.setdefault(row.case, {})[row.seed] = row
        return result

    # -- against the goals -----------------------------------------------------------------------------------------

    def verdicts(self) -> list[str]:
        """Return what the comparison says of the goals, a line each."""
        return [line for name, share in itertools.product(self.before, SHARES) for line in self._verdicts(name, share)]

    def _verdicts(self, network: str, share: float) -> Iterator[str]:
        rows, place = self.by_case(network, share), f"{network} at {share:.0%}"

        def of(case: Case, loss: bool = False) -> BySeed:
            return {seed: row.loss if loss else row.accuracy for seed, row in rows.get(case, {}).items()}

        def compared(ours: Case, other: Case) -> str:
            return f"{_compared(of(ours), of(other))} (loss {_means(of(ours, True), of(other, True), 1, 4)})"

        for count in (0, *COUNTS):
            planned = Case(OURS, "planned", count)
            peers = [case for case in rows if case.tool in (PEER, PEER_AGAIN) and case.images == count]
            if count == 0:
                peers = [case for case in rows if case.tool == PEER]
            if planned in rows and peers:
                best = max(peers, key=lambda case: statistics.mean(of(case).values()))
                what = f"{PEER} with the same" if count else f"the best of {PEER}"
                yield f"- {place}, {_images(count)}, against {what}: {compared(planned, best)}"
        for count in (0, *COUNTS) if share < max(SHARES) else ():
            planned, even = Case(OURS, "planned", count), Case(UNIFORM, "uniform", count)
            if planned in rows and even in rows:
                yield f"- {place}, {_images(count)}, against uniform widths: {compared(planned, even)}"
        some = of(Case(OURS, "planned", 128))
        if share == 0.5 and some:
            least = {seed: 0.95 * accuracy for seed, accuracy in self.before[network].items()}
            yield f"- {place}, 128 images, against 95 % of what was: {_compared(some, least)}"

    # -- the table -------------------------------------------------------------------------------------------------

    def render(self) -> str:
        """Return the results as markdown."""
        lines = ["# Shrinking trained networks at once", "", f"- {self.machine}"]
        for network, before in self.before.items():
            found = f"{100 * statistics.mean(before.values()):.2f} % before"
            lines.append(f"- {network}: {found}" + (f", mean of {len(before)} networks" if len(before) > 1 else ""))
        lines += ["- test accuracy in %; in brackets, of the first network, after one epoch of fine-tuning"]
        for what, belongs in _FORMS.items():
            tuned = {row.network for row in self.rows if row.tuned is not None and belongs(row)}
            lines += (
                [f"- fine-tuned {what}: {', '.join(name for name in self.before if name in tuned)}"] if tuned else []
            )
        lines += ["- many other splits of batch-norm-mlp's parameters, over 8 networks: allocations.md", ""]
        for network in self.before:
            lines += [f"## {network}", "", *self._table(network), ""]
        lines += ["## After one epoch of fine-tuning, the worst and the best row", "", *self._tuned_table(), ""]
        lines += ["## Against the goals", ""]
        lines += ["Means, and by how much ours are more or less on the same network, with its standard error;"]
        lines += ["what is less than twice that is within two errors.", ""]
        return "\n".join([*lines, *self.verdicts(), ""])

    def _table(self, network: str) -> Iterator[str]:
        yield "| tool | method | images | " + " | ".join(f"{share:.0%}" for share in SHARES) + " |"
        yield "|---" * (3 + len(SHARES)) + "|"
        columns = [self.by_case(network, share) for share in SHARES]
        for case in dict.fromkeys(itertools.chain(*columns)):
            cells = [_cell(column.get(case, {})) for column in columns]
            yield f"| {case.tool} | {case.method} | {case.images} | " + " | ".join(cells) + " |"

    def _tuned_table(self) -> Iterator[str]:
        tools = {OURS: (OURS,), UNIFORM: (UNIFORM,), PEER: (PEER, PEER_AGAIN)}
        yield "| network | parameters | " + " | ".join(tools) + " |"
        yield "|---" * (2 + len(tools)) + "|"
        for network, share in itertools.product(self.before, SHARES):
            cells = []
            for names in tools.values():
                own = [row for row in self.rows if (row.network, row.share) == (network, share) and row.tool in names]
                found = [100 * row.tuned for row in own if row.tuned is not None]
                cells.append(f"{min(found):.2f} to {max(found):.2f}" if found else "")
            yield f"| {network} | {share:.0%} | " + " | ".join(cells) + " |"

    # -- the plot --------------------------------------------------------------------------------------------------

    def draw(self, path: Path) -> None:
        """Draw the share of wrong answers over that of parameters, a panel per network."""
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot as plt

        figure, panels = plt.subplots(
            1, len(self.before), figsize=(4 * len(self.before), 3.6), sharey=True, squeeze=False
        )
        kinds: dict[str, Callable[[Case], bool]] = {
            "fxwidth, 1024 images": lambda case: case.tool == OURS and case.images == 1024,
            "fxwidth, 128 images": lambda case: case.tool == OURS and case.images == 128,
            "fxwidth, no data": lambda case: case.tool == OURS and case.images == 0,
            "Torch-Pruning, best re-estimated, 1024 images": lambda case: (
                case.tool == PEER_AGAIN and case.images == 1024
            ),
            "Torch-Pruning, best as it comes": lambda case: case.tool == PEER,
        }
        for panel, (network, before) in zip(panels[0], self.before.items(), strict=True):
            for number, (label, belongs) in enumerate(kinds.items()):
                curve = [statistics.mean(before.values()), *(self._best(network, share, belongs) for share in SHARES)]
                style = "-" if label.startswith("fxwidth") else "--"
                values = [100 * (1 - value) for value in curve]
                panel.plot(
                    [100, *(100 * s for s in SHARES)], values, style, marker="o", label=label, color=f"C{number}"
                )
            panel.set_title(network)
            # Halves and tenths of a percent show beside errors near chance.
            panel.set_yscale("log")
            panel.yaxis.set_major_formatter("{x:g}")
            panel.set_xlabel("parameters kept (%)")
            panel.invert_xaxis()
            panel.grid(alpha=0.3, which="both")
        panels[0][0].set_ylabel("test error, not fine-tuned (%)")
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower center", ncol=3, frameon=False)
        figure.tight_layout(rect=(0, 0.14, 1, 1))
        figure.savefig(path, dpi=120)
        plt.close(figure)

    def _best(self, network: str, share: float, belongs: Callable[[Case], bool]) -> float:
        found = [_mean_accuracy(rows) for case, rows in self.by_case(network, share).items() if belongs(case)]
        return max(found, default=float("nan"))


def _images(count: int) -> str:
    return f"{count} images" if count else "no data"


def _mean_accuracy(rows: Mapping[int, Row]) -> float:
    return statistics.mean(row.accuracy for row in rows.values())


def _cell(rows: Mapping[int, Row]) -> str:
    if not rows:
        return ""
    tuned = [f" ({100 * row.tuned:.2f})" for row in rows.values() if row.tuned is not None]
    return f"{100 * _mean_accuracy(rows):.2f}" + "".join(tuned[:1])


def _compared(ours: BySeed, other: BySeed) -> str:
    mine, theirs = (statistics.mean(values[seed] for seed in _seeds(ours, other)) for values in (ours, other))
    if max(mine, theirs) < CHANCE + 0.05:
        word = "both near chance"
    else:
        word = "above" if mine > theirs else "equal" if mine == theirs else "BELOW"
        difference = _difference(ours, other)
        word += ", within two errors" if difference is not None and abs(difference[0]) < 2 * difference[1] else ""
    return f"{_means(ours, other, 100, 2)}: {word}"


def _seeds(ours: BySeed, other: BySeed) -> list[int]:
    """Return the networks on which both are measured already."""
    return [seed for seed in ours if seed in other]


def _means(ours: BySeed, other: BySeed, unit: float, digits: int) -> str:
    """Return both means, and that of the differences on the same network with its standard error."""
    seeds = _seeds(ours, other)
    words = " / ".join(f"{unit * statistics.mean(values[s] for s in seeds):.{digits}f}" for values in (ours, other))
    difference = _difference(ours, other)
    if difference is None:
        return words
    return f"{words}, {unit * difference[0]:+.{digits}f} ± {unit * difference[1]:.{digits}f}"


def _difference(ours: BySeed, other: BySeed) -> tuple[float, float] | None:
    """Return the mean difference on the same network and its standard error, where there are several networks."""
    differences = [ours[seed] - other[seed] for seed in _seeds(ours, other)]
    if len(differences) < 2:
        return None
    return statistics.mean(differences), statistics.stdev(differences) / len(differences) ** 0.5
