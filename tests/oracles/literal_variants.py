"""Sample calls with other literals: each number of a call changed a little, as long as the op takes it.

A rule that looks at some of an op's literals and forgets another is right for the samples that its author thought of.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tests.oracles.rules import run
from tests.oracles.sample_calls import Operand, Sample, Sizes


def variants(sample: Sample) -> Iterator[tuple[str, Sample]]:
    """Yield a sample's call with one literal changed, and which that is; only calls that run are yielded."""
    given = sample.arguments(Sizes())
    schema = sample.overload()._schema.arguments
    positional = [parameter for parameter in schema if not parameter.kwarg_only]
    filled = given + [parameter.default_value for parameter in positional[len(given) :]]
    for k, parameter in enumerate(positional):
        for value in _others(filled[k], parameter):
            arguments = [*filled[:k], value, *filled[k + 1 :]]
            changed = replace(sample, arguments=lambda s, own=arguments: own)
            if _runs(changed, arguments):
                yield f"{parameter.name}={value}", changed
    for parameter in schema:
        if parameter.kwarg_only:
            own = sample.keywords.get(parameter.name, parameter.default_value)
            for value in _others(own, parameter):
                changed = replace(sample, keywords={**sample.keywords, parameter.name: value})
                if _runs(changed, given):
                    yield f"{parameter.name}={value}", changed


# Numbers that stand for names, of which others mean nothing.
_NAMES = ("dtype", "layout", "memory_format", "interpolation_mode", "padding_mode")


def _others(value: Any, parameter: torch.Argument) -> Iterator[Any]:
    kind = str(parameter.type)
    if parameter.name in _NAMES:
        return
    if isinstance(value, Operand) or (isinstance(value, list) and any(isinstance(part, Operand) for part in value)):
        return
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from {value + 1, value - 1, -value, 0, 2} - {value}
    elif isinstance(value, float):
        yield value + 1.0
    elif value is None and kind in ("Optional[int]", "Optional[SymInt]"):
        yield from (0, 1, 2)
    elif value is None and kind == "Optional[bool]":
        yield True
    elif isinstance(value, (list, tuple)) and all(type(part) is int for part in value):
        yield from _other_lists(list(value))


def _other_lists(value: list[int]) -> Iterator[list[int]]:
    for k, part in enumerate(value):
        for other in {part + 1, part - 1, -1, 0} - {part}:
            yield [*value[:k], other, *value[k + 1 :]]
        for j in range(k):
            if value[j] != part:
                swapped = list(value)
                swapped[j], swapped[k] = part, value[j]
                yield swapped
    yield value[:-1]
    yield [*value, 1]


def _runs(sample: Sample, arguments: list[Any]) -> bool:
    torch.manual_seed(1)
    operands = [leaf.make() for leaf in pytree.tree_leaves((arguments, sample.keywords)) if isinstance(leaf, Operand)]
    try:
        return bool(results := run(sample, arguments, operands)) and all(map(_is_in_memory, results))
    except (RuntimeError, IndexError, ValueError, TypeError, NotImplementedError):
        return False


def _is_in_memory(result: Tensor) -> bool:
    """Tell whether all of a result is memory of its own: some kernels take strides that lead out of it."""
    if result.layout != torch.strided:
        return False
    last = result.storage_offset() + sum((n - 1) * step for n, step in zip(result.shape, result.stride(), strict=True))
    return result.numel() == 0 or last < result.untyped_storage().nbytes() // result.element_size()
