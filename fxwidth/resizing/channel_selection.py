"""Which channels a resize keeps, from what evidence, and which groups change their basis before."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fxwidth.axes.index_maps import NEW, IndexMaps, Indices
from fxwidth.groups.channel_group import ChannelGroup
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.importance.estimates import Evidence, gather_evidence, needs_moments, refuse_negative_variances
from fxwidth.options import ResizeOptions
from fxwidth.reconstruction.basis_change import Rotation, rotated
from fxwidth.resizing.requested import Known, Requested
from fxwidth.rewriting.transaction import Transaction
from fxwidth.runtime.process_groups import ranks_at_work
from fxwidth.statistics.moments import Moments
from fxwidth.weights.readers import wiring_of
from fxwidth.work_progress import each


@dataclass(frozen=True)
class ChannelSelection:
    """The channels of the groups that change.

    Attributes:
        evidence: what is known of the channels.
        kept: the old channel at each new place, `NEW` where there is none.
        bases: the new bases of those groups that change theirs, in which the first channels are kept.
        named: the groups whose channels the plan names.
    """

    evidence: Evidence
    kept: Mapping[ChannelGroup, Indices]
    bases: Mapping[ChannelGroup, Rotation]
    named: tuple[ChannelGroup, ...]

    @property
    def growing(self) -> list[ChannelGroup]:
        """The groups that get new channels."""
        return [group for group, own in self.kept.items() if (own == NEW).any()]

    def maps(self) -> IndexMaps:
        """Return the maps of all dims."""
        space = self.evidence.width_graph.analysis.space
        return IndexMaps(space, {group.factor: own for group, own in self.kept.items()})

    def told(self) -> dict[str, Any]:
        """Return what the history tells of channels; in a new basis there are no old ones."""
        kept = {group.name: own[own != NEW].tolist() for group, own in self.kept.items() if group not in self.bases}
        rotated_groups, named = ([group.name for group in groups] for groups in (self.bases, self.named))
        return {"kept": kept, "rotated": rotated_groups, "named": named}

    def change_bases(self, transaction: Transaction) -> Moments | None:
        """Bring groups to their new bases, and return the moments in these."""
        moments, wiring = self.evidence.moments, wiring_of(self.evidence.width_graph)
        for basis in self.bases.values():
            assert moments is not None
            moments = rotated(wiring, basis, moments, transaction)
        return moments


def select_channels(
    width_graph: WidthGraph, asked: Requested, data: Iterable[Any] | None, options: ResizeOptions, known: Known
) -> ChannelSelection:
    """Choose the channels to keep by the weights as they are, and find the bases to change to.

    Raises:
        FxwidthError: the data cannot be used, a method gives no order, or a batch norm would take the root of a
            negative number.
    """
    if asked.drops and not known.blind:
        refuse_negative_variances(width_graph.analysis)
    evidence = _evidence(width_graph, asked, data, options, known)
    groups = each(list(asked.widths), "choosing channels")
    kept = {group: _kept(evidence, group, asked.widths[group], asked) for group in groups}
    if (ranks := ranks_at_work()) is not None:
        first = ranks.first("the channels to keep", [own.tolist() for own in kept.values()])
        kept = {group: np.asarray(own, dtype=np.int64) for group, own in zip(kept, first, strict=True)}
    # All bases are found before any weight changes: readers of one group write another.
    shrinking = (group for group, width in asked.widths.items() if width < group.width and group not in asked.channels)
    bases = {group: basis for group in shrinking if (basis := evidence.rotation(group)) is not None}
    return ChannelSelection(evidence, kept, bases, tuple(asked.channels))


def _evidence(
    width_graph: WidthGraph, asked: Requested, data: Iterable[Any] | None, options: ResizeOptions, known: Known
) -> Evidence:
    """Return what is known of the channels, as far as it is needed."""
    selection = options.selection if known.evidence is None else known.evidence.selection
    if known.blind or not needs_moments(asked.widths, selection, options.fold, asked.channels):
        return Evidence(width_graph, None, selection)
    if known.evidence is not None:
        return known.evidence
    return gather_evidence(width_graph, data, selection, options.rotates)


def _kept(evidence: Evidence, group: ChannelGroup, width: int, asked: Requested) -> Indices:
    if group in asked.channels:
        return asked.channels[group]
    if width > group.width:
        kept: Indices = np.concatenate([np.arange(group.width), np.full(width - group.width, NEW)])
        return kept
    return evidence.kept(group, width)
