"""The state of optimizers and of an Evolver as plain data with tensors beside, by the names of parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, fx
from torch.optim import Optimizer

from fxwidth.errors import FxwidthError
from fxwidth.rewriting.optimizers import Optimizers, check_optimizer
from fxwidth.runtime.tensor_slots import tensor_slots
from fxwidth.serialization.plain_trees import TensorsBeside, decoded, encoded

_OPTIMIZERS, _EVOLVER = "optimizers", "evolver"
FURTHER = "further"
"""What else a file holds beside a graph, of whoever has written it."""
_GROUPS, _STATE, _PARAMETERS = "param_groups", "state", "params"
# How an optimizer that was given names calls the parameters of a group, one for each.
_LABELS = "param_names"


class Evolving(Protocol):
    """What an `Evolver` has that a file needs."""

    gm: fx.GraphModule

    def state_dict(self) -> dict[str, Any]:
        """Return its state."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another was."""


def state_of(
    gm: fx.GraphModule, optimizer: Optimizers | None, evolver: Evolving | None, beside: TensorsBeside
) -> dict[str, Any]:
    """Return the state of what trains a graph, as JSON can hold it.

    Raises:
        FxwidthError: it trains another graph, or keeps what plain data cannot hold, which is named.
    """
    check_training(gm, optimizer, evolver)
    state: dict[str, Any] = {}
    if optimizer is not None:
        state[_OPTIMIZERS] = [_optimizer_data(gm, one, beside) for one in _each(optimizer)]
    if evolver is not None:
        state[_EVOLVER] = encoded(evolver.state_dict(), "the Evolver's state", beside.leaf)
    return state


def check_training(gm: fx.GraphModule, optimizer: Optimizers | None, evolver: Evolving | None) -> None:
    """Check that an optimizer and an Evolver train a graph.

    Raises:
        FxwidthError: one does not.
    """
    check_optimizer(optimizer, gm)
    if evolver is not None and getattr(evolver, "gm", None) is not gm:
        raise FxwidthError(
            f"evolver= is {type(evolver).__name__}, and evolves no graph or another one; pass the fxwidth.Evolver that "
            "was made for this graph."
        )


def refuse_missing(state: Mapping[str, Any], path: object, optimizer: object, evolver: object) -> None:
    """Check that a file holds the state that is asked for.

    Raises:
        FxwidthError: it does not.
    """
    for key, wanted, option in ((_OPTIMIZERS, optimizer, "optimizer"), (_EVOLVER, evolver, "evolver")):
        if wanted is not None and key not in state:
            raise FxwidthError(
                f"{path} holds no state for {option}=; save it with fxwidth.save(gm, path, {option}={option}), or "
                f"leave {option}= out."
            )


def put_state(
    gm: fx.GraphModule,
    state: Mapping[str, Any],
    optimizer: Optimizers | None,
    evolver: Evolving | None,
    tensor: Callable[[str], Tensor],
) -> None:
    """Give optimizers and an Evolver, made for a graph as it is now, the state of a file.

    Args:
        gm: the graph.
        state: as `state_of` returned it.
        optimizer: one, or as many as were saved, of the same classes.
        evolver: one with the same options.
        tensor: returns the tensors beside, by name.

    Raises:
        FxwidthError: they are others than those that were saved.
    """

    def found(kind: str, content: Any) -> Tensor:
        return tensor_beside(kind, content, tensor)

    if optimizer is not None:
        own, saved = _each(optimizer), state[_OPTIMIZERS]
        if len(own) != len(saved):
            raise FxwidthError(f"the file holds the state of {len(saved)} optimizers, but received {len(own)}.")
        for one, data in zip(own, saved, strict=True):
            _put_optimizer(gm, one, data, found)
    if evolver is not None:
        evolver.load_state_dict(decoded(state[_EVOLVER], found))


def further_of(state: Mapping[str, Any], tensor: Callable[[str], Tensor]) -> Any:
    """Return what else a file holds, or None.

    Args:
        state: as a file tells of it.
        tensor: returns the tensors beside, by name.
    """
    return decoded(state.get(FURTHER), lambda kind, content: tensor_beside(kind, content, tensor))


def tensor_beside(kind: str, content: Any, tensor: Callable[[str], Tensor]) -> Tensor:
    """Return what stands beside a tree, of which `TensorsBeside` has made it.

    Raises:
        ValueError: it is no tensor.
    """
    if kind != "tensor":
        raise ValueError(f"{kind!r} is no kind of value")
    return tensor(content)


def _each(optimizer: Optimizers) -> Sequence[Optimizer]:
    return [optimizer] if isinstance(optimizer, Optimizer) else optimizer


