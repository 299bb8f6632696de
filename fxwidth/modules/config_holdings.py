"""Which widths can be said by the entries of a configuration.

Entries are made smaller, alone and together, and the class is built anew from them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, partial
from itertools import islice
from typing import Any

from torch import nn

from fxwidth.analysis.result import ParameterAxes
from fxwidth.axes.polynomials import Polynomial, entries_polynomial
from fxwidth.groups.channel_group import ChannelGroup
from fxwidth.modules.class_runs import ClassRuns, Failure
from fxwidth.modules.holdings import Holdings, Tie, kind_of
from fxwidth.modules.rebuilding import (
    Entry,
    Rebuilding,
    Shapes,
    made_otherwise,
    shapes_of,
)
from fxwidth.modules.trials import Trials
from fxwidth.runtime.tensor_slots import tensor_slots

# How many entries of a configuration are made smaller together at most.
_MOST_ENTRIES = 5
# How many kinds of groups may have to change for given shapes, and how many ways to come by these are tried.
_DEEPEST, _MOST_SOLUTIONS = 16, 12
# By how many steps a tie is made narrower than planned at most, for a class to be built of it.
_NARROWER = 64


@dataclass(frozen=True)
class _Move:
    entries: tuple[Entry, ...]
    tie: Tie


class InConfig:
    """What can be said by a model's configuration."""

    def __init__(self, trials: Trials, groups: Sequence[ChannelGroup], rebuilding: Rebuilding) -> None:
        self._trials = trials
        self._groups = {group.name: group for group in groups}
        self._rebuilding = rebuilding
        self._values = {entry: value for entry, value in rebuilding.entries().items() if value > 1}
        self._base = shapes_of(rebuilding.base)
        self._why: dict[str, str] = {}

    def found(self) -> Holdings:
        """Return it, as far as trials tell."""
        found = [move for entry in self._values if self._matters(entry) and (move := self._move(entry)) is not None]
        moves: list[_Move] = []
        # Where two change the same groups, such as a hidden size and a ratio to it, that which changes more is taken.
        for move in sorted(found, key=self._left):
            if all(not one.tie.units.keys() & move.tie.units.keys() for one in moves):
                moves.append(move)
        moves = self._together(moves)
        entries = [str(entry) for move in moves for entry in move.entries]
        result = Holdings([move.tie for move in moves], entries=entries, narrower=partial(self._narrower, moves))
        held = {name for move in moves for name in move.tie.units}
        why = "no entry of the configuration changes it by itself"
        result.staying |= {name: self._why.get(name, why) for name in self._groups if name not in held}
        return result

    def _matters(self, entry: Entry) -> bool:
        """Tell whether an entry changes parameters, if only beside others: alone it may bring other ones, or fail."""
        other = self._rebuilding.build({entry: self._less((entry,))})
        return other is None or shapes_of(other) != self._base

    def _left(self, move: _Move) -> float:
        """Return how many parameters there are after a move by half."""
        factors = {self._groups[name].factor: self._groups[name].width // 2 for name in move.tie.units}
        return self._parameters(factors)

    @cached_property
    def _parameters(self) -> Polynomial:
        analysis = self._trials.width_graph.analysis
        entries = analysis.parameters.values()
        return entries_polynomial(analysis.space, [e.axes for e in entries if isinstance(e.tensor, nn.Parameter)])

    def _move(self, first: Entry) -> _Move | None:
        """Return a change of entries by one ratio that changes groups as a whole, or None."""
        entries: tuple[Entry, ...] = (first,)
        move, failure = self._tried(entries)
        while move is None and len(entries) < _MOST_ENTRIES:
            best = entries
            reached = -1 if failure is None else failure.reached
            for other in self._values:
                if other in entries or math.gcd(*(self._values[one] for one in (*entries, other))) == 1:
                    continue
                found, after = self._tried((*entries, other))
                if found is not None:
                    return found
                if after is not None and after.reached > reached:
                    best, reached, failure = (*entries, other), after.reached, after
            if best == entries:
                return None
            entries = best
        return move

    def _less(self, entries: Sequence[Entry]) -> Any:
        common = math.gcd(*(self._values[entry] for entry in entries))
        return self._values[entries[0]] // common * max(1, common // 2)

    def _tried(self, entries: tuple[Entry, ...]) -> tuple[_Move | None, Failure | None]:
        common = math.gcd(*(self._values[entry] for entry in entries))
        left = max(1, common // 2)
        changes = {entry: self._values[entry] // common * left for entry in entries}
        other = self._rebuilding.build(changes)
        shapes = self._shapes(changes)
        if other is None or not shapes:
            return None, Failure(-1, "", "", "the class cannot be built so") if other is None else None
        worst: Failure | None = Failure(-1, "", "", "its shapes are not those of narrower groups")
        if (buffer := made_otherwise(self._rebuilding.base, other)) is not None:
            return None, Failure(-1, "", type(other).__name__, f"it makes other numbers in {buffer} itself")
        self._tell_pinned(entries, shapes)
        for widths in self._solutions(shapes):
            failure = self._trials.failure_as(widths, self._rebuilding.base, other)
            if failure is None:
                step = math.gcd(common, *(self._groups[name].width for name in widths))
                units = {name: self._groups[name].width // step for name in widths}
                if all(units[name] * (step * left // common) == width for name, width in widths.items()):
                    names = ", ".join(map(str, entries))
                    return _Move(entries, Tie(units, f"the configuration has one number for them ({names})")), None
                continue
            told = f"changed by {', '.join(map(str, entries))} in the configuration: {failure}"
            for name in widths:
                self._why.setdefault(name, told)
            if worst is None or failure.reached > worst.reached:
                worst = failure
        return None, worst

    def _tell_pinned(self, entries: Sequence[Entry], shapes: Shapes) -> None:
        """Note why groups stay that entries change beside a size which the graph cannot change."""
        graph = self._trials.width_graph
        touched: dict[str, None] = {}
        told = ""
        # Parameters of one kind are alike.
        for name, shape in {kind_of(name): (name, shape) for name, shape in reversed(shapes.items())}.values():
            found = self._entry_of(name)
            for dim, (old, new) in enumerate(zip(self._base[name], shape, strict=True)):
                if found is None or name in self._trials.runs.dead:
                    continue
                inside = [g for g in graph.groups if any((s.parameter, s.dim) == (found.name, dim) for s in g.sites)]
                free = [group.name for group in inside if group.name in self._groups]
                if new != old and not free:
                    pins = [f", as {group.name!r} is pinned there: {group.pinned}" for group in inside if group.pinned]
                    told = told or f"{name} then has {new} where the graph can have {old} alone{''.join(pins[:1])}"
                touched |= dict.fromkeys(free if new != old else ())
        for group in touched if told else ():
            self._why.setdefault(group, f"changed by {', '.join(map(str, entries))} in the configuration: {told}")

    def _entry_of(self, name: str) -> ParameterAxes | None:
        runs = self._trials.runs
        return runs.analysis.parameters.get(runs.entries.get(_first_name(runs, name), ""))

    def _shapes(self, changes: Mapping[Entry, int]) -> Shapes:
        """Return the shapes of those parameters that changed entries change; none where others come or go."""
        other = self._rebuilding.build(changes)
        if other is None:
            return {}
        shapes = shapes_of(other)
        if shapes.keys() != self._base.keys():
            return {}
        return {name: shape for name, shape in shapes.items() if shape != self._base[name]}

    def _solutions(self, shapes: Shapes) -> Iterator[dict[str, int]]:
        """Yield widths of groups, all of a kind alike, by which parameters get some shapes."""
        space = self._trials.width_graph.analysis.space
        wanted: list[tuple[Polynomial, int]] = []
        for name, tensor_shape in self._base.items():
            entry = self._entry_of(name)
            shape = shapes.get(name, tensor_shape)
            if entry is not None and name not in self._trials.runs.dead:
                wanted += [(entries_polynomial(space, [[axis]]), n) for axis, n in zip(entry.axes, shape, strict=True)]
        yield from islice(self._solved(wanted, {}, 0), _MOST_SOLUTIONS)

    def _solved(
        self, wanted: Sequence[tuple[Polynomial, int]], widths: dict[str, int], depth: int
    ) -> Iterator[dict[str, int]]:
        factors = {self._groups[name].factor: width for name, width in widths.items()}
        wrong = next(((cost, size) for cost, size in wanted if round(cost(factors)) != size), None)
        if wrong is None:
            if widths:
                yield widths
            return
        if depth > _DEEPEST:
            return
        cost, size = wrong
        for name, group in self._groups.items():
            along = cost.along(group.factor, factors)
            if name in widths or len(along) != 2 or not along[1]:
                continue
            constant = cost(factors) - along[1] * group.width
            width = (size - constant) / along[1]
            if width == int(width) and group.least.width <= width < group.width:
                share = int(width) / group.width
                alike = {
                    n: g for n, g in self._groups.items() if kind_of(n) == kind_of(name) and g.width == group.width
                }
                more = {n: int(g.width * share) for n, g in alike.items() if n not in widths}
                yield from self._solved(wanted, {**widths, **more}, depth + 1)
                if len(more) > 1:
                    yield from self._solved(wanted, {**widths, name: int(width)}, depth + 1)

    def _together(self, moves: list[_Move]) -> list[_Move]:
        """Return the moves that can be made at once."""
        while moves and self._joint(moves) is not None:
            fewer = (moves[:place] + moves[place + 1 :] for place in reversed(range(len(moves))))
            moves = next((rest for rest in fewer if self._joint(rest) is None), moves[:-1])
        return moves

    def _narrower(self, moves: Sequence[_Move], widths: Mapping[str, int]) -> Iterator[dict[str, int]]:
        """Yield widths of which the class can be built: those given, and with one tie somewhat narrower."""
        multiples = [self._multiple(move, widths) for move in moves]
        if self._can_be_built(moves, multiples):
            yield dict(widths)
        for place in sorted(range(len(moves)), key=lambda place: -multiples[place]):
            for less in range(multiples[place] - 1, max(0, multiples[place] - 1 - _NARROWER), -1):
                other = [*multiples[:place], less, *multiples[place + 1 :]]
                if self._can_be_built(moves, other):
                    units = moves[place].tie.units.items()
                    yield {**widths, **{name: unit * less for name, unit in units if name in widths}}

    def _multiple(self, move: _Move, widths: Mapping[str, int]) -> int:
        name, unit = next(iter(move.tie.units.items()))
        return widths.get(name, self._groups[name].width) // unit

    def _can_be_built(self, moves: Sequence[_Move], multiples: Sequence[int]) -> bool:
        changes: dict[Entry, Fraction] = {}
        for move, multiple in zip(moves, multiples, strict=True):
            for entry in move.entries:
                ratio = Fraction(multiple, self._multiple(move, {}))
                changes[entry] = changes.get(entry, Fraction(self._values[entry])) * ratio
        if any(value.denominator != 1 for value in changes.values()):
            return False
        return self._rebuilding.build({entry: int(value) for entry, value in changes.items()}) is not None

    def _joint(self, moves: Sequence[_Move]) -> Failure | None:
        changes: dict[Entry, int] = {}
        widths: dict[str, int] = {}
        for move in moves:
            common = math.gcd(*(self._values[entry] for entry in move.entries))
            left = max(1, common // 2)
            for entry in move.entries:
                changes[entry] = changes.get(entry, self._values[entry]) * left // common
            widths |= {name: self._groups[name].width * left // common for name in move.tie.units}
        other = self._rebuilding.build(changes)
        if other is None:
            return Failure(-1, "", "", "the class cannot be built so")
        return self._trials.failure_as(widths, self._rebuilding.base, other)


def _first_name(runs: ClassRuns, name: str) -> str:
    """Return the first name of a tensor of the model that has several."""
    if name in runs.slots:
        return name
    owner, _, attribute = name.rpartition(".")
    tensor = getattr(runs.model.get_submodule(owner), attribute)
    return next(first for first, (one, _) in tensor_slots(runs.model).items() if one is tensor)
