"""The options of `plan` and `resize`: each is typed and validated here alone, and all are carried whole from here on.

What each of them does is told by `fxwidth.plan` and `fxwidth.resize`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, fields
from functools import partial
from inspect import Parameter, signature
from typing import Any, TypedDict, TypeVar

import numpy as np
from torch import Tensor

from fxwidth.costs.budget import Budget
from fxwidth.errors import FxwidthError
from fxwidth.growth.directions import Direction, check_directions
from fxwidth.plain_numbers import is_integer, plain_number
from fxwidth.rewriting.optimizers import Optimizers, refuse_other_than_optimizers
from fxwidth.selection.registry import Selection, check_selection
from fxwidth.statistics.calibration_data import refuse_other_than_batches, replayed

Loss = Callable[..., Tensor]
# What a plan looks at without a budget alone, and under one alone.
_THRESHOLDS = ("shrink_energy", "grow_energy", "grow_step")
_UNDER_BUDGET = ("data", "selection", "rotate")
_NUMBERS = ("params", "shrink_energy", "grow_energy", "grow_step", "min_width", "max_width", "align")
# One pattern, or several, each a pattern or a list of them, whose groups get one width.
SameWidth = str | Sequence[str | Sequence[str]]


class _CommonKeywords(TypedDict, total=False):
    data: Iterable[Any] | None
    selection: Selection
    exact: bool
    rotate: bool


class PlanKeywords(_CommonKeywords, total=False):
    """The keywords of `fxwidth.plan`, for type checkers: the fields of `PlanOptions`."""

    budget: Budget | None
    params: int | float | None
    loss: Loss | None
    shrink_energy: float
    grow_energy: float
    grow_step: int
    min_width: int
    max_width: int | None
    align: int
    same_width: SameWidth | None
    only: str | Sequence[str] | None
    keep: str | Sequence[str] | None


class ResizeKeywords(_CommonKeywords, total=False):
    """The keywords of `fxwidth.resize` beside `optimizer`, for type checkers: the fields of `ResizeOptions`."""

    recalibrate: bool | None
    fold: bool
    directions: Direction


class EvolveKeywords(PlanKeywords, ResizeKeywords, total=False):
    """The keywords of both."""


@dataclass(frozen=True, eq=False, kw_only=True)
class PlanOptions:
    """The options of `fxwidth.plan`, which tells what they do; all that can be known without a graph is checked.

    Raises:
        FxwidthError: an option is out of range, or options contradict each other.
    """

    budget: Budget | None = None
    params: int | float | None = None
    data: Iterable[Any] | None = None
    loss: Loss | None = None
    selection: Selection = "greedy"
    shrink_energy: float = 0.05
    grow_energy: float = 0.5
    grow_step: int = 0
    min_width: int = 1
    max_width: int | None = None
    align: int = 1
    same_width: SameWidth | None = None
    only: str | Sequence[str] | None = None
    keep: str | Sequence[str] | None = None
    exact: bool = True
    rotate: bool = True

    def __post_init__(self) -> None:
        check_selection(self.selection)
        refuse_other_than_batches(self.data)
        for name in _NUMBERS:
            object.__setattr__(self, name, plain_number(getattr(self, name)))
        _check_limits(self.min_width, self.max_width, self.align)
        _check_thresholds(self.shrink_energy, self.grow_energy, self.grow_step)
        _check_switches({"exact": self.exact, "rotate": self.rotate})
        # Patterns are gone through more than once.
        for name in ("only", "keep"):
            object.__setattr__(self, name, _patterns(getattr(self, name), name))
        object.__setattr__(self, "same_width", _classes(self.same_width))
        _check_budget(self.budget, self.params)
        if self.target is not None:
            self._refuse_given(_THRESHOLDS, "decides without a budget; under one, widths go by what readers miss")
        elif not self.grow_step and self.grow_energy != type(self).grow_energy:
            raise FxwidthError(
                f"grow_energy={self.grow_energy} says where channels are added, but grow_step=0 adds none. "
                "Give grow_step= too, or leave it out."
            )
        if self.loss is not None and self.target is None:
            raise FxwidthError("loss= weighs groups against each other under a budget; give one, or leave loss out.")
        refuse_loss_without_data(self.loss, self.data)

    @property
    def target(self) -> Budget | None:
        """The budget that is given as such or by its short form, if one is."""
        return self.budget if self.params is None else Budget(params=self.params)

    def refuse_unused(self) -> None:
        """Check that a plan by itself, with which no resize goes along, uses all that is given.

        Raises:
            FxwidthError: something makes a difference under a budget alone, and there is none.
        """
        if self.target is None:
            told = "makes a difference under a budget alone; without one, widths go by the spectrum of the weights"
            self._refuse_given(_UNDER_BUDGET, told)

    def _refuse_given(self, names: Sequence[str], why: str) -> None:
        defaults = {field.name: field.default for field in fields(self)}
        for name in names:
            value = getattr(self, name)
            is_default = value is defaults[name] or (isinstance(value, (str, int, float)) and value == defaults[name])
            if not is_default:
                remedy = (
                    "Leave it out, or params= and budget=."
                    if self.target
                    else "Leave it out, or give params= or budget=."
                )
                raise FxwidthError(f"{name}= {why}. {remedy}")


@dataclass(frozen=True, eq=False, kw_only=True)
class ResizeOptions:
    """The options of `fxwidth.resize`, which tells what they do; all that can be known without a graph is checked.

    Raises:
        FxwidthError: an option is out of range, or options contradict each other.
    """

    optimizer: Optimizers | None = None
    data: Iterable[Any] | None = None
    selection: Selection = "greedy"
    recalibrate: bool | None = None
    rotate: bool = True
    fold: bool = True
    exact: bool = True
    directions: Direction = "orthogonal"

    def __post_init__(self) -> None:
        refuse_other_than_optimizers(self.optimizer)
        check_selection(self.selection)
        check_directions(self.directions)
        refuse_other_than_batches(self.data)
        _check_switches({"rotate": self.rotate, "fold": self.fold, "exact": self.exact})
        if self.recalibrate is not None:
            _check_switches({"recalibrate": self.recalibrate})
        if self.recalibrate and self.data is None:
            raise FxwidthError("recalibrate=True needs data= to run the network on.")

    @property
    def rotates(self) -> bool:
        """Whether groups change their basis: an optimizer's state knows that which there is, and only folds use it."""
        return bool(self.rotate and self.fold and self.optimizer is None)


