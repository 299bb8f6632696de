"""What is known of a graph's channels, and the orders and width curves that follow from it, each found once."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxwidth.analysis.result import Analysis
from fxwidth.axes.factors import axis_size
from fxwidth.axes.index_maps import Indices
from fxwidth.axes.positions import channel_positions
from fxwidth.errors import FxwidthError
from fxwidth.groups.channel_group import ChannelGroup
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.reconstruction.basis_change import Rotation, rotation
from fxwidth.rules.family_table import running_norm
from fxwidth.runtime.finiteness import accumulation_dtype
from fxwidth.selection.error_curves import Errors, logarithmic, lost_share
from fxwidth.selection.grams import Grams, each_grams, grams_of
from fxwidth.selection.orders import channel_order
from fxwidth.selection.registry import PROJECTION, Selection, check_selection, is_nested, reads_moments
from fxwidth.selection.silent_channels import silent_channels, silent_last
from fxwidth.statistics.covariance_shrinkage import shrunk
from fxwidth.statistics.moment import Moment
from fxwidth.statistics.moments import Moments, has_values, moments_from_data
from fxwidth.statistics.observation_points import Key, find_probes
from fxwidth.statistics.remembered_noise import noise_moments
from fxwidth.weights.readers import wiring_of
from fxwidth.weights.writer_spectra import singular_values, tail_share, writer_gram

# As many rows as evidence has that does not come from samples.
_PLENTY = 10**12


class Evidence:
    """The moments of a graph's activations, and what a method of selection makes of them.

    Args:
        width_graph: the graph.
        moments: what readers see; None where that is not known, as on the meta device.
        selection: the method, one that is registered, or a function that scores channels.
        rotates: whether linear groups are brought to the basis of their spectrum, of which the first channels are kept.
    """

    def __init__(
        self, width_graph: WidthGraph, moments: Moments | None, selection: Selection = "greedy", rotates: bool = False
    ) -> None:
        self.width_graph = width_graph
        self.moments = moments
        self.selection = check_selection(selection)
        self._orders: dict[tuple[ChannelGroup, int], Tensor] = {}
        self._errors: dict[ChannelGroup, Errors] = {}
        self._read: set[ChannelGroup] = set()
        # Scores and weights are of the channels as they are.
        self._rotates = rotates and moments is not None and reads_moments(selection) and selection != PROJECTION
        self._rotations: dict[ChannelGroup, Rotation | None] = {}

    def unrotated(self) -> Evidence:
        """Return the same evidence for a network whose groups keep their bases."""
        if not self._rotates:
            return self
        result = Evidence(self.width_graph, self.moments, self.selection)
        # Orders are of channels as they are in both.
        result._orders = self._orders
        return result

    def rotation(self, group: ChannelGroup) -> Rotation | None:
        """Return the basis that a group is to be brought to before channels are dropped; None for the one it has."""
        if not self._rotates:
            return None
        if group not in self._rotations:
            assert self.moments is not None
            found = rotation(self.width_graph, group, self.moments)
            worse = found is not None and not found.is_best and self._loses_less(group, found)
            self._rotations[group] = None if worse else found
        return self._rotations[group]

    def _loses_less(self, group: ChannelGroup, turned: Rotation) -> bool:
        """Tell whether half of the channels as they are would be a better choice than half of the turned ones."""
        grams, half = self._grams(group), group.width // 2
        key = group, 0 if is_nested(self.selection) else half
        if grams is None:
            return False
        if key not in self._orders:
            self._orders[key] = self._found_order(group, half, grams)
        return float(self._lost(group, grams, self._orders[key])[half]) < float(turned.lost[half])

    def kept(self, group: ChannelGroup, width: int) -> Indices:
        """Return the channels of a group to keep, sorted."""
        if width >= group.width:
            return np.arange(group.width, dtype=np.int64)
        if self.rotation(group) is not None:
            return np.arange(width, dtype=np.int64)
        return np.sort(self.order(group, width)[:width].cpu().numpy().astype(np.int64))

    def order(self, group: ChannelGroup, count: int) -> Tensor:
        """Return all channels of a group, those first that are to be kept when so many are."""
        key = group, 0 if is_nested(self.selection) else count
        if key not in self._orders:
            self._orders[key] = self._found_order(group, count, self._grams(group))
        return self._orders[key]

    def errors(self, group: ChannelGroup) -> Errors:
        """Return the predicted error of every width of a group from none to all, [width + 1], zero at the end."""
        if group not in self._errors:
            turned = self.rotation(group)
            grams = self._grams(group, always=True) if turned is None else None
            if turned is not None:
                self._read.add(group)
                self._errors[group] = logarithmic(turned.lost.cpu().numpy())
            elif grams is None:
                self._errors[group] = spectral_errors(self.width_graph, group)
            else:
                self._read.add(group)
                key = group, 0 if is_nested(self.selection) else group.width // 2
                if key not in self._orders:
                    self._orders[key] = self._found_order(group, group.width // 2, grams)
                self._errors[group] = logarithmic(self._lost(group, grams, self._orders[key]))
                if group.name in self.width_graph.followed:
                    # Whoever reads an output counts as one reader, of whom no more is known.
                    self._errors[group] = self._errors[group] + lost_of_writers(self.width_graph, group)
        return self._errors[group]

    def source(self, group: ChannelGroup) -> str | None:
        """Return what the errors of a group come from: that of the moments, or None for the writers' spectrum."""
        return self.moments.source if self.moments is not None and self._is_read(group) else None

    def _is_read(self, group: ChannelGroup) -> bool:
        if group not in self._errors:
            self.errors(group)
        return group in self._read

    def _grams(self, group: ChannelGroup, *, always: bool = False) -> Grams | None:
        if self.moments is None or not (always or reads_moments(self.selection)):
            return None
        return grams_of(wiring_of(self.width_graph), group, self.moments)

    def _lost(self, group: ChannelGroup, grams: Grams, order: Tensor) -> Errors:
        """Return the share of their outputs that readers miss of the first k channels of an order, for every k."""
        assert self.moments is not None
        # Readers that were too many to be held are gone through once more.
        parts = each_grams(wiring_of(self.width_graph), group, self.moments) if grams.is_sum else [grams]
        return np.asarray(sum(lost_share(part, order) for part in parts), dtype=np.float64)

    def _found_order(self, group: ChannelGroup, count: int, grams: Grams | None) -> Tensor:
        grams = grams if reads_moments(self.selection) else None
        order = channel_order(self.width_graph, group, count, grams, self.selection)
        if grams is None or self.moments is None:
            return order
        return silent_last(order, silent_channels(self.width_graph.analysis, group, self.moments))


