"""Readers that share one weight, and what takes a constant added to their output: the units in which weights change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from fxwidth.memo import per_graph
from fxwidth.recording.tape import OpCall
from fxwidth.rules.family_table import running_norm, takes_rows
from fxwidth.rules.op_families import Norm
from fxwidth.weights.readers import ParameterView, Reader, Wiring


@dataclass(frozen=True)
class Absorber:
    """A vector that can take a constant meant for a reader's output channels.

    Attributes:
        view: the parameter or buffer entries, one per output channel.
        sign: 1 for a bias, -1 for the running mean that a batch norm takes off.
    """

    view: ParameterView
    sign: int


@dataclass(frozen=True)
class ReaderSet:
    """All readers of one weight.

    Attributes:
        readers: they have the same view and dims, so the first one tells how the weight is laid out.
        foldable: whether changing the weight changes nothing but what these readers make of their channels.
        absorber: what takes constants, or None.
        variance: the running variance of the batch norm that alone follows, or None.
    """

    readers: tuple[Reader, ...]
    foldable: bool
    absorber: Absorber | None
    variance: ParameterView | None

    @property
    def first(self) -> Reader:
        """The reader that stands for all."""
        return self.readers[0]


@per_graph
def reader_sets(wiring: Wiring) -> list[ReaderSet]:
    """Return the readers of a graph, put together where they share a weight."""
    return list(_find(wiring))


def _find(wiring: Wiring) -> Iterator[ReaderSet]:
    by_weight: dict[object, list[Reader]] = {}
    for reader in wiring.readers:
        shared = (reader.view, reader.weight_dim, reader.groups, reader.minor, reader.transposed)
        by_weight.setdefault(shared if reader.view else reader.key, []).append(reader)
    for readers in by_weight.values():
        view = readers[0].view
        foldable = view is not None and _used_only_by(wiring, view, [reader.call for reader in readers])
        # What is known of complex channels are products of one part with the same of another, no means.
        is_real = not readers[0].call.arguments[readers[0].weight].is_complex()
        if foldable and is_real and all(takes_rows(reader.call.func, reader.weight) for reader in readers):
            yield ReaderSet(tuple(readers), True, *_following_vectors(wiring, readers))
        else:
            yield ReaderSet(tuple(readers), foldable, None, None)


def _used_only_by(wiring: Wiring, view: ParameterView, calls: list[OpCall]) -> bool:
    """Tell whether the entries of a view reach no other op, and these ops only once, as this view."""
    own = {call.index for call in calls}

    def leaves_alone(call: OpCall, tensor: Tensor) -> bool:
        other = wiring.view(tensor)
        if other is None or other.parameter != view.parameter:
            return False
        if other == view and call.index in own:
            return sum(one is tensor for one in call.inputs) == 1
        return not other.overlaps(view)

    return wiring.used_only(view.parameter, leaves_alone)


def _following_vectors(wiring: Wiring, readers: list[Reader]) -> tuple[Absorber | None, ParameterView | None]:
    """Return what takes a constant for the readers' outputs, and the variance by which these are divided."""
    width = readers[0].outputs * readers[0].groups
    norms = [wiring.following_batch_norm(reader.call) for reader in readers]

    def statistic(which: Callable[[Norm], str]) -> ParameterView | None:
        found = [None if call is None else (call, running_norm(call.func)) for call in norms]
        places = [(one[0], one[0].arguments[which(one[1])]) if one and one[1] else None for one in found]
        return _common_view(wiring, places, width)

    bias = _common_view(wiring, [wiring.added_bias(reader.call) for reader in readers], width)
    mean = statistic(lambda norm: norm.mean)
    absorber = Absorber(bias, 1) if bias is not None else Absorber(mean, -1) if mean is not None else None
    return absorber, statistic(lambda norm: norm.variance)


def _common_view(wiring: Wiring, places: list[tuple[OpCall, Tensor] | None], width: int) -> ParameterView | None:
    """Return the vector that stands at all places, if it stands nowhere else."""
    if any(place is None for place in places):
        return None
    known = [place for place in places if place is not None]
    views = {wiring.view(tensor) for _, tensor in known}
    view = views.pop()
    if views or view is None or view.size != (width,):
        return None
    return view if _used_only_by(wiring, view, [call for call, _ in known]) else None
