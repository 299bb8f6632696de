"""How new channels enter a group without changing the function: what stands in the new slots of every parameter.

A recipe is exact when interpretation of the tape (`interpreter.py`) finds no op that lets new channels reach
old ones. Recipes are tried from the one that leaves most to learn to the narrowest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, Flag, StrEnum, auto

from torch import Tensor

from fxwidth.analysis.result import Analysis
from fxwidth.analysis.roles import Roles
from fxwidth.axes.factors import ONE, Factor
from fxwidth.growth.call_view import AxisFacts
from fxwidth.growth.contraction import convolution_parts
from fxwidth.growth.interpreter import Interpretation
from fxwidth.growth.states import DirectionlessError, NormedWriterError, ProductRefusedError, State
from fxwidth.growth.tape_index import Slot, tape_index
from fxwidth.recording.tape import Axes, OpCall
from fxwidth.rules.family_table import adds, as_family, channel_norm, family_of, is_arithmetic
from fxwidth.rules.op_families import Arithmetic, FakeQuantization, Norm, WeightNorm


class Recipe(StrEnum):
    """How the new channels of a group stay without effect."""

    FREE = "new channels carry anything and nobody reads them"
    ONE_SIDED = "new channels carry anything, but are zero on one side of each product of activations"
    ZERO = "new channels are zero"
    MEAN = "new channels are the mean of the old ones"


class Fill(Enum):
    """What stands in the new slots of a parameter along one dim."""

    ZERO = "zero"
    MEAN = "the mean of the old entries"
    WEIGHTED = "the mean of the old entries, each times its entry of a per-channel scale"
    ONE = "one"
    DIRECTIONS = "directions that the old entries do not span"


_STATES = {Fill.ZERO: State.ZERO, Fill.MEAN: State.MEAN, Fill.WEIGHTED: State.WEIGHTED}


@dataclass(frozen=True)
class Growth:
    """The recipe for new channels of a group.

    Attributes:
        recipe: the kind of recipe; `FREE` where none is exact.
        inexact: None, or why new channels change the function.
        fills: what stands in the new slots of each parameter dim.
        weights: for each `Fill.WEIGHTED` dim, the parameter that holds the per-channel scale.
        norms: the tape index of each norm that sees more channels than before: its gain times sqrt(n / n') and its
            eps times n / n', from n to n' channels, leave what it makes of the old ones as it was.
    """

    recipe: Recipe = Recipe.FREE
    inexact: str | None = None
    fills: Mapping[Slot, Fill] = field(default_factory=dict)
    weights: Mapping[Slot, str] = field(default_factory=dict)
    norms: tuple[int, ...] = ()


class Use(Flag):
    """What ops do with a parameter's entries along the channels."""

    READS = auto()
    WRITES = auto()
    SCALES = auto()
    SHIFTS = auto()
    UNIT_GAIN = auto()
    GROUP_KERNEL = auto()


def find_growth(analysis: Analysis, roles: Roles, factor: Factor) -> Growth:
    """Find how a group can grow without a change of the function.

    Args:
        analysis: the tape and the axes, after all pinning.
        roles: what the graph does with its parameters.
        factor: the group's factor.
    """
    search = GrowthSearch(analysis, roles, factor)
    failures: list[Interpretation] = []
    for recipe in Recipe:
        fills, weights, run = search.repaired(recipe)
        if run.refusal is None:
            fills, run = search.with_active_readers(fills, weights, run)
            return Growth(recipe, None, fills, weights, tuple(run.norms))
        failures.append(run)
    # The recipe that came furthest met what stands in the way of all; of several, the narrowest says most.
    furthest = max(reversed(failures), key=lambda run: run.progress)
    return Growth(Recipe.FREE, str(furthest.refusal), search.fills(Recipe.FREE))


class GrowthSearch:
    """The attempts to grow one group."""

    def __init__(self, analysis: Analysis, roles: Roles, factor: Factor) -> None:
        self._analysis = analysis
        self._roles = roles
        self._factor = factor
        self._uses = _find_uses(analysis, roles, factor)

    def fills(self, recipe: Recipe) -> dict[Slot, Fill]:
        """Return what a recipe puts in the new slots."""
        return {slot: self._fill(recipe, slot, use) for slot, use in self._uses.items()}

    def run(self, fills: Mapping[Slot, Fill], weights: Mapping[Slot, str]) -> Interpretation:
        """Follow the new channels along the tape."""
        states = {slot: _STATES.get(fill, State.ANY) for slot, fill in fills.items()}
        return Interpretation(self._analysis, self._roles, self._factor, states, weights).run()

    def repaired(self, recipe: Recipe) -> tuple[dict[Slot, Fill], dict[Slot, str], Interpretation]:
        """Try a recipe, and again with what the attempt found to be missing, as far as the recipe allows."""
        fills, weights = self.fills(recipe), dict[Slot, str]()
        run = self.run(fills, weights)
        while (changed := self._change(recipe, run, fills)) is not None:
            fills |= changed
            run = self.run(fills, weights)
        if recipe is Recipe.MEAN and run.refusal is not None:
            weights = {slot: name for slot, name in run.wanted_weights.items() if Use.WRITES in self._uses[slot]}
            if weights:
                # The scales are one, so that a weighted mean becomes the mean of the products.
                fills |= {slot: Fill.ONE for slot in fills if slot[0] in weights.values()}
                fills |= dict.fromkeys(weights, Fill.WEIGHTED)
                run = self.run(fills, weights)
        return fills, weights, run

    def with_active_readers(
        self, fills: dict[Slot, Fill], weights: Mapping[Slot, str], run: Interpretation
    ) -> tuple[dict[Slot, Fill], Interpretation]:
        """Let readers of channels that are zero anyway be anything, so that those channels get a gradient."""
        idle = {slot: use for slot, use in self._uses.items() if slot not in run.needed and self._is_float(slot)}
        active = {slot: Fill.DIRECTIONS for slot, use in idle.items() if use == Use.READS and self._is_matrix(slot)}
        active |= {slot: Fill.MEAN for slot, use in idle.items() if use == Use.SCALES and fills[slot] is Fill.ZERO}
        if not active:
            return fills, run
        again = self.run({**fills, **active}, weights)
        return (fills, run) if again.refusal is not None else ({**fills, **active}, again)

    def _change(self, recipe: Recipe, run: Interpretation, fills: Mapping[Slot, Fill]) -> dict[Slot, Fill] | None:
        """Return what would do away with the reason for a refusal, or None."""
        refusal = run.refusal
        changed: dict[Slot, Fill] = {}
        if recipe is Recipe.ONE_SIDED and isinstance(refusal, ProductRefusedError):
            changed = dict.fromkeys(self._one_side(run, refusal, fills), Fill.ZERO)
        elif isinstance(refusal, DirectionlessError):
            lengths = self._slots_of(refusal.length, refusal.dim)
            if lengths:
                directions = self._slots_of(refusal.direction, refusal.dim) - lengths
                changed = {slot: Fill.DIRECTIONS if self._is_matrix(slot) else Fill.ONE for slot in directions}
                changed |= dict.fromkeys(lengths, Fill.ZERO)
        elif isinstance(refusal, NormedWriterError):
            origins = run.sources.get(refusal.weight, frozenset())
            changed = dict.fromkeys((slot for slot in origins if Use.WRITES in self._uses[slot]), Fill.ZERO)
            if changed:
                # What is added to the channels keeps them alive, or what reads them would never learn.
                changed |= dict.fromkeys(self._biases(), Fill.ONE)
        return changed if any(fills[slot] is not fill for slot, fill in changed.items()) else None

    def _biases(self) -> list[Slot]:
        return [slot for slot, use in self._uses.items() if use == Use.WRITES and not self._is_matrix(slot)]

    def _slots_of(self, tensor: Tensor, dim: int) -> set[Slot]:
        """Return the parameter dims that a dim of a tensor comes from."""
        provenance = self._roles.provenance.get(tensor, ())
        return set(provenance[dim] & self._uses.keys()) if dim < len(provenance) else set()

    def _one_side(self, run: Interpretation, refusal: ProductRefusedError, fills: Mapping[Slot, Fill]) -> list[Slot]:
        left, right = (run.sources.get(tensor, frozenset()) for tensor in (refusal.left, refusal.right))
        free = [slot for slot in right - left if fills[slot] is not Fill.ZERO]
        return [slot for slot in free if Use.WRITES in self._uses[slot]]

    def _is_float(self, slot: Slot) -> bool:
        return self._analysis.parameters[slot[0]].fake.dtype.is_floating_point

    def _fill(self, recipe: Recipe, slot: Slot, use: Use) -> Fill:
        if not self._is_float(slot):
            return Fill.ZERO
        if recipe is Recipe.MEAN and Use.WRITES in use:
            return Fill.MEAN
        if Use.READS in use or (recipe is Recipe.ZERO and Use.WRITES in use):
            return Fill.ZERO
        if Use.GROUP_KERNEL in use:
            return Fill.DIRECTIONS
        if Use.UNIT_GAIN in use:
            return Fill.ONE
        if Use.SCALES in use:
            return Fill.MEAN
        return Fill.DIRECTIONS if Use.WRITES in use and self._is_matrix(slot) else Fill.ZERO

    def _is_matrix(self, slot: Slot) -> bool:
        return not _is_vector(self._analysis.parameters[slot[0]].axes, slot[1])


def _find_uses(analysis: Analysis, roles: Roles, factor: Factor) -> dict[Slot, Use]:
    """Return what the graph does with each parameter dim that the factor is in."""
    index = tape_index(analysis)
    facts = AxisFacts(factor, analysis.space)
    uses = dict.fromkeys(index.slots.get(factor, ()), Use(0))
    for call in index.calls.get(factor, ()):
        inputs = call.inputs
        inside = not call.contractions and all(map(roles.is_parameter, inputs))
        for tensor in inputs:
            provenance = roles.provenance.get(tensor, ())
            axes = call.axes[tensor]
            for dim, sources in enumerate(provenance):
                if dim < len(axes) and facts.carries(axes[dim]):
                    use = _use_in_parameters(call, tensor, dim) if inside else _use(call, tensor, dim, facts)
                    for slot in sources & uses.keys():
                        uses[slot] |= use
    return uses


def _use_in_parameters(call: OpCall, tensor: Tensor, dim: int) -> Use:
    """Return what an op on parameters alone tells: the length of a weight's rows scales them, as in a weight norm."""
    family = family_of(call.func)
    multiplies = is_arithmetic(call.func, Arithmetic.PRODUCT, Arithmetic.QUOTIENT)
    return (
        Use.SCALES
        if (multiplies or isinstance(family, (WeightNorm, FakeQuantization))) and _is_vector(call.axes[tensor], dim)
        else Use(0)
    )


def _is_vector(axes: Axes, dim: int) -> bool:
    """Tell whether a tensor has nothing but one dim; another with a group of width one may have more again."""
    return all(axis == ONE for place, axis in enumerate(axes) if place != dim)


def _use(call: OpCall, tensor: Tensor, dim: int, facts: AxisFacts) -> Use:
    reads = multiplies = False
    for contraction in call.contractions:
        for operand, dims in ((contraction.left, contraction.left_dims), (contraction.right, contraction.right_dims)):
            if operand is tensor:
                # A kernel of a group that grows as a whole neither makes nor reads channels of its own.
                if "groups" in call.arguments and convolution_parts(call, facts) == (1, 0, 0):
                    return Use.GROUP_KERNEL
                reads |= dim in dims
                multiplies = True
    if multiplies:
        return Use.READS if reads else Use.WRITES
    norm = as_family(call.func, Norm)
    if norm is not None:
        for names, use in ((("weight", norm.variance), Use.UNIT_GAIN), ((norm.bias, norm.mean), Use.SHIFTS)):
            if any(call.arguments.get(name) is tensor for name in names):
                return Use.SCALES if use is Use.UNIT_GAIN and channel_norm(call.func) is not None else use
    return Use.WRITES if call.contractions or adds(call.func) else Use.SCALES
