"""A penalty that makes the channels which are to go small before they go."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxwidth.axes.index_maps import Indices
from fxwidth.errors import FxwidthError
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.importance.estimates import Evidence, gather_evidence
from fxwidth.penalties.channel_norms import channel_lengths
from fxwidth.penalties.known_graphs import known_groups
from fxwidth.penalties.sums import total
from fxwidth.plain_numbers import is_integer, plain_number
from fxwidth.plans import Plan
from fxwidth.resizing.requested import Requested, refuse_too_narrow, requested
from fxwidth.rewriting.looks import looking_at
from fxwidth.runtime.contexts import plain_surroundings
from fxwidth.selection.registry import Selection, check_selection, reads_moments
from fxwidth.statistics.calibration_data import refuse_other_than_batches


class GrowingPenalty:
    """Half the squared norm of the channels that a plan drops, times a factor that grows at every call.

    Growing slowly, it leaves the network time to do without them; what a resize by `plan` then drops is next to
    nothing. A channel's norm is over all weights that write or read it.

    Args:
        gm: a graph from `fxwidth.trace`.
        plan: as for `fxwidth.resize`; which channels go is chosen now where it does not name those that stay.
        step: what the factor grows by at each call with gradients enabled.
        most: the factor at which it stops.
        selection: the method by which channels are chosen, as for `fxwidth.resize`.
        data: batches of inputs, for methods that look at what readers see; without them that is estimated.

    Attributes:
        plan: the plan with the channels that stay, for `fxwidth.resize`.
        factor: that of the last call.

    Raises:
        FxwidthError: the plan drops nothing or cannot be carried out, an option cannot be used, or, at a call, the
            groups have been resized since.

    Source: H. Wang, C. Qin, Y. Zhang and Y. Fu, Neural Pruning via Growing Regularization (2021), GReg-1, there on the
        filters of each layer, here on channels with their readers.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> gm = fxwidth.trace(net, torch.randn(2, 8))
        >>> optimizer = torch.optim.SGD(gm.parameters(), lr=0.1)
        >>> penalty = fxwidth.GrowingPenalty(gm, {"0": 12}, step=1e-2)
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     (gm(torch.randn(16, 8)).square().mean() + penalty()).backward()
        ...     optimizer.step()
        >>> round(penalty.factor, 2), len(penalty.plan["0"])
        (0.03, 12)
        >>> fxwidth.resize(gm, penalty.plan).get_parameter("0.weight").shape
        torch.Size([12, 8])
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        plan: Mapping[str, int | Sequence[int]],
        *,
        step: float = 1e-4,
        most: float = 1.0,
        selection: Selection = "magnitude",
        data: Iterable[Any] | None = None,
    ) -> None:
        self.step, self.most = _positive("step", step), _positive("most", most)
        check_selection(selection)
        refuse_other_than_batches(data)
        if data is not None and not reads_moments(selection):
            raise FxwidthError(f"data= would be ignored: selection={selection!r} does not look at it; leave it out.")
        width_graph = known_groups(gm)
        asked = requested(width_graph, plan, exact=False)
        refuse_too_narrow(width_graph, asked)
        if not asked.drops:
            raise FxwidthError(f"the plan {dict(plan)!r} drops no channels, so that there is nothing to penalise.")
        self.gm = gm
        self.plan = Plan(looking_at(gm, lambda: _kept(width_graph, asked, selection, data)))
        self._widths = {name: width_graph[name].width for name in self.plan}
        self._calls = 0

    def __repr__(self) -> str:
        return f"<GrowingPenalty on {len(self._widths)} groups: factor {self.factor:g} of at most {self.most:g}>"

    @property
    def factor(self) -> float:
        """The factor of the last call."""
        return min(self._calls * self.step, self.most)

    def __call__(self) -> Tensor:
        """Return the penalty as the graph is now, and let the factor grow for it where gradients are enabled."""
        width_graph = known_groups(self.gm)
        for name, width in self._widths.items():
            now = width_graph[name].width if name in width_graph else "no more"
            if now != width:
                raise FxwidthError(
                    f"group {name!r} had {width} channels when this penalty was made, and has {now}: it has been "
                    "resized. Make a new GrowingPenalty for what is to go next."
                )
        self._calls += torch.is_grad_enabled()
        with plain_surroundings():
            terms = [self._of(width_graph, name) for name in self.plan]
            return 0.5 * self.factor * total([term for term in terms if term is not None], self.gm)

    def _of(self, width_graph: WidthGraph, name: str) -> Tensor | None:
        lengths = channel_lengths(width_graph, width_graph[name])
        if lengths is None:
            return None
        goes = torch.ones(len(lengths), dtype=torch.bool)
        goes[list(self.plan.channels[name])] = False
        return lengths.square()[goes.to(lengths.device)].sum()

    def state_dict(self) -> dict[str, Any]:
        """Return the number of calls and which channels stay, as plain data."""
        return {"calls": self._calls, "plan": {name: list(kept) for name, kept in self.plan.channels.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another one was.

        Args:
            state: what `state_dict` has returned.

        Raises:
            FxwidthError: it is no such state, or is one of other groups; nothing has changed.
        """
        calls = state.get("calls") if isinstance(state, Mapping) else None
        if not isinstance(state, Mapping) or not is_integer(calls) or set(state) != {"calls", "plan"}:
            raise FxwidthError(f"a state of a GrowingPenalty is what its state_dict() returns, but received {state!r}.")
        plan = Plan(state["plan"])
        asked = requested(known_groups(self.gm), plan, exact=False)
        if set(plan.channels) != set(plan) or len(asked.channels) != len(plan):
            raise FxwidthError(
                f"the state is of groups of other widths: {plan.widths}, which are to be narrower than those of the "
                f"graph. Make the penalty on the graph as it was when the state was taken."
            )
        self._calls, self.plan = int(calls or 0), plan
        self._widths = {group.name: group.width for group in asked.channels}


def _kept(
    width_graph: WidthGraph, asked: Requested, selection: Selection, data: Iterable[Any] | None
) -> dict[str, list[int]]:
    """Return the channels that stay of each group that shrinks."""
    channels: dict[str, Indices] = {group.name: kept for group, kept in asked.channels.items()}
    others = {group: width for group, width in asked.widths.items() if group.name not in channels}
    if others:
        looks = reads_moments(selection)
        evidence = gather_evidence(width_graph, data, selection) if looks else Evidence(width_graph, None, selection)
        channels |= {g.name: evidence.kept(g, width) for g, width in others.items() if width < g.width}
    return {name: kept.tolist() for name, kept in channels.items()}


def _positive(name: str, given: Any) -> float:
    value = plain_number(given)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise FxwidthError(f"{name}={given!r} must be a number above 0.")
    return float(value)
