"""Nodes without which a graph does the same: results that nobody uses, and nodes that give what they are given."""

from __future__ import annotations

import builtins
import copy
import math
import operator
from typing import Any

import torch
from torch import SymBool, SymFloat, SymInt, Tensor, fx, nn
from torch._ops import OpOverload

from fxwidth.analysis.result import Analysis
from fxwidth.frontends.train_eval_merge import TrainingFlag, by_mode
from fxwidth.recording.graph_meta import refuse_groups_of_one
from fxwidth.recording.tape import OpCall
from fxwidth.runtime.module_state import walk
from fxwidth.runtime.reachable_state import has_global_hooks
from fxwidth.simplification.called_layers import is_bare
from fxwidth.simplification.rebuilding import rebuild
from fxwidth.tracing.analyze import analyze_module

aten = torch.ops.aten

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_DROPOUT_FUNCTIONS = (
    *(nn.functional.dropout, nn.functional.dropout1d, nn.functional.dropout2d, nn.functional.dropout3d),
    *(nn.functional.alpha_dropout, nn.functional.feature_alpha_dropout, torch.dropout),
    *(aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default),
    aten.feature_alpha_dropout.default,
)
_WITH_MODES = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase, nn.RReLU)
# Functions in Python that compute, and do nothing else.
_PLAIN_CODE = frozenset({operator.__name__, "_operator", math.__name__, builtins.__name__})
_NOT_PLAIN = frozenset({"print", "setattr", "delattr", "exec", "eval", "open", "input", "next", "__import__"})
_OF_TORCH = frozenset({"torch", "torch.functional", "torch.nn.functional", "torch._C", "torch._C._nn"})
_NAMESPACES = frozenset({"aten", "prims"})
_LOOKS = frozenset({"size", "dim", "numel", "stride", "is_contiguous", "nelement", "ndimension"})
_VALUES = (Tensor, bool, int, float, complex, str, torch.Size, torch.dtype, torch.device, SymInt, SymFloat, SymBool)


def remove_needless(module: fx.GraphModule, by: str, *, for_inference: bool) -> int:
    """Take nodes out of a graph without which it does the same, and return how many these were.

    Args:
        module: the graph; whoever calls this has a transaction of it under way.
        by: the name of the pass that does it.
        for_inference: whether it need do the same in evaluation alone.

    Raises:
        FxwidthError: the graph cannot be analysed, or a group has been given width one.
    """
    analysis = analyze_module(module)
    graph = copy.deepcopy(module.graph)
    nodes = dict(zip(graph.nodes, module.graph.nodes, strict=True))
    removed = 0
    for node, own in list(nodes.items()):
        if _same_as_given(analysis, own, for_inference):
            given = _signal(node)
            assert given is not None
            node.replace_all_uses_with(given)
            graph.erase_node(node)
            del nodes[node]
            removed += 1
    for node, own in reversed(list(nodes.items())):
        if not node.users and _has_no_effect(analysis, own, for_inference):
            graph.erase_node(node)
            removed += 1
    if removed:
        refuse_groups_of_one(module, by)
        rebuild(module, graph, by)
    return removed


def _same_as_given(analysis: Analysis, node: fx.Node, for_inference: bool) -> bool:
    """Tell whether a node gives what it is given as it is, in evaluation and, where it matters, in training."""
    signal = _signal(node)
    if signal is None or not _is_identity(analysis, node, for_inference):
        return False
    # In evaluation it must have been the very same tensor.
    value = analysis.node_values.get(node.name)
    return isinstance(value, Tensor) and value is analysis.node_values.get(signal.name)


def _signal(node: fx.Node) -> fx.Node | None:
    signal = node.args[0] if node.args else node.kwargs.get("input")
    return signal if isinstance(signal, fx.Node) else None


