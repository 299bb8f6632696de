"""Remembering what is found of a graph, for as long as there is that graph."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar


class Remembering(Protocol):
    """What has a memo of its own: an `Analysis`, a `WidthGraph` or its `Wiring`."""

    @property
    def memo(self) -> dict[Any, Any]:
        """What has been found of it."""


_Graph = TypeVar("_Graph", bound=Remembering)
_Rest = ParamSpec("_Rest")
_Found = TypeVar("_Found")


def per_graph(function: Callable[Concatenate[_Graph, _Rest], _Found]) -> Callable[Concatenate[_Graph, _Rest], _Found]:
    """Return a function that looks once for what it finds of a graph, by the other arguments, which are hashable.

    The graph holds what was found. A table of all graphs would hold them in turn: what is found of a graph mostly
    refers to it.
    """

    @wraps(function)
    def remembered(graph: _Graph, /, *args: _Rest.args, **kwargs: _Rest.kwargs) -> _Found:
        key = (function, args, tuple(sorted(kwargs.items())))
        if key not in graph.memo:
            graph.memo[key] = function(graph, *args, **kwargs)
        found: _Found = graph.memo[key]
        return found

    return remembered
