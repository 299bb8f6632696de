"""Nodes of a flat graph that switch autocast on and off, as dynamo writes a `with torch.autocast(...)` of a model."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import fx

ENTER_AUTOCAST: Callable[..., Any] = torch.amp.autocast_mode._enter_autocast
EXIT_AUTOCAST: Callable[..., Any] = torch.amp.autocast_mode._exit_autocast


class AutocastNodes:
    """Has nodes that are run one by one run under the autocast that whole runs have there.

    To be used as a context, which leaves autocast as it was.
    """

    def __init__(self) -> None:
        self._open: list[Any] = []

    def __enter__(self) -> AutocastNodes:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        while self._open:
            EXIT_AUTOCAST(self._open.pop())

    def switch(self, node: fx.Node) -> bool:
        """Do what a node does to autocast; return whether it is such a node."""
        if node.target is ENTER_AUTOCAST:
            self._open.append(ENTER_AUTOCAST(*node.args, **node.kwargs))
        elif node.target is EXIT_AUTOCAST:
            EXIT_AUTOCAST(self._open.pop())
        else:
            return False
        return True
