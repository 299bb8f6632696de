"""Two graphs of one model, traced in eval and in training mode, laid side by side: where do they differ?

Each node of training is paired with the node of evaluation that does the same to the same; numbers and flags may
differ. What only one of the two does is a *region*: nodes of which one value is used afterwards, which takes the place
of one value of evaluation; or none, where training does nothing more than write to buffers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxwidth.frontends.alignment import Alignment, Choice, DifferentError, TrainingRegion, path_of
from fxwidth.frontends.call_signature import Inputs, Outputs
from fxwidth.frontends.export_reassembly import Region
from fxwidth.frontends.in_place import is_write
from fxwidth.frontends.node_arguments import leaves_of, named_arguments, replaced
from fxwidth.runtime.pytree_differences import difference

# How many nodes that evaluation alone runs are looked past in search of the next one that both run.
_REACH = 16


def align(evaluated: fx.GraphModule, trained: fx.GraphModule) -> Alignment:
    """Return how the graph of training differs from that of evaluation.

    Raises:
        DifferentError: it differs by more than numbers, counters of batches and regions.
    """
    return _Aligner(evaluated, trained).run()


class _UnequalError(Exception):
    """Two arguments or nodes do not correspond."""


@dataclass(frozen=True)
class _Supposed:
    """A value of training that would take the place of one of evaluation."""

    result: fx.Node
    value: fx.Node


class _Aligner:
    def __init__(self, evaluated: fx.GraphModule, trained: fx.GraphModule) -> None:
        self._evaluated = evaluated
        self._trained = trained
        self._found = Alignment()
        # Which regions a value of training has come from, and what it takes the place of.
        self._instead: dict[tuple[fx.Node, fx.Node], TrainingRegion] = {}
        self._pending: list[fx.Node] = []
        self._supposed: list[_Supposed] = []
        self._nodes = [node for node in evaluated.graph.nodes if node.op != "get_attr"]
        self._place = 0
        # Where in evaluation the open region ends.
        self._end = 0

    def run(self) -> Alignment:
        attributes = {node.target: node for node in self._evaluated.graph.find_nodes(op="get_attr")}
        for node in self._trained.graph.nodes:
            if node.op == "get_attr":
                partner = attributes.get(node.target)
                if partner is not None and self._same_attribute(str(node.target)):
                    self._found.partner[node] = partner
            elif not self._advance(node) and not self._count(node) and not self._measure(node):
                self._hold(node)
        if self._pending:
            raise DifferentError(self._nodes[min(self._place, len(self._nodes) - 1)], self._pending[0])
        return self._found

    def _measure(self, node: fx.Node) -> bool:
        """Take a size of a tensor into both modes: many regions may use it."""
        if node.target is not torch.ops.aten.sym_size.int or node.args[0] in self._pending:
            return False
        self._found.regions.append(TrainingRegion((node,), node, None, self._nodes[self._place]))
        return True

    def _hold(self, node: fx.Node) -> None:
        """Let a node of training wait for the value that its region is there for."""
        passed = self._nodes[self._end : self._place] if self._pending else []
        self._pending.append(node)
        self._end = self._place
        # The region is run as one, behind what both modes run in between.
        if any(self._writes_elsewhere(one) for one in (*passed, *self._pending)) and passed:
            raise DifferentError(passed[0], node)

    def _writes_elsewhere(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            module = self._evaluated if node.graph is self._evaluated.graph else self._trained
            return bool(getattr(module.get_submodule(str(node.target)), "inplace", False))
        return is_write(node) and node.args[0] not in self._pending

    def _count(self, node: fx.Node) -> bool:
        if not is_counter(node) or self._place == len(self._nodes):
            return False
        self._found.counters.append((node, self._nodes[self._place]))
        return True

    def _advance(self, node: fx.Node) -> bool:
        """Pair a node of training with the next of evaluation, or with one a little further on."""
        for place in range(self._place, min(self._place + _REACH, len(self._nodes))):
            own = self._nodes[place]
            skipped = self._nodes[self._place : place]
            try:
                arguments, supposed = self._match(own, node)
            except _UnequalError:
                continue
            if supposed is None and not skipped and self._is_for_effects():
                self._found.regions.append(TrainingRegion(tuple(self._pending), None, None, own))
                self._pending = []
            if supposed is None and (skipped or (self._pending and path_of(own) != path_of(node))):
                continue  # what evaluation runs in between must be of some use, or is done for its effects
            if supposed is not None and not self._open_region(own, skipped, supposed, arguments):
                continue
            if any(isinstance(leaf, (Choice, TrainingRegion)) for leaf in leaves_of(arguments)):
                self._found.arguments[own] = arguments
            self._found.partner[node] = own
            self._place = place + 1
            return True
        return False

    def _is_for_effects(self) -> bool:
        """Tell whether the nodes that wait do nothing more than write to buffers, right where they stand."""
        inside = set(self._pending)
        used = any(user not in inside for node in self._pending for user in node.users)
        writes = any(map(self._writes_elsewhere, self._pending))
        movable = all(self._movable(self._trained, node) for node in self._pending)
        return writes and movable and not used and self._end == self._place

    def _open_region(
        self, own: fx.Node, skipped: Sequence[fx.Node], supposed: _Supposed, arguments: dict[str, Any]
    ) -> bool:
        """Take what was run in between as a region, if one value comes out of it in either mode."""
        result, value = supposed.result, supposed.value
        if not _one_value(self._pending, result) or not _one_value(skipped, value) or any(map(is_write, skipped)):
            return False
        if not all(self._movable(self._trained, node) for node in self._pending):
            return False
        if not all(self._movable(self._evaluated, node) for node in skipped):
            return False
        early = not skipped and value in self._nodes[: self._end] and self._pending
        region = TrainingRegion(tuple(self._pending), result, value, self._nodes[self._end] if early else own)
        self._found.regions.append(region)
        self._instead[result, value] = region
        self._pending = []
        for name, argument in arguments.items():
            arguments[name] = replaced(argument, lambda leaf: region if leaf == supposed else leaf)
        return True

    def _movable(self, module: fx.GraphModule, node: fx.Node) -> bool:
        """Tell whether a node can be run in one mode alone: the parts that it calls have no tensors of their own."""
        if node.op != "call_module":
            return node.op != "placeholder"
        part = module.get_submodule(str(node.target))
        return not isinstance(part, (Inputs, Outputs)) and not list(part.parameters()) and not list(part.buffers())

    def _same_attribute(self, name: str) -> bool:
        own, other = attribute(self._evaluated, name), attribute(self._trained, name)
        if own is other:
            return True
        both = isinstance(own, Tensor) and isinstance(other, Tensor) and own.shape == other.shape
        return both and not own.is_meta and torch.equal(own, other)

    def _match(self, node: fx.Node, other: fx.Node) -> tuple[dict[str, Any], _Supposed | None]:
        """Return the arguments of a node for both modes, and which value must be the one that comes out of a region.

        Raises:
            _UnequalError: the nodes do different things.
        """
        if node.op != other.op or node.target != other.target:
            raise _UnequalError
        if node.op == "call_module" and not self._same_module(str(node.target)):
            raise _UnequalError
        own, others = named_arguments(node), named_arguments(other)
        if own.keys() != others.keys():
            raise _UnequalError
        self._supposed = []
        merged = {name: self._merge(value, others[name]) for name, value in own.items()}
        if len(set(self._supposed)) > 1 or (self._supposed and path_of(node) != path_of(other)):
            raise _UnequalError
        return merged, self._supposed[0] if self._supposed else None

    def _same_module(self, name: str) -> bool:
        return same_module(self._evaluated.get_submodule(name), self._trained.get_submodule(name))

    def _merge(self, own: Any, other: Any) -> Any:
        """Return an argument of a node, with choices for numbers and regions for values that differ."""
        if isinstance(own, fx.Node) or isinstance(other, fx.Node):
            if not isinstance(own, fx.Node) or not isinstance(other, fx.Node):
                raise _UnequalError
            return self._merge_nodes(own, other)
        if isinstance(own, (list, tuple)) and isinstance(other, (list, tuple)) and len(own) == len(other):
            parts = [self._merge(one, two) for one, two in zip(own, other, strict=True)]
            return tuple(parts) if isinstance(own, tuple) else parts
        if isinstance(own, dict) and isinstance(other, dict) and own.keys() == other.keys():
            return {key: self._merge(value, other[key]) for key, value in own.items()}
        if isinstance(own, slice) and isinstance(other, slice):
            ends = [(own.start, other.start), (own.stop, other.stop), (own.step, other.step)]
            return slice(*(self._merge(one, two) for one, two in ends))
        if type(own) is type(other) and own == other:
            return own
        if isinstance(own, (bool, int, float)) and isinstance(other, (bool, int, float)):
            return Choice(other, own)
        raise _UnequalError

    def _merge_nodes(self, own: fx.Node, other: fx.Node) -> Any:
        if self._found.partner.get(other) is own:
            return own
        if (other, own) in self._instead:
            return self._instead[other, own]
        if other in self._pending or other in self._found.partner:
            self._supposed.append(_Supposed(other, own))
            return self._supposed[-1]
        raise _UnequalError


def _one_value(nodes: Sequence[fx.Node], result: fx.Node) -> bool:
    """Tell whether nothing but one node of some is used by others, if there are any at all."""
    inside = set(nodes)
    leaks = any(user not in inside for node in nodes if node is not result for user in node.users)
    return not nodes or (result in inside and not leaks)


def is_counter(node: fx.Node) -> bool:
    """Tell whether a node counts the batches of a batch norm."""
    if node.target is not torch.ops.aten.add_.Tensor or node.users or len(node.args) != 2:
        return False
    buffer, step = node.args
    return isinstance(buffer, fx.Node) and buffer.op == "get_attr" and isinstance(step, int)


def same_module(own: nn.Module, other: nn.Module) -> bool:
    """Tell whether modules that two graphs of one model call do the same."""
    if own is other:
        return True
    if isinstance(own, Outputs) and isinstance(other, Outputs):
        return difference(own.structure, other.structure) is None
    if isinstance(own, Inputs) and isinstance(other, Inputs):
        return own.shapes == other.shapes
    if isinstance(own, Region) and isinstance(other, Region):
        return own.body.code == other.body.code and own.settings == other.settings
    return False


def attribute(module: fx.GraphModule, name: str) -> Any:
    """Return what a module holds at a path."""
    path, _, last = name.rpartition(".")
    return getattr(module.get_submodule(path), last)
