"""One graph for `train()` and `eval()`: tracing writes down one mode, and what the other does otherwise is added."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxwidth.calls import Inputs, Outputs
from fxwidth.exporting import Region
from fxwidth.structures import difference
from fxwidth.tape import bind, evaluating, training, unbind

FLAG_MODULE = "fxwidth_training"
_FLAGS = ("train", "training")


class TrainingFlag(nn.Module):
    """Tells a graph whether it is in training mode."""

    def forward(self) -> bool:
        """Return the module's mode, which `train()` and `eval()` of the graph set."""
        return self.training


def by_mode(flag: bool, in_training: Any, in_eval: Any) -> Any:
    """Return the one or the other value."""
    return in_training if flag else in_eval


def in_both_modes(model: nn.Module, trace: Callable[[], fx.GraphModule]) -> fx.GraphModule:
    """Return a traced graph that follows `train()` and `eval()`.

    The model is traced in both modes. Where the two graphs differ in numbers and flags alone (dropout, batch norm), the
    graph chooses them by its mode. Otherwise it is the graph of the model's present mode, in which only dropout and
    batch norm follow the graph's mode.

    Args:
        model: the module. Its training mode is the modes its parts are in, where it is in training mode itself.
        trace: traces the model in the mode it is in.
    """
    present = trace()
    try:
        with evaluating(model) if model.training else training(model):
            other = trace()
    except Exception:
        other = None  # what the model does in that mode cannot be traced
    evaluated, trained = (other, present) if model.training else (present, other)
    if evaluated is not None and trained is not None and _Merger(evaluated, trained).run():
        result = evaluated
    else:
        result = present
        _follow_flags(result, model.training)
    result.training = model.training
    for part in result.children():
        if isinstance(part, (TrainingFlag, Inputs, Outputs, Region)):
            part.training = model.training
    return result


@dataclass(frozen=True)
class _Choice:
    """A number that differs between the modes."""

    in_training: Any
    in_eval: Any


class _Merger:
    """Adds to a graph of eval mode what one of training mode does otherwise, if that is numbers and counters alone."""

    def __init__(self, evaluated: fx.GraphModule, trained: fx.GraphModule) -> None:
        self._evaluated = evaluated
        self._trained = trained
        self._partner: dict[fx.Node, fx.Node] = {}
        self._arguments: dict[fx.Node, dict[str, Any]] = {}
        self._counters: list[tuple[fx.Node, fx.Node]] = []

    def run(self) -> bool:
        """Change the eval graph and return True, or return False when the graphs differ by more."""
        if not self._align():
            return False
        if not self._arguments and not self._counters:
            return True
        chooser = _Chooser(self._evaluated)
        for node, arguments in self._arguments.items():
            chooser.set_arguments(node, arguments)
        for counter, place in self._counters:
            name = str(counter.all_input_nodes[0].target)
            _copy_buffer(self._trained, self._evaluated, name)
            with self._evaluated.graph.inserting_before(place):
                counted = self._evaluated.graph.get_attr(name), chooser.node(_Choice(counter.args[1], 0))
                self._evaluated.graph.create_node("call_function", counter.target, counted)
        self._evaluated.graph.lint()
        self._evaluated.recompile()
        return True

    def _align(self) -> bool:
        attributes = {node.target: node for node in self._evaluated.graph.find_nodes(op="get_attr")}
        waiting = iter([node for node in self._evaluated.graph.nodes if node.op != "get_attr"])
        current = next(waiting)
        for node in self._trained.graph.nodes:
            if node.op == "get_attr":
                partner = attributes.get(node.target)
                if partner is not None and not self._same_attribute(str(node.target)):
                    return False
                if partner is not None:
                    self._partner[node] = partner
            elif self._match(current, node):
                self._partner[node] = current
                current = next(waiting, current)
            elif _is_counter(node):
                self._counters.append((node, current))
            else:
                return False
        return current.op == "output" and current in self._partner.values()

    def _same_attribute(self, name: str) -> bool:
        own, other = _attribute(self._evaluated, name), _attribute(self._trained, name)
        if own is other:
            return True
        both = isinstance(own, Tensor) and isinstance(other, Tensor) and own.shape == other.shape
        return both and not own.is_meta and torch.equal(own, other)

    def _match(self, node: fx.Node, other: fx.Node) -> bool:
        if node.op != other.op or node.target != other.target:
            return False
        if node.op == "call_module" and not _same_module(*(m.get_submodule(str(node.target)) for m in self._modules)):
            return False
        own, others = _named_arguments(node), _named_arguments(other)
        if own.keys() != others.keys():
            return False
        merged = {}
        for name, value in own.items():
            found, merged[name] = self._merge(value, others[name])
            if not found:
                return False
        if any(isinstance(leaf, _Choice) for leaf in torch.utils._pytree.tree_leaves(merged)):
            self._arguments[node] = merged
        return True

    @property
    def _modules(self) -> tuple[fx.GraphModule, fx.GraphModule]:
        return self._evaluated, self._trained

    def _merge(self, own: Any, other: Any) -> tuple[bool, Any]:
        """Return whether two arguments are the same but for numbers, and the argument with choices for these."""
        if isinstance(own, fx.Node) or isinstance(other, fx.Node):
            return isinstance(other, fx.Node) and self._partner.get(other) is own, own
        if isinstance(own, (list, tuple)) and isinstance(other, (list, tuple)) and len(own) == len(other):
            pairs = [self._merge(one, two) for one, two in zip(own, other, strict=True)]
            return all(same for same, _ in pairs), type(own)(value for _, value in pairs)
        if type(own) is type(other) and own == other:
            return True, own
        numbers = isinstance(own, (bool, int, float)) and isinstance(other, (bool, int, float))
        return numbers, _Choice(other, own)


