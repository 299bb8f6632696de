"""Watching the tensors of a run: each op is found on the analysis tape, and what the probes ask for is summed up."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from fxwidth.analysis.result import Analysis
from fxwidth.recording.tape import OpCall, TapeRecorder
from fxwidth.runtime.process_groups import Ranks
from fxwidth.statistics.moment import Moment
from fxwidth.statistics.observation_points import Key, Measure, Probe
from fxwidth.statistics.row_sums import Average, RowSum, pool

ROWS_PER_BATCH = 65_536

OTHER_OPS = "it ran other ops than when it was analysed"
NOT_FINITE = "its inputs are not finite"
TOO_LARGE = "its inputs are so large that their squares are beyond the range of their precision"


@dataclass(frozen=True)
class Seen:
    """All that the probes measured in one run; see `Moments`."""

    contracted: dict[Key, Moment] = field(default_factory=dict)
    squares: dict[Key, Tensor] = field(default_factory=dict)
    products: dict[Key, Tensor] = field(default_factory=dict)
    deviations: dict[int, Tensor] = field(default_factory=dict)
    missed: dict[str, str] = field(default_factory=dict)


def _is_finite(values: Tensor) -> bool:
    # A sum is finite only if all its terms are, and needs no memory.
    return bool(values.sum().isfinite()) or bool(values.isfinite().all())


def _sum_of(probe: Probe) -> Hashable:
    """Return what tells one sum from another: probes with the same keys add to one."""
    return probe.keys if probe.measure == Measure.MOMENT else probe


class Observer:
    """Watches the ops of a run, finds each one's place on the analysis tape, and sums what the probes ask for."""

    def __init__(self, analysis: Analysis, probes: Sequence[Probe]) -> None:
        self.node = ""
        self.samples = 0
        self.missed: dict[str, str] = {}
        self._analysis = analysis
        self._probes: dict[int, list[Probe]] = {}
        for probe in probes:
            self._probes.setdefault(probe.call.index, []).append(probe)
        self._sums: dict[Hashable, RowSum | Average] = {}
        self._parts: dict[Hashable, list[Probe]] = {}
        for probe in probes:
            self._parts.setdefault(_sum_of(probe), []).append(probe)
        self._expected: deque[OpCall] = deque()
        self._is_astray = False
        self._strayed: set[str] = set()
        self._found: set[int] = set()
        # By all that stands for them. Tied ones are one tensor, and so are told by what they are and not by a name.
        self._parameters = {
            id(one): id(entry.tensor) for entry in analysis.parameters.values() for one in (entry.tensor, entry.fake)
        }
        self._too_large: set[Hashable] = set()

    def begin(self, node: str) -> None:
        """Expect the ops of a node."""
        self.node = node
        self._expected = deque(self._analysis.calls_of(node))
        self._is_astray = False

    def end(self) -> None:
        """Check that all the ops of the node have come."""
        if self._expected:
            self._stray()

    def see(self, call: OpCall) -> None:
        """Take in one op that has just run."""
        expected = self.matched(call)
        for probe in self._probes.get(expected.index, ()) if expected is not None else ():
            self._measure(probe, call.arguments[probe.argument])

    def stand_for(self, leaves: Mapping[str, Tensor]) -> None:
        """Take tensors for the parameters of these names, in whose place they are used."""
        for name, leaf in leaves.items():
            self._parameters[id(leaf)] = id(self._analysis.parameters[name].tensor)

    def matched(self, call: OpCall) -> OpCall | None:
        """Return the place on the tape of an op that has just run, or None where the run has left the tape."""
        used = self._used(call)
        if self._is_astray:
            self._find_again(call, used)
        elif not self._expected or not self._is_like(self._expected[0], call, used):
            self._stray()
            self._find_again(call, used)
        if self._is_astray or not self._expected:
            return None
        found = self._expected.popleft()
        self._found.add(found.index)
        return found

    def _used(self, call: OpCall) -> set[int]:
        """Return which parameters an op takes, by what tells them from others."""
        return {self._parameters[id(tensor)] for tensor in call.inputs if id(tensor) in self._parameters}

    def _is_like(self, expected: OpCall, call: OpCall, used: set[int]) -> bool:
        # Parameters that something else stands for are not known by what they are.
        return expected.name == call.name and used <= self._used(expected)

    def _stray(self) -> None:
        """Note that the run has left the tape; where it depends on values it may, and can be found again."""
        if any(call.recorded is not None for call in self._analysis.calls_of(self.node)):
            self._strayed.add(self.node)
            self._is_astray = True
        else:
            self.missed[self.node] = OTHER_OPS
            self._expected.clear()

    def _find_again(self, call: OpCall, used: set[int]) -> None:
        """Go on where the tape uses the same parameters, if an op uses any: loops over samples have other lengths."""
        if not used:
            return
        for skipped, expected in enumerate(self._expected):
            if self._is_like(expected, call, used):
                for _ in range(skipped):
                    self._expected.popleft()
                self._is_astray = False
                return

    @property
    def expected(self) -> OpCall | None:
        """The op that is to come next in the node at work."""
        return self._expected[0] if self._expected else None

    def pool(self, ranks: Ranks) -> None:
        """Take in what the other ranks have seen in runs of the same graph on data of their own.

        Raises:
            FxwidthError: one has failed, or could not be reached.
        """
        keys = list(self._parts)
        large = [place for place, key in enumerate(keys) if key in self._too_large]
        told = ranks.gather("what was missed", (self.missed, self._strayed, self._found, large))
        if not ranks.is_data_parallel:
            told = told[:1]
        # In the order of the ranks, for all to have the same.
        self.missed = {}
        for missed, strayed, found, places in told:
            self.missed = {**missed, **self.missed}
            self._strayed |= strayed
            self._found |= found
            self._too_large |= {keys[place] for place in places}
        pool(ranks, self._sums, keys)

    def seen(self) -> Seen:
        """Return all that was seen."""
        result = Seen(missed=self.missed)
        for key, total in self._sums.items():
            probes = self._parts[key]
            # Several places of one weight, as the steps of a loop, need not all be there in every run.
            if any(probe.call.node in self.missed for probe in probes) or all(
                self.is_unseen(probe.call) for probe in probes
            ):
                continue
            probe, value = probes[0], total.moment() if isinstance(total, RowSum) else total.value()
            if not _is_finite(value.covariance if isinstance(value, Moment) else value):
                is_seen = isinstance(value, Moment) and _is_finite(value.mean)
                self.missed[probe.call.node] = TOO_LARGE if is_seen or key in self._too_large else NOT_FINITE
            elif isinstance(value, Moment):
                result.contracted.update(dict.fromkeys(probe.keys, value))
            elif probe.measure == Measure.SQUARES:
                result.squares[probe.keys[0]] = value
            elif probe.measure == Measure.PRODUCTS:
                result.products[probe.keys[0]] = value
            else:
                result.deviations[probe.call.index] = value
        return result

    def is_unseen(self, call: OpCall) -> bool:
        """Tell whether a run has not come to an op of the tape, or has left the tape before."""
        return call.node in self.missed or (call.node in self._strayed and call.index not in self._found)

    def _measure(self, probe: Probe, tensor: Tensor) -> None:
        if probe.measure == Measure.MOMENT:
            total = self._sums.setdefault(_sum_of(probe), RowSum())
            assert isinstance(total, RowSum)
            # An input that is seen in several places is one input all the same.
            samples = self.samples if self._parts[_sum_of(probe)][0] is probe else 0
            total.add(probe.rows(tensor, ROWS_PER_BATCH // probe.places), samples)
        else:
            average = self._sums.setdefault(_sum_of(probe), Average())
            assert isinstance(average, Average)
            average.add(*probe.squares(tensor))
            if not _is_finite(average.value()) and _is_finite(tensor):
                self._too_large.add(_sum_of(probe))


class Walker(fx.Interpreter):
    """Runs a graph, telling an observer which node is at work; values are freed as soon as they are used up."""

    def __init__(self, module: fx.GraphModule, observer: Observer, recorder: TapeRecorder) -> None:
        super().__init__(module)
        self._observer = observer
        self._recorder = recorder

    def run_node(self, n: fx.Node) -> Any:
        """Run one node."""
        self._observer.begin(n.name)
        value = super().run_node(n)
        self._observer.end()
        # The tape would keep every activation alive.
        self._recorder.calls.clear()
        return value
