"""Channel groups: the units that are resized, found from the axes of an analysis."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import networkx as nx
from torch import nn

from fxwidth.analysis.free_outputs import output_dims
from fxwidth.analysis.result import Analysis
from fxwidth.analysis.roles import Role, Roles, find_roles
from fxwidth.axes.factors import Factor, term_size
from fxwidth.axes.index_maps import NEW, IndexMaps
from fxwidth.errors import FxwidthError
from fxwidth.groups.channel_group import ChannelGroup
from fxwidth.groups.drawing import draw
from fxwidth.groups.explanations import describe_pin
from fxwidth.groups.group_building import build_groups, lost_groups, pin_of, pin_unused
from fxwidth.groups.group_kinds import Kind, group_kinds
from fxwidth.groups.group_names import LEGEND, named, near_names, proposed
from fxwidth.groups.repeated_blocks import folded, without_numbers
from fxwidth.growth.recipes import Growth
from fxwidth.rules.copies import channel_copies
from fxwidth.runtime.gc_pause import without_collections
from fxwidth.tables import Table

_COLUMNS = ("group", "width", "kind", "writers", "readers", "notes")
# How many groups an error lists.
_SHOWN = 3


class WidthGraph:
    """The channel groups of a graph, and the reasons for them; `fxwidth.analyze` makes one.

    Args:
        analysis: the axes of the graph's parameters.

    Attributes:
        analysis: the same.
        groups: all groups, pinned ones among them.
        roles: what each parameter's dims do, by name and dim.
        memo: what is found once of the graph and kept with it.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> gm = fxwidth.trace(net, torch.randn(2, 8))
        >>> graph = fxwidth.analyze(gm)
        >>> [(group.name, group.width) for group in graph.free]
        [('0', 16)]
        >>> graph.why_pinned("2")  # doctest: +ELLIPSIS
        "'2' keeps its width...
    """

    @without_collections()
    def __init__(self, analysis: Analysis) -> None:
        self.analysis = analysis
        self.memo: dict[Any, Any] = {}
        self.roles: Roles = find_roles(analysis)
        pin_unused(analysis)
        self.groups: list[ChannelGroup] = list(build_groups(analysis, self.roles))
        self.groups += lost_groups(analysis, {group.name for group in self.groups})

    def __getitem__(self, name: str) -> ChannelGroup:
        """Return a group by name.

        Raises:
            FxwidthError: there is no such group; the message proposes the nearest names.
        """
        found = self._by_name.get(name)
        if found is None:
            if several := named(name, self._by_name):
                told = ", ".join(map(repr, several[:_SHOWN])) + (", ..." if several[_SHOWN:] else "")
                raise FxwidthError(f"{name!r} stands for {len(several)} channel groups ({told}); give one of them.")
            hint = self.proposal(name)
            raise FxwidthError(
                f"there is no channel group {name!r}{f'; {hint}' if hint else '.'} print(fxwidth.analyze(gm)) lists "
                "all groups."
            )
        return found

    def near(self, name: str) -> list[str]:
        """Return the names of the groups that may be meant by a name that is none, the nearest first.

        Args:
            name: what was typed; one for the last layer, such as "head" or "fc", means it however it is called.
        """
        return near_names(name, self._by_name, [one for one, kind in self.kinds.items() if kind is Kind.OUTPUT])

    def proposal(self, name: str) -> str:
        """Return what to tell of a name that is no group's: the groups that a layer writes, or near names.

        Args:
            name: what was typed.
        """
        written = [
            group.name
            for group in self.groups
            if any(site.parameter.startswith(f"{name}.") and site.role is not Role.READER for site in group.sites)
        ]
        if not written:
            return proposed(self.near(name))
        shown = ", ".join(map(repr, written[:_SHOWN])) + (", ..." if written[_SHOWN:] else "")
        kind = "groups" if len(written) > 1 else "group"
        return f"the layer of this name writes the {kind} {shown}, named after the first layer that does."

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    @property
    def free(self) -> list[ChannelGroup]:
        """The groups that can be resized."""
        return [group for group in self.groups if group.pinned is None]

    def growths(self, maps: IndexMaps) -> dict[Factor, Growth]:
        """Return what growing does, by the factors of the groups that get new channels.

        Args:
            maps: the old channel of each new one, by factor.
        """
        return {group.factor: group.growth for group in self.groups if (maps.of(group.factor) == NEW).any()}

    @cached_property
    def _by_name(self) -> dict[str, ChannelGroup]:
        return {group.name: group for group in self.groups}

    @cached_property
    def graph(self) -> nx.MultiGraph:
        """Factors as vertices; each edge is a coupling, with the op and fx node that made it as `context`."""
        graph = nx.MultiGraph()
        for name, entry in self.analysis.parameters.items():
            for dim, origin in enumerate(entry.origins):
                if origin is not None:
                    graph.add_node(origin, label=f"{name} dim {dim}")
        for link in self.analysis.space.links:
            graph.add_edge(link.first, link.second, context=link.context)
        return graph

    def explain(self, a: str, b: str) -> str:
        """Tell why two dims share channels.

        Args:
            a: a group's name, or a parameter's name and dim as in "conv1.weight:0".
            b: likewise.

        Raises:
            FxwidthError: a name is not known, or the graph has changed since it was analysed.
        """
        self.refuse_outdated()
        first, second = self._origin(a), self._origin(b)
        common = set(self.analysis.space.leaves(first)) & set(self.analysis.space.leaves(second))
        if not common:
            return "\n".join([f"{first.name} and {second.name} share no channels.", *self._copied(first, second)])
        path = nx.shortest_path(self.graph, first, second)
        hops = [f"  {one.name} - {two.name}: {self._context(one, two)}" for one, two in nx.utils.pairwise(path)]
        axis = self.analysis.space.normalise(((first,),))
        shared = sum(term_size(term) for term in axis if common.intersection(self.analysis.space.factors((term,))))
        return "\n".join([f"{first.name} and {second.name} share {shared} channels:", *hops])

    def why_pinned(self, group: ChannelGroup | str) -> str:
        """Tell why a group keeps its width: the op, the node, and what would free it.

        Args:
            group: a group, its name, or a parameter's name and dim as in "conv1.weight:0".

        Raises:
            FxwidthError: a name is not known, or the graph has changed since it was analysed.
        """
        self.refuse_outdated()
        name = group if isinstance(group, str) else group.name
        leaves = [self[name].factor] if name in self else self.analysis.space.leaves(self._origin(name))
        return "\n\n".join(self._told(name, leaf) for leaf in dict.fromkeys(leaves))

    def draw(self, path: str | Path) -> None:
        """Draw the groups over the graph; this needs matplotlib.

        Args:
            path: the file to write, .svg or .png.

        Raises:
            FxwidthError: the suffix is another, the folder does not exist, matplotlib is not installed, or the graph
                has changed since it was analysed.
        """
        self.refuse_outdated()
        draw(self.analysis, self.groups, path)

    @property
    def outdated(self) -> str | None:
        """None, or what has changed of the graph since it was analysed; values of tensors may change."""
        seen = self.analysis.seen
        return None if seen is None else seen.change(self.analysis.module)

    def refuse_outdated(self) -> None:
        """Check that the graph is what was analysed.

        Raises:
            FxwidthError: it has been resized or changed since.
        """
        if (change := self.outdated) is not None:
            raise FxwidthError(
                f"the graph has changed since it was analysed: {change}. Call fxwidth.analyze(gm) again; "
                "plans and groups are those of the graph as it was."
            )

    def _copied(self, first: Factor, second: Factor) -> Iterator[str]:
        """Tell where channels of one are copied to those of the other, by which their widths are not coupled."""
        space = self.analysis.space
        for call in channel_copies(self.analysis.calls):
            sides = call.axes[call.arguments["self"]], call.output_axes[0]
            read, made = (set(space.factors(axes[call.arguments["dim"]])) for axes in sides)
            for source, result in ((first, second), (second, first)):
                if read.intersection(space.leaves(source)) and made.intersection(space.leaves(result)):
                    yield (
                        f"  {source.name} - {result.name}: joined only by a copy of channels ({call.place}), whose "
                        "table follows both: each has a width of its own."
                    )

    def _told(self, name: str, leaf: Factor) -> str:
        pin = pin_of(leaf)
        if pin is None:
            return f"{name!r} is free: its width of {leaf.size} can change."
        origins = ((path, entry.origins) for path, entry in self.analysis.parameters.items())
        places = [
            f"{path} dim {dim}"
            for path, own in origins
            for dim, origin in enumerate(own)
            if origin is not None and leaf in self.analysis.space.leaves(origin)
        ]
        return describe_pin(name, leaf.size, places, pin, self.analysis.module)

    def _context(self, one: Factor, two: Factor) -> str:
        return next(iter(self.graph[one][two].values()))["context"] or "the same parameter"

    def _origin(self, name: str) -> Factor:
        parameter, _, dim = name.rpartition(":")
        if parameter in self.analysis.parameters and dim.isdigit():
            origins = self.analysis.parameters[parameter].origins
            if int(dim) < len(origins) and (origin := origins[int(dim)]) is not None:
                return origin
            raise FxwidthError(f"{parameter} has no dim {dim} of size above one.")
        group = self[name]
        site = next(iter(group.sites_as(Role.WRITER)), group.sites[0])
        origin = self.analysis.parameters[site.parameter].origins[site.dim]
        # Of a group that is lost there is no more.
        return group.factor if origin is None else origin

    @cached_property
    def kinds(self) -> dict[str, Kind]:
        """What the channels of each group are, by its name: hidden, heads, head dim, residual stream, input, output."""
        return group_kinds(self.analysis, self.roles, self.groups)

    @cached_property
    def followed(self) -> dict[str, tuple[str, ...]]:
        """The dims of outputs, such as "features.0 dim 1", of which callers must follow each free group."""
        found: dict[str, list[str]] = {}
        names = {group.factor: group.name for group in self.free}
        for dim, axis in output_dims(self.analysis):
            for factor in dict.fromkeys(self.analysis.space.factors(axis)):
                if factor in names:
                    found.setdefault(names[factor], []).append(dim)
        return {name: tuple(dims) for name, dims in found.items()}

    def __repr__(self) -> str:
        entries = self.analysis.parameters.values()
        count = sum(entry.tensor.numel() for entry in entries if isinstance(entry.tensor, nn.Parameter))
        return f"<WidthGraph: {len(self.groups)} groups, {len(self.free)} of them free, {count:,} parameters>"

    def __str__(self) -> str:
        """Return a table of the groups, and first whether the graph has changed since."""
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table(folds=True)._repr_html_()

    def table(self, *, folds: bool = False) -> Table:
        """Return a table of the groups, with what their names say below it.

        Above it stands what has changed of the graph since, if anything has.

        Args:
            folds: whether groups of repeated blocks that are alike are one row.
        """
        change = self.outdated
        above = () if change is None else (f"outdated: {change}; call fxwidth.analyze(gm) again",)
        rows = (
            [(name, *cells) for name, cells, _ in self.folded_rows()]
            if folds
            else [(group.name, *self._cells(group)) for group in self.groups]
        )
        return Table(_COLUMNS, tuple(rows), above, (LEGEND,) if rows else ())

    def folded_rows(self) -> list[tuple[str, tuple[str, ...], tuple[str, ...]]]:
        """Return for groups of repeated blocks that are alike their folded name, their cells, and their names."""
        cells = {group.name: self._cells(group) for group in self.groups}
        # Reasons name nodes, and these have numbers of their own.
        rows = folded((name, (*own[:-1], without_numbers(own[-1]))) for name, own in cells.items())
        return [(name, cells[names[0]], names) for name, _, names in rows]

    def _cells(self, group: ChannelGroup) -> tuple[str, ...]:
        notes = [f"pinned: {group.pinned}"] if group.pinned else []
        notes += [f"mixed: {group.mixed}"] if group.mixed and not group.pinned else []
        if (followed := self.followed.get(group.name)) is not None:
            notes += [f"free, and callers follow: output {', '.join(followed)}"]
        counts = (str(len({site.parameter for site in group.sites_as(role)})) for role in (Role.WRITER, Role.READER))
        return str(group.width), self.kinds[group.name], *counts, "; ".join(notes)


def refuse_other_than_groups(value: object) -> None:
    """Check that a value is what `fxwidth.analyze` returns, of a graph as it is now.

    Raises:
        FxwidthError: it is something else, such as the module itself, or the graph has changed since.
    """
    if not isinstance(value, WidthGraph):
        raise FxwidthError(
            f"the channel groups of a graph are needed, but received {type(value).__name__}; "
            "pass what fxwidth.analyze(gm) returns."
        )
    value.refuse_outdated()
