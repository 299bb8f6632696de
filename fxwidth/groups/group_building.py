"""Channel groups made of the axes of an analysis: which parameters have dims in each, and in which roles."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import cache, partial

from torch import Tensor

from fxwidth.analysis.least_widths import Least, least_widths
from fxwidth.analysis.result import Analysis
from fxwidth.analysis.roles import Role, Roles
from fxwidth.axes.factors import Factor, find
from fxwidth.axes.pins import BATCH, STRUCTURAL, UNUSED, Pin
from fxwidth.axes.positions import positions_by_channel
from fxwidth.groups.channel_group import ChannelGroup, Site
from fxwidth.growth.recipes import Growth, find_growth


def pin_unused(analysis: Analysis) -> None:
    """Pin the dims of parameters that no call reads, in either mode."""
    # A parameter the tape never touches looks free, but nothing says what depends on its shape.
    in_training = (call for calls in analysis.training_calls.values() for call in calls)
    used = set[Tensor]().union(*(call.axes for call in analysis.calls), *(call.inputs for call in in_training))
    for entry in analysis.parameters.values():
        if entry.fake not in used:
            analysis.space.context = ""
            for axis in entry.axes:
                analysis.space.pin(axis, UNUSED)


def build_groups(analysis: Analysis, roles: Roles) -> Iterator[ChannelGroup]:
    """Yield a group for each factor of parameters' dims; its name is that of its first writer."""
    sites: dict[Factor, list[Site]] = {}
    names: dict[Factor, str] = {}
    shared = _group_factors(analysis, roles)
    leaves_of = cache(lambda root: tuple(dict.fromkeys(analysis.space.leaves(root))))
    for parameter, entry in analysis.parameters.items():
        for dim, origin in enumerate(entry.origins):
            if origin is None:
                continue
            leaves = leaves_of(find(origin))
            role = roles.by_dim.get((parameter, dim), Role.PER_CHANNEL)
            for number, leaf in enumerate(leaves):
                own_role = Role.PER_CHANNEL if (parameter, dim, leaf) in shared else role
                positions = partial(positions_by_channel, entry.axes[dim], leaf)
                sites.setdefault(leaf, []).append(Site(parameter, dim, own_role, positions))
                if role == Role.WRITER and leaf not in names:
                    names[leaf] = _name(parameter, dim, number if len(leaves) > 1 else None)
    taken: set[str] = set()
    least = least_widths(analysis)
    for leaf, places in sites.items():
        if leaf.pinned is not None and leaf.pinned.reason in STRUCTURAL:
            continue
        name = names.get(leaf) or _name(places[0].parameter, places[0].dim, None)
        while name in taken:
            name += "'"
        taken.add(name)
        pin = pin_of(leaf)
        pinned = None if pin is None else str(pin)
        recipe = partial(Growth, inexact=f"pinned: {pinned}") if pinned else partial(find_growth, analysis, roles, leaf)
        yield ChannelGroup(
            name, leaf.size, tuple(places), pinned, leaf.mixed, leaf, recipe, least.get(leaf, Least(1, ""))
        )


def lost_groups(analysis: Analysis, taken: Collection[str]) -> Iterator[ChannelGroup]:
    """Yield a pinned group for each place at which the analysis could not follow the axes."""
    for lost in analysis.lost:
        name = lost.name
        while name in taken:
            name += "'"
        factor = Factor(1, name)
        factor.pinned = Pin(lost.why)
        sites = tuple(Site(parameter, dim, Role.PER_CHANNEL) for parameter, dim in lost.dims)
        recipe = partial(Growth, inexact=f"pinned: {lost.why}")
        yield ChannelGroup(name, 1, sites, lost.why, None, factor, recipe, Least(1, ""))


def pin_of(leaf: Factor) -> Pin | None:
    """Return why a factor keeps its size: the batch does always."""
    return Pin(BATCH) if leaf.is_batch else leaf.pinned


def _group_factors(analysis: Analysis, roles: Roles) -> set[tuple[str, int, Factor]]:
    """Return the occurrences of convolution groups in writers: such a factor is in the channels read and written."""
    result = set()
    for reading in roles.readings:
        signal_axis = reading.call.axes[reading.activation][reading.activation_dim]
        entry = analysis.parameters[reading.parameter]
        own_axis = entry.axes[reading.parameter_dim]
        if analysis.space.normalise(signal_axis) == analysis.space.normalise(own_axis):
            continue
        through = set(analysis.space.factors(signal_axis)) - set(analysis.space.factors(own_axis))
        for dim, axis in enumerate(entry.axes):
            if dim != reading.parameter_dim:
                result |= {
                    (reading.parameter, dim, factor) for factor in analysis.space.factors(axis) if factor in through
                }
    return result


def _name(parameter: str, dim: int, number: int | None) -> str:
    name = parameter.removesuffix(".weight") + (f":{dim}" if dim else "")
    return name if number is None else f"{name}#{number}"
