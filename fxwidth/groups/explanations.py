"""Texts that tell why sizes stay, fit to be pasted into an issue."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from fxwidth.axes.pins import Pin, remedy

_MOST_PLACES = 3


def describe_pin(name: str, size: int, places: Sequence[str], pin: Pin, module: fx.GraphModule) -> str:
    """Return why a group keeps its width: the reason, the op and node, and what would free it.

    Args:
        name: the group.
        size: its width.
        places: where it occurs, e.g. "conv.weight dim 0".
        pin: the reason.
        module: the graph, for what its nodes are.
    """
    shown = ", ".join(places[:_MOST_PLACES])
    if len(places) > _MOST_PLACES:
        shown += f" and {len(places) - _MOST_PLACES} more"
    lines = [f"{name!r} keeps its width of {size} ({shown})", f"reason: {pin.reason}{_where(pin, module)}"]
    if pin.root is not pin:
        lines.append(f"that dimension: {pin.root.reason}{_where(pin.root, module)}")
    return "\n".join([*lines, f"to free it: {remedy(pin)}"])


def _where(pin: Pin, module: fx.GraphModule) -> str:
    op, _, name = pin.context.partition(" at node ")
    if not name:
        return f" ({op})" if op else ""
    # A part of the node's module may be named besides.
    name, _, part = name.partition(", in ")
    node = next((node for node in module.graph.nodes if node.name == name), None)
    return f", in {op} at node {name}{_described(node, module)}" + (f", in its part {part!r}" if part else "")


def _described(node: fx.Node | None, module: fx.GraphModule) -> str:
    if node is None or node.op != "call_module":
        return ""
    path = str(node.target)
    return f", which is module {path!r} ({type(module.get_submodule(path)).__name__})"
