"""Running the tape on states: from what stands in the new slots of parameters to where new channels arrive."""

from __future__ import annotations

from collections.abc import Mapping
from operator import and_

from torch import Tensor

from fxwidth.analysis.result import Analysis
from fxwidth.analysis.roles import Roles
from fxwidth.axes.factors import Factor
from fxwidth.growth import (  # noqa: F401  (they fill the table of transfers)
    contraction,
    matrices,
    movement,
    normalization,
    quantization,
    reduction,
    writes,
)
from fxwidth.growth.call_view import AxisFacts, CallView
from fxwidth.growth.lasting import written_by
from fxwidth.growth.pointwise import pass_pointwise
from fxwidth.growth.ranges import ANYTHING, Range, refuse_not_finite, result_range
from fxwidth.growth.states import CONSTANT, RefusedError, State, States, meet
from fxwidth.growth.tape_index import Slot, tape_index
from fxwidth.growth.transfers import NO_TRANSFER, transfer_of
from fxwidth.recording.tape import OpCall, storage_of
from fxwidth.rules.family_table import channel_norm
from fxwidth.rules.op_names import rule_name
from fxwidth.rules.registry import broadcast_all, rule_for

"""A dim of a parameter or buffer."""


class Interpretation:
    """One run of the calls that mention a factor, given the state of each parameter's new slots.

    Attributes:
        refusal: why new channels change the function, or None.
        progress: the tape index of the call that refused.
        needed: the parameter dims whose zeros the run relied on.
        norms: the tape index of each norm whose gain and eps must be rescaled.
        sources: by tensor id, the parameter dims that its channels come from.
        wanted_weights: the parameter dims that would have to be weighted by a scale for its product to have the mean.
    """

    def __init__(
        self,
        analysis: Analysis,
        roles: Roles,
        factor: Factor,
        slots: Mapping[Slot, State],
        weights: Mapping[Slot, str] | None = None,
    ) -> None:
        self._analysis = analysis
        self._roles = roles
        self._index = tape_index(analysis)
        self._facts = AxisFacts(factor, analysis.space)
        self._factor = factor
        self._slots = slots
        self._weights = dict(weights or {})
        self.states: dict[Tensor, States] = {}
        self._ranges: dict[Tensor, Range] = {}
        self._by_storage: dict[int, dict[Tensor, Tensor]] = {}
        self._most: dict[Tensor, States] = {}
        self._started: dict[Tensor, States] = {}
        self._rewritten: dict[str, None] = {}
        self.refusal: RefusedError | None = None
        self.progress = -1
        self.needed: set[Slot] = set()
        self.norms: list[int] = []
        self.sources: dict[Tensor, frozenset[Slot]] = {}
        self.wanted_weights: dict[Slot, str] = {}

    def run(self) -> Interpretation:
        """Follow the new channels along the tape."""
        self._follow()
        while self.refusal is None and (self._less_in_training() | self._less_in_next_call()):
            for found in (self.states, self._ranges, self._by_storage, self.needed, self.norms, self.sources):
                found.clear()
            self._follow()
        return self

    def _follow(self) -> None:
        for slot in self._slots:
            self._start(slot[0])
        for call in self._index.calls.get(self._factor, ()):
            try:
                self._pass(call)
            except RefusedError as refusal:
                self._told(refusal, call)
                self.refusal, self.progress = refusal, call.index
                return
        # What training alone does comes last: its ops have no index on the tape, and read what is on it.
        try:
            for call in self._index.in_training.get(self._factor, ()):
                known = len(self.norms)
                self._pass(call)
                if len(self.norms) > known:
                    raise RefusedError(f"a norm sees more channels ({call.place})")
        except RefusedError as refusal:
            self.refusal, self.progress = RefusedError(f"in training, {refusal}"), len(self._analysis.calls)

    def _less_in_training(self) -> bool:
        """Note what holds for less in training than in evaluation: what reads it may rely on what holds in both."""
        found = False
        for own, other in self._analysis.in_training:
            states = self.states.get(other, ())
            in_training = self.states.get(own, states if own is other else (CONSTANT,) * len(states))
            both = tuple(one & two for one, two in zip(states, in_training, strict=True))
            if both != states:
                self._most[other] = both
                found = True
        return found

    def _less_in_next_call(self) -> bool:
        """Note what holds for less of a tensor at the end of a call, if that writes to it, than at its beginning."""
        found = False
        for name, _ in self._slots:
            fake = self._analysis.parameters[name].fake
            both = tuple(map(and_, self.states[fake], self._started[fake]))
            if both != self._started[fake]:
                self._most[fake] = both
                self._rewritten[name] = None
                found = True
        return found

    def _told(self, refusal: RefusedError, call: OpCall) -> None:
        """Add to a refusal what of the next calls is the reason, if it is."""
        if call in self._index.kept_as:
            refusal.args = (f"{refusal}, and {self._index.kept_as[call]} keeps the result for the next call",)
        if self._rewritten:
            refusal.args = (f"{refusal}, once a call has written to {', '.join(map(repr, self._rewritten))}",)

    # -- what calls ask and tell (see `growth_states.Observer`) ------------------------------------------------------

    def states_of(self, tensor: Tensor, call: OpCall) -> States:
        """Return the states of a call's operand."""
        axes = call.axes[tensor]
        known = self.states.get(tensor)
        if known is not None and len(known) == len(axes):
            return known
        if any(map(self._facts.carries, axes)):
            raise RefusedError(f"a tensor of shape {tuple(tensor.shape)} comes from nowhere (node {call.node})")
        return (CONSTANT,) * len(axes)

    def zero_needed(self, tensor: Tensor, dim: int) -> None:
        """Learn that an operand must keep its zeros."""
        if tensor in self._roles.provenance:
            self.needed |= self._roles.provenance[tensor][dim]

    def is_parameter(self, tensor: Tensor) -> bool:
        """Tell whether an operand is made of parameters alone."""
        return self._roles.is_parameter(tensor)

    def is_statistic(self, tensor: Tensor) -> bool | None:
        """Tell whether an operand is made of buffers alone, which training may compute anew; None unless fixed."""
        return self._index.statistics.get(tensor)

    def is_used(self, tensor: Tensor) -> bool:
        """Tell whether any op, or the model's output, takes a tensor."""
        return tensor in self._index.used

    def gain_conflict(self, weight: Tensor) -> str | None:
        """Return why the gain of a norm cannot be rescaled, or None."""
        if weight not in self._analysis.names:
            return "computes its gain, which can therefore not be rescaled"
        for call in self._index.users[weight]:
            if channel_norm(call.func) is None or call.arguments["weight"] is not weight:
                return "shares its gain, which would have to be rescaled, with other ops"
        return None

    def gain_rescaled(self, call: OpCall) -> None:
        """Learn that a norm's gain and eps must be rescaled."""
        self.norms.append(call.index)

    def scaled(self, signal: Tensor, scale: Tensor) -> bool:
        """Tell whether a signal's weighted means are weighted by this scale; if they could be, take note."""
        name = self._per_channel_name(scale)
        if name is None:
            return False
        origins = self.sources.get(signal, frozenset())
        weighted = {self._weights[slot] for slot in origins if slot in self._weights}
        if weighted:
            return weighted == {name}
        self.wanted_weights |= {slot: name for slot in origins if self._slots[slot] & State.MEAN}
        return False

    def _per_channel_name(self, scale: Tensor) -> str | None:
        """Return the parameter that a tensor is a view of, if that has one entry per channel and nothing else."""
        if scale not in self._roles.provenance:
            return None
        for name, _ in {slot for dims in self._roles.provenance[scale] for slot in dims}:
            entry = self._analysis.parameters[name]
            is_view = storage_of(entry.fake) == storage_of(scale) and entry.fake.dtype == scale.dtype
            bare = [axis for axis in entry.axes if self._facts.is_bare(axis)]
            if is_view and bare and entry.fake.numel() == self._factor.size:
                return name
        return None

    # -- the run -----------------------------------------------------------------------------------------------------

    def _start(self, name: str) -> None:
        entry = self._analysis.parameters[name]
        states = [self._slots.get((name, dim), CONSTANT) for dim in range(len(entry.axes))]
        origins = frozenset((name, dim) for dim in range(len(entry.axes)) if (name, dim) in self._slots)
        self._store(entry.fake, tuple(states), origins)
        self._started[entry.fake] = self.states[entry.fake]
        if states and all(self.states[entry.fake][dim] & State.ZERO for _, dim in origins):
            self._ranges[entry.fake] = (0.0, 0.0)

    def _pass(self, call: OpCall) -> None:
        if not call.outputs:
            return
        view = CallView(call, self._facts, self)
        passes = transfer_of(rule_name(call.func))
        if passes is None:
            if rule_for(call.func) is not broadcast_all:
                view.refuse(NO_TRANSFER)
            passes = pass_pointwise
            refuse_not_finite(view, self._range_of)
        results = view.results(passes(view))
        own = ANYTHING if call.func._schema.is_mutable else result_range(call, self._range_of)
        self._ranges |= dict.fromkeys(call.outputs, own)
        origins: frozenset[Slot] = frozenset()
        for tensor in call.inputs:
            if view.carrying(tensor):
                origins |= self.sources.get(tensor, frozenset())
        if targets := written_by(call):
            self._write(call, targets, results, origins)
        for (output, axes), states in zip(view.outputs, results, strict=True):
            if any(map(self._facts.carries, axes)):
                self._store(output, states, origins)

    def _range_of(self, value: object) -> Range:
        """Return where the new entries of an operand lie."""
        if isinstance(value, Tensor):
            return self._ranges.get(value, ANYTHING)
        return (float(value), float(value)) if isinstance(value, (int, float)) else ANYTHING

    def _store(self, tensor: Tensor, states: States, origins: frozenset[Slot]) -> None:
        most = self._most.get(tensor, states)
        self.states[tensor] = tuple(one & two for one, two in zip(states, most, strict=True))
        self.sources[tensor] = origins
        self._by_storage.setdefault(storage_of(tensor), {})[tensor] = tensor

    def _write(self, call: OpCall, targets: list[Tensor], results: list[States], origins: frozenset[Slot]) -> None:
        """Let all views of what an op wrote to have only what holds for old and written entries alike."""
        returned = dict(zip(map(storage_of, call.outputs), zip(call.output_axes, results, strict=True), strict=True))
        for key in set(map(storage_of, targets)):
            written = State.ANY
            if key in returned:
                pairs = zip(*returned[key], strict=True)
                written = meet(state for axis, state in pairs if self._facts.carries(axis))
            for tensor in self._by_storage.get(key, {}).values():
                axes = self._analysis.axes_of(tensor)
                old = self.states[tensor]
                carried = map(self._facts.carries, axes) if len(axes) == len(old) else [True] * len(old)
                self.states[tensor] = tuple(
                    state & written if carries else CONSTANT for state, carries in zip(old, carried, strict=True)
                )
                self.sources[tensor] |= origins
                self._ranges.pop(tensor, None)
