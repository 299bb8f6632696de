"""Choosing widths: by each group's own spectrum, or all together under a parameter count."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
import numpy.typing as npt
import torch

from fxwidth.allocation import Choice, allocate
from fxwidth.costs import entries_polynomial, parameter_count, parameter_polynomial
from fxwidth.errors import FxwidthError
from fxwidth.factors import Factor
from fxwidth.groups import ChannelGroup, WidthGraph
from fxwidth.plans import Plan
from fxwidth.readers import wiring_of
from fxwidth.spectrum import singular_values, tail_share, writer_matrices

__all__ = ["Plan", "plan"]


def plan(
    width_graph: WidthGraph,
    *,
    params: int | float | None = None,
    shrink_energy: float = 0.05,
    grow_energy: float = 0.5,
    grow_step: int = 0,
    min_width: int = 1,
    max_width: int | None = None,
    align: int = 1,
    only: str | Sequence[str] | None = None,
    keep: str | Sequence[str] | None = None,
    exact: bool = True,
) -> Plan:
    """Choose new widths from the singular spectra of the groups' writers.

    Without `params`, each group goes by itself: it shrinks while the tail of its singular values holds less than
    `shrink_energy` of their sum, and grows by `grow_step` when the smallest one times the width exceeds `grow_energy`
    of the sum. With `params`, groups shrink together to that count, and as much of the spectra is kept in what each
    layer reads as can be found.

    Args:
        width_graph: the groups, from `fxwidth.analyze`.
        params: the parameter count to reach, an absolute int or a ratio in (0, 1] of the present one.
        shrink_energy: in [0, 1); 0 for no shrinking.
        grow_energy: in [0, 1]; a flat spectrum has 1, one with a zero singular value 0.
        grow_step: channels to add; 0 for no growing.
        min_width: no group shrinks below this.
        max_width: no group stays or grows above this.
        align: new widths are rounded up to multiples of this.
        only: names or patterns (fnmatch) of the groups that may change.
        keep: names or patterns of groups that must not.
        exact: whether to leave alone groups that cannot grow without changing the function.

    Returns:
        A plan that names only groups whose width changes; `notes["parameters"]` is the count before and after.

    Raises:
        FxwidthError: an option is out of range, a pattern matches no group, or `params` is out of reach.

    Source: the thresholds are those of J. Dejaegher, SVD evolutive CNN (2021).
    """
    limits = Limits(min_width, max_width, align)
    thresholds = Thresholds(shrink_energy, grow_energy, grow_step)
    groups = _chosen(width_graph, only, keep)
    if params is not None:
        widths = _under_count(width_graph, groups, limits, _target(width_graph, params))
    else:
        widths = {group: _by_threshold(width_graph, group, limits, thresholds, exact) for group in groups}
    before = parameter_count(width_graph, {})
    after = parameter_count(width_graph, {group.factor: width for group, width in widths.items()})
    changed = {group.name: width for group, width in widths.items() if width != group.width}
    return Plan(changed, {"parameters": [before, after]})


@dataclass(frozen=True)
class Limits:
    """What widths a group may take."""

    least: int
    most: int | None
    align: int

    def __post_init__(self) -> None:
        for name, value in (("min_width", self.least), ("align", self.align), ("max_width", self.most)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise FxwidthError(f"{name}={value!r} must be an integer of at least 1.")
        if self.most is not None and self.most < self._up(self.least):
            raise FxwidthError(
                f"no width lies between min_width={self.least} and max_width={self.most} with align={self.align}; "
                "widen the range or lower align."
            )

    def nearest(self, group: ChannelGroup, width: int) -> int:
        """Return the allowed width for a group that is to have some width: rounded up, and never across its own."""
        rounded = self._up(max(width, self.least))
        if width <= group.width:
            rounded = min(rounded, group.width)
        return rounded if self.most is None else min(rounded, self._widest)

    def smaller(self, group: ChannelGroup) -> list[int]:
        """Return the widths that a group may shrink to or stay at, ascending."""
        top = group.width if self.most is None else min(group.width, self.most)
        widths = list(range(self._up(self.least), top + 1, self.align))
        if group.width == top and top not in widths:
            widths.append(top)
        return widths

    def _up(self, width: int) -> int:
        return -(-width // self.align) * self.align

    @property
    def _widest(self) -> int:
        assert self.most is not None
        return self.most // self.align * self.align


@dataclass(frozen=True)
class Thresholds:
    """When a group shrinks or grows by its own spectrum."""

    shrink_energy: float
    grow_energy: float
    grow_step: int

    def __post_init__(self) -> None:
        if not 0 <= self.shrink_energy < 1:
            raise FxwidthError(f"shrink_energy={self.shrink_energy!r} must lie in [0, 1): a share of the spectrum.")
        if not 0 <= self.grow_energy <= 1:
            raise FxwidthError(f"grow_energy={self.grow_energy!r} must lie in [0, 1]: a share of the spectrum.")
        if isinstance(self.grow_step, bool) or not isinstance(self.grow_step, int) or self.grow_step < 0:
            raise FxwidthError(f"grow_step={self.grow_step!r} must be an integer of at least 0: channels to add.")


def _chosen(
    width_graph: WidthGraph, only: str | Sequence[str] | None, keep: str | Sequence[str] | None
) -> list[ChannelGroup]:
    """Return the groups that may change."""
    wanted = None if only is None else _matching(width_graph, only, "only")
    kept = set() if keep is None else _matching(width_graph, keep, "keep")
    return [group for group in width_graph.free if group.name not in kept and (wanted is None or group.name in wanted)]


def _matching(width_graph: WidthGraph, patterns: str | Sequence[str], option: str) -> set[str]:
    names = [group.name for group in width_graph.groups]
    found: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if not isinstance(pattern, str):
            raise FxwidthError(f"{option}= takes names or patterns of groups, but received {pattern!r}.")
        matches = {name for name in names if name == pattern or fnmatchcase(name, pattern)}
        if not matches:
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3)
            hint = f"did you mean {', '.join(map(repr, near))}? " if near else ""
            raise FxwidthError(f"{option}={pattern!r} matches no group; {hint}print(width_graph) lists all groups.")
        found |= matches
    return found


def _by_threshold(
    width_graph: WidthGraph, group: ChannelGroup, limits: Limits, thresholds: Thresholds, exact: bool
) -> int:
    """Return the width that a group's own spectrum asks for."""
    width = group.width
    if next(writer_matrices(width_graph, group), None) is not None:
        values = singular_values(width_graph, group)
        tails = tail_share(values)
        # The tails fall: the first below the threshold is the smallest width that keeps enough.
        width = int(torch.count_nonzero(tails >= thresholds.shrink_energy)) if thresholds.shrink_energy else width
        width = max(1, min(width, group.width))
        total = float(values.sum())
        is_full = width == group.width and float(values[-1]) * width > thresholds.grow_energy * total
        if is_full and thresholds.grow_step and not (exact and group.inexact_growth):
            width = group.width + thresholds.grow_step
    if width == group.width and (limits.most is None or width <= limits.most):
        return width
    return limits.nearest(group, width)


