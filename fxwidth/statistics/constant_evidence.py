"""Inputs that noise could not vary, and readers that depend on nothing else: nothing is known of what they read."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fxwidth.analysis.result import Analysis
from fxwidth.recording.tape import storage_of
from fxwidth.runtime.pytrees import deep_tensors
from fxwidth.statistics.calibration_data import input_names
from fxwidth.statistics.moment import Moment
from fxwidth.statistics.observation_points import Key

# A channel varies if its deviation is more than so many rounding units of the channel of largest variance.
_ROUNDING = 100.0


def constant_inputs(batches: Sequence[Sequence[Any]]) -> set[int]:
    """Return the places, among all tensors of the inputs, of those that are the same for every sample of some batches.

    Only integers and truth values are meant: of floating-point numbers there is noise.

    Args:
        batches: one value per placeholder each.
    """
    found = [deep_tensors(tuple(batch)) for batch in batches]
    return {
        place
        for place, tensors in enumerate(zip(*found, strict=True))
        if not (tensors[0].is_floating_point() or tensors[0].is_complex()) and _is_constant(tensors)
    }


def _is_constant(tensors: Sequence[Tensor]) -> bool:
    first = tensors[0][:1] if tensors[0].dim() else tensors[0]
    return all(bool((tensor == first).all()) for tensor in tensors)


def without_constants(
    analysis: Analysis, contracted: Mapping[Key, Moment], constant: Collection[int]
) -> tuple[dict[Key, Moment], dict[str, str]]:
    """Return moments with white ones for readers of what depends on constant inputs alone, and the nodes of these.

    By a constant every channel can be told from any other; it may be told so for other values too, or not. White
    moments let channels that nobody reads go first, and others by what is made of them.

    Args:
        analysis: the graph.
        contracted: what was seen.
        constant: the places, among all tensors of the inputs, of those that were the same for every sample.

    Returns:
        The moments, and for each fx node of which nothing is known why.
    """
    if not constant:
        return dict(contracted), {}
    held, varied = _reach(analysis, constant)
    names = _placeholders(analysis, constant)
    result, missed = dict(contracted), {}
    for key, moment in contracted.items():
        call = analysis.calls[key[0]]
        source = storage_of(call.arguments[key[1]])
        if source in held and source not in varied and not _varies(moment):
            result[key] = _white(moment)
            missed[call.node] = (
                f"it depends on {names} alone, of which it is not known what values there are; pass data, or analyse "
                "the graph with example_inputs that differ"
            )
    return result, missed


def _varies(moment: Moment) -> bool:
    least = (_ROUNDING * moment.precision) ** 2 * moment.squares().amax()
    return bool(moment.covariance.diagonal().amax() > least)


def _white(moment: Moment) -> Moment:
    energy = moment.squares().mean()
    covariance = torch.eye(len(moment.mean), dtype=energy.dtype, device=energy.device).mul_(energy)
    return replace(moment, mean=torch.zeros_like(moment.mean), covariance=covariance)


def _reach(analysis: Analysis, constant: Collection[int]) -> tuple[set[int], set[int]]:
    """Return the memory of all that depends on constant inputs, and of all that depends on others."""
    held: set[int] = set()
    varied: set[int] = set()
    for place, tensor in enumerate(deep_tensors(tuple(analysis.inputs))):
        (held if place in constant else varied).add(storage_of(tensor))
    for call in analysis.calls:
        sources = {storage_of(tensor) for tensor in call.inputs}
        results = {storage_of(tensor) for tensor in call.outputs}
        if sources & held:
            held |= results
        if sources & varied or torch.Tag.nondeterministic_seeded in call.func.tags:
            varied |= results
    return held, varied


def _placeholders(analysis: Analysis, constant: Collection[int]) -> str:
    """Return the names of the inputs that hold some tensors."""
    names, place = [], 0
    for name, value in zip(input_names(analysis), analysis.inputs, strict=True):
        count = len(deep_tensors(value))
        if any(place <= one < place + count for one in constant):
            names.append(repr(name))
        place += count
    return f"input{'s' if len(names) > 1 else ''} {', '.join(names)}"