def _names(gm: fx.GraphModule) -> dict[int, str]:
    return {id(tensor): name for name, (tensor, _) in tensor_slots(gm).items()}


def _name(optimizer: Optimizer) -> str:
    return type(optimizer).__name__


def _named_groups(gm: fx.GraphModule, optimizer: Optimizer) -> list[list[str]]:
    """Return the names of the parameters of each group.

    Raises:
        FxwidthError: one has none.
    """
    names = _names(gm)
    groups = []
    for number, group in enumerate(optimizer.param_groups):
        for place, parameter in enumerate(group[_PARAMETERS]):
            if id(parameter) not in names:
                raise FxwidthError(
                    f"{_name(optimizer)} trains parameter {place} of its group {number}, of shape "
                    f"{tuple(parameter.shape)}, which is not in the graph, so that it has no name in the file; save "
                    "the state of that optimizer by itself."
                )
        groups.append([names[id(parameter)] for parameter in group[_PARAMETERS]])
    return groups


def _optimizer_data(gm: fx.GraphModule, optimizer: Optimizer, beside: TensorsBeside) -> dict[str, Any]:
    groups, state = _named_groups(gm, optimizer), optimizer.state_dict()
    names = [name for group in groups for name in group]
    kind = _name(optimizer)
    options = [{key: value for key, value in group.items() if key != _PARAMETERS} for group in state[_GROUPS]]
    by_name: dict[int, Any] = {}
    unnamed: dict[Any, Any] = {}
    for key, value in state[_STATE].items():
        (by_name if type(key) is int and key < len(names) else unnamed)[key] = value
    rest = {key: value for key, value in state.items() if key not in (_GROUPS, _STATE)}
    return {
        "class": kind,
        "names": groups,
        "groups": encoded(options, f"an option of {kind}", beside.leaf),
        "state": {
            names[key]: encoded(value, f"the state of {kind} for {names[key]}", beside.leaf)
            for key, value in by_name.items()
        },
        "unnamed": encoded(unnamed, f"the state of {kind}", beside.leaf),
        "rest": encoded(rest, f"what {kind} keeps", beside.leaf),
    }


def _put_optimizer(gm: fx.GraphModule, optimizer: Optimizer, data: Mapping[str, Any], found: Any) -> None:
    groups = _named_groups(gm, optimizer)
    if _name(optimizer) != data["class"]:
        raise FxwidthError(f"the file holds the state of {data['class']}, but received {_name(optimizer)}; make one.")
    if list(map(sorted, groups)) != list(map(sorted, data["names"])):
        raise FxwidthError(
            f"{_name(optimizer)} has other parameters in its groups than the file: {_difference(groups, data)}; make it"
            " for the same parameters, in the same groups."
        )
    numbers = {name: number for number, name in enumerate(name for group in groups for name in group)}
    parameters = [parameter for group in optimizer.param_groups for parameter in group[_PARAMETERS]]
    states = {name: decoded(value, found) for name, value in data["state"].items()}
    optimizer.load_state_dict(
        {
            **decoded(data["rest"], found),
            _STATE: {**{numbers[name]: value for name, value in states.items()}, **decoded(data["unnamed"], found)},
            _GROUPS: [
                {**_in_order(options, saved, group), _PARAMETERS: [numbers[name] for name in group]}
                for options, saved, group in zip(decoded(data["groups"], found), data["names"], groups, strict=True)
            ],
        }
    )
    for name, saved in states.items():
        _undo_conversions(optimizer.state.get(parameters[numbers[name]]), saved)


def _in_order(options: Mapping[str, Any], saved: Sequence[str], own: Sequence[str]) -> Mapping[str, Any]:
    """Return the options of a group with the names of its parameters in the order that these have here."""
    if _LABELS not in options:
        return options
    labels = dict(zip(saved, options[_LABELS], strict=True))
    return {**options, _LABELS: [labels[name] for name in own]}


def _undo_conversions(own: Any, saved: Any) -> None:
    """Put back the tensors of a state that torch has converted to the dtype of their parameter."""
    if not isinstance(own, dict) or not isinstance(saved, dict):
        return
    for key, value in saved.items():
        now = own.get(key)
        if isinstance(value, Tensor) and isinstance(now, Tensor) and now.dtype != value.dtype:
            own[key] = value.to(now.device)
        else:
            _undo_conversions(now, value)


def _difference(groups: Sequence[Sequence[str]], data: Mapping[str, Any]) -> str:
    own, saved = ({name for group in all_groups for name in group} for all_groups in (groups, data["names"]))
    if own == saved:
        return "they are in other groups"
    return f"{min(own ^ saved)} is in only one of them"
