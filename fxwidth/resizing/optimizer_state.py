"""Carrying an optimizer over a resize: its parameters are replaced in place, its state follows them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from fxwidth.axes.index_maps import NEW, Indices
from fxwidth.errors import FxwidthError
from fxwidth.rewriting.optimizers import Optimizers, optimizers_in, refuse_kept_parameters
from fxwidth.rewriting.successors import gather

# The second moment of a new slot, as a share of the mean of its neighbours. Gradients of new channels are far smaller
# at first than those of trained ones, for what reads them is zero: where all of the mean divides them they hardly move.
# Zero would let them make steps of several times the rate, which diverge at high rates.
_SHARE = 0.1
# State that scales a step, and by which power of that share a new slot begins with less than its neighbours.
_SCALES = {
    # Second moments.
    "exp_avg_sq": 1.0,
    "max_exp_avg_sq": 1.0,
    "square_avg": 1.0,
    "sum": 1.0,
    "variance": 1.0,
    # Sizes, and factors whose product is taken.
    "exp_inf": 0.5,
    "row_var": 0.5,
    "col_var": 0.5,
    # Lengths of steps.
    "acc_delta": 0.0,
    "step_size": 0.0,
    "mu_product": 0.0,
}
# Factored state, and the dim that it sums over: at width one its shape does not tell.
_SUMMED_OVER = {"row_var": -1, "col_var": -2}
# State that is an average of the parameter itself.
_COPIES = frozenset({"ax"})


@dataclass(frozen=True)
class Replacement:
    """A parameter that takes the place of another.

    Attributes:
        name: that of both in the graph.
        old: the parameter that goes.
        new: the one that comes.
        indices: for each dim the old position of each new one, -1 for none, or None for a dim that stays.

    Example:
        >>> import numpy as np
        >>> new = torch.nn.Parameter(torch.zeros(2, 4))
        >>> change = fxwidth.Replacement("weight", torch.nn.Parameter(torch.zeros(3, 4)), new, [np.array([0, 2]), None])
        >>> change.follow(torch.tensor([1.0, 2.0, 3.0]), [0])
        tensor([1., 3.])
    """

    name: str
    old: Tensor
    new: Tensor
    indices: Sequence[Indices | None]

    def __repr__(self) -> str:
        return f"<Replacement of {self.name!r}: {tuple(self.old.shape)} -> {tuple(self.new.shape)}>"

    def follow(self, tensor: Tensor, dims: Sequence[int] | None = None) -> Tensor:
        """Return a tensor with its entries in their new places, zero where there was none.

        Args:
            tensor: a tensor some of whose dims are dims of the parameter.
            dims: for each dim of the tensor that of the parameter that it is; by default the same ones.
        """
        chosen = range(len(self.indices)) if dims is None else dims
        return gather(tensor, [self.indices[dim] for dim in chosen])


StateRule = Callable[[Mapping[str, Any], Replacement], dict[str, Any]]
_Rule = TypeVar("_Rule", bound=StateRule)
_RULES: dict[type[Optimizer], StateRule] = {}


def optimizer_state_rule(kind: type[Optimizer]) -> Callable[[_Rule], _Rule]:
    """Return a decorator for the function that resizes the state of a class of optimizers.

    The function takes the state of one parameter and the `Replacement` of that parameter, and returns the state of the
    new one. It leaves what it is given as it is: a resize may still fail.

    Args:
        kind: the class; its subclasses follow the same rule unless they have one of their own.

    Raises:
        FxwidthError: it is no class of optimizers.

    Example:
        >>> class Signed(torch.optim.SGD):
        ...     pass
        >>> @fxwidth.optimizer_state_rule(Signed)
        ... def follow_rows(state, replacement):
        ...     return {"rows": replacement.follow(state["rows"], [0])}
    """
    if not (isinstance(kind, type) and issubclass(kind, Optimizer)):
        raise FxwidthError(f"optimizer_state_rule takes a class of torch.optim.Optimizer, but received {kind!r}.")

    def register(rule: _Rule) -> _Rule:
        _RULES[kind] = rule
        return rule

    return register


@dataclass(frozen=True)
class OptimizerUpdate:
    """New states of an optimizer and of those inside of it, computed and not yet in use."""

    replacements: tuple[Replacement, ...]
    states: tuple[tuple[Optimizer, Mapping[Tensor, dict[str, Any]]], ...]

    def commit(self) -> None:
        """Replace parameters in their groups, in place and in order, and their state with them."""
        successors = {replacement.old: replacement.new for replacement in self.replacements}
        for optimizer, states in self.states:
            for group in optimizer.param_groups:
                group["params"][:] = [successors.get(parameter, parameter) for parameter in group["params"]]
            renewed = {successors.get(key, key): states.get(key, own) for key, own in optimizer.state.items()}
            optimizer.state.clear()
            optimizer.state.update(renewed)


def plan_optimizer_update(
    optimizer: Optimizers, replacements: Sequence[Replacement], names: Mapping[Tensor, str]
) -> OptimizerUpdate:
    """Compute the state of an optimizer for resized parameters; nothing is changed before `commit`.

    Surviving entries keep their state; new entries have no momentum, and a share of the mean of their neighbours where
    the state scales the step: a tenth of second moments, so that they learn faster than trained ones. Step counts
    stay.

    Args:
        optimizer: the optimizer, or several.
        replacements: the parameters that are replaced.
        names: those of all parameters of the graph.

    Raises:
        FxwidthError: the optimizer keeps state of which it is not known how it follows a resize.
    """
    going = {replacement.old: replacement.name for replacement in replacements}
    return OptimizerUpdate(
        tuple(replacements), tuple((one, _states(one, replacements, names, going)) for one in optimizers_in(optimizer))
    )


def _states(
    optimizer: Optimizer, replacements: Sequence[Replacement], names: Mapping[Tensor, str], going: Mapping[Tensor, str]
) -> dict[Tensor, dict[str, Any]]:
    refuse_kept_parameters(optimizer, going)
    rule = next((_RULES[kind] for kind in type(optimizer).__mro__ if kind in _RULES), None)
    known = {key: (key, own) for key, own in optimizer.state.items()}
    pairs = [(known[one.old], one) for one in replacements if one.old in known]
    if rule is not None:
        return {key: rule(own, replacement) for (key, own), replacement in pairs}
    # Of all parameters: a square one may have state of its shape that belongs to something else.
    for key, own in known.values():
        if key in names:
            _Entries(type(optimizer).__name__, names[key], key.shape, None).changed(own)
    kind = type(optimizer).__name__
    return {key: _Entries(kind, one.name, key.shape, one).changed(own) for (key, own), one in pairs}


@dataclass(frozen=True)
class _Entries:
    """The state of one parameter, entry by entry; without a replacement it is only looked at."""

    optimizer: str
    parameter: str
    shape: torch.Size
    replacement: Replacement | None

    def changed(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return the state after the resize.

        Raises:
            FxwidthError: an entry is of no known form.
        """
        return {key: self._changed(str(key), str(key), value) for key, value in state.items()}

    def _changed(self, key: str, place: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._resized(key, place, value)
        if isinstance(value, dict):
            return {own: self._changed(str(own), f"{place}[{own!r}]", part) for own, part in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self._changed(key, f"{place}[{i}]", part) for i, part in enumerate(value))
        inside = [part for part in getattr(value, "__dict__", {}).values() if isinstance(part, Tensor)]
        if any(part.numel() > 1 for part in inside):
            self._refuse(place, f"a {type(value).__name__} with tensors in it")
        return value

    def _resized(self, key: str, place: str, value: Tensor) -> Tensor:
        # Factored state (one row and one column per matrix) has size one along the dims it sums over.
        fits = value.dim() == len(self.shape) and all(
            own in (1, full) for own, full in zip(value.shape, self.shape, strict=True)
        )
        if not fits and value.numel() > 1:
            self._refuse(place, f"of shape {tuple(value.shape)}")
        if not fits or value.dim() == 0 or self.replacement is None:
            return value
        sizes = zip(value.shape, self.shape, self.replacement.indices, strict=True)
        indices = [kept if own == full else None for own, full, kept in sizes]
        if key in _SUMMED_OVER:
            indices[_SUMMED_OVER[key]] = None
        try:
            gathered = gather(value, indices)
        except Exception as error:
            self._refuse(place, f"a {type(value).__name__} that cannot be indexed", error)
        if key in _SCALES:
            return _fill_with_means(gathered, indices, _SHARE ** _SCALES[key])
        return _fill_from(self.replacement.new.detach(), gathered, indices) if key in _COPIES else gathered

    def _refuse(self, place: str, what: str, error: Exception | None = None) -> NoReturn:
        raise FxwidthError(
            f"{self.optimizer} keeps state {place!r} for parameter {self.parameter!r} {tuple(self.shape)}, {what}, of "
            "which it is not known how it follows a resize. Register a rule with fxwidth.optimizer_state_rule, or "
            "call resize without optimizer= and make a new optimizer for gm.parameters()."
        ) from error


def _fill_with_means(gathered: Tensor, indices: Sequence[Indices | None], share: float) -> Tensor:
    """Give new slots a share of the mean of the old ones, dim after dim, so that corners are filled too."""
    is_new = torch.zeros(gathered.shape, dtype=torch.bool, device=gathered.device)
    for dim, kept in enumerate(indices):
        if kept is None or not (kept == NEW).any() or not (kept != NEW).any():
            continue
        old = torch.from_numpy(np.flatnonzero(kept != NEW)).to(gathered.device)
        new = torch.from_numpy(np.flatnonzero(kept == NEW)).to(gathered.device)
        mean = gathered.index_select(dim, old).mean(dim, keepdim=True)
        sizes = [len(new) if d == dim else n for d, n in enumerate(gathered.shape)]
        gathered = gathered.index_copy(dim, new, mean.expand(sizes))
        is_new.index_fill_(dim, new, True)
    return torch.where(is_new, gathered * share, gathered)


def _fill_from(source: Tensor, gathered: Tensor, indices: Sequence[Indices | None]) -> Tensor:
    """Copy new slots from the new parameter."""
    for dim, kept in enumerate(indices):
        if kept is not None and (kept == NEW).any():
            new = torch.from_numpy(np.flatnonzero(kept == NEW)).to(gathered.device)
            gathered = gathered.index_copy(dim, new, source.index_select(dim, new).to(gathered.dtype))
    return gathered
