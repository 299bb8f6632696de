"""How a call fits the placeholders of a graph, which takes some by position and some by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx
from torch.utils import _pytree as pytree

from fxwidth.errors import FxwidthError
from fxwidth.frontends.call_signature import CALL_FORMS, NOT_GIVEN, Call
from fxwidth.frontends.generated_signature import kinds_of
from fxwidth.frontends.labels import labels_told


def bound_to_placeholders(module: fx.GraphModule, call: Call) -> list[Any]:
    """Return one value per placeholder of a graph for a call.

    Raises:
        FxwidthError: the graph does not take this call.
    """
    placeholders = module.graph.find_nodes(op="placeholder")
    codegen = module.graph._codegen
    if isinstance(codegen, fx.graph._PyTreeCodeGen):
        # A graph of torch.export: one placeholder per tensor, and a function of the model's arguments around it.
        info = codegen.pytree_info
        either_way = inspect.Parameter.POSITIONAL_OR_KEYWORD
        values = _by_name({name: either_way for name in info.orig_args if name != "self"}, {}, call)
        leaves = pytree.tree_leaves(list(values.values()))
        if len(leaves) != len(placeholders):
            raise FxwidthError(
                f"example_inputs hold {len(leaves)} values, but the graph was exported for {len(placeholders)}; "
                "pass inputs of the structure it was exported with."
            )
        return leaves
    defaults = {str(node.target): node.args[0] for node in placeholders if node.args and node.args[0] is not NOT_GIVEN}
    return list(_by_name(kinds_of(module.graph), defaults, call).values())


def call_with(module: fx.GraphModule, values: Sequence[Any]) -> Call:
    """Return the call of a graph that gives its placeholders some values, in order."""
    by_name = [kind is inspect.Parameter.KEYWORD_ONLY for kind in kinds_of(module.graph).values()]
    if not any(by_name):
        return Call(tuple(values), {})
    first, names = by_name.index(True), list(kinds_of(module.graph))
    return Call(tuple(values[:first]), dict(zip(names[first:], values[first:], strict=True)))


def _by_name(kinds: Mapping[str, Any], defaults: Mapping[str, Any], call: Call) -> dict[str, Any]:
    places = [name for name, kind in kinds.items() if kind is not inspect.Parameter.KEYWORD_ONLY]
    values = dict(zip(places, call.args, strict=False))
    named = [name for name, kind in kinds.items() if kind is not inspect.Parameter.POSITIONAL_ONLY]
    unknown = [name for name in call.kwargs if name not in named or name in values]
    values = {**defaults, **values, **call.kwargs}
    missing = [name for name in kinds if name not in values]
    if missing or unknown or len(call.args) > len(places):
        if not call.kwargs and (told := labels_told("the graph", places, call.args)) is not None:
            raise FxwidthError(told)
        given = len(call.args) + len(call.kwargs)
        detail = f" and {unknown[0]!r} is none of them" if unknown else ""
        if len(call.args) > len(places):
            detail = f", {len(call.args)} of them by position, of which it takes {len(places)}"
        raise FxwidthError(
            f"the model takes {len(kinds)} inputs ({', '.join(kinds)}), but example_inputs has {given}{detail}; "
            f"{CALL_FORMS}."
        )
    return {name: values[name] for name in kinds}
