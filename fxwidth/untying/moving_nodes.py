"""Which nodes only move entries about, by numbers that the model holds, and which make such numbers."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from fxwidth.analysis.result import Analysis
from fxwidth.recording.tape import OpCall
from fxwidth.rules.family_table import as_family, is_move
from fxwidth.rules.op_families import ChannelCopies, LookUp, Move, Movement
from fxwidth.runtime.module_state import is_plain_layer
from fxwidth.runtime.pytrees import deep_tensors

aten = torch.ops.aten

# A copy to another dtype is no copy of the same numbers; what strides show depends on the layout in memory; and what
# has no gradient does not learn.
_OTHER_MOVES = (Move.CAST, Move.STRIDES, Move.RESHAPE_BY_STRIDES)
_WITHOUT_GRADIENT = frozenset({"detach", "detach_copy"})


@dataclass(frozen=True)
class Moving:
    """The nodes of a graph that only move entries about.

    Attributes:
        nodes: with a signal among what they take: their results are entries of it in other places, or zeros.
        constants: with none: what they make is the same for all inputs.
    """

    nodes: frozenset[fx.Node] = field(default=frozenset())
    constants: frozenset[fx.Node] = field(default=frozenset())


def moving_nodes(analysis: Analysis) -> Moving:
    """Find the nodes that only move entries about."""
    # Whole numbers that the model holds do not change in training.
    fixed = {entry.fake for entry in analysis.parameters.values() if not entry.fake.dtype.is_floating_point}
    nodes, constants = set[fx.Node](), set[fx.Node]()
    for node in analysis.module.graph.nodes:
        made = deep_tensors(analysis.node_values.get(node.name))
        if node.op in ("placeholder", "output") or not made or node.name in analysis.effects:
            continue
        calls = analysis.calls_of(node.name)
        if node.op == "get_attr":
            if fixed.issuperset(made) or not _is_known(analysis, made):
                fixed.update(made)
                constants.add(node)
            continue
        of_signals = [call for call in calls if not _makes_constants(call, fixed)]
        if not of_signals:
            if calls and _is_open(analysis, node):
                constants.add(node)
        elif _is_open(analysis, node) and all(_moves(call, fixed) for call in of_signals):
            nodes.add(node)
    return Moving(frozenset(nodes), frozenset(constants))


def _is_known(analysis: Analysis, tensors: list[Tensor]) -> bool:
    return any(tensor in analysis.names for tensor in tensors)


def _is_open(analysis: Analysis, node: fx.Node) -> bool:
    """Tell whether a node is nothing but the ops that it has run."""
    return node.op != "call_module" or is_plain_layer(analysis.module.get_submodule(str(node.target)))


def _makes_constants(call: OpCall, fixed: set[Tensor]) -> bool:
    """Tell whether an op makes what is the same for all inputs, and take note of it."""
    random = torch.Tag.nondeterministic_seeded in call.func.tags
    if random or call.func._schema.is_mutable or any(t not in fixed and not _is_literal(t) for t in call.inputs):
        return False
    fixed.update(call.outputs)
    return True


def _is_literal(tensor: Tensor) -> bool:
    """Tell whether a tensor on the tape is one that the code holds, which stands for itself."""
    return not torch._subclasses.fake_tensor.is_fake(tensor)


def _moves(call: OpCall, fixed: set[Tensor]) -> bool:
    if call.func._schema.is_mutable or call.name in _WITHOUT_GRADIENT:
        return False
    look_up = as_family(call.func, LookUp)
    if look_up is not None:
        return all(tensor in fixed or _is_literal(tensor) for tensor in deep_tensors(call.arguments[look_up.index]))
    if as_family(call.func, Movement) is not None:
        return not is_move(call.func, *_OTHER_MOVES)
    return as_family(call.func, ChannelCopies) is not None or call.func.overloadpacket is aten.constant_pad_nd


def reads_by_number(call: OpCall) -> bool:
    """Tell whether an op names entries of a dim by their numbers, for which the dim is pinned."""
    return as_family(call.func, LookUp) is not None or is_move(call.func, Move.REORDERING)
