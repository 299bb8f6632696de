"""The arguments of a node of a graph by name, whatever it calls."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate

from fxwidth.recording.tape import bind, unbind


def named_arguments(node: fx.Node) -> dict[str, Any]:
    """Return a node's arguments by name, defaults filled in where a signature is known."""
    if isinstance(node.target, torch._ops.OpOverload):
        return bind(node.target, node.args, node.kwargs)
    signature = _signature(node.target) if node.op == "call_function" else None
    if signature is not None:
        try:
            bound = signature.bind(*node.args, **node.kwargs)
        except TypeError:
            bound = None
        if bound is not None:
            bound.apply_defaults()
            return dict(bound.arguments)
    return {**{str(i): value for i, value in enumerate(node.args)}, **node.kwargs}


@cache
def _signature(function: Any) -> inspect.Signature | None:
    """Return the signature of a Python function all of whose arguments can be passed by name."""
    if not inspect.isfunction(function):
        return None
    signature = inspect.signature(function)
    plain = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    return signature if all(p.kind in plain for p in signature.parameters.values()) else None


def replaced(value: Any, change: Callable[[Any], Any]) -> Any:
    """Return a value with a function applied to what is in it, containers and slices taken apart."""
    return map_aggregate(value, change)


def leaves_of(arguments: Mapping[str, Any]) -> Iterator[Any]:
    """Yield what is in the arguments of a node, containers and slices taken apart."""
    found: list[Any] = []
    map_aggregate(dict(arguments), found.append)
    yield from found


def set_named_arguments(node: fx.Node, arguments: dict[str, Any]) -> None:
    """Give a node arguments under the names that `named_arguments` gives them."""
    if isinstance(node.target, torch._ops.OpOverload):
        node.args, node.kwargs = unbind(node.target, arguments)
        return
    # Named in order: what was positional stays so, and a default is written out only where it has become a choice.
    names, count = list(arguments), len(node.args)
    named = {name: arguments[name] for name in names[count:]}
    node.args = tuple(arguments[name] for name in names[:count])
    node.kwargs = {name: value for name, value in named.items() if name in node.kwargs or isinstance(value, fx.Node)}
