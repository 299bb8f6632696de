"""Attention that a graph has in parts and a class as one op.

A graph that has been resized may do attention as products, softmax and dropout, each a node, for its dropout to follow
the mode. A class that runs `scaled_dot_product_attention` does the same by one op. The parts are recognised by how
tensors go through them, and by their dropout, which is a module that the class does not have; they are put together
here, so that calls can be compared. That the values are the same is checked when they are written back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch import Tensor, fx
from torch.nn import functional

from fxwidth.recording import composite_ops
from fxwidth.recording.tape import OpCall

_MASKS = frozenset({"masked_fill", "add", "logical_not", "ones_like", "detach", "triu"})
_PARTS = _MASKS | frozenset({"mul", "transpose", "expand", "view", "_unsafe_view", "clone", "bmm", "_safe_softmax"})


def with_whole_attention(calls: Sequence[OpCall], graph: fx.Graph, parts: Set[str]) -> list[OpCall]:
    """Return the ops of a tape, those of attention in parts as one.

    Args:
        calls: the ops, in order.
        graph: whose tape it is.
        parts: the paths of the modules that the class has itself.
    """
    outside = (node for node in graph.nodes if node.op == "call_module" and node.target not in parts)
    added = {node.args[0].name for node in outside if node.args and isinstance(node.args[0], fx.Node)}
    if not added:
        return list(calls)
    writers = {id(output): call for call in calls for output in call.outputs}
    readers = {id(tensor): call for call in calls for tensor in call.inputs}
    result = list(calls)
    for softmax in calls:
        if softmax.name == "_safe_softmax" and softmax.node in added:
            found = _Parts(softmax, writers, readers).whole(result)
            if found is not None:
                start, end, whole = found
                result[start:end] = [whole]
    return result


@contextmanager
def attention_in_parts() -> Iterator[None]:
    """Let attention with dropout, as a class does it in training by one op, be done in the parts that a graph has."""
    with patch.object(composite_ops, "FUSED_ATTENTION", _in_parts):
        yield


def _in_parts(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if dropout_p == 0.0:
        return _fused(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if enable_gqa:
        key, value = (one.repeat_interleave(query.shape[-3] // one.shape[-3], -3) for one in (key, value))
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-2, -1)
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
    if attn_mask is not None:
        is_boolean = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(attn_mask.logical_not(), -math.inf) if is_boolean else scores + attn_mask
    weights = torch.ops.aten._safe_softmax.default(scores, -1)
    return functional.dropout(weights, dropout_p) @ value


_fused = composite_ops.FUSED_ATTENTION


@dataclass(frozen=True)
class _Parts:
    """The ops around a softmax of attention weights."""

    softmax: OpCall
    writers: dict[int, OpCall]
    readers: dict[int, OpCall]

    def whole(self, calls: Sequence[OpCall]) -> tuple[int, int, OpCall] | None:
        """Return from where to where among calls the parts are, and the op that they are together."""
        scores, is_causal = self.softmax.inputs[0], False
        masks: list[Tensor] = []
        while (writer := self._writer(scores, "masked_fill", "add")) is not None:
            mask = writer.inputs[1]
            before = self._writer(mask, "logical_not")
            if writer.name == "masked_fill" and before is None:
                if is_causal or not self._is_above_diagonal(mask):
                    return None
                is_causal = True
            else:
                masks.append(mask if before is None else before.inputs[0])
            scores = writer.inputs[0]
        product = self._writer(scores, "bmm")
        after = self._reader(self.softmax.outputs[0], "bmm")
        if product is None or after is None or len(masks) > 1:
            return None
        scaled = self._writer(self._before(product.inputs[0]), "mul")
        turned = self._writer(self._before(product.inputs[1]), "transpose")
        value = self._before(after.inputs[1])
        last = self.readers.get(id(after.outputs[0]))
        if scaled is None or turned is None or last is None or last.name not in ("view", "_unsafe_view"):
            return None
        start, end = calls.index(scaled), calls.index(last) + 1
        if any(call.name not in _PARTS for call in calls[start:end]):
            return None
        whole = OpCall(
            index=last.index,
            func=torch.ops.fxwidth.attention.default,
            arguments={
                "query": scaled.inputs[0],
                "key": turned.inputs[0],
                "value": value,
                "attn_mask": masks[0] if masks else None,
                "dropout_p": 0.0,
                "is_causal": is_causal,
                "scale": scaled.arguments["other"],
                "enable_gqa": False,
            },
            result=last.result,
            node=last.node,
            part=last.part,
            axes={tensor: axes for call in calls[start:end] for tensor, axes in call.axes.items()},
            output_axes=last.output_axes,
            outputs=list(last.outputs),
        )
        return start, end, whole

    def _is_above_diagonal(self, mask: Tensor) -> bool:
        above = self._writer(mask, "triu")
        if above is None or above.arguments["diagonal"] != 1:
            return False
        return self._writer(above.inputs[0], "ones_like") is not None

    def _writer(self, tensor: Tensor, *names: str) -> OpCall | None:
        """Return the op of one of some names that gave a tensor, perhaps under another shape."""
        call = self.writers.get(id(self._before(tensor)))
        return call if call is not None and call.name in names else None

    def _before(self, tensor: Tensor) -> Tensor:
        """Return a tensor as it was before it was put into the shape for a product."""
        while (call := self.writers.get(id(tensor))) is not None and call.name in _SHAPING:
            tensor = call.inputs[0]
        return tensor

    def _reader(self, tensor: Tensor, name: str) -> OpCall | None:
        while (call := self.readers.get(id(tensor))) is not None and call.name in _SHAPING:
            tensor = call.outputs[0]
        return call if call is not None and call.name == name else None


# What a product of matrices does to its operands and its result, and what a mask is given through.
_SHAPING = frozenset({"expand", "view", "_unsafe_view", "clone", "reshape", "detach"})
