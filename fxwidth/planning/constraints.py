"""To which widths groups may change: ranges, grids and groups that go together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fxwidth.errors import FxwidthError
from fxwidth.groups.channel_group import ChannelGroup
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.modules.holdings import Holdings
from fxwidth.option_keywords import SameWidth
from fxwidth.options import PlanOptions
from fxwidth.planning.group_choice import matching
from fxwidth.recording.width_history import first_widths


@dataclass(frozen=True)
class Limits:
    """What widths a group may take.

    Attributes:
        least: the smallest, or as a float its part of the width that the group had first.
        most: the largest, if there is one.
        align: of what widths are multiples.
        first: the widths that groups had before all resizes, by name, of those that were resized.
    """

    least: int | float
    most: int | None
    align: int
    first: Mapping[str, int]

    @classmethod
    def of(cls, options: PlanOptions, width_graph: WidthGraph) -> Limits:
        """Return those that options set."""
        first = first_widths(width_graph.analysis.module)
        return cls(options.min_width, options.max_width, options.align, first)

    def nearest(self, group: ChannelGroup, width: int) -> int:
        """Return the allowed width for a group that is to have some width: rounded up, and never across its own."""
        rounded = self._up(max(width, self._least_of(group)))
        if width <= group.width:
            rounded = min(rounded, group.width)
        return rounded if self.most is None else min(rounded, self._widest)

    def smaller(self, group: ChannelGroup) -> list[int]:
        """Return the widths that a group may shrink to or stay at, ascending."""
        top = group.width if self.most is None else min(group.width, self.most)
        widths = list(range(self._up(self._least_of(group)), top + 1, self.align))
        if group.width == top and top not in widths:
            widths.append(top)
        return widths or [group.width]

    def allowed(self, group: ChannelGroup, top: int) -> list[int]:
        """Return the widths that a group may take, ascending, up to some width above its own."""
        top = top if self.most is None else min(top, self.most)
        return self.smaller(group) + list(range(self._up(group.width + 1), top + 1, self.align))

    def _least_of(self, group: ChannelGroup) -> int:
        least = self.least
        if isinstance(least, float):
            least = math.ceil(least * self.first.get(group.name, group.width) * (1 - 1e-12))
        return max(least, group.least.width)

    def _up(self, width: int) -> int:
        return -(-width // self.align) * self.align

    @property
    def _widest(self) -> int:
        assert self.most is not None
        return self.most // self.align * self.align


@dataclass(frozen=True)
class Class:
    """Groups that are to have one width, or widths in a fixed relation.

    Attributes:
        groups: those that may change.
        fixed: the width that all must take, because one of them cannot change.
        units: of each group, what its width is a multiple of, that multiple being the same for all; else all have one
            width.
    """

    groups: tuple[ChannelGroup, ...]
    fixed: int | None = None
    units: tuple[int, ...] = ()

    def of_groups(self, width: int) -> dict[ChannelGroup, int]:
        """Return the width of each group at that of the class, which is the multiple where there are units."""
        return dict(zip(self.groups, (unit * width for unit in self.each_unit), strict=True))

    @property
    def each_unit(self) -> tuple[int, ...]:
        """The unit of each group."""
        return self.units or (1,) * len(self.groups)

    @property
    def present(self) -> int:
        """The present width of the class."""
        return max(group.width // unit for group, unit in zip(self.groups, self.each_unit, strict=True))

    def widths(self, limits: Limits, growth: float = 1.0) -> list[int]:
        """Return the widths of the class that all may take, ascending: up to the present one times a factor.

        Raises:
            FxwidthError: there are none.
        """
        if self.fixed is not None:
            return [self.fixed]
        first, *others = [
            {width // unit for width in limits.allowed(group, math.ceil(growth * group.width)) if width % unit == 0}
            for group, unit in zip(self.groups, self.each_unit, strict=True)
        ]
        common = first.intersection(*others)
        if not common and self.units:
            return [self.present]
        if not common:
            raise FxwidthError(
                f"same_width: {_listed(self.groups)} have no width in common that min_width={limits.least}, "
                f"max_width={limits.most} and align={limits.align} allow; lower min_width or align."
            )
        return sorted(common)


def classes(width_graph: WidthGraph, free: Iterable[ChannelGroup], same_width: SameWidth | None) -> list[Class]:
    """Return the groups that may change, put together where a pattern says that they are to have one width.

    Raises:
        FxwidthError: a pattern matches no group, in a flat list one group alone, two share a group, or groups that must
            stay have other widths.
    """
    free = list(free)
    result: list[Class] = []
    taken: dict[ChannelGroup, str | Sequence[str]] = {}
    patterns = [same_width] if isinstance(same_width, str) else list(same_width or ())
    # In a flat list of names each is a class of its own, which is hardly what was meant.
    is_flat = all(isinstance(pattern, str) for pattern in patterns)
    for pattern in patterns:
        members = matching(width_graph, pattern, "same_width")
        if len(members) == 1 and is_flat:
            raise FxwidthError(_asks_nothing(members[0], patterns))
        for group in members:
            if group in taken:
                raise FxwidthError(
                    f"same_width={pattern!r} and same_width={taken[group]!r} both match group {group.name!r}; "
                    "write patterns that have no group in common."
                )
            taken[group] = pattern
        result += _class(members, set(free), pattern)
    return result + [Class((group,)) for group in free if group not in taken]


def tied_classes(
    width_graph: WidthGraph, free: Iterable[ChannelGroup], same_width: SameWidth | None, held: Holdings
) -> list[Class]:
    """Return the groups that may change in a module, put together where that or a pattern says so.

    Raises:
        FxwidthError: as for `classes`, or a pattern asks for what the module cannot hold.
    """
    chosen = [group for group in free if group.name not in held.staying]
    names = {group.name for group in chosen}
    bound = held.bound(names)
    result = classes(width_graph, [group for group in chosen if group.name not in bound], same_width)
    for tie in held.ties:
        if tie.units.keys() & bound.keys():
            continue
        touched = [unit for unit in result if any(group.name in tie.units for group in unit.groups)]
        others = [group.name for unit in touched for group in unit.groups if group.name not in tie.units]
        units = dict(tie.units)
        if others and set(units.values()) != {1}:
            raise FxwidthError(
                f"same_width asks for one width for {', '.join(map(repr, others))} and groups whose widths go together "
                f"in the module by other ratios ({tie.why}); write a pattern without them."
            )
        units |= dict.fromkeys(others, 1)
        fixed = {unit.fixed for unit in touched if unit.fixed is not None}
        if fixed:
            result = [unit for unit in result if unit not in touched]
            continue
        groups = tuple(group for group in width_graph.groups if group.name in units)
        result = [unit for unit in result if unit not in touched]
        result.append(Class(groups, units=tuple(units[group.name] for group in groups)))
    return result


def _asks_nothing(group: ChannelGroup, patterns: Sequence[str | Sequence[str]]) -> str:
    meant = [patterns if len(patterns) > 1 else [*patterns, "..."]]
    return (
        f"same_width={list(patterns)!r} asks nothing of group {group.name!r}: each entry of the list is for groups "
        f"that get one width, and one of them matches it alone. For one width for all write same_width={meant!r}."
    )


def _class(members: Sequence[ChannelGroup], free: set[ChannelGroup], pattern: str | Sequence[str]) -> list[Class]:
    groups = tuple(group for group in members if group in free)
    staying = [group for group in members if group not in free]
    widths = {group.width for group in staying}
    if len(widths) > 1 or (widths and any(group.width < max(widths) for group in groups)):
        others = f", and {_listed(groups)} cannot shrink to that width" if len(widths) == 1 else ""
        raise FxwidthError(
            f"same_width={pattern!r} cannot be: {_listed(staying)} must stay as they are{others}. "
            "Write a pattern without the groups that stay."
        )
    return [Class(groups, widths.pop() if widths else None)] if groups else []


def _listed(groups: Iterable[ChannelGroup]) -> str:
    return ", ".join(f"{group.name!r} ({group.width})" for group in groups)
