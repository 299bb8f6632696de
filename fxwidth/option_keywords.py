"""The keywords of `plan`, `resize` and `evolve`, for type checkers: the fields of `PlanOptions` and `ResizeOptions`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypedDict

from torch import Tensor, nn

from fxwidth.costs.budget import Budget
from fxwidth.growth.directions import Direction
from fxwidth.selection.registry import Selection

Loss = Callable[..., Tensor]
# One pattern, or several, each a pattern or a list of them, whose groups get one width.
SameWidth = str | Sequence[str | Sequence[str]]
# Names or patterns, or modules in their place.
Chosen = str | nn.Module | Sequence[str | nn.Module]


class _CommonKeywords(TypedDict, total=False):
    data: Iterable[Any] | None
    selection: Selection
    exact: bool
    rotate: bool
    loss: Loss | None


class PlanKeywordsBesideBudget(_CommonKeywords, total=False):
    """The keywords of `fxwidth.plan` but for budgets, for type checkers."""

    shrink_energy: float
    grow_energy: float
    grow_step: int
    ratio: float | None
    min_width: int | float
    max_width: int | None
    align: int
    same_width: SameWidth | None
    only: Chosen | None
    keep: Chosen | None
    within: Chosen | None
    for_module: nn.Module | None


class PlanKeywords(PlanKeywordsBesideBudget, total=False):
    """The keywords of `fxwidth.plan`, for type checkers: the fields of `PlanOptions`."""

    budget: Budget | None
    params: int | float | None
    flops: int | float | None
    activation_memory: int | float | None
    latency: int | float | None


class ResizeKeywords(_CommonKeywords, total=False):
    """The keywords of `fxwidth.resize` beside `optimizer`, for type checkers: the fields of `ResizeOptions`."""

    recalibrate: bool | None
    fold: bool
    directions: Direction
    reader_step: bool
    also: Sequence[nn.Module]


class EvolveKeywords(PlanKeywords, ResizeKeywords, total=False):
    """The keywords of both."""
