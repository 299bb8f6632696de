"""Sizes of what a node takes that may be others, as lengths of sequences, and how the numbers in its ops follow them.

A layer computes its numbers from the shapes that it is given; taken apart into ops it would keep those of the example.
So it is run on tensors of other sizes, and where each number turns out a multiple of some of them, or one of them and a
constant, the ops can be given what the tensors of the moment say.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxwidth.analysis.result import Analysis
from fxwidth.recording.tape import OpCall, TapeRecorder, plain_kernels
from fxwidth.rewriting.batch_checks import with_shape
from fxwidth.rules.registry import keeps
from fxwidth.runtime.module_state import unchanged


@dataclass(frozen=True)
class FreeSize:
    """A size that may be another.

    Attributes:
        source: the node whose tensor has it.
        dim: of this tensor.
        size: on the tape.
        alike: other tensors and their dims that must have the same size, such as keys and values.
    """

    source: fx.Node
    dim: int
    size: int
    alike: tuple[tuple[fx.Node, int], ...] = ()


@dataclass(frozen=True)
class Following:
    """How a number follows free sizes.

    Attributes:
        sizes: those of which it is a multiple, or the one from which it differs by a constant.
        is_multiple: which of the two.
    """

    sizes: tuple[FreeSize, ...]
    is_multiple: bool


# By the index of a call on the tape: of each leaf of its arguments, in order, how it follows; None where it stays.
Followings = Mapping[int, Sequence[Following | None]]

# What a size becomes when it alone is another, and by how much the first of all that change together grows.
_ONE, _TOGETHER = 1, 2


def followings(analysis: Analysis, node: fx.Node, values: Mapping[fx.Node, Any]) -> Followings:
    """Return how the numbers in the ops of a node follow sizes of what it takes; nothing where some number is in doubt.

    The module must hold its old parameters, as fake tensors.

    Args:
        analysis: the tape.
        node: the node.
        values: what each node was on the tape.
    """
    calls = analysis.calls_of(node.name)
    sources = node.all_input_nodes
    if analysis.record is not None or not all(isinstance(values[source], Tensor) for source in sources):
        return {}
    if not _tells_all(analysis, calls, [values[source] for source in sources]):
        return {}
    runs = _Runs(analysis, node, values, calls)
    free = list(_free(runs, [size for source in sources for size in _candidates(analysis, source, values[source])]))
    if not free:
        return {}
    before = runs.numbers
    try:
        found = [_following(number, [(size, one[place]) for size, one in free]) for place, number in enumerate(before)]
    except _InDoubtError:
        return {}
    # Whether the sizes add up where several of them are others is seen by a run of which this is known.
    together = {size: size.size + _TOGETHER + place for place, (size, _) in enumerate(free)}
    expected = [
        number if one is None else _at(number, one, together) for number, one in zip(before, found, strict=True)
    ]
    if runs.at(together) != expected:
        return {}
    at, by_call = iter(found), {}
    for call in calls:
        by_call[call.index] = [next(at) if _is_number(leaf) else None for leaf in _leaves(call)]
    return by_call


class _InDoubtError(Exception):
    """A number follows sizes in a way that is not known."""


class _Runs:
    """Runs one node at other sizes of what it takes."""

    def __init__(
        self, analysis: Analysis, node: fx.Node, values: Mapping[fx.Node, Any], calls: Sequence[OpCall]
    ) -> None:
        self._analysis = analysis
        self._node = node
        self._values = values
        self._calls = calls
        self._interpreter = fx.Interpreter(analysis.module, graph=node.graph)
        self.numbers = [leaf for call in calls for leaf in _leaves(call) if _is_number(leaf)]

    def at(self, sizes: Mapping[FreeSize, int]) -> list[int] | None:
        """Return the numbers in the node's ops at other sizes, or None where it runs other ops, or none."""
        given = {source: self._resized(source, sizes) for source in self._node.all_input_nodes}
        args = fx.node.map_arg(self._node.args, given.__getitem__)
        kwargs = fx.node.map_arg(self._node.kwargs, given.__getitem__)
        module = self._analysis.module
        called = module.get_submodule(str(self._node.target)) if self._node.op == "call_module" else torch.nn.Module()
        recorder = TapeRecorder(keeps)
        try:
            with unchanged(called), plain_kernels(), self._analysis.mode, recorder:
                getattr(self._interpreter, self._node.op)(self._node.target, args, kwargs)
        except Exception:
            return None
        numbers: list[int] = []
        if [call.func for call in recorder.calls] != [call.func for call in self._calls]:
            return None
        for call, before in zip(recorder.calls, self._calls, strict=True):
            own, other = _leaves(call), _leaves(before)
            if [_kept(leaf) for leaf in own] != [_kept(leaf) for leaf in other]:
                return None
            numbers += [leaf for leaf in own if _is_number(leaf)]
        return numbers

    def _resized(self, source: fx.Node, sizes: Mapping[FreeSize, int]) -> Tensor:
        tensor: Tensor = self._values[source]
        shape = list(tensor.shape)
        for size, new in sizes.items():
            for other, dim in ((size.source, size.dim), *size.alike):
                if other is source:
                    shape[dim] = new
        return with_shape(tensor, shape)


