"""What of a tape matters for which factor: found once, asked for every group."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.nn import Parameter

from fxwidth.analysis.result import Analysis
from fxwidth.axes.factor_space import FactorSpace
from fxwidth.axes.factors import Axis, Factor
from fxwidth.growth.lasting import lasting, written_by
from fxwidth.memo import per_graph
from fxwidth.recording.tape import OpCall, storage_of


class TapeIndex:
    """The calls that matter for the outputs or outlast a call, and the parameter dims, by the factors they mention."""

    def __init__(self, analysis: Analysis) -> None:
        self._factors: dict[Axis, frozenset[Factor]] = {}
        self.calls: dict[Factor, list[OpCall]] = {}
        self.slots: dict[Factor, list[Slot]] = {}
        self.users: dict[Tensor, list[OpCall]] = {entry.fake: [] for entry in analysis.parameters.values()}
        self.used = set(analysis.outputs)
        # Of tensors that are made of parameters and buffers, whether of buffers alone.
        self.statistics = {e.fake: not isinstance(e.tensor, Parameter) for e in analysis.parameters.values()}
        # For which calls, but for what lasts, nothing that the model returns would change, and what that is.
        self.kept_as: dict[OpCall, str] = {}
        for call, lasts in _live_calls(analysis):
            if lasts:
                self.kept_as[call] = lasts
            self.used |= call.axes.keys()
            if call.axes and call.axes.keys() <= self.statistics.keys():
                only_buffers = all(self.statistics[key] for key in call.axes)
                self.statistics |= dict.fromkeys(call.outputs, only_buffers)
            rows = [*call.axes.values(), *call.output_axes]
            for factor in self._mentioned(analysis.space, (axis for axes in rows for axis in axes)):
                self.calls.setdefault(factor, []).append(call)
            for key in call.axes.keys() & self.users.keys():
                self.users[key].append(call)
        self.in_training: dict[Factor, list[OpCall]] = {}
        for call in (call for calls in analysis.training_calls.values() for call in calls):
            self.used |= call.axes.keys()
            rows = [*call.axes.values(), *call.output_axes]
            for factor in self._mentioned(analysis.space, (axis for axes in rows for axis in axes)):
                self.in_training.setdefault(factor, []).append(call)
        for name, entry in analysis.parameters.items():
            for dim, axis in enumerate(entry.axes):
                for factor in self._mentioned(analysis.space, [axis]):
                    self.slots.setdefault(factor, []).append((name, dim))

    def _mentioned(self, space: FactorSpace, axes: Iterable[Axis]) -> set[Factor]:
        result: set[Factor] = set()
        for axis in axes:
            known = self._factors.get(axis)
            if known is None:
                known = self._factors[axis] = frozenset(space.factors(axis))
            result |= known
        return result


def _live_calls(analysis: Analysis) -> list[tuple[OpCall, str]]:
    """Return the calls that the model's outputs depend on, or what outlasts the call alone, with its name, in order."""
    # By storage, so that what is written in place through a view counts for all that show the same memory.
    wanted = {**lasting(analysis), **dict.fromkeys(map(storage_of, analysis.outputs), "")}
    live = []
    for call in reversed(analysis.calls):
        names = [wanted[key] for key in map(storage_of, [*call.outputs, *written_by(call)]) if key in wanted]
        if names:
            name = "" if "" in names else names[0]
            live.append((call, name))
            for key in map(storage_of, call.inputs):
                wanted[key] = name and wanted.get(key, name)
    return live[::-1]


@per_graph
def tape_index(analysis: Analysis) -> TapeIndex:
    """Return the index of an analysis, made once."""
    return TapeIndex(analysis)


Slot = tuple[str, int]
