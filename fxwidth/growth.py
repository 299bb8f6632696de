"""How new channels enter a group without changing the function: the recipe for every place the group occurs in.

A recipe says what stands in the new slots of each parameter. It is exact when abstract interpretation of the tape (see
`growth_states`) finds no op that lets new channels reach old ones. Recipes are tried from the freest to the narrowest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum, Flag, StrEnum, auto
from weakref import WeakKeyDictionary

from torch import Tensor

from fxwidth.analysis import Analysis
from fxwidth.factors import Axis, Factor, FactorSpace
from fxwidth.growth_pointwise import pass_pointwise
from fxwidth.growth_states import (
    CONSTANT,
    TRANSFERS,
    AxisFacts,
    CallView,
    ProductRefusal,
    Refusal,
    State,
    States,
)
from fxwidth.growth_transfer import is_grouped
from fxwidth.roles import ADDING, Roles
from fxwidth.rules.registry import broadcast_all, rule_for, rule_name
from fxwidth.tape import OpCall

Slot = tuple[str, int]
"""A dim of a parameter or buffer."""


class Recipe(StrEnum):
    """How the new channels of a group stay without effect."""

    FREE = "new channels carry anything and nobody reads them"
    ONE_SIDED = "new channels carry anything, but one side of each product of two activations is zero"
    ZERO = "new channels are zero"
    MEAN = "new channels are the mean of the old ones"


class Fill(Enum):
    """What stands in the new slots of a parameter along one dim."""

    ZERO = State.ZERO
    MEAN = State.MEAN
    WEIGHTED = State.WEIGHTED
    ONE = "one"
    DIRECTIONS = "directions"

    @property
    def state(self) -> State:
        """What is known of entries filled so."""
        return self.value if isinstance(self.value, State) else State.ANY


@dataclass(frozen=True)
class Growth:
    """The recipe for new channels of a group.

    Attributes:
        recipe: the kind of recipe; `FREE` where none is exact.
        inexact: None, or why new channels change the function.
        fills: what stands in the new slots of each parameter dim.
        weights: for `Fill.WEIGHTED` slots, the per-channel scale whose product with the channels has the mean.
        norms: the tape index of each norm that sees more channels than before: its gain times sqrt(n / n') and its
            eps times n / n', from n to n' channels, leave what it makes of the old ones as it was.
    """

    recipe: Recipe = Recipe.FREE
    inexact: str | None = None
    fills: Mapping[Slot, Fill] = field(default_factory=dict)
    weights: Mapping[Slot, str] = field(default_factory=dict)
    norms: tuple[int, ...] = ()


class Use(Flag):
    """What an op does with a parameter's entries along the channels."""

    READS = auto()
    WRITES = auto()
    SCALES = auto()
    SHIFTS = auto()
    NORM_GAIN = auto()
    GROUP_KERNEL = auto()


_UNUSED = Use(0)
_UNIT_GAIN = frozenset({"weight", "running_var"})
_CHANNEL_NORMS = frozenset({"native_layer_norm", "_fused_rms_norm", "fxwidth::rms_norm"})


def find_growth(analysis: Analysis, roles: Roles, factor: Factor) -> Growth:
    """Find how a group can grow without a change of the function.

    Args:
        analysis: the tape and the axes; groups must be final.
        roles: what the graph does with its parameters.
        factor: the group's factor.
    """
    tape = _tape_of(analysis)
    uses = _uses(analysis, tape, roles, factor)
    failures: list[_Attempt] = []
    for recipe in Recipe:
        attempt = _Attempt(analysis, tape, roles, factor, _fills(analysis, recipe, uses))
        attempt = _repaired(attempt, recipe, uses)
        if attempt.refusal is None:
            attempt = _with_active_readers(attempt, uses)
            return Growth(recipe, None, attempt.fills, attempt.weights, tuple(attempt.norms))
        failures.append(attempt)
    # The recipe that came furthest met what stands in the way of all.
    furthest = max(failures, key=lambda attempt: attempt.progress)
    return Growth(Recipe.FREE, str(furthest.refusal), failures[0].fills)


def _repaired(attempt: _Attempt, recipe: Recipe, uses: Mapping[Slot, Use]) -> _Attempt:
    """Run an attempt and give it what it asks for, as far as the recipe allows."""
    attempt.run()
    if recipe is Recipe.ONE_SIDED:
        # Each turn sets at least one more slot to zero.
        while isinstance(attempt.refusal, ProductRefusal):
            left, right = (attempt.sources.get(id(t), frozenset()) for t in (attempt.refusal.left, attempt.refusal.right))
            zeroed = {slot for slot in right - left if attempt.fills[slot] is not Fill.ZERO and uses[slot] & Use.WRITES}
            if not zeroed:
                break
            attempt = attempt.with_fills({**attempt.fills, **dict.fromkeys(zeroed, Fill.ZERO)})
            attempt.run()
    elif recipe is Recipe.MEAN and attempt.refusal is not None and attempt.wanted_weights:
        weights = attempt.wanted_weights
        scales = {(name, 0): Fill.ONE for name in weights.values()}
        fills = {**attempt.fills, **dict.fromkeys(weights, Fill.WEIGHTED)}
        fills |= {slot: Fill.ONE for slot in fills if slot[0] in set(weights.values())}
        attempt = attempt.with_fills(fills, weights)
        attempt.run()
    return attempt