def _target(width_graph: WidthGraph, params: int | float) -> int:
    if isinstance(params, bool) or not isinstance(params, (int, float)):
        raise FxwidthError(f"params={params!r} must be an int, the count to reach, or a float, its ratio.")
    if isinstance(params, float):
        if not 0 < params <= 1:
            raise FxwidthError(f"params={params} as a ratio must lie in (0, 1]; give an int for an absolute count.")
        return int(params * parameter_count(width_graph, {}))
    if params < 1:
        raise FxwidthError(f"params={params} must be at least 1.")
    return params


def _under_count(
    width_graph: WidthGraph, groups: Sequence[ChannelGroup], limits: Limits, target: int
) -> dict[ChannelGroup, int]:
    """Return the widths of least summed error with at most so many parameters."""
    allowed = {group: limits.smaller(group) or [group.width] for group in groups}
    cost = parameter_polynomial(width_graph)
    largest = {group.factor: widths[-1] for group, widths in allowed.items()}
    if cost(largest) <= target:
        return {group: widths[-1] for group, widths in allowed.items()}
    smallest = {group.factor: widths[0] for group, widths in allowed.items()}
    if cost(smallest) > target:
        raise FxwidthError(_out_of_reach(width_graph, groups, smallest, target))
    choices = []
    for group, widths in allowed.items():
        choices.append(Choice(group.factor, np.array(widths), width_errors(width_graph, group)[widths]))
    result = allocate(choices, cost, target)
    return {group: result[group.factor] for group in groups}


def width_errors(width_graph: WidthGraph, group: ChannelGroup) -> npt.NDArray[np.float64]:
    """Return the predicted error of every width of a group from none to all, [width + 1].

    It is -log of the share of the sum of singular values that is kept, since shares multiply from layer to layer,
    times the number of readers, each counted by how much of what it reads is of this group.
    """
    tails = tail_share(singular_values(width_graph, group)).cpu().numpy()
    audience = max(1.0, wiring_of(width_graph).audience.get(group.factor, 0.0))
    return np.asarray(-np.log(np.clip(1.0 - tails, 1e-12, 1.0)) * audience, dtype=np.float64)


def _out_of_reach(
    width_graph: WidthGraph, groups: Iterable[ChannelGroup], smallest: Mapping[Factor, int], target: int
) -> str:
    """Tell how far down a graph can go and which groups that stay hold it up."""
    analysis = width_graph.analysis
    widths = {group.factor: smallest[group.factor] for group in groups}
    held: list[tuple[int, str]] = []
    for group in width_graph.groups:
        if group.factor not in widths:
            tensors = {site.parameter for site in group.sites}
            count = sum(
                entries_polynomial(analysis.space, [analysis.parameters[name].axes])(widths) for name in tensors
            )
            reason = f"pinned: {group.pinned}" if group.pinned else "left out by only= or keep="
            held.append((count, f"{group.name!r} is in {count} of them ({reason})"))
    held.sort(key=lambda entry: -entry[0])
    detail = f" Groups that stay: {'; '.join(text for _, text in held[:3])}." if held else ""
    return (
        f"params={target} is out of reach: with every free group at its smallest width "
        f"{parameter_count(width_graph, widths)} parameters remain.{detail} "
        "Raise params, lower min_width or align, or free groups."
    )
