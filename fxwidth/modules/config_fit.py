"""The entries of a configuration with which a class is built at given widths, found by trial."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from torch import nn

from fxwidth.modules.class_runs import Failure
from fxwidth.modules.code_sizes import Pairs
from fxwidth.modules.rebuilding import Entry, Rebuilding, Shapes, shapes_of

Judge = Callable[[nn.Module], Failure | None]
# How many ways to come by the shapes are tried, and how many models are built in search of them.
_MOST_SOLUTIONS, _MOST_BUILT = 12, 300


@dataclass(frozen=True)
class Fitted:
    """A configuration that does, or why none has been found.

    Attributes:
        changes: the entries that change.
        built: the class, built anew with them, without values.
        problem: None, or what is in the way.
    """

    changes: Mapping[Entry, int]
    built: nn.Module | None
    problem: str | None


def fit_config(rebuilding: Rebuilding, shapes: Shapes, known: Pairs, judge: Judge) -> Fitted:
    """Find the entries with which a class has parameters of some shapes, and does what is prescribed.

    Args:
        rebuilding: builds the class anew.
        shapes: those of the parameters, by name.
        known: what sizes become in the ops.
        judge: tells where a model with the attributes of one that was built does otherwise.
    """
    fit = _Fit(rebuilding, shapes, known)
    furthest: tuple[int, Fitted] | None = None
    for changes in islice(fit.by_shapes(), _MOST_SOLUTIONS):
        changes, failure = _fit_ops(fit, rebuilding, changes, judge)
        if failure is None:
            return Fitted(changes, rebuilding.build(changes), None)
        if furthest is None or failure.reached > furthest[0]:
            furthest = failure.reached, Fitted(changes, None, str(failure))
    return Fitted(fit.nearest, None, fit.conflict(fit.nearest)) if furthest is None else furthest[1]


def _fit_ops(
    fit: _Fit, rebuilding: Rebuilding, changes: dict[Entry, int], judge: Judge
) -> tuple[dict[Entry, int], Failure | None]:
    """Change entries further that are in no shape, such as a number of heads; return where that does not succeed."""
    failure = judge(_certain(rebuilding.build(changes)))
    while failure is not None:
        for more in fit.others(changes):
            other = rebuilding.build(more)
            if other is None or fit.wrong(more):
                continue
            after = judge(other)
            if after is None or after.reached > failure.reached:
                changes, failure = more, after
                break
        else:
            break
    return changes, failure


def _certain(built: nn.Module | None) -> nn.Module:
    assert built is not None
    return built


class _Fit:
    def __init__(self, rebuilding: Rebuilding, shapes: Shapes, known: Pairs) -> None:
        self._rebuilding = rebuilding
        self._values = rebuilding.entries()
        self._base = shapes_of(rebuilding.base)
        self._shapes = {name: shape for name, shape in shapes.items() if name in self._base}
        self._known = known
        self._places = self._sensitive()
        self._left = 0
        self.nearest: Mapping[Entry, int] = {}
        self._fewest = len(self.wrong({})) + 1

    def wrong(self, changes: Mapping[Entry, int]) -> list[tuple[str, int]]:
        """Return the dims that come out otherwise; one for all where nothing can be built."""
        built = self._rebuilding.build(changes)
        found = {} if built is None else shapes_of(built)
        if found.keys() != self._base.keys():
            return [("", 0)] * sum(map(len, self._base.values()))
        return [
            (name, dim)
            for name, shape in self._shapes.items()
            for dim, size in enumerate(shape)
            if found[name][dim] != size
        ]

    def by_shapes(self) -> Iterator[dict[Entry, int]]:
        """Yield the entries by which all dims come out as they must: several ways, where heads and their size may."""
        self._left = _MOST_BUILT
        yield from self._extended({})

    def _extended(self, changes: dict[Entry, int]) -> Iterator[dict[Entry, int]]:
        wrong = self.wrong(changes)
        if len(wrong) < self._fewest:
            self.nearest, self._fewest = changes, len(wrong)
        if not wrong:
            yield changes
            return
        found = []
        for entry in self._open(changes, wrong):
            for value in self._candidates(entry):
                self._left -= 1
                if self._left < 0:
                    return
                more = {**changes, entry: value}
                found.append((len(self.wrong(more)), more))
        for _, more in sorted(found, key=lambda one: one[0]):
            yield from self._extended(more)

    def _open(self, changes: Mapping[Entry, int], wrong: Sequence[tuple[str, int]]) -> list[Entry]:
        """Return entries that may be set next: those of the dim that depends on the fewest."""
        if self._is_none(wrong):
            # Nothing can be built: another entry must change beside, whichever that is.
            return [entry for entry in self._values if entry not in changes]
        by_place: dict[tuple[str, int], list[Entry]] = {place: [] for place in wrong}
        for entry, places in self._places.items():
            for place in places:
                if place in by_place:
                    by_place[place].append(entry)
        # What no other entry changes alone may be changed by one that matters beside others: with which parameters come
        # or go, or that rounds a size off where it does not divide it.
        silent = [entry for entry in self._values if entry not in self._places and entry not in changes]
        found = ([entry for entry in entries if entry not in changes] for entries in by_place.values())
        return min((entries or silent for entries in found), key=len)

    @staticmethod
    def _is_none(wrong: Sequence[tuple[str, int]]) -> bool:
        return wrong[0][0] == ""

    def others(self, changes: Mapping[Entry, int]) -> Iterator[dict[Entry, int]]:
        """Yield more changes that may help, of entries that no shape tells of first."""
        for entry in sorted(self._values, key=lambda entry: entry in self._places):
            for value in self._candidates(entry):
                if changes.get(entry) != value:
                    yield {**changes, entry: value}

    def conflict(self, changes: Mapping[Entry, int]) -> str:
        """Tell which entry would have to hold several numbers, or which parameters come out otherwise."""
        wrong = {name: None for name, _ in self.wrong(changes)}
        for entry, places in self._places.items():
            wanted: dict[int, str] = {}
            for name, dim in places:
                old = self._base[name][dim]
                if (self._values[entry] * self._shapes[name][dim]) % old == 0:
                    wanted.setdefault(self._values[entry] * self._shapes[name][dim] // old, name)
            if len(wanted) > 1 and any(name in wrong for name in wanted.values()):
                told = ", ".join(f"{size} for {name}" for size, name in list(wanted.items())[:4])
                return f"the configuration has one number, {entry}, where {told} would be needed"
        listed = ", ".join(f"{name} {list(self._shapes[name])}" for name in list(wrong)[:3] if name in self._shapes)
        return f"no configuration was found by which {listed or 'the class'} comes out of these sizes"

    def _candidates(self, entry: Entry) -> list[int]:
        value = self._values[entry]
        counts: dict[int, int] = defaultdict(int)
        for name, dim in self._places.get(entry, ()):
            old, new = self._base[name][dim], self._shapes[name][dim]
            if old != new and (value * new) % old == 0:
                counts[value * new // old] += 1
        found = sorted(counts, key=lambda size: -counts[size])
        found += [int(new) for new in self._known.get(value, ()) if isinstance(new, int) and new not in found]
        return [size for size in found if size != value and size > 0]

    def _sensitive(self) -> dict[Entry, list[tuple[str, int]]]:
        """Return the dims that change with each entry, of those that change the shapes and not which there are."""
        found: dict[Entry, list[tuple[str, int]]] = {}
        for entry, value in self._values.items():
            for other in (2 * value, value // 2, value + 1) if value > 0 else ():
                built = self._rebuilding.build({entry: other}) if other > 0 and other != value else None
                shapes = {} if built is None else shapes_of(built)
                if shapes.keys() != self._base.keys():
                    continue
                places = [
                    (name, dim)
                    for name, shape in shapes.items()
                    for dim, size in enumerate(shape)
                    if size != self._base[name][dim] and name in self._shapes
                ]
                if places:
                    found[entry] = places
                break
        return found
