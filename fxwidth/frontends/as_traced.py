"""What a graph without the parts of its model does until somebody calls its `train()` or `eval()`.

As it is constructed, or where somebody froze a part by hand, a model may have its parts in other modes than its own
`train()` and `eval()` lead to. A graph of ops alone has no parts to be in a mode; where its numbers differ, it chooses
them by whether it has been put in a mode since it was traced.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxwidth.frontends.alignment import DifferentError
from fxwidth.frontends.node_arguments import named_arguments, set_named_arguments
from fxwidth.frontends.train_eval_alignment import is_counter, same_module
from fxwidth.frontends.train_eval_merge import by_mode, share
from fxwidth.runtime.module_state import GraphPart

AS_TRACED_MODULE = "fxwidth_as_traced"
_NUMBERS = (bool, int, float)


class AsTraced(GraphPart):
    """Tells a graph whether its parts are in the modes in which it was traced.

    Args:
        mode: that of the graph when it was traced.
    """

    def __init__(self, mode: bool) -> None:
        super().__init__()
        self.training = self.mode = mode
        self.is_unchanged = True

    def train(self, mode: bool = True) -> AsTraced:
        """Set the mode, and note that somebody did."""
        self.is_unchanged = False
        return super().train(mode)

    def forward(self) -> bool:
        """Return whether nobody has called `train()` or `eval()` of the graph, nor put all of it in another mode."""
        return self.is_unchanged and self.training == self.mode


@dataclass(frozen=True)
class Differences:
    """What a model does otherwise as it is than after its `train()` or `eval()`.

    Attributes:
        as_it_is: its graph with the parts in the modes that they are in.
        numbers: nodes of the other graph whose numbers are others as it is, with these by the names of arguments.
        more: the counters of batches that are written to only as it is, with their steps.
        less: those that are written to only afterwards.
    """

    as_it_is: fx.GraphModule
    numbers: Mapping[fx.Node, Mapping[str, Any]]
    more: Counter[tuple[str, int]]
    less: Counter[tuple[str, int]]


def differences(as_it_is: fx.GraphModule, after: fx.GraphModule) -> Differences:
    """Return how the graph of a model as it is differs from that after its `train()` or `eval()`.

    Raises:
        DifferentError: by more than numbers.
    """
    own, other = _counters(as_it_is), _counters(after)
    return Differences(as_it_is, _numbers(as_it_is, after), own - other, other - own)


def keep_as_traced(
    module: fx.GraphModule, found: Differences, partner: Mapping[fx.Node, fx.Node] | None, mode: bool
) -> None:
    """Let a graph do what its model does as it is, until the graph is put in a mode.

    Args:
        module: the graph of both modes, as `train()` and `eval()` of the model lead to them.
        found: what the model does otherwise as it is.
        partner: the node of this graph for each node of that of the mode in which the model is; None where it is that.
        mode: the mode that the model is in.

    Raises:
        DifferentError: a node has no partner; then nothing has been changed.
    """
    for node in found.numbers:
        if partner is not None and node not in partner:
            raise DifferentError(node, node)
    if not (found.numbers or found.more or found.less):
        return
    writer = _Writer(module, mode)
    for node, numbers in found.numbers.items():
        writer.choose(node if partner is None else partner[node], numbers)
    writer.count(found)
    module.graph.lint()
    module.recompile()


def _counters(module: fx.GraphModule) -> Counter[tuple[str, int]]:
    """Return which counters of batches a graph writes to, each with its step."""
    return Counter((str(node.args[0].target), node.args[1]) for node in module.graph.nodes if is_counter(node))


def _numbers(as_it_is: fx.GraphModule, after: fx.GraphModule) -> dict[fx.Node, dict[str, Any]]:
    """Return the nodes of the second graph whose numbers differ in the first, with those of the first by name."""
    own, other = ([n for n in m.graph.nodes if n.op != "get_attr" and not is_counter(n)] for m in (as_it_is, after))
    pairs: dict[fx.Node, Any] = {}
    found: dict[fx.Node, dict[str, Any]] = {}
    for node, one in zip(own, other, strict=False):
        if node.op != one.op or node.target != one.target or not _same_part(as_it_is, after, node):
            raise DifferentError(one, node)
        arguments, others = named_arguments(node), named_arguments(one)
        differing = {n: v for n, v in arguments.items() if not _same(pairs, v, others.get(n, ...))}
        if arguments.keys() != others.keys() or not all(
            type(value) in _NUMBERS and type(others[name]) in _NUMBERS for name, value in differing.items()
        ):
            raise DifferentError(one, node)
        if differing:
            found[one] = differing
        pairs[node] = one
    if len(own) != len(other):
        raise DifferentError(other[-1], own[-1])
    return found


def _same_part(as_it_is: fx.GraphModule, after: fx.GraphModule, node: fx.Node) -> bool:
    if node.op != "call_module":
        return True
    return same_module(*(module.get_submodule(str(node.target)) for module in (as_it_is, after)))


def _same(pairs: Mapping[fx.Node, Any], own: Any, other: Any) -> bool:
    """Tell whether an argument of a node is the same in both graphs."""
    if isinstance(own, fx.Node):
        if own.op == "get_attr":
            return isinstance(other, fx.Node) and other.op == "get_attr" and own.target == other.target
        return pairs.get(own) is other
    if isinstance(own, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(own) == len(other) and all(_same(pairs, *both) for both in zip(own, other, strict=True))
    if isinstance(own, dict) and isinstance(other, dict):
        return own.keys() == other.keys() and all(_same(pairs, value, other[key]) for key, value in own.items())
    return type(own) is type(other) and bool(own == other)


class _Writer:
    """Writes choices by whether a graph is as it was traced into it."""

    def __init__(self, module: fx.GraphModule, mode: bool) -> None:
        self._module = module
        self._graph = module.graph
        module.add_submodule(AS_TRACED_MODULE, AsTraced(mode))
        first = next(node for node in self._graph.nodes if node.op != "placeholder")
        with self._graph.inserting_before(first):
            self._flag = self._graph.call_module(AS_TRACED_MODULE)

    def choose(self, node: fx.Node, as_it_is: Mapping[str, Any]) -> None:
        """Give a node other numbers as long as the graph is as it was traced."""
        with self._graph.inserting_before(node):
            chosen = {
                name: self._graph.call_function(by_mode, (self._flag, as_it_is[name], value))
                for name, value in named_arguments(node).items()
                if name in as_it_is
            }
        set_named_arguments(node, {**named_arguments(node), **chosen})

    def count(self, found: Differences) -> None:
        """Let counters of batches be written to as long as the graph is as it was traced, or only afterwards."""
        less = {name for name, _ in found.less}
        for node in list(self._graph.nodes):
            is_addition = node.target is torch.ops.aten.add_.Tensor and isinstance(node.args[0], fx.Node)
            if is_addition and node.args[0].target in less:
                self.choose(node, {"other": 0})
        (end,) = self._graph.find_nodes(op="output")
        with self._graph.inserting_before(end):
            for name, step in found.more.elements():
                counter = self._graph.get_attr(share(found.as_it_is, self._module, name))
                steps = self._graph.call_function(by_mode, (self._flag, step, 0))
                self._graph.call_function(torch.ops.aten.add_.Tensor, (counter, steps))