_OWNERS: dict[type, str] = {PlanOptions: "fxwidth.plan", ResizeOptions: "fxwidth.resize"}
_Kind = TypeVar("_Kind", PlanOptions, ResizeOptions)
_Function = TypeVar("_Function", bound=Callable[..., Any])


def refuse_loss_without_data(loss: Loss | None, data: Iterable[Any] | None) -> None:
    """Check that there are data where there is a loss.

    Raises:
        FxwidthError: there are none.
    """
    if loss is not None and data is None:
        raise FxwidthError("loss= needs data= to be taken on: batches of the inputs and what the loss compares with.")


def options_from(kind: type[_Kind], given: Mapping[str, Any]) -> _Kind:
    """Return the options of one kind that some keywords give.

    Raises:
        FxwidthError: one of them is no such option, is out of range, or contradicts another.
    """
    _refuse_unknown(given, [kind])
    options = kind(**given)
    if isinstance(options, PlanOptions):
        options.refuse_unused()
    return options


def both_options(given: Mapping[str, Any], optimizer: Optimizers | None) -> tuple[PlanOptions, ResizeOptions]:
    """Return the options of `plan` and of `resize` that some keywords give, those that both have to both.

    Raises:
        FxwidthError: one of them is no option of either, is out of range, or contradicts another.
    """
    _refuse_unknown(given, [PlanOptions, ResizeOptions])
    refuse_other_than_batches(given.get("data"))
    # What an iterator gives is for both.
    given = {**given, "data": replayed(given.get("data"))}
    planning, resizing = (
        {name: value for name, value in given.items() if name in _names(kind)} for kind in (PlanOptions, ResizeOptions)
    )
    return PlanOptions(**planning), ResizeOptions(optimizer=optimizer, **resizing)


