"""What an optimizer must be to be carried over a resize."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fxwidth.errors import FxwidthError

_NEW_ONE = "call resize without optimizer= and make a new optimizer for gm.parameters()."
# Of nested containers in an optimizer's attributes, how many levels are looked through for parameters.
_DEPTH = 4


Optimizers = Optimizer | Sequence[Optimizer]
"""One optimizer, or several that train a model together."""


def _each(optimizer: Any) -> Sequence[Any]:
    return optimizer if isinstance(optimizer, (list, tuple)) else [] if optimizer is None else [optimizer]


def optimizers_in(optimizer: Any) -> list[Optimizer]:
    """Return optimizers and those that they are made of, as that of sharpness-aware minimisation is; none of others."""
    found: list[Optimizer] = [one for one in _each(optimizer) if isinstance(one, Optimizer)]
    for one in found:
        inner = [value for value in vars(one).values() if isinstance(value, Optimizer)]
        # A wrapper may give out the state of the one that it wraps.
        found += [other for other in inner if all(other.state is not known.state for known in found)]
    return found


def refuse_other_than_optimizers(optimizer: Any) -> None:
    """Check that an optimizer, if there is one, or each of several, is one whose state can be resized.

    Raises:
        FxwidthError: it is something else.
    """
    for one in _each(optimizer):
        if not isinstance(one, Optimizer):
            inner = getattr(one, "optimizer", None)
            remedy = "pass its .optimizer" if isinstance(inner, Optimizer) else "pass the one that trains gm"
            raise FxwidthError(
                f"optimizer= takes a torch.optim.Optimizer, or a list of them, but received {type(one).__name__}; "
                f"{remedy}."
            )
        if isinstance(one, torch.optim.LBFGS):
            raise FxwidthError(
                f"LBFGS keeps one history for all parameters together, which cannot be resized; {_NEW_ONE}"
            )


def check_optimizer(optimizer: Any, module: nn.Module) -> None:
    """Check that an optimizer, or each of several, is one, and that it trains a module, or a part of it.

    Raises:
        FxwidthError: it is something else, or was made for another model.
    """
    refuse_other_than_optimizers(optimizer)
    own = set(module.parameters())
    for one in _each(optimizer):
        held = [parameter for group in one.param_groups for parameter in group["params"]]
        if own and not any(parameter in own for parameter in held):
            raise FxwidthError(
                f"optimizer= is {type(one).__name__} with {len(held)} parameters, none of which is in the graph: it "
                "was made for another model, such as a copy. Make it for gm.parameters()."
            )


def refuse_kept_parameters(optimizer: Optimizer, names: Mapping[Tensor, str]) -> None:
    """Check that an optimizer keeps parameters, and tensors of their shapes, in its groups and its state alone.

    Args:
        optimizer: the optimizer.
        names: those of the parameters that are about to be replaced, by `id`.

    Raises:
        FxwidthError: it keeps one of them, or a tensor of its shape, in an attribute, where the new one would not get.
    """
    managed = ("param_groups", "state")
    by_shape = {parameter.shape: name for parameter, name in names.items() if parameter.dim()}
    for attribute, value in vars(optimizer).items():
        for tensor in () if attribute in managed or isinstance(value, Optimizer) else _tensors_in(value, _DEPTH):
            if tensor in names or tensor.shape in by_shape:
                name = names.get(tensor)
                told = f"parameter {name!r}" if name else f"a tensor of the shape of {by_shape[tensor.shape]!r}"
                raise FxwidthError(
                    f"{type(optimizer).__name__} keeps {told} in its attribute {attribute!r}, beside its groups and "
                    f"its state, so that it would go on with the old one; {_NEW_ONE}"
                )


def _tensors_in(value: Any, depth: int) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, (Mapping, Sequence, set)) and not isinstance(value, (str, bytes)):
        for part in chain(value.keys(), value.values()) if isinstance(value, Mapping) else value:
            yield from _tensors_in(part, depth - 1)


def exchange_parameters(
    optimizer: Optimizers, successors: Mapping[Tensor, Sequence[Tensor]], names: Mapping[Tensor, str]
) -> None:
    """Give an optimizer other parameters in the place of some; their state begins anew.

    Args:
        optimizer: one, or several.
        successors: what comes into the place of each parameter; nothing where it is gone.
        names: those of all parameters of the graph.

    Raises:
        FxwidthError: an optimizer keeps one of them in an attribute, where the new one would not get.
    """
    going = {old: names[old] for old in successors}
    for one in optimizers_in(optimizer):
        refuse_kept_parameters(one, going)
    for one in optimizers_in(optimizer):
        for group in one.param_groups:
            group["params"][:] = [new for old in group["params"] for new in successors.get(old, [old])]
        for old in successors:
            one.state.pop(old, None)
