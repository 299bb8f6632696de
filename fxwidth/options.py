"""The options of `plan` and `resize`: each is typed here alone, and all are carried whole from here on.

What each of them does is told by `fxwidth.plan` and `fxwidth.resize`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, fields, replace
from inspect import Parameter, signature
from typing import Any, TypeVar

from torch import fx, nn

from fxwidth.costs.budget import SHORTHANDS, Budget
from fxwidth.costs.registry import COSTS
from fxwidth.errors import FxwidthError
from fxwidth.growth.directions import Direction, check_directions, needs_of
from fxwidth.option_keywords import Chosen, Loss, SameWidth
from fxwidth.option_values import (
    check_budget,
    check_limits,
    check_module,
    check_ratio,
    check_switches,
    check_thresholds,
    graphs_in,
    patterns,
    width_classes,
)
from fxwidth.plain_numbers import plain_number
from fxwidth.registration import name_of
from fxwidth.rewriting.optimizers import Optimizers, refuse_other_than_optimizers
from fxwidth.selection.registry import Selection, check_selection
from fxwidth.statistics.calibration_data import refuse_other_than_batches, replayed

# What a plan looks at without a budget alone, and under one alone.
_THRESHOLDS = ("shrink_energy", "grow_energy", "grow_step")
_UNDER_BUDGET = ("data", "selection", "rotate")
_NUMBERS = (*SHORTHANDS, "ratio", "shrink_energy", "grow_energy", "grow_step", "min_width", "max_width", "align")
_SHARES = "for a part of the present parameters, give params=0.5, and for one of all groups' channels, ratio=0.5. "
# What other libraries call a target.
_RATIOS = frozenset({"sparsity", "pruning_ratio", "amount", "size"})


@dataclass(frozen=True, eq=False, kw_only=True)
class PlanOptions:
    """The options of `fxwidth.plan`, which tells what they do; all that can be known without a graph is checked.

    Raises:
        FxwidthError: an option is out of range, or options contradict each other.
    """

    budget: Budget | None = None
    params: int | float | None = None
    flops: int | float | None = None
    activation_memory: int | float | None = None
    latency: int | float | None = None
    data: Iterable[Any] | None = None
    loss: Loss | None = None
    selection: Selection = "greedy"
    shrink_energy: float = 0.05
    grow_energy: float = 0.5
    grow_step: int = 0
    ratio: float | None = None
    min_width: int | float = 1
    max_width: int | None = None
    align: int = 1
    same_width: SameWidth | None = None
    only: Chosen | None = None
    keep: Chosen | None = None
    within: Chosen | None = None
    for_module: nn.Module | None = None
    exact: bool = True
    rotate: bool = True

    def __post_init__(self) -> None:
        check_selection(self.selection)
        check_module(self.for_module, "for_module")
        refuse_other_than_batches(self.data)
        for name in _NUMBERS:
            object.__setattr__(self, name, plain_number(getattr(self, name)))
        check_limits(self.min_width, self.max_width, self.align)
        check_thresholds(self.shrink_energy, self.grow_energy, self.grow_step)
        check_switches({"exact": self.exact, "rotate": self.rotate})
        # Patterns are gone through more than once.
        for name in ("only", "keep", "within"):
            object.__setattr__(self, name, patterns(getattr(self, name), name))
        object.__setattr__(self, "same_width", width_classes(self.same_width))
        check_budget(self.budget, self._shorthands)
        check_ratio(self.ratio, self.target)
        if self.target is not None:
            self._refuse_given(_THRESHOLDS, "decides without a budget; under one, widths go by what readers miss")
        elif self.ratio is not None:
            self._refuse_given(_THRESHOLDS, "decides where widths go by spectra; ratio= sets them")
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
        return Budget(**self._shorthands) if self._shorthands else self.budget

    def to(self, budget: Budget | None, **changes: Any) -> PlanOptions:
        """Return the same options with another budget, or without one, and other changes."""
        shorthands: dict[str, Any] = dict.fromkeys(SHORTHANDS)
        return replace(self, **shorthands, budget=budget, **changes)

    @property
    def _shorthands(self) -> dict[str, Any]:
        """The bounds that are given in the place of a budget."""
        return {name: getattr(self, name) for name in SHORTHANDS if getattr(self, name) is not None}

    def refuse_unused(self) -> None:
        """Check that a plan by itself, with which no resize goes along, uses all that is given.

        Raises:
            FxwidthError: something makes a difference under a budget alone, and there is none.
        """
        if self.target is None:
            by = "a ratio sets widths by itself" if self.ratio else "widths go by the spectrum of the weights"
            told = f"makes a difference under a budget alone; without one, {by}"
            self._refuse_given(_UNDER_BUDGET, told)

    def _refuse_given(self, names: Sequence[str], why: str) -> None:
        defaults = {field.name: field.default for field in fields(self)}
        for name in names:
            value = getattr(self, name)
            is_default = value is defaults[name] or (isinstance(value, (str, int, float)) and value == defaults[name])
            if not is_default:
                others = (
                    "params= and budget=" if self.target else "ratio=" if self.ratio and name in _THRESHOLDS else None
                )
                remedy = f"Leave it out, or {others}." if others else "Leave it out, or give params= or budget=."
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
    loss: Loss | None = None
    reader_step: bool = False
    also: Sequence[nn.Module] = ()

    def __post_init__(self) -> None:
        refuse_other_than_optimizers(self.optimizer)
        check_selection(self.selection)
        check_directions(self.directions)
        refuse_other_than_batches(self.data)
        check_switches({name: getattr(self, name) for name in ("rotate", "fold", "exact", "reader_step")})
        object.__setattr__(self, "also", graphs_in(self.also, "also"))
        if self.recalibrate is not None:
            check_switches({"recalibrate": self.recalibrate})
        if self.recalibrate and self.data is None:
            raise FxwidthError("recalibrate=True needs data= to run the network on.")
        _check_task(self)

    @property
    def looks_at_task(self) -> bool:
        """Whether growth goes by the data and the loss."""
        return bool(self.reader_step or needs_of(self.directions))

    @property
    def graphs_beside(self) -> tuple[fx.GraphModule, ...]:
        """The graphs in `also`."""
        return graphs_in(self.also, "also")

    @property
    def rotates(self) -> bool:
        """Whether groups change their basis: only folds use it, and optimizers and companions know the present one."""
        return bool(self.rotate and self.fold and self.optimizer is None and not self.also)


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


def _check_task(options: ResizeOptions) -> None:
    """Check that growth has the data and the loss that it goes by, and that no loss is given in vain."""
    if options.loss is not None and not callable(options.loss):
        raise FxwidthError(f"loss={options.loss!r} must be a function of the model's output and the targets.")
    if not options.looks_at_task:
        if options.loss is not None:
            raise FxwidthError(
                f"loss= would be ignored: directions={name_of(options.directions)!r} does not look at it. Choose "
                'directions that do, such as "tiny", or reader_step=True, or leave loss out.'
            )
        return
    asks = f"directions={name_of(options.directions)!r}" if needs_of(options.directions) else "reader_step=True"
    for name, what in (("data", "batches of inputs and targets"), ("loss", "a function of the output and the targets")):
        if getattr(options, name) is None:
            raise FxwidthError(f"{asks} looks at the task and needs {name}=, {what}, but received none.")


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


def both_options(
    given: Mapping[str, Any], optimizer: Optimizers | None, later: Iterable[Any] | None = None
) -> tuple[PlanOptions, ResizeOptions]:
    """Return the options of `plan` and of `resize` that some keywords give, those that both have to both.

    A loss is for that one, or for both, which looks at it.

    Args:
        given: the keywords.
        optimizer: that of the resize.
        later: batches that are still to come, which stand for data where there is a loss and no data are given.

    Raises:
        FxwidthError: one of them is no option of either, is out of range, or contradicts another.
    """
    _refuse_unknown(given, [PlanOptions, ResizeOptions])
    refuse_other_than_batches(given.get("data"))
    # What an iterator gives is for both.
    given = {**given, "data": replayed(given.get("data"))}
    grows_by_task = bool(given.get("reader_step") or needs_of(given.get("directions", "orthogonal")))
    if given["data"] is None and (grows_by_task or given.get("loss") is not None):
        given["data"] = later
    planning, resizing = (
        {name: value for name, value in given.items() if name in _names(kind)} for kind in (PlanOptions, ResizeOptions)
    )
    if given.get("loss") is not None:
        if grows_by_task and not has_target(given):
            del planning["loss"]
        elif not grows_by_task:
            del resizing["loss"]
    return PlanOptions(**planning), ResizeOptions(optimizer=optimizer, **resizing)


def has_target(given: Mapping[str, Any]) -> bool:
    """Tell whether some keywords give a budget, as such or by a short form."""
    return any(given.get(name) is not None for name in ("budget", *SHORTHANDS))


def tells_options(*kinds: type, but: Collection[str] = ()) -> Callable[[_Function], _Function]:
    """Have the signature of a function name, in the place of its `**options`, the options of some kinds one by one.

    Args:
        kinds: their classes.
        but: the names of those that the function does not take.
    """

    def telling(function: _Function) -> _Function:
        told = signature(function)
        own = [one for one in told.parameters.values() if one.kind is not Parameter.VAR_KEYWORD]
        found: dict[str, Field[Any]] = {field.name: field for kind in kinds for field in fields(kind)}
        more = [
            Parameter(name, Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
            for name, field in found.items()
            if name not in told.parameters and name not in but
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
            if PlanOptions in kinds and name in COSTS:
                kind, hint = PlanOptions, f"a bound on it is budget=fxwidth.Budget(costs={{{name!r}: ...}}). "
            elif PlanOptions in kinds and name in _RATIOS:
                kind, hint = PlanOptions, _SHARES
            raise FxwidthError(f"{name}= is no option of {_OWNERS[kind]}; {hint}They are {', '.join(_names(kind))}.")
