"""Replacing a node by the ATen ops it must run: the last rung of the repair ladder, and one that always exists."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from fxwidth.analysis.result import Analysis
from fxwidth.axes.index_maps import IndexMaps
from fxwidth.errors import FxwidthError
from fxwidth.recording.composite_ops import PLAIN_FUNCTIONS
from fxwidth.recording.layouts import for_any_layout
from fxwidth.recording.tape import OpCall, unbind
from fxwidth.rewriting.free_sizes import Following, Followings, leaves_of
from fxwidth.rewriting.training_behaviour import Kept, Step
from fxwidth.rewriting.training_runs import Dropout
from fxwidth.rules.registry import resized_call
from fxwidth.runtime.pytrees import deep_tensors


def as_tuple(*values: Any) -> tuple[Any, ...]:
    """Return the arguments as a tuple: the result of a lowered node with several outputs."""
    return values


def nothing() -> None:
    """Return nothing: the result of a lowered node that only writes."""


class Lowering:
    """Lowers nodes of one graph."""

    def __init__(
        self,
        analysis: Analysis,
        maps: IndexMaps,
        graph: fx.Graph,
        add_constant: Callable[[Tensor], str],
        add_dropout: Callable[[Dropout], str],
    ) -> None:
        self._analysis = analysis
        self._maps = maps
        self._larger = maps.with_larger_batch()
        self._graph = graph
        self._add_constant = add_constant
        self._add_dropout = add_dropout

    def lower(
        self,
        node: fx.Node,
        old_name: str,
        old_values: dict[fx.Node, Any],
        in_training: tuple[Sequence[Step], Any] | None = None,
        sizes: Followings | None = None,
    ) -> tuple[fx.Node, list[fx.Node]]:
        """Insert the prescribed ops before a node; return the node of its result and all inserted nodes, in order.

        Args:
            node: the node to be replaced.
            old_name: its name on the tape.
            old_values: what nodes were on the tape.
            in_training: what it does in training and the result of that, where it differs from evaluation.
            sizes: how the numbers in its ops follow sizes of what it takes.
        """
        last = node.prev
        self._known: dict[int, fx.Node] = {}
        calls = self._analysis.calls_of(old_name)
        # All or none: a part of the numbers of another size would make something else of it.
        self._followings = sizes if sizes and all(self._can_follow(call, sizes[call.index]) for call in calls) else {}
        with self._graph.inserting_before(node):
            for source in node.all_input_nodes:
                self._remember(old_values[source], source)
            if in_training is None:
                for call in calls:
                    self._emit(call)
                value = self._analysis.node_values[old_name]
            else:
                steps, value = in_training
                for step in steps:
                    self._emit_step(step)
            result = self._result(value, old_name)
        inserted, current = [], last.next
        while current is not node:
            inserted.append(current)
            current = current.next
        return result, inserted

    def _remember(self, value: Any, node: fx.Node) -> None:
        if isinstance(value, Tensor):
            self._known.setdefault(id(value), node)
        elif isinstance(value, (tuple, list)):
            for i, part in enumerate(value):
                if isinstance(part, (Tensor, tuple, list)) and id(part) not in self._known:
                    self._remember(part, self._graph.call_function(operator.getitem, (node, i)))

    def _emit_step(self, step: Step) -> None:
        """Insert one step of a module in training: what evaluation prescribes, on the tensors that training has."""
        if isinstance(step.call, Kept):
            self._known[id(step.call.result)] = self._graph.call_module(
                step.call.path, (self._tensor(step.call.given),)
            )
        elif step.twin is None:
            assert step.dropout is not None
            source = self._tensor(step.call.arguments["self"])
            self._known[id(step.call.result)] = self._dropped(source, step.dropout)
        else:
            for own, twin in zip(step.call.inputs, step.twin.inputs, strict=True):
                self._known[id(twin)] = self._tensor(own)
            if step.dropout is None:
                self._emit(step.twin)
            else:
                self._emit_attention(step.twin, step.dropout)
            for own, twin in zip(step.call.outputs, step.twin.outputs, strict=True):
                self._known[id(own)] = self._known[id(twin)]

    def _dropped(self, source: fx.Node, dropout: Dropout) -> fx.Node:
        return self._graph.call_module(self._add_dropout(dropout), (source,))

    def _emit_attention(self, call: OpCall, dropout: Dropout) -> None:
        """Insert attention with a dropout of its weights, which a module must do for it to follow the mode."""
        _, arguments = resized_call(call, self._maps)
        query, key, value = (self._tensor(arguments[name]) for name in ("query", "key", "value"))
        if arguments["enable_gqa"]:
            heads = {name: self._maps.size(call.axes[arguments[name]][-3]) for name in ("query", "key", "value")}
            key = self._call(torch.repeat_interleave, key, heads["query"] // heads["key"], -3)
            value = self._call(torch.repeat_interleave, value, heads["query"] // heads["value"], -3)
        scaled = self._call(torch.mul, query, arguments["scale"])
        scores = self._call(torch.matmul, scaled, self._call(torch.transpose, key, -2, -1))
        scores = self._masked(scores, arguments)
        weights = self._call(torch.ops.aten._safe_softmax.default, scores, -1)
        self._known[id(call.result)] = self._call(torch.matmul, self._dropped(weights, dropout), value)

    def _masked(self, scores: fx.Node, arguments: dict[str, Any]) -> fx.Node:
        mask = arguments["attn_mask"]
        if arguments["is_causal"]:
            ones = self._graph.call_function(torch.ones_like, (scores,), {"dtype": torch.bool})
            scores = self._call(torch.masked_fill, scores, self._call(torch.triu, ones, 1), -math.inf)
        if mask is None:
            return scores
        if mask.dtype != torch.bool:
            return self._call(torch.add, scores, self._tensor(mask))
        hidden = self._call(torch.logical_not, self._tensor(mask))
        return self._call(torch.masked_fill, scores, hidden, -math.inf)

    def _call(self, function: Callable[..., Any], *args: Any) -> fx.Node:
        return self._graph.call_function(function, args)

    def _emit(self, call: OpCall) -> None:
        if call.func.overloadpacket is torch.ops.aten._assert_tensor_metadata:
            return
        func, arguments = resized_call(call, self._maps)
        _, larger = resized_call(call, self._larger)
        sizes = _by_argument(call, arguments, self._followings.get(call.index, ())) or {}
        arguments = {
            name: self._argument(value, larger[name], iter(sizes.get(name, ()))) for name, value in arguments.items()
        }
        contiguous = partial(self._call, torch.ops.aten.contiguous.default)
        func, arguments = for_any_layout(func, arguments, contiguous)
        args, kwargs = unbind(func, arguments)
        # An overload makes fixed numbers of sizes where `torch.jit` traces them; the function does not.
        function = torch.reshape if func is torch.ops.aten.reshape.default else PLAIN_FUNCTIONS.get(func, func)
        node = self._graph.call_function(function, args, kwargs)
        self._remember(call.result, node)
        if isinstance(call.result, Tensor):
            self._known[id(call.result)] = node

    def _argument(self, value: Any, larger: Any, sizes: Iterator[tuple[int, Following] | None]) -> Any:
        if isinstance(value, (list, tuple)):
            return [self._argument(own, other, sizes) for own, other in zip(value, larger, strict=True)]
        followed = next(sizes, None)
        if isinstance(value, Tensor):
            return self._tensor(value)
        if not isinstance(value, int) or isinstance(value, bool):
            return value
        if followed is not None:
            return self._with_sizes(value, larger, *followed)
        return self._with_batch(value, larger - value) if value != larger else value

    def _can_follow(self, call: OpCall, followings: Sequence[Following | None]) -> bool:
        """Tell whether the numbers of an op follow sizes as they did, whatever has become of widths in them."""
        if not any(followings):
            return True
        _, arguments = resized_call(call, self._maps)
        _, larger = resized_call(call, self._larger)
        sizes = _by_argument(call, arguments, followings)
        if sizes is None:
            return False
        for name, nested in sizes.items():
            own, other = leaves_of(arguments[name]), leaves_of(larger[name])
            for value, grown, how in zip(own, other, nested, strict=True):
                if how is not None and not self._is_followed(value, grown, *how):
                    return False
        return True

    def _is_followed(self, value: int, larger: int, before: int, following: Following) -> bool:
        if not following.is_multiple:
            return value == larger == before
        count, rest = divmod(value, self._divisor(following, value != larger))
        batch = self._analysis.batch
        has_batch = value == larger or (batch is not None and value * (batch.size + 1) == larger * batch.size)
        return count > 0 and not rest and has_batch

    def _divisor(self, following: Following, has_batch: bool) -> int:
        sizes = [one.size for one in following.sizes]
        return math.prod([*sizes, self._analysis.batch.size] if has_batch and self._analysis.batch else sizes)

    def _with_sizes(self, value: int, larger: int, before: int, following: Following) -> fx.Node:
        """Compute a number from the sizes of the moment."""
        node, *others = [self._graph.call_method("size", (one.source, one.dim)) for one in following.sizes]
        if not following.is_multiple:
            return self._plus(node, before - following.sizes[0].size)
        for other in [*others, self._batch_node()] if value != larger else others:
            node = self._call(operator.mul, node, other)
        count = value // self._divisor(following, value != larger)
        return self._call(operator.mul, node, count) if count != 1 else node

    def _plus(self, node: fx.Node, offset: int) -> fx.Node:
        return self._call(operator.add, node, offset) if offset else node

    def _with_batch(self, value: int, slope: int) -> fx.Node:
        """Compute a size that is linear in the batch from the batch of the moment."""
        batch = self._analysis.batch
        assert batch is not None
        node = self._batch_node()
        if slope != 1:
            node = self._graph.call_function(operator.mul, (node, slope))
        return self._plus(node, value - slope * batch.size)

    def _batch_node(self) -> fx.Node:
        inputs = [tensor for tensor in deep_tensors(self._analysis.inputs) if self._has_batch(tensor)]
        for node in self._graph.nodes:
            value = self._analysis.node_values.get(node.name)
            if any(value is tensor for tensor in inputs):
                return self._graph.call_method("size", (node, 0))
        raise FxwidthError("the graph has no tensor input to take the batch size from.")

    def _has_batch(self, tensor: Tensor) -> bool:
        axes = self._analysis.axes_of(tensor)
        return bool(axes) and any(factor.is_batch for factor in self._analysis.space.factors(axes[0]))

    def _tensor(self, value: Tensor) -> fx.Node:
        known = self._known.get(id(value))
        if known is None:
            name = self._analysis.names.get(value) or self._add_constant(value)
            known = self._known[id(value)] = self._graph.get_attr(name)
        return known

    def _result(self, value: Any, name: str) -> fx.Node:
        if value is None:
            return self._graph.call_function(nothing)
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, (tuple, list)):
            parts = [None if part is None else self._result(part, name) for part in value]
            return self._graph.call_function(as_tuple, tuple(parts))
        raise FxwidthError(
            f"node {name!r} returns a {type(value).__name__}, which cannot be rebuilt from ATen ops; "
            "trace the model so that this module is taken apart, or keep its groups with keep=."
        )


def _by_argument(
    call: OpCall, resized: Mapping[str, Any], followings: Sequence[Following | None]
) -> dict[str, list[Any]] | None:
    """Return, for each argument, what its numbers were and how they follow sizes, in order; None for those that stay.

    None as a whole where the new sizes take other arguments.
    """
    each = iter(followings)
    found: dict[str, list[Any]] = {}
    for name, value in call.arguments.items():
        leaves = leaves_of(value)
        if name not in resized or len(leaves_of(resized[name])) != len(leaves):
            return None
        found[name] = [None if how is None else (leaf, how) for leaf, how in zip(leaves, each, strict=False)]
    return found if found.keys() == resized.keys() else None
