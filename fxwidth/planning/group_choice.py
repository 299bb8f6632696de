"""Which groups may change: by their names, by modules, and by the part of the network that they lie in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from fxwidth.analysis.roles import Role
from fxwidth.errors import FxwidthError
from fxwidth.groups.channel_group import ChannelGroup
from fxwidth.groups.group_names import named, near_names, proposed
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.option_keywords import Chosen
from fxwidth.options import PlanOptions


def chosen_groups(
    width_graph: WidthGraph, only: Chosen | None, keep: Chosen | None, within: Chosen | None = None
) -> list[ChannelGroup]:
    """Return the groups that may change.

    Args:
        width_graph: the groups.
        only: names, patterns or modules of those that may.
        keep: likewise of those that must not.
        within: paths, patterns or modules: nothing outside of these may change.

    Raises:
        FxwidthError: a pattern or module stands for no group, or no group is left of those that are named.
    """
    wanted = None if only is None else set(matching(width_graph, only, "only"))
    kept = set() if keep is None else set(matching(width_graph, keep, "keep"))
    named = [g for g in width_graph.free if g not in kept and (wanted is None or g in wanted)]
    if wanted and not named:
        pinned = [group for group in width_graph.groups if group in wanted and group.pinned]
        reason = f"{pinned[0].name!r} is pinned: {pinned[0].pinned}" if pinned else "keep= names them too"
        raise FxwidthError(f"only={_told(only)} leaves no group that may change: {reason}")
    return named if within is None else _inside(width_graph, named, within)


def matching(width_graph: WidthGraph, chosen: Chosen, option: str) -> list[ChannelGroup]:
    """Return the groups whose names are, or match, one of some patterns, or that modules write.

    A pattern is one of fnmatch, or the folded name of repeated blocks, as tables show them.

    Raises:
        FxwidthError: a pattern or a module stands for no group.
    """
    names = [group.name for group in width_graph.groups]
    found: set[str] = set()
    for one in _each(chosen):
        if isinstance(one, nn.Module):
            found |= set(_written_by(width_graph, one, option))
            continue
        matches = named(one, names)
        if not matches:
            inside = [f"{one}.*"] if named(f"{one}.*", names) else []
            hint = proposed(inside) if inside else width_graph.proposal(one)
            raise FxwidthError(
                f"{option}={one!r} matches no group; {f'{hint} ' if hint else ''}print(width_graph) lists all groups."
            )
        found.update(matches)
    return [group for group in width_graph.groups if group.name in found]


def without_modules(width_graph: WidthGraph, options: PlanOptions) -> PlanOptions:
    """Return options that name groups where they were given modules, whose parameters a resize may replace.

    Raises:
        FxwidthError: a pattern or a module stands for no group.
    """
    if options.within is not None and _has_modules(options.within):
        inside = chosen_groups(width_graph, options.only, options.keep, options.within)
        return replace(options, only=[group.name for group in inside], keep=None, within=None)
    found: dict[str, Any] = {}
    for name, chosen in (("only", options.only), ("keep", options.keep)):
        if chosen is not None and _has_modules(chosen):
            found[name] = [group.name for group in matching(width_graph, chosen, name)]
    return replace(options, **found)


def _has_modules(chosen: Chosen) -> bool:
    return any(isinstance(one, nn.Module) for one in _each(chosen))


def _inside(width_graph: WidthGraph, groups: Sequence[ChannelGroup], within: Chosen) -> list[ChannelGroup]:
    """Return the groups that occur in some parts of a network alone.

    Raises:
        FxwidthError: a pattern matches no part, or no group is inside.
    """
    inside = _parameters_in(width_graph, within)
    found = [group for group in groups if all(site.parameter in inside for site in group.sites)]
    if not found:
        partly = ((group, site) for group in groups for site in group.sites if site.parameter in inside)
        group = next((group for group, _ in partly), None)
        outside = next((site for site in group.sites if site.parameter not in inside), None) if group else None
        reason = f"{group.name!r} is in {outside.parameter} too" if group and outside else "no free group is in there"
        raise FxwidthError(f"within={_told(within)} leaves no group that may change: {reason}.")
    return found


def _parameters_in(width_graph: WidthGraph, within: Chosen) -> set[str]:
    """Return the names of the parameters and buffers in some parts of a network, by paths, patterns or modules."""
    parents = {name: list(_parents(name)) for name in width_graph.analysis.parameters}
    found: set[str] = set()
    for one in _each(within):
        if isinstance(one, nn.Module):
            found |= _held_by(width_graph, one, "within")
            continue
        paths = list(dict.fromkeys(path for own in parents.values() for path in own))
        matches = set(named(one, paths))
        if not matches:
            hint = proposed(near_names(one, paths))
            raise FxwidthError(
                f"within={one!r} matches no module with parameters; {f'{hint} ' if hint else ''}give its path."
            )
        found |= {name for name, own in parents.items() if matches.intersection(own)}
    return found


def _parents(name: str) -> Iterator[str]:
    """Yield the paths of the modules that a parameter is in, the innermost first."""
    path = name.rpartition(".")[0]
    while path:
        yield path
        path = path.rpartition(".")[0]


def _written_by(width_graph: WidthGraph, module: nn.Module, option: str) -> Iterator[str]:
    """Yield the names of the groups that a module writes: those of its parameters but for what it reads."""
    names = _held_by(width_graph, module, option)
    for group in width_graph.groups:
        if any(site.parameter in names and site.role is not Role.READER for site in group.sites):
            yield group.name


def _held_by(width_graph: WidthGraph, module: nn.Module, option: str) -> set[str]:
    """Return the names, in a graph, of the parameters and buffers of a module."""
    own = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
    names = {name for name, entry in width_graph.analysis.parameters.items() if id(entry.tensor) in own}
    if not names:
        why = "none of its parameters are in this graph" if own else "it has no parameters"
        raise FxwidthError(
            f"{option}= was given a module, {type(module).__name__}, but {why}; give one of the model that was traced, "
            "or of the graph, with parameters, or a name."
        )
    return names


def _each(chosen: Chosen) -> Iterable[str | nn.Module]:
    return [chosen] if isinstance(chosen, (str, nn.Module)) else chosen


def _told(chosen: Chosen | None) -> str:
    if isinstance(chosen, nn.Module):
        return type(chosen).__name__
    if chosen is None or isinstance(chosen, str):
        return repr(chosen)
    return "[" + ", ".join(map(_told, chosen)) + "]"