def _free(runs: _Runs, candidates: Sequence[FreeSize]) -> Iterator[tuple[FreeSize, list[int]]]:
    """Yield the sizes that may be others, with the numbers of the ops where they are larger by one.

    Some may be others by themselves; of those that may not, all that are alike are changed together.
    """
    bound: dict[int, list[FreeSize]] = {}
    for size in candidates:
        numbers = runs.at({size: size.size + _ONE})
        if numbers is None:
            bound.setdefault(size.size, []).append(size)
        else:
            yield size, numbers
    for first, *others in bound.values():
        together = replace(first, alike=tuple((other.source, other.dim) for other in others))
        numbers = runs.at({together: first.size + _ONE}) if others else None
        if numbers is not None:
            yield together, numbers


def _candidates(analysis: Analysis, source: fx.Node, tensor: Tensor) -> Iterator[FreeSize]:
    for dim, (size, axis) in enumerate(zip(tensor.shape, analysis.axes_of(tensor), strict=True)):
        if size > 1 and not analysis.space.factors(axis):
            yield FreeSize(source, dim, int(size))


def _following(number: int, runs: Sequence[tuple[FreeSize, int]]) -> Following | None:
    """Return how a number follows sizes of which each is larger by one in a run of its own.

    Raises:
        _InDoubtError: in another way than by one that can be written down.
    """
    changed = [(size, other) for size, other in runs if other != number]
    if not changed:
        return None
    sizes = tuple(size for size, _ in changed)
    is_multiple = number % prod(size.size for size in sizes) == 0
    if is_multiple and all(other * size.size == number * (size.size + _ONE) for size, other in changed):
        return Following(sizes, True)
    if len(changed) == 1 and changed[0][1] == number + _ONE:
        return Following(sizes, False)
    raise _InDoubtError


def _at(number: int, following: Following, sizes: Mapping[FreeSize, int]) -> int:
    if following.is_multiple:
        return number * prod(sizes[one] for one in following.sizes) // prod(one.size for one in following.sizes)
    return number + sum(sizes[one] - one.size for one in following.sizes)


def _tells_all(analysis: Analysis, calls: Sequence[OpCall], given: Sequence[Tensor]) -> bool:
    """Tell whether it is known where all tensors come from that ops take: others may have been made for these sizes."""
    known = {*given, *(tensor for call in calls for tensor in call.outputs)}
    return all(tensor in known or tensor in analysis.names for call in calls for tensor in call.inputs)


def leaves_of(value: Any) -> list[Any]:
    """Return the leaves of an argument, in order; None is one."""
    return pytree.tree_leaves(value, is_leaf=lambda one: one is None)


def _leaves(call: OpCall) -> list[Any]:
    return [leaf for value in call.arguments.values() for leaf in leaves_of(value)]


def _is_number(leaf: Any) -> bool:
    return isinstance(leaf, int) and not isinstance(leaf, bool)


def _kept(leaf: Any) -> Any:
    """Return what of an argument must be the same at other sizes."""
    return type(leaf) if _is_number(leaf) or isinstance(leaf, Tensor) else leaf
