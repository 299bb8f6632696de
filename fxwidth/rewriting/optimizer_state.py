"""Carrying an optimizer over a resize: its parameters are replaced in place, its state follows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from fxwidth.errors import FxwidthError
from fxwidth.index_maps import NEW, Indices
from fxwidth.rewriting.parameters import gather

# State that divides a step: zero in a new slot would make its first steps far too large.
_SCALES = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "acc_delta", "exp_inf", "step_size"}) | {
    "row_var",
    "col_var",
    "variance",
    "mu_product",
}
# State that is an average of the parameter itself.
_COPIES = frozenset({"ax"})


@dataclass(frozen=True)
class Replacement:
    """A parameter that takes the place of another; `indices` holds one index map per dim, None for dims that stay."""

    old: Tensor
    new: Tensor
    indices: Sequence[Indices | None]


@dataclass(frozen=True)
class OptimizerUpdate:
    """A new state of an optimizer, computed and not yet in use."""

    optimizer: Optimizer
    states: tuple[tuple[Replacement, dict[str, Any] | None], ...]

    def commit(self) -> None:
        """Replace parameters in their groups, in place and in order, and their state with them."""
        successors = {id(replacement.old): replacement.new for replacement, _ in self.states}
        for group in self.optimizer.param_groups:
            group["params"][:] = [successors.get(id(parameter), parameter) for parameter in group["params"]]
        for replacement, state in self.states:
            self.optimizer.state.pop(replacement.old, None)
            if state is not None:
                self.optimizer.state[replacement.new] = state


def plan_optimizer_update(optimizer: Optimizer, replacements: Sequence[Replacement]) -> OptimizerUpdate:
    """Compute the state of an optimizer for resized parameters; nothing is changed before `commit`.

    Surviving entries keep their state; new entries have no momentum, and the mean of their neighbours where the state
    divides the step. Step counts stay.

    Raises:
        FxwidthError: the optimizer keeps state that does not belong to single parameters (LBFGS).
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        raise FxwidthError(
            "LBFGS keeps one history for all parameters together, which cannot be resized; "
            "call resize without optimizer= and make a new optimizer for gm.parameters()."
        )
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    states = []
    for replacement in replacements:
        if id(replacement.old) in known:
            old = optimizer.state.get(replacement.old)
            states.append((replacement, None if old is None else _resized_state(old, replacement)))
    return OptimizerUpdate(optimizer, tuple(states))


def _resized_state(state: dict[str, Any], replacement: Replacement) -> dict[str, Any]:
    return {key: _resized_entry(key, value, replacement) for key, value in state.items()}


def _resized_entry(key: str, value: Any, replacement: Replacement) -> Any:
    if not isinstance(value, Tensor) or value.dim() != replacement.old.dim() or value.dim() == 0:
        return value
    # Factored state (one row and one column per matrix) has size one along the dims it sums over.
    sizes = zip(value.shape, replacement.old.shape, replacement.indices, strict=True)
    indices = [kept if own == full else None for own, full, kept in sizes]
    gathered = gather(value, indices)
    if key in _SCALES:
        return _fill_with_means(gathered, indices)
    return _fill_from(replacement.new.detach(), gathered, indices) if key in _COPIES else gathered


def _fill_with_means(gathered: Tensor, indices: Sequence[Indices | None]) -> Tensor:
    """Give new slots the mean of the old ones, dim after dim, so that corners are filled too."""
    for dim, kept in enumerate(indices):
        if kept is None or not (kept == NEW).any() or not (kept != NEW).any():
            continue
        old = torch.from_numpy(np.flatnonzero(kept != NEW)).to(gathered.device)
        new = torch.from_numpy(np.flatnonzero(kept == NEW)).to(gathered.device)
        mean = gathered.index_select(dim, old).mean(dim, keepdim=True)
        gathered = gathered.index_copy(
            dim, new, mean.expand([len(new) if d == dim else n for d, n in enumerate(gathered.shape)])
        )
    return gathered


def _fill_from(source: Tensor, gathered: Tensor, indices: Sequence[Indices | None]) -> Tensor:
    """Copy new slots from the new parameter."""
    for dim, kept in enumerate(indices):
        if kept is not None and (kept == NEW).any():
            new = torch.from_numpy(np.flatnonzero(kept == NEW)).to(gathered.device)
            gathered = gathered.index_copy(dim, new, source.index_select(dim, new).to(gathered.dtype))
    return gathered