def tells_options(*kinds: type) -> Callable[[_Function], _Function]:
    """Have the signature of a function name, in the place of its `**options`, the options of some kinds one by one."""

    def telling(function: _Function) -> _Function:
        told = signature(function)
        own = [one for one in told.parameters.values() if one.kind is not Parameter.VAR_KEYWORD]
        found: dict[str, Field[Any]] = {field.name: field for kind in kinds for field in fields(kind)}
        more = [
            Parameter(name, Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
            for name, field in found.items()
            if name not in told.parameters
        ]
        function.__signature__ = told.replace(parameters=[*own, *more])  # type: ignore[attr-defined]
        return function

    return telling


def _names(kind: type) -> list[str]:
    return [field.name for field in fields(kind)]


def _refuse_unknown(given: Iterable[str], kinds: Sequence[type]) -> None:
    known = {name: kind for kind in reversed(kinds) for name in _names(kind)}
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            kind = known[near[0]] if near else kinds[0]
            hint = f"did you mean {near[0]}=? " if near else ""
            raise FxwidthError(f"{name}= is no option of {_OWNERS[kind]}; {hint}They are {', '.join(_names(kind))}.")


def _check_budget(budget: Any, params: Any) -> None:
    """Check that there is one budget at most, and that it is one."""
    if budget is not None and not isinstance(budget, Budget):
        raise FxwidthError(f"budget={budget!r} must be a fxwidth.Budget, such as Budget(params=0.5).")
    if params is not None and budget is not None:
        raise FxwidthError(f"params={params} is short for a budget; put it into budget={budget}.")
    if params is not None:
        Budget(params=params)


def _check_limits(least: Any, most: Any, align: Any) -> None:
    above = () if most is None else (("max_width", most),)
    for name, value in (("min_width", least), ("align", align), *above):
        if not is_integer(value) or value < 1:
            raise FxwidthError(f"{name}={value!r} must be an integer of at least 1.")
    if most is not None and most < -(-least // align) * align:
        raise FxwidthError(
            f"no width lies between min_width={least} and max_width={most} with align={align}; "
            "widen the range or lower align."
        )


def _check_thresholds(shrink: Any, grow: Any, step: Any) -> None:
    if not isinstance(shrink, (int, float)) or not 0 <= shrink < 1:
        raise FxwidthError(f"shrink_energy={shrink!r} must lie in [0, 1): a share of the spectrum.")
    if not isinstance(grow, (int, float)) or not 0 <= grow <= 1:
        raise FxwidthError(f"grow_energy={grow!r} must lie in [0, 1]: a share of the spectrum.")
    if not is_integer(step) or step < 0:
        raise FxwidthError(f"grow_step={step!r} must be an integer of at least 0: channels to add.")


def _check_switches(switches: Mapping[str, Any]) -> None:
    for name, value in switches.items():
        if not isinstance(value, (bool, int, np.bool_)) or value not in (0, 1):
            raise FxwidthError(f"{name}={value!r} must be True or False.")


def _patterns(given: Any, option: str) -> str | list[str] | None:
    """Return one pattern, or several as a list."""
    if given is None or isinstance(given, str):
        return given
    if not isinstance(given, Iterable):
        raise FxwidthError(f"{option}= takes names or patterns of groups, but received {given!r}.")
    patterns = list(given)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise FxwidthError(f"{option}= takes names or patterns of groups, but received {pattern!r}.")
    return patterns


def _classes(given: Any) -> str | list[Any] | None:
    """Return what groups get one width, as strings and lists of them."""
    if given is None or isinstance(given, str):
        return given
    if not isinstance(given, Iterable):
        raise FxwidthError(f"same_width= takes patterns of groups, but received {given!r}.")
    return list(map(partial(_patterns, option="same_width"), given))
