"""Which widths a module can hold: groups that its code or its configuration has one number for, and sizes that stay.

It is learnt by probing the module once: groups are narrowed, its own code is run under fake tensors, and what it does
is compared with what is prescribed. Where it fails, groups that occur there are narrowed by the same ratio, as long as
that leads further.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from itertools import islice
from typing import Any

from torch import nn

from fxwidth.axes.polynomials import Polynomial, entries_polynomial
from fxwidth.errors import FxwidthError
from fxwidth.groups.channel_group import ChannelGroup
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.modules.class_runs import ClassRuns, Failure
from fxwidth.modules.graph_calls import arguments_of_graph
from fxwidth.modules.rebuilding import (
    Entry,
    Rebuilding,
    Shapes,
    made_otherwise,
    plain_objects,
    shapes_of,
    unsaved_tensors,
)
from fxwidth.modules.trials import Trials
from fxwidth.rewriting.transaction import Transaction
from fxwidth.runtime.tensor_slots import tensor_slots

# How many entries of a configuration, and how many kinds of groups, are narrowed together at most.
_MOST_ENTRIES, _MOST_KINDS = 5, 6
# How many kinds of groups may have to change for given shapes, and how many ways to come by these are tried.
_DEEPEST, _MOST_SOLUTIONS = 16, 12
# By how many steps a tie is made narrower than planned at most, for a class to be built of it.
_NARROWER = 64


@dataclass(frozen=True)
class Tie:
    """Groups whose widths a module can only change together.

    Attributes:
        units: by group name, what its width is a multiple of: that multiple is the same for all of them.
        why: what has one number for them.
    """

    units: Mapping[str, int]
    why: str


@dataclass
class Holdings:
    """What a module can hold.

    Attributes:
        ties: the groups that go together.
        staying: the groups that must keep their widths, and why.
        entries: the entries of a configuration that hold widths; None for a module that has none.
        settle: makes widths by group name somewhat smaller where the class cannot be built of them, as where a number
            of heads must divide another size.
    """

    ties: list[Tie] = field(default_factory=list)
    staying: dict[str, str] = field(default_factory=dict)
    entries: list[str] | None = None
    settle: Callable[[Mapping[str, int]], dict[str, int]] = dict

    def told(self) -> dict[str, Any]:
        """Return it as plain data, for the notes of a plan."""
        return {
            "keeps_eps": self.entries is not None,
            "ties": [{"units": dict(tie.units), "why": tie.why} for tie in self.ties],
            "staying": dict(self.staying),
            "entries": self.entries,
        }


def module_holdings(width_graph: WidthGraph, model: nn.Module) -> Holdings:
    """Return which widths of a graph's groups a module of the class that was traced can hold.

    It is found once for each module; that is left as it was, after any exception too, Ctrl-C included.

    Raises:
        FxwidthError: the module does not do what the graph does at its present widths.
    """
    key = ("holdings", id(model))
    if key not in width_graph.memo:
        runs = ClassRuns(width_graph.analysis, model, arguments_of_graph(width_graph.analysis.module))
        transaction = Transaction(model, objects=plain_objects(model))
        width_graph.memo[key] = model, transaction.run(lambda: holdings_of(width_graph, runs))
    found: Holdings = width_graph.memo[key][1]
    return found


def holdings_of(width_graph: WidthGraph, runs: ClassRuns) -> Holdings:
    """Return which widths of a graph's groups a module can hold; it is left as it was."""
    trials = Trials(width_graph, runs)
    failure = runs.failure(trials.maps({}))
    if failure is not None:
        raise FxwidthError(
            f"for_module: {type(runs.model).__name__} does not do what the graph does at the widths that this has now: "
            f"{failure}. Pass the model that was traced, or one of the same class and sizes."
        )
    staying = dict(_made_anew(width_graph, runs))
    groups = [group for group in width_graph.free if group.name not in staying and group.width > group.least.width]
    rebuilding = Rebuilding.of(runs.model)
    found = _InCode(trials, groups).found() if rebuilding is None else _InConfig(trials, groups, rebuilding).found()
    found.staying |= staying
    return found


