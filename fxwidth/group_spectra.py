"""All that is known of the widths of a graph's groups, as plain data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fxwidth.groups.channel_group import ChannelGroup
from fxwidth.groups.width_graph import WidthGraph, refuse_other_than_groups
from fxwidth.importance.estimates import Evidence
from fxwidth.importance.loss_sensitivity import calibrated
from fxwidth.options import Loss, PlanOptions, refuse_loss_without_data
from fxwidth.planning.constraints import chosen_groups
from fxwidth.rewriting.looks import looking_at
from fxwidth.selection.registry import Selection
from fxwidth.statistics.moments import has_values
from fxwidth.weights.rank_estimates import effective_rank, gavish_donoho_rank, marchenko_pastur_rank, stable_rank
from fxwidth.weights.writer_spectra import singular_values, writer_columns


@dataclass(frozen=True)
class GroupSpectrum:
    """The spectrum of a group's writers and what is predicted to be lost at each of its widths.

    Attributes:
        width: the number of channels.
        singular_values: of the stacked writers, largest first, one per channel; None where there are no values.
        effective_rank: exp of their entropy.
        stable_rank: their energy in units of the largest.
        gavish_donoho_rank: how many are worth keeping if the others are noise of unknown level.
        marchenko_pastur_rank: how many lie above all that noise could have.
        errors: the predicted error of every width from none to all; plans add them up over groups. In units of the
            loss where it was probed, else -log of the share of their outputs that readers keep, summed over readers.
        evidence: what the errors come from: "data", "noise", "weights", or None for the spectrum alone.
        is_calibrated: whether the errors are in units of the loss.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> gm = fxwidth.trace(net, torch.randn(2, 8))
        >>> found = fxwidth.spectrum(fxwidth.analyze(gm))["0"]
        >>> found.width, 1 <= found.stable_rank <= found.effective_rank <= 16
        (16, True)
    """

    width: int
    singular_values: tuple[float, ...] | None
    effective_rank: float | None
    stable_rank: float | None
    gavish_donoho_rank: int | None
    marchenko_pastur_rank: int | None
    errors: tuple[float, ...]
    evidence: str | None
    is_calibrated: bool

    def as_plain(self) -> dict[str, Any]:
        """Return the spectrum as a dict of numbers, lists and strings, fit for JSON."""
        return asdict(self)


def spectrum(
    width_graph: WidthGraph,
    *,
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
    selection: Selection = "greedy",
    only: str | Sequence[str] | None = None,
    keep: str | Sequence[str] | None = None,
) -> dict[str, GroupSpectrum]:
    """Return the spectrum, the ranks and the width curve of every free group, by its name.

    Args:
        width_graph: the groups, from `fxwidth.analyze`.
        data: batches that begin with the graph's inputs, from which to see what readers see; without them, that is
            estimated from the weights and batch norm statistics.
        loss: called with the output and what follows the inputs in a batch; brings errors to the unit of the loss.
        selection: the method whose choices the errors are of, as for `fxwidth.plan`.
        only: names or patterns of the groups to look at.
        keep: names or patterns of groups to leave out.

    Raises:
        FxwidthError: a pattern matches no group, there is no such method, or the data or the loss cannot be used.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> gm = fxwidth.trace(net, torch.randn(2, 8))
        >>> found = fxwidth.spectrum(fxwidth.analyze(gm))["0"]
        >>> len(found.singular_values), len(found.errors)
        (16, 17)
    """
    options = PlanOptions(data=data, selection=selection, only=only, keep=keep)
    refuse_loss_without_data(loss, data)
    refuse_other_than_groups(width_graph)
    groups = chosen_groups(width_graph, options.only, options.keep)

    def look() -> dict[str, GroupSpectrum]:
        evidence, errors = calibrated(width_graph, groups, data, loss, selection)
        return {group.name: _of(evidence, group, errors[group], loss is not None) for group in groups}

    return looking_at(width_graph.analysis.module, look)


def _of(evidence: Evidence, group: ChannelGroup, errors: Any, is_calibrated: bool) -> GroupSpectrum:
    graph = evidence.width_graph
    columns = writer_columns(graph, group)
    curve = tuple(np.asarray(errors).tolist())
    source = evidence.source(group)
    if not columns or not has_values(graph.analysis):
        return GroupSpectrum(group.width, None, None, None, None, None, curve, source, is_calibrated)
    values = np.asarray(singular_values(graph, group).cpu().numpy(), dtype=np.float64)
    return GroupSpectrum(
        group.width,
        tuple(values.tolist()),
        effective_rank(values),
        stable_rank(values),
        gavish_donoho_rank(values, group.width, columns),
        marchenko_pastur_rank(values, group.width, columns),
        curve,
        source,
        is_calibrated,
    )
