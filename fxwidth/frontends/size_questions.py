"""Whether a model treats a batch of one in a way of its own.

The exporter takes each size that may change for two or more. What a model asks and this answers, as in
`if x.shape[0] > 1`, leaves no guard in the graph; so the questions are noted here, and answered again for one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

import sympy
import torch
from torch import Tensor

_ANSWERS: tuple[tuple[type, str], ...] = (
    (torch.SymBool, "__bool__"),
    (torch.SymBool, "__int__"),
    (torch.SymInt, "__bool__"),
)


class SizeQuestions:
    """The questions about sizes that code outside of torch has asked, each with its answer."""

    def __init__(self) -> None:
        self._asked: list[tuple[Any, bool]] = []

    def forget(self) -> None:
        """Forget what has been asked: the model is run anew."""
        self._asked.clear()

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Hear the questions of code that is run now."""
        with ExitStack() as stack:
            for kind, name in _ANSWERS:
                stack.enter_context(patch.object(kind, name, self._hearing(getattr(kind, name))))
            yield

    def _hearing(self, answer: Callable[[Any], int]) -> Callable[[Any], int]:
        @wraps(answer)
        def asked(value: Any) -> int:
            result = answer(value)
            # Ops of torch ask of each size whether it is one, and do what is right for one.
            if not str(sys._getframe(1).f_globals.get("__name__")).startswith("torch."):
                self._asked.append((value.node, bool(result)))
            return result

        return asked

    def guards(self, leaves: Sequence[Tensor]) -> dict[str, list[tuple[int, int]]]:
        """Return the conditions on `leaves`, in Python, without which the model would have been answered otherwise.

        With each come all dims that have the size which it is about, as (leaf, dim).

        Args:
            leaves: the symbolic tensors that stand for the inputs.
        """
        places: dict[Any, list[tuple[int, int]]] = {}
        for position, leaf in enumerate(leaves):
            sizes: Sequence[Any] = leaf.shape
            for dim, size in enumerate(sizes):
                if isinstance(size, torch.SymInt) and isinstance(size.node.expr, sympy.Symbol):
                    places.setdefault(size.node.expr, []).append((position, dim))
        differing = (symbol for node, answer in self._asked for symbol in _decisive(node, answer) if symbol in places)
        found = [places[symbol] for symbol in dict.fromkeys(differing)]
        return {f"leaves[{own[0][0]}].size()[{own[0][1]}] != 1": own for own in found}


def _decisive(node: Any, answer: bool) -> list[Any]:
    """Return the sizes of which it would have been another answer if they were one."""
    question = node.shape_env.replace(node.expr)
    symbols = sorted(question.free_symbols, key=str)
    of_ones = question.xreplace(dict.fromkeys(symbols, sympy.S.One))
    return symbols if _truth(of_ones) is (not answer) else []


def _truth(value: Any) -> bool | None:
    """Return whether a value is true, or None where that depends on sizes."""
    if isinstance(value, (sympy.Number, sympy.logic.boolalg.BooleanAtom)):
        return bool(value)
    return None