def _made_anew(width_graph: WidthGraph, runs: ClassRuns) -> Iterator[tuple[str, str]]:
    """Yield the groups that occur in tensors whose numbers a class makes itself, such as positions or frequencies."""
    unsaved = unsaved_tensors(runs.model)
    own = {graph: name for name, graph in runs.entries.items()}
    for group in width_graph.free:
        for site in group.sites:
            name = own.get(site.parameter)
            tensor = runs.slots[name][0] if name is not None else None
            if tensor is None or isinstance(tensor, nn.Parameter):
                continue
            if name in unsaved or not (tensor.is_floating_point() or tensor.is_complex()):
                yield group.name, f"the class makes the numbers in {name} itself"
                break


def kind_of(name: str) -> str:
    """Return a group's name without the numbers of layers."""
    return re.sub(r"\d+(?=\.)|(?<=\.)\d+", "*", name)


class _InCode:
    """What the code of a module without a configuration can hold."""

    def __init__(self, trials: Trials, groups: Sequence[ChannelGroup]) -> None:
        self._trials = trials
        self._groups = {group.name: group for group in groups}

    def found(self) -> Holdings:
        result = Holdings()
        if self._failure([{name: group.width} for name, group in self._groups.items()]) is None:
            return result
        free, waiting = self._alone()
        tied: list[dict[str, int]] = []
        known: dict[str, Failure | frozenset[str]] = {}
        while waiting:
            name = next(one for one in self._groups if one in waiting)
            found = known.get(kind_of(name))
            tie, failure = ({name: 0}, found) if isinstance(found, Failure) else self._tied(name, waiting, found)
            # Groups of a kind are in layers of one class: what is found of the first is true of all, or is seen below.
            known[kind_of(name)] = frozenset(map(kind_of, tie)) if failure is None else failure
            waiting -= tie.keys() if failure is None else {name}
            if failure is None:
                tied.append(tie)
                result.ties.append(Tie(_units(tie), "its code has one number for them"))
            else:
                result.staying[name] = str(failure)
        units = [*({name: self._groups[name].width} for name in free), *tied]
        for unit in self._culprits(units):
            result.staying |= dict.fromkeys(unit, "its code cannot have it changed beside other groups")
            result.ties = [tie for tie in result.ties if tie.units.keys() != unit.keys()]
        return result

    def _alone(self) -> tuple[list[str], set[str]]:
        """Return the groups that can be narrowed by themselves, as one of their kind can, and those that cannot."""
        verdicts: dict[str, bool] = {}
        for name, group in self._groups.items():
            if kind_of(name) not in verdicts:
                verdicts[kind_of(name)] = self._failure([{name: group.width}]) is None
        free = [name for name in self._groups if verdicts[kind_of(name)]]
        return free, self._groups.keys() - set(free)

    def _failure(self, units: Sequence[Mapping[str, int]]) -> Failure | None:
        """Return where units fail that are narrowed at once, each by a ratio of its own."""
        widths: dict[str, int] = {}
        for number, unit in enumerate(units):
            widths |= _narrowed(unit, number)
        return self._trials.failure({n: max(w, self._groups[n].least.width) for n, w in widths.items()})

    def _culprits(self, units: Sequence[dict[str, int]]) -> list[dict[str, int]]:
        """Return the units that are in the way alone, or where none is, those that are so beside the others."""
        if not units or self._failure(units) is None:
            return []
        if len(units) == 1:
            return list(units)
        half = len(units) // 2
        found = [*self._culprits(units[:half]), *self._culprits(units[half:])]
        while (rest := [unit for unit in units if unit not in found]) and self._failure(rest) is not None:
            found.append(rest[-1])
        return found

    def _tied(
        self, name: str, waiting: set[str], kinds: frozenset[str] | None
    ) -> tuple[dict[str, int], Failure | None]:
        """Return a group with others by which it can be narrowed, and None, or where that does not succeed.

        Args:
            name: the group.
            waiting: the others.
            kinds: those of the groups that a group of its kind goes with, where that is known.
        """
        if kinds is not None:
            waiting = {one for one in waiting if kind_of(one) in kinds}
        tie = {name: self._groups[name].width}
        failure: Failure | None = self._failure_of(tie)
        while failure is not None and len({kind_of(one) for one in tie}) <= _MOST_KINDS:
            best: dict[str, int] = tie
            best_failure = failure
            for more in self._joining(tie, failure, waiting):
                after = self._failure_of(more)
                if after is None:
                    return more, None
                if after.reached > best_failure.reached:
                    best, best_failure = more, after
            if best is tie:
                return tie, failure
            tie, failure = best, best_failure
        return tie, failure

    def _failure_of(self, tie: Mapping[str, int]) -> Failure | None:
        if math.gcd(*tie.values()) == 1:
            return Failure(-1, "", "", f"the widths of {', '.join(tie)} have no part in common")
        return self._trials.failure(_narrowed(tie, 0))

    def _joining(self, tie: Mapping[str, int], failure: Failure, waiting: set[str]) -> Iterator[dict[str, int]]:
        """Yield a tie with more groups: each that occurs where it fails, alone and with all of its kind."""
        others = [name for name in self._groups if name not in tie and name in waiting]
        near = [name for name in others if any(_inside(s.parameter, failure.part) for s in self._groups[name].sites)]
        near += [name for name in others if name not in near and _shared_path(name, failure.part)]
        for name in near:
            yield {**tie, name: self._groups[name].width}
            alike = [one for one in others if kind_of(one) == kind_of(name)]
            if len(alike) > 1:
                yield {**tie, **{one: self._groups[one].width for one in alike}}


