"""Choosing widths: by each group's own spectrum, or all together under a parameter count."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from math import ceil

from fxwidth.allocation import Candidate, allocate
from fxwidth.costs import parameter_count, parameter_polynomial
from fxwidth.errors import FxwidthError
from fxwidth.groups import ChannelGroup, WidthGraph
from fxwidth.plans import Plan
from fxwidth.roles import Role
from fxwidth.spectrum import singular_values, tail_share

__all__ = ["Plan", "plan"]


def plan(
    width_graph: WidthGraph,
    *,
    params: int | float | None = None,
    shrink_energy: float = 0.02,
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
    of the sum. With `params`, groups shrink together to that count: the sum over groups of the tails' shares of the
    sum of squares is minimised.

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
    _check_options(shrink_energy, grow_energy, grow_step, min_width, max_width, align)
    groups = _chosen(width_graph, only, keep)
    ranges = {group: _allowed_widths(group, min_width, max_width, align) for group in groups}
    if params is not None:
        widths = _under_count(width_graph, ranges, _target(width_graph, params))
    else:
        widths = {}
        for group, allowed in ranges.items():
            if group.sites_as(Role.WRITER):
                growth = grow_step if group.inexact_growth is None or not exact else 0
                widths[group] = _by_threshold(width_graph, group, allowed, shrink_energy, grow_energy, growth, max_width, align)
    changed = {group.name: width for group, width in widths.items() if width != group.width}
    after = parameter_count(width_graph, {group.factor: width for group, width in widths.items()})
    return Plan(changed, {"parameters": [parameter_count(width_graph, {}), after]})
