"""The axes of a graph in which groups have width one, as they were found when these were wider.

A dim of size one may be a channel or may be broadcast, and no op tells which. So a resize that leaves a group at width
one writes down what the analysis before it had found: the factors, the axes of parameters and inputs, and those of the
operands and results of every op. The next analysis follows these instead of the rules (`following.py`).

All of it is plain data with numbers for factors, so that it is pickled with the graph and shared by its copies.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from fxwidth.analysis.op_signatures import Signature, is_copy, is_view, prescribed_signatures, structure
from fxwidth.analysis.result import Analysis, Dim, LostGroup
from fxwidth.axes.factor_space import FactorSpace, Link
from fxwidth.axes.factors import Axis, Factor, find
from fxwidth.axes.index_maps import IndexMaps
from fxwidth.axes.pins import Pin
from fxwidth.recording.tape import OpCall
from fxwidth.rules.family_table import is_move
from fxwidth.rules.op_families import Move
from fxwidth.rules.op_names import rule_name
from fxwidth.runtime.pytrees import deep_tensors


def kind_of(call: OpCall) -> str:
    """Return a name that an op shares with those that a resize may put in its place."""
    return "view" if is_view(call.func) else "split" if is_move(call.func, Move.SPLIT) else rule_name(call.func)


@dataclass(frozen=True, slots=True)
class Ref:
    """The number of a factor, in its place in an axis."""

    number: int


KnownAxis = tuple[tuple["int | Ref | KnownAxis", ...], ...]
"""An axis with numbers in the place of factors."""
_KnownRow = tuple[KnownAxis, ...]


@dataclass(frozen=True, slots=True)
class KnownFactor:
    """A factor with numbers in the place of other factors; see `Factor`."""

    size: int
    name: str
    parent: int | None
    refined_to: KnownAxis | None
    pinned: Pin | None
    mixed: str | None
    is_batch: bool


@dataclass(frozen=True, slots=True)
class KnownCall:
    """An op that is no mere copy, with the axes of its operands and results in order; see `OpCall`.

    `literals` are the whole numbers among its arguments. Contractions and reductions name operands by their places
    among the inputs.
    """

    kind: str
    literals: Signature
    inputs: tuple[_KnownRow, ...]
    outputs: tuple[_KnownRow, ...]
    contractions: tuple[tuple[int, tuple[int, ...], int, tuple[int, ...]], ...]
    reductions: tuple[tuple[int, int, str], ...]


@dataclass(frozen=True)
class KnownAxes:
    """All that an analysis has found of axes, with the sizes that a resize leaves.

    Attributes:
        factors: by their numbers.
        links: why factors are related, by number.
        parameters: the axes of each parameter and buffer, as they were before any op.
        inputs: the axes of each tensor among the graph's inputs.
        calls: the ops in order, those that a part does in training right after those of its node.
        batch: the number of the batch's factor.
        is_single: whether the inputs are one sample, without a batch.
        narrow: the groups of width one, and the parameter dims in which they occur.
        lost: those of width one of which an earlier record was of another graph.
    """

    factors: tuple[KnownFactor, ...]
    links: tuple[tuple[int, int, str], ...]
    parameters: Mapping[str, _KnownRow]
    inputs: tuple[_KnownRow, ...]
    calls: tuple[KnownCall, ...]
    batch: int | None
    is_single: bool
    narrow: Mapping[str, tuple[Dim, ...]]
    lost: tuple[LostGroup, ...]

    def restored(self) -> tuple[FactorSpace, list[Factor]]:
        """Return new factors, by number, in a space of their own."""
        factors = [Factor(known.size, known.name) for known in self.factors]
        for factor, known in zip(factors, self.factors, strict=True):
            factor.parent = None if known.parent is None else factors[known.parent]
            factor.refined_to = None if known.refined_to is None else decoded(known.refined_to, factors)
            factor.pinned, factor.mixed, factor.is_batch = known.pinned, known.mixed, known.is_batch
        return FactorSpace(Link(factors[a], factors[b], context) for a, b, context in self.links), factors


def decoded(axis: KnownAxis, factors: Sequence[Factor]) -> Axis:
    """Return an axis with factors in the place of their numbers."""

    def element(known: int | Ref | KnownAxis) -> int | Factor | Axis:
        if isinstance(known, Ref):
            return factors[known.number]
        return decoded(known, factors) if isinstance(known, tuple) else known

    return tuple(tuple(map(element, term)) for term in axis)


def known_axes(analysis: Analysis, maps: IndexMaps, narrow: Mapping[str, tuple[Dim, ...]]) -> KnownAxes:
    """Write down the axes of a graph, at the sizes that it has after a resize.

    Args:
        analysis: of the graph before.
        maps: the index maps of the resize.
        narrow: the groups that are of width one then, and where they occur.
    """
    notation = _Notation(analysis.space, maps)
    parameters = {name: tuple(map(notation.axis, entry.axes)) for name, entry in analysis.parameters.items()}
    inputs = tuple(notation.axes(analysis.axes_of(tensor)) for tensor in deep_tensors(analysis.inputs))
    calls = tuple(notation.call(call) for call in _in_order(analysis) if not is_copy(call.func))
    batch = None if analysis.batch is None else notation.number(analysis.batch)
    links = tuple((notation.number(a), notation.number(b), context) for a, b, context in analysis.space.links)
    factors = tuple(notation.factors())
    single, lost = analysis.is_single, analysis.lost
    return KnownAxes(factors, links, parameters, inputs, calls, batch, single, dict(narrow), lost)


def _in_order(analysis: Analysis) -> Iterator[OpCall]:
    for node in analysis.node_calls:
        yield from analysis.calls_of(node)
        yield from analysis.training_calls.get(node, ())


class _Notation:
    """Numbers for the factors of one space."""

    def __init__(self, space: FactorSpace, maps: IndexMaps) -> None:
        self._space = space
        self._maps = maps
        self._numbers: dict[Factor, int] = {}
        self._axes: dict[Axis, KnownAxis] = {}

    def number(self, factor: Factor) -> int:
        return self._numbers.setdefault(factor, len(self._numbers))

    def axis(self, axis: Axis) -> KnownAxis:
        known = self._axes.get(axis)
        if known is None:
            known = self._axes[axis] = tuple(tuple(map(self._element, term)) for term in axis)
        return known

    def axes(self, axes: Iterable[Axis]) -> _KnownRow:
        return tuple(self.axis(self._space.normalise(axis)) for axis in axes)

    def call(self, call: OpCall) -> KnownCall:
        inputs = call.inputs
        contractions = tuple(
            (_place(inputs, c.left), c.left_dims, _place(inputs, c.right), c.right_dims) for c in call.contractions
        )
        reductions = tuple(
            (_place(inputs, reduction.tensor), reduction.dim, reduction.kind) for reduction in call.reductions
        )
        operands = tuple(self.axes(call.axes[tensor]) for tensor in inputs)
        literals = next((structure(one) for one in prescribed_signatures([call], self._maps)), ())
        return KnownCall(
            kind_of(call), literals, operands, tuple(map(self.axes, call.output_axes)), contractions, reductions
        )

    def factors(self) -> Iterator[KnownFactor]:
        """Yield the factors by number; those that one is made of get numbers on the way."""
        done = 0
        while done < len(self._numbers):
            for factor in list(self._numbers)[done:]:
                parent = None if factor.parent is None else self.number(find(factor))
                refined_to = None if factor.refined_to is None else self.axis(factor.refined_to)
                size = self._maps.size(((factor,),))
                yield KnownFactor(size, factor.name, parent, refined_to, factor.pinned, factor.mixed, factor.is_batch)
                done += 1

    def _element(self, element: int | Factor | Axis) -> int | Ref | KnownAxis:
        if isinstance(element, Factor):
            return Ref(self.number(element))
        return self.axis(element) if isinstance(element, tuple) else element


def _place(tensors: Sequence[Tensor], tensor: Tensor) -> int:
    return next(place for place, other in enumerate(tensors) if other is tensor)