def _inside(parameter: str, part: str) -> bool:
    return not part or parameter.startswith(f"{part}.")


def _shared_path(name: str, part: str) -> bool:
    return bool(part) and name.startswith(part.rpartition(".")[0])


def _units(tie: Mapping[str, int]) -> dict[str, int]:
    common = math.gcd(*tie.values())
    return {name: width // common for name, width in tie.items()}


def _narrowed(unit: Mapping[str, int], number: int) -> dict[str, int]:
    """Return about half the widths of groups that go together; not the same part of each, lest that hide a fault."""
    common = math.gcd(*unit.values())
    left = max(1, common // 2 - number % max(1, common // 4))
    return {name: width // common * left for name, width in unit.items()}


@dataclass(frozen=True)
class _Move:
    entries: tuple[Entry, ...]
    tie: Tie


class _InConfig:
    """What can be said by a model's configuration."""

    def __init__(self, trials: Trials, groups: Sequence[ChannelGroup], rebuilding: Rebuilding) -> None:
        self._trials = trials
        self._groups = {group.name: group for group in groups}
        self._rebuilding = rebuilding
        self._values = {entry: value for entry, value in rebuilding.entries().items() if value > 1}
        self._base = shapes_of(rebuilding.base)
        self._why: dict[str, str] = {}

    def found(self) -> Holdings:
        shaping = [entry for entry in self._values if self._shapes({entry: self._less((entry,))})]
        moves: list[_Move] = []
        for entry in shaping:
            move = self._move(entry)
            if move is None:
                continue
            taken = {name for one in moves for name in one.tie.units}
            if not taken & move.tie.units.keys():
                moves.append(move)
        moves = self._together(moves)
        entries = [str(entry) for move in moves for entry in move.entries]
        result = Holdings([move.tie for move in moves], entries=entries, settle=partial(self._settled, moves))
        held = {name for move in moves for name in move.tie.units}
        why = "no entry of the configuration changes it by itself"
        result.staying |= {name: self._why.get(name, why) for name in self._groups if name not in held}
        return result

    def _move(self, first: Entry) -> _Move | None:
        """Return a change of entries by one ratio that changes groups as a whole, or None."""
        entries: tuple[Entry, ...] = (first,)
        move, failure = self._tried(entries)
        while move is None and len(entries) < _MOST_ENTRIES:
            best = entries
            reached = -2 if failure is None else failure.reached
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
        runs, space = self._trials.runs, self._trials.width_graph.analysis.space
        entries = self._trials.width_graph.analysis.parameters
        wanted: list[tuple[Polynomial, int]] = []
        for name, tensor_shape in self._base.items():
            first = _first_name(runs, name)
            entry = entries.get(runs.entries.get(first, ""))
            shape = shapes.get(name, tensor_shape)
            if entry is not None:
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
            moves = moves[:-1]
        return moves

    def _settled(self, moves: Sequence[_Move], widths: Mapping[str, int]) -> dict[str, int]:
        """Return widths of which the class can be built: those given, or with one tie somewhat narrower."""
        multiples = [self._multiple(move, widths) for move in moves]
        if self._can_be_built(moves, multiples):
            return dict(widths)
        for place in sorted(range(len(moves)), key=lambda place: -multiples[place]):
            for less in range(multiples[place] - 1, max(0, multiples[place] - 1 - _NARROWER), -1):
                other = [*multiples[:place], less, *multiples[place + 1 :]]
                if self._can_be_built(moves, other):
                    units = moves[place].tie.units.items()
                    return {**widths, **{name: unit * less for name, unit in units if name in widths}}
        return dict(widths)

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
