"""Which widths the code of a module can hold, where no configuration says so.

Groups are narrowed, alone and together, and the code is run under fake tensors at these widths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from fxwidth.groups.channel_group import ChannelGroup
from fxwidth.modules.class_runs import Failure
from fxwidth.modules.holdings import Holdings, Tie, kind_of
from fxwidth.modules.trials import Trials

# How many kinds of groups are narrowed together at most.
_MOST_KINDS = 6


class InCode:
    """What the code of a module without a configuration can hold."""

    def __init__(self, trials: Trials, groups: Sequence[ChannelGroup]) -> None:
        self._trials = trials
        self._groups = {group.name: group for group in groups}

    def found(self) -> Holdings:
        """Return it, as far as trials tell."""
        result = Holdings()
        units = [{name: group.width} for name, group in self._groups.items()]
        if self._failure(units) is not None:
            units = self._in_evaluation(result)
        for unit in self._culprits(units, self._problem) if self._problem(units) is not None else ():
            problem = str(self._problem([unit]))
            result.staying |= dict.fromkeys(unit, problem)
            result.ties = [tie for tie in result.ties if tie.units.keys() != unit.keys()]
        return result

    def _in_evaluation(self, result: Holdings) -> list[dict[str, int]]:
        """Note what groups go together and which stay by what the code does in evaluation; return what may change."""
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
        culprits = self._culprits(units, self._failure)
        for unit in culprits:
            result.staying |= dict.fromkeys(unit, "its code cannot have it changed beside other groups")
            result.ties = [tie for tie in result.ties if tie.units.keys() != unit.keys()]
        return [unit for unit in units if unit not in culprits]

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
        return next((found for one in self._all_narrowed(units) if (found := self._trials.failure(one))), None)

    def _problem(self, units: Sequence[Mapping[str, int]]) -> str | None:
        """Return what is in the way when they are written back, as what the code does in training alone."""
        return next((told for one in self._all_narrowed(units) if (told := self._trials.problem(one, None))), None)

    def _all_narrowed(self, units: Sequence[Mapping[str, int]]) -> Iterator[dict[str, int]]:
        """Yield widths at which neighbouring units keep different parts: first falling along the units, then rising.

        One pattern is not enough: code that cuts a dim into equal parts, as `chunk` does, takes an odd width with a
        first part that is greater by one.
        """
        numbers = range(len(units))
        for order in (numbers, numbers[::-1]) if len(units) > 1 else (numbers,):
            widths: dict[str, int] = {}
            for number, unit in zip(order, units, strict=True):
                widths |= _narrowed(unit, number)
            if widths:
                yield {name: max(width, self._groups[name].least.width) for name, width in widths.items()}

    def _culprits(
        self, units: Sequence[dict[str, int]], fails: Callable[[Sequence[dict[str, int]]], object]
    ) -> list[dict[str, int]]:
        """Return the units that are in the way alone, or where none is, those that are so beside the others."""
        if not units or fails(units) is None:
            return []
        if len(units) == 1:
            return list(units)
        half = len(units) // 2
        found = [*self._culprits(units[:half], fails), *self._culprits(units[half:], fails)]
        while (rest := [unit for unit in units if unit not in found]) and fails(rest) is not None:
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
