"""Looking at a graph: whatever ends that on its way leaves the graph as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import fx

from fxwidth.rewriting.originals import original_of
from fxwidth.rewriting.transaction import Transaction, is_put_back

_Found = TypeVar("_Found")


def looking_at(module: fx.GraphModule, look: Callable[[], _Found]) -> _Found:
    """Return what is found by running a graph; it has not changed then, nor after any exception, Ctrl-C included.

    Inside of a resize, which puts back the graph or the model that it has just been traced from, that is enough.
    """
    original = original_of(module)
    if is_put_back(module) or (original is not None and is_put_back(original)):
        return look()
    return Transaction(module, is_run_only=True).run(look)
