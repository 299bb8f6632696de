"""A channel group: one factor and every place where it occurs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from fxwidth.analysis.least_widths import Least
from fxwidth.analysis.roles import Role
from fxwidth.axes.factors import Factor
from fxwidth.axes.index_maps import Indices
from fxwidth.axes.pins import LOST
from fxwidth.growth.recipes import Growth


@dataclass(frozen=True)
class Site:
    """One dim of one parameter or buffer in which a group occurs, and what it does there.

    Attributes:
        parameter: the name of the parameter or buffer.
        dim: the dim.
        role: what the group does there.
        find_positions: finds the positions of each channel in the dim, when they are asked for.

    Example:
        >>> site = fxwidth.analyze(fxwidth.trace(torch.nn.Linear(8, 4), torch.randn(2, 8))).groups[0].sites[0]
        >>> site.parameter, site.dim
        ('weight', 0)
        >>> [positions.tolist() for positions in site.positions]
        [[0], [1], [2], [3]]
    """

    parameter: str
    dim: int
    role: Role
    find_positions: Callable[[], Sequence[Indices]] = field(default=tuple, repr=False, compare=False)

    @cached_property
    def positions(self) -> tuple[Indices, ...]:
        """The positions of each channel in the dim, one tuple a channel, ascending.

        A flattened feature map has several positions for each channel, a concatenation has positions of other groups in
        between, and where a dim holds pairs of channels a position is of both. A resize drops all positions of the
        channels that it drops. Empty for a group that is lost: of such nothing is known but its names.
        """
        return tuple(self.find_positions())


@dataclass(eq=False)
class ChannelGroup:
    """One factor and every place it occurs: the channels that are added and removed together.

    Attributes:
        name: the writer that comes first, with a number where that dim holds several groups.
        width: the number of channels.
        sites: where the group occurs in parameters and buffers.
        pinned: why the width must stay, or None.
        factor: what stands for the group in axes and costs.
        find_growth: finds what growing asks of each op, when it is asked for.
        mixed: the op that reduces over the channels (norm, softmax, mean), so that removing some changes the others.
        least: below which width no resize goes, and why: a variance, a norm or a softmax over fewer tells nothing.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> gm = fxwidth.trace(net, torch.randn(2, 8))
        >>> group = fxwidth.analyze(gm)["0"]
        >>> group.width, [(site.parameter, site.dim, str(site.role)) for site in group.sites]
        (16, [('0.weight', 0, 'writer'), ('0.bias', 0, 'writer'), ('2.weight', 1, 'reader')])
    """

    name: str
    width: int
    sites: tuple[Site, ...]
    pinned: str | None
    mixed: str | None
    # What these hold, tapes and tensors, is not for a person to read.
    factor: Factor = field(repr=False)
    find_growth: Callable[[], Growth] = field(repr=False)
    least: Least = field(repr=False)

    def __repr__(self) -> str:
        counts = [(role, len({site.parameter for site in self.sites_as(role)})) for role in (Role.WRITER, Role.READER)]
        told = [f"{self.width} channels", *(f"{count} {role}s" for role, count in counts)]
        told += [f"pinned: {self.pinned}"] if self.pinned else []
        return f"<ChannelGroup {self.name!r}: {', '.join(told)}>"

    @cached_property
    def growth(self) -> Growth:
        """How new channels are made; found on first use, since it reads the whole tape."""
        return self.find_growth()

    @property
    def is_lost(self) -> bool:
        """Whether nothing is known any more of a group of width one but where it was."""
        return self.factor.pinned is not None and self.factor.pinned.reason.startswith(LOST)

    @property
    def inexact_growth(self) -> str | None:
        """None, or why new channels cannot be added without changing the function."""
        return self.growth.inexact

    def sites_as(self, role: Role) -> list[Site]:
        """Return the sites of one role.

        Args:
            role: what the group does there, such as `Role.WRITER`.
        """
        return [site for site in self.sites if site.role == role]