def _is_identity(analysis: Analysis, node: fx.Node, for_inference: bool) -> bool:
    if node.op == "call_module":
        module = analysis.module.get_submodule(str(node.target))
        if has_global_hooks() or not _is_without_hooks(module):
            return False
        is_off = isinstance(module, _DROPOUTS) and (module.p == 0.0 or (for_inference and not module.training))
        return type(module) is nn.Identity or (type(module) in _DROPOUTS and is_off)
    if node.op != "call_function" or node.target not in _DROPOUT_FUNCTIONS:
        return False
    arguments = _arguments_of_dropout(node)
    if arguments.get("p") == 0.0:
        return True
    training = arguments.get("training", arguments.get("train", True))
    if isinstance(training, fx.Node):
        # A flag that tells the mode.
        return for_inference and analysis.node_values.get(training.name) is False
    return training is False


def _arguments_of_dropout(node: fx.Node) -> dict[str, Any]:
    return dict(zip(("input", "p", "training"), node.args, strict=False)) | dict(node.kwargs)


def _is_without_hooks(module: nn.Module) -> bool:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return "forward" not in vars(module) and not any(vars(module)[name] for name in names)


def _has_no_effect(analysis: Analysis, node: fx.Node, for_inference: bool) -> bool:
    """Tell whether a node only computes what it returns; what is not known for sure has an effect."""
    if node.op == "get_attr":
        return True
    if node.op not in ("call_function", "call_method", "call_module"):
        return False
    if node.name in analysis.effects or node.name in analysis.keeping:
        return False
    calls = list(analysis.calls_of(node.name))
    if not for_inference:
        calls += analysis.training_calls.get(node.name, [])
        # Of ops that are told the mode, batch norm among them, the tape has what they do in evaluation.
        if any(_tells_mode(analysis, one) for one in node.all_input_nodes):
            return False
    if not all(map(_only_computes, calls)):
        return False
    if node.op == "call_module":
        return _is_known_module(analysis, node, for_inference)
    if not _is_value(analysis.node_values.get(node.name)):
        # Assertions and what switches a mode return nothing, and contexts and handles no numbers.
        return False
    return _is_known_function(node, calls)


def _tells_mode(analysis: Analysis, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(analysis.module.get_submodule(str(node.target)), TrainingFlag)
    return node.target is by_mode


def _only_computes(call: OpCall) -> bool:
    random = torch.Tag.nondeterministic_seeded in call.func.tags
    return not call.func._schema.is_mutable and not random and bool(call.outputs)


def _is_known_module(analysis: Analysis, node: fx.Node, for_inference: bool) -> bool:
    module = analysis.module.get_submodule(str(node.target))
    if isinstance(module, TrainingFlag):
        return True
    if has_global_hooks():
        return False
    # In training a dropout draws numbers that others would then draw, and a batch norm counts, though nobody reads it.
    if isinstance(module, _WITH_MODES) and (module.training or not for_inference):
        return False
    return is_bare(module) and not any(name for name, _ in walk(module) if name)


def _is_value(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_value, value))
    return isinstance(value, _VALUES)


def _is_known_function(node: fx.Node, calls: list[OpCall]) -> bool:
    target: Any = node.target
    if node.is_impure():
        return False
    if node.op == "call_method":
        # By its name in place; all that computes anything is on the tape, or asks for a size.
        return not str(target).endswith("_") and (bool(calls) or str(target) in _LOOKS)
    if isinstance(target, OpOverload):
        return target.namespace in _NAMESPACES and bool(target._schema.returns) and bool(calls)
    if target is by_mode:
        return True
    module, name = getattr(target, "__module__", None) or "", getattr(target, "__name__", "")
    if module in _PLAIN_CODE:
        # In place they are called iadd, imul and so on.
        return name not in _NOT_PLAIN and not (name.startswith("i") and hasattr(operator, name[1:]))
    # Functions in C++ do not all say of which module they are.
    is_torch = module in _OF_TORCH or (not module and getattr(torch, name, None) is target)
    return is_torch and bool(calls)
