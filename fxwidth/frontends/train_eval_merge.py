"""Adds to a graph of evaluation what the model does otherwise in training: numbers by mode, and parts that are run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fxwidth.frontends.alignment import Alignment, Choice, TrainingRegion
from fxwidth.frontends.call_signature import Inputs
from fxwidth.frontends.node_arguments import named_arguments, replaced, set_named_arguments
from fxwidth.frontends.train_eval_alignment import attribute, is_counter
from fxwidth.runtime.module_state import GraphPart
from fxwidth.runtime.tensor_slots import register_at

FLAG_MODULE = "fxwidth_training"
_FLAGS = ("train", "training", "use_input_stats")
_RECURRENT = ("lstm.", "gru.", "rnn_tanh.", "rnn_relu.")  # with a dropout between layers
# What gives back its operand as it is: what training does to the order in memory, evaluation can do too.
_NEUTRAL = (torch.ops.aten.contiguous.default,)


class TrainingFlag(GraphPart):
    """Tells a graph whether it is in training mode."""

    def forward(self) -> bool:
        """Return the module's mode, which `train()` and `eval()` of the graph set."""
        return self.training


class InTraining(GraphPart):
    """A part of a graph that is run in training alone.

    Args:
        body: the part.
        for_effects: whether it is run for what it writes to: no dead code then, although nobody uses its result.
    """

    def __init__(self, body: fx.GraphModule, *, for_effects: bool = False) -> None:
        super().__init__()
        self.body = body
        self._is_impure = for_effects

    def forward(self, value: Any, *operands: Any) -> Any:
        """Return what the part makes of the operands in training, and in evaluation the value as it is."""
        return self.body(*operands) if self.training else value


def by_mode(flag: bool, in_training: Any, in_eval: Any) -> Any:
    """Return the one or the other value."""
    return in_training if flag else in_eval


class Writer:
    """Adds to a graph of evaluation what one of training does otherwise."""

    def __init__(self, evaluated: fx.GraphModule, trained: fx.GraphModule, alignment: Alignment) -> None:
        self._evaluated = evaluated
        self._graph = evaluated.graph
        self._trained = trained
        self._alignment = alignment
        self._written: dict[TrainingRegion, fx.Node] = {}

    def run(self) -> None:
        """Change the graph of evaluation."""
        _take_guards(self._evaluated, self._trained)
        found = self._alignment
        if not found.arguments and not found.counters and all(region.result is not None for region in found.regions):
            return  # sizes that nobody uses
        chooser = _Chooser(self._evaluated)
        for region in found.regions:
            self._written[region] = self._write(region, region.result)
        for node, arguments in found.arguments.items():
            filled = replaced(arguments, self._filled)
            chooser.set_arguments(node, filled)
        for counter, place in found.counters:
            name = str(counter.all_input_nodes[0].target)
            share(self._trained, self._evaluated, name)
            with self._graph.inserting_before(place):
                counted = self._graph.get_attr(name), chooser.node(Choice(counter.args[1], 0))
                self._graph.create_node("call_function", counter.target, counted)
        chooser.done()

    def _filled(self, leaf: Any) -> Any:
        return self._written[leaf] if isinstance(leaf, TrainingRegion) else leaf

    def _write(self, region: TrainingRegion, result: fx.Node | None) -> fx.Node:
        """Insert the nodes of a region; return that of its value."""
        with self._graph.inserting_before(region.before):
            both = region.instead_of is None or (region.nodes and all(node.target in _NEUTRAL for node in region.nodes))
            if result is not None and both:
                return self._graph.node_copy(result, self._value)
            if not region.nodes and region.instead_of is not None and region.instead_of.target in _NEUTRAL:
                return region.instead_of
            body = fx.Graph()
            known: dict[fx.Node, fx.Node] = {}
            operands = []
            for source in _operands(region):
                operands.append(self._value(source))
                known[source] = body.placeholder(source.name)
            for node in region.nodes:
                known[node] = body.node_copy(node, known.__getitem__)
            body.output(None if result is None else known[result])
            number = sum(isinstance(part, InTraining) for part in self._evaluated.children())
            name = f"fxwidth_in_training_{number}"
            part = InTraining(fx.GraphModule(self._trained, body, "Body"), for_effects=result is None)
            self._evaluated.add_submodule(name, part)
            return self._graph.call_module(name, (region.instead_of, *operands))

    def _value(self, source: fx.Node) -> fx.Node:
        """Return the node that is in training what a node of the graph of training is."""
        if source.op == "get_attr":
            return self._graph.get_attr(share(self._trained, self._evaluated, str(source.target)))
        written = (node for region, node in self._written.items() if region.result is source and region.nodes)
        return self._alignment.partner.get(source) or next(written)