class _Chooser:
    """Writes choices between the modes into a graph."""

    def __init__(self, module: fx.GraphModule) -> None:
        self._graph = module.graph
        self._known: dict[Any, fx.Node] = {}
        if not hasattr(module, FLAG_MODULE):
            module.add_submodule(FLAG_MODULE, TrainingFlag())
        placeholders = self._graph.find_nodes(op="placeholder")
        first = placeholders[-1].next if placeholders else next(iter(self._graph.nodes))
        with self._graph.inserting_before(first):
            self._flag = self._graph.call_module(FLAG_MODULE)

    def node(self, choice: _Choice) -> fx.Node:
        """Return the node of a choice."""
        key = (choice.in_training, type(choice.in_training), choice.in_eval, type(choice.in_eval))
        if choice.in_training is True and choice.in_eval is False:
            return self._flag
        if key not in self._known:
            with self._graph.inserting_after(self._flag):
                self._known[key] = self._graph.call_function(by_mode, (self._flag, choice.in_training, choice.in_eval))
        return self._known[key]

    def set_arguments(self, node: fx.Node, arguments: Mapping[str, Any]) -> None:
        """Give a node arguments with choices in them."""
        filled = torch.utils._pytree.tree_map(
            lambda leaf: self.node(leaf) if isinstance(leaf, _Choice) else leaf, dict(arguments)
        )
        _set_named_arguments(node, filled)


def _follow_flags(module: fx.GraphModule, present: bool) -> None:
    """Let the flags of dropout and batch norm, and the counters of the latter, follow the mode."""
    changes = []
    for node in module.graph.nodes:
        if node.op == "call_function":
            named = _named_arguments(node)
            flags = [name for name in _FLAGS if named.get(name) is present and _is_stochastic(node)]
            changes += [(node, {**named, name: _Choice(True, False)}) for name in flags]
            if _is_counter(node):
                changes.append((node, {**named, "other": _Choice(named["other"], 0)}))
    if not changes:
        return
    chooser = _Chooser(module)
    for node, arguments in changes:
        chooser.set_arguments(node, arguments)
    module.graph.lint()
    module.recompile()


def _is_stochastic(node: fx.Node) -> bool:
    name = str(getattr(node.target, "__name__", node.target))
    return "dropout" in name or "norm" in name


def _is_counter(node: fx.Node) -> bool:
    """Tell whether a node counts the batches of a batch norm."""
    if node.target is not torch.ops.aten.add_.Tensor or node.users or len(node.args) != 2:
        return False
    buffer, step = node.args
    return isinstance(buffer, fx.Node) and buffer.op == "get_attr" and isinstance(step, int)


def _named_arguments(node: fx.Node) -> dict[str, Any]:
    """Return a node's arguments by name, defaults filled in where a signature is known."""
    if isinstance(node.target, torch._ops.OpOverload):
        return bind(node.target, node.args, node.kwargs)
    signature = _signature(node.target) if node.op == "call_function" else None
    if signature is not None:
        try:
            bound = signature.bind(*node.args, **node.kwargs)
        except TypeError:
            bound = None
        if bound is not None:
            bound.apply_defaults()
            return dict(bound.arguments)
    return {**{str(i): value for i, value in enumerate(node.args)}, **node.kwargs}


def _set_named_arguments(node: fx.Node, arguments: dict[str, Any]) -> None:
    if isinstance(node.target, torch._ops.OpOverload):
        node.args, node.kwargs = unbind(node.target, arguments)
        return
    # Named in order: what was positional stays so, and a default is written out only where it has become a choice.
    names, count = list(arguments), len(node.args)
    named = {name: arguments[name] for name in names[count:]}
    node.args = tuple(arguments[name] for name in names[:count])
    node.kwargs = {name: value for name, value in named.items() if name in node.kwargs or isinstance(value, fx.Node)}


@cache
def _signature(function: Any) -> inspect.Signature | None:
    """Return the signature of a Python function all of whose arguments can be passed by name."""
    if not inspect.isfunction(function):
        return None
    signature = inspect.signature(function)
    plain = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    return signature if all(p.kind in plain for p in signature.parameters.values()) else None


def _same_module(own: nn.Module, other: nn.Module) -> bool:
    if own is other:
        return True
    if isinstance(own, Outputs) and isinstance(other, Outputs):
        return difference(own.structure, other.structure) is None
    if isinstance(own, Inputs) and isinstance(other, Inputs):
        return own.shapes == other.shapes and own.guards == other.guards
    if isinstance(own, Region) and isinstance(other, Region):
        return own.body.code == other.body.code and own.settings == other.settings
    return False


def _attribute(module: fx.GraphModule, name: str) -> Any:
    path, _, attribute = name.rpartition(".")
    return getattr(module.get_submodule(path), attribute)


def _copy_buffer(source: fx.GraphModule, target: fx.GraphModule, name: str) -> None:
    path, _, attribute = name.rpartition(".")
    holder: nn.Module = target
    for part in path.split(".") if path else []:
        if not hasattr(holder, part):
            holder.add_module(part, nn.Module())
        holder = getattr(holder, part)
    if not hasattr(holder, attribute):
        holder.register_buffer(attribute, _attribute(source, name))