def spectral_errors(width_graph: WidthGraph, group: ChannelGroup) -> Errors:
    """Return the predicted error of every width by the writers alone: the share of their singular values that is lost.

    It counts once for every reader, by the share of what it reads that is of this group.
    """
    weighted_fan_out = max(1.0, wiring_of(width_graph).weighted_fan_out.get(group.factor, 0.0))
    return lost_of_writers(width_graph, group, weighted_fan_out)


def lost_of_writers(width_graph: WidthGraph, group: ChannelGroup, weight: float = 1.0) -> Errors:
    """Return the predicted error of every width for one reader, or some weight of readers, by the writers alone."""
    tails = tail_share(singular_values(width_graph, group)).cpu().numpy()
    return logarithmic(np.asarray(tails * weight, dtype=np.float64))


def gather_evidence(
    width_graph: WidthGraph, data: Iterable[Any] | None, selection: Selection = "greedy", rotates: bool = False
) -> Evidence:
    """Return what data, or without them noise sent through the network, tell of a graph's channels.

    Raises:
        FxwidthError: the data cannot be used, there is no such method of selection, or a batch norm would take the root
            of a negative number; or the graph has changed since it was analysed.
    """
    width_graph.refuse_outdated()
    if check_selection(selection) == PROJECTION:
        return Evidence(width_graph, moments_from_writers(width_graph), selection)
    refuse_negative_variances(width_graph.analysis)
    if data is not None:
        measured = moments_from_data(width_graph, data)
        if measured is not None:
            free = partial(noise_moments, width_graph, keeps=False)
            measured = shrunk(measured, free, find_probes(width_graph))
        return Evidence(width_graph, measured, selection, rotates)
    return Evidence(width_graph, noise_moments(width_graph), selection, rotates)


def needs_moments(
    widths: Mapping[ChannelGroup, int], selection: Selection, folds: bool, given: Collection[ChannelGroup] = ()
) -> bool:
    """Tell whether a resize to some widths asks what readers see: to choose channels by it, or to refit readers.

    Args:
        widths: the new width of each group that changes.
        selection: the method by which channels are chosen.
        folds: whether readers are refitted.
        given: groups whose channels are chosen already.
    """
    shrinking = [group for group, width in widths.items() if width < group.width]
    return any(folds or (group not in given and reads_moments(selection)) for group in shrinking)


def refuse_negative_variances(analysis: Analysis) -> None:
    """Check that no batch norm takes the root of a negative number.

    Raises:
        FxwidthError: one does.
    """
    for call in analysis.calls:
        norm = running_norm(call.func)
        if norm is None:
            continue
        variance = call.arguments.get(norm.variance)
        name = None if variance is None else analysis.names.get(variance)
        values = None if name is None else analysis.parameters[name].tensor
        if values is None or values.device.type == "meta":
            continue
        eps = call.arguments[norm.eps]
        least = float(values.min()) if values.numel() else 1.0
        if least + eps <= 0:
            raise FxwidthError(
                f"{name}, by whose root batch norm divides at node {call.node!r}, goes down to {least:g}: what the "
                "network computes in eval mode is no number. Load running statistics that were measured, or train it."
            )


def moments_from_writers(width_graph: WidthGraph) -> Moments | None:
    """Return the moments that channels would have if their writers' inputs were white and nothing came in between.

    Channels of different groups are taken to have nothing to do with each other. None without values.

    Source: J. Dejaegher, SVD evolutive CNN (2021), where layers are projected by their weights alone.
    """
    if not has_values(width_graph.analysis):
        return None
    space = width_graph.analysis.space
    grams = {group.factor: writer_gram(width_graph, group) for group in width_graph.free}
    contracted: dict[Key, Moment] = {}
    for reader in wiring_of(width_graph).readers:
        values = wiring_of(width_graph).values(reader.call.arguments[reader.weight])
        if values is None:
            continue
        size = axis_size(reader.axis)
        covariance = torch.eye(size, dtype=accumulation_dtype(values), device=values.device)
        for factor in dict.fromkeys(space.factors(reader.axis)):
            gram = grams.get(factor)
            for positions in channel_positions(space, reader.axis, factor) if gram is not None else []:
                assert gram is not None
                for place in torch.from_numpy(positions).to(gram.device).T:
                    covariance[place[:, None], place[None]] = gram
        mean = covariance.new_zeros(size)
        contracted[reader.key] = Moment(mean, covariance, _PLENTY, _PLENTY, torch.finfo(covariance.dtype).eps)
    return Moments("weights", 0, contracted, {}, {})