def _take_guards(evaluated: fx.GraphModule, trained: fx.GraphModule) -> None:
    """Let the inputs of a graph be those that the model takes in the graph's mode."""
    for name, part in evaluated.named_children():
        other = getattr(trained, name, None)
        if isinstance(part, Inputs) and isinstance(other, Inputs) and part.guards != other.guards:
            part.guards_in_training = other.guards


def _operands(region: TrainingRegion) -> list[fx.Node]:
    """Return what the nodes of a region take from outside of it."""
    if not region.nodes:
        return [] if region.result is None else [region.result]
    inside = set(region.nodes)
    sources = (source for node in region.nodes for source in node.all_input_nodes)
    return list(dict.fromkeys(source for source in sources if source not in inside))


class _Chooser:
    """Writes choices between the modes into a graph."""

    def __init__(self, module: fx.GraphModule) -> None:
        self._module = module
        self._graph = module.graph
        self._known: dict[Any, fx.Node] = {}
        self._flag: fx.Node | None = None

    def node(self, choice: Choice) -> fx.Node:
        """Return the node of a choice."""
        flag = self._flag = self._flag or self._new_flag()
        key = (choice.in_training, type(choice.in_training), choice.in_eval, type(choice.in_eval))
        if choice.in_training is True and choice.in_eval is False:
            return flag
        if key not in self._known:
            with self._graph.inserting_after(flag):
                self._known[key] = self._graph.call_function(by_mode, (flag, choice.in_training, choice.in_eval))
        return self._known[key]

    def _new_flag(self) -> fx.Node:
        if not hasattr(self._module, FLAG_MODULE):
            self._module.add_submodule(FLAG_MODULE, TrainingFlag())
        placeholders = self._graph.find_nodes(op="placeholder")
        first = placeholders[-1].next if placeholders else next(iter(self._graph.nodes))
        with self._graph.inserting_before(first):
            return self._graph.call_module(FLAG_MODULE)

    def set_arguments(self, node: fx.Node, arguments: Mapping[str, Any]) -> None:
        """Give a node arguments with choices in them."""
        filled = replaced(dict(arguments), lambda leaf: self.node(leaf) if isinstance(leaf, Choice) else leaf)
        set_named_arguments(node, filled)

    def done(self) -> None:
        """Make the changed graph the code of its module."""
        self._graph.lint()
        self._module.recompile()


def follow_flags(module: fx.GraphModule, present: bool) -> None:
    """Let the flags of dropout and norms, and those counters of batches that are in the graph, follow the mode."""
    changes = []
    for node in module.graph.nodes:
        if node.op == "call_function":
            named = named_arguments(node)
            flags = [name for name in _FLAGS if named.get(name) is present and _has_modes(node, named)]
            changes += [(node, {**named, name: Choice(True, False)}) for name in flags]
            if is_counter(node):
                changes.append((node, {**named, "other": Choice(named["other"], 0)}))
    if not changes:
        return
    chooser = _Chooser(module)
    for node, arguments in changes:
        chooser.set_arguments(node, arguments)
    chooser.done()


def _has_modes(node: fx.Node, arguments: Mapping[str, Any]) -> bool:
    """Tell whether an op has a dropout, or is a norm with running statistics: without these it is the same in both."""
    name = str(getattr(node.target, "__name__", node.target))
    return (
        "dropout" in name
        or name.startswith(_RECURRENT)
        or ("norm" in name and arguments.get("running_mean") is not None)
    )


def share(source: fx.GraphModule, target: fx.GraphModule, name: str) -> str:
    """Let a module hold a tensor that another has; return the path at which it does."""
    tensor = attribute(source, name)
    path, _, last = name.rpartition(".")
    held = register_at(target, name, tensor, last not in source.get_submodule(path)._non_persistent_buffers_set)
    if held is not tensor and not _same_values(held, tensor):
        number = 0
        while hasattr(target, f"fxwidth_training_constant_{number}"):
            number += 1
        name = f"fxwidth_training_constant_{number}"
        target.register_buffer(name, tensor, persistent=False)
    return name


def _same_values(own: Any, other: Any) -> bool:
    both = isinstance(own, Tensor) and isinstance(other, Tensor) and own.shape == other.shape
    return both and own.dtype == other.dtype and not own.is_meta and torch.equal(own, other)
