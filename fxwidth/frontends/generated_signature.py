"""The signature of a graph's generated code: an argument that a model takes by name alone is one there too.

torch.fx writes all placeholders as arguments that may be passed either way: what a model takes as one of its `*args`
would be another argument of the graph.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from inspect import Parameter
from typing import Any

from torch import fx
from torch.fx.graph import CodeGen

_NAME = re.compile(r"\w*")
_ONE_WAY = (Parameter.POSITIONAL_ONLY, Parameter.KEYWORD_ONLY)


class SignatureCodeGen(CodeGen):
    """Generates code as torch.fx does, but for the `/` and the `*` among the arguments.

    Args:
        kinds: of the arguments that are taken by position or by name alone, by their names.
    """

    def __init__(self, kinds: Mapping[str, Any]) -> None:
        super().__init__()
        self._kinds = dict(kinds)

    def kinds(self, names: Sequence[str]) -> list[Any]:
        """Return how arguments are taken; somebody may have added or dropped some since."""
        kinds = [self._kinds.get(name, Parameter.POSITIONAL_OR_KEYWORD) for name in names]
        last = max((i for i, kind in enumerate(kinds) if kind is Parameter.POSITIONAL_ONLY), default=-1)
        for i in range(len(kinds)):
            if i < last:
                kinds[i] = Parameter.POSITIONAL_ONLY
            elif i > 0 and kinds[i - 1] is Parameter.KEYWORD_ONLY:
                kinds[i] = Parameter.KEYWORD_ONLY
        return kinds

    def gen_fn_def(self, free_vars: list[str], *rest: Any, **options: Any) -> str:
        """Return the first line of the code."""
        kinds = self.kinds([_NAME.match(text)[0] for text in free_vars])  # type: ignore[index]  # `name: type = default`
        if Parameter.KEYWORD_ONLY in kinds:
            free_vars.insert(kinds.index(Parameter.KEYWORD_ONLY), "*")
        if Parameter.POSITIONAL_ONLY in kinds:
            free_vars.insert(kinds.count(Parameter.POSITIONAL_ONLY), "/")
        return super().gen_fn_def(free_vars, *rest, **options)


def set_kinds(graph: fx.Graph, kinds: Iterable[tuple[str, Any]]) -> None:
    """Let the code of a graph take its arguments, each by name and kind, as the model takes them."""
    one_way = {name: kind for name, kind in kinds if kind in _ONE_WAY}
    if one_way:
        graph.set_codegen(SignatureCodeGen(one_way))


def kinds_of(graph: fx.Graph) -> dict[str, Any]:
    """Return how a graph takes the argument of each placeholder, in order."""
    names = [str(node.target) for node in graph.find_nodes(op="placeholder")]
    codegen = graph._codegen
    usual = [Parameter.POSITIONAL_OR_KEYWORD] * len(names)
    return dict(zip(names, codegen.kinds(names) if isinstance(codegen, SignatureCodeGen) else usual, strict=True))
