"""One graph for `train()` and `eval()`: tracing writes down one mode, and what the other does otherwise is added."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxwidth.calls import Inputs, Outputs
from fxwidth.draws import ALMOST_ONE, drawing
from fxwidth.errors import FxwidthWarning
from fxwidth.exporting import Region
from fxwidth.mode_alignment import (
    Alignment,
    Choice,
    DifferentError,
    TrainingRegion,
    align,
    attribute,
    is_counter,
    named_arguments,
    path_of,
    replaced,
)
from fxwidth.tape import evaluating, training, unbind
from fxwidth.tensor_slots import tensor_slots

FLAG_MODULE = "fxwidth_training"
_FLAGS = ("train", "training")
# What gives back its operand as it is: what training does to the order in memory, evaluation can do too.
_NEUTRAL = (torch.ops.aten.contiguous.default,)


class TrainingFlag(nn.Module):
    """Tells a graph whether it is in training mode."""

    def forward(self) -> bool:
        """Return the module's mode, which `train()` and `eval()` of the graph set."""
        return self.training


class InTraining(nn.Module):
    """A part of a graph that is run in training alone."""

    def __init__(self, body: fx.GraphModule) -> None:
        super().__init__()
        self.body = body

    def forward(self, value: Any, *operands: Any) -> Any:
        """Return what the part makes of the operands in training, and in evaluation the value as it is."""
        return self.body(*operands) if self.training else value


def by_mode(flag: bool, in_training: Any, in_eval: Any) -> Any:
    """Return the one or the other value."""
    return in_training if flag else in_eval


@dataclass(frozen=True)
class Traced:
    """A graph, and what of a mode it does not follow.

    Attributes:
        module: the graph.
        unfollowed: what it does not follow, in words; None where it follows both modes.
        untraceable: whether that is for want of a trace of the other mode, so that another front end may do better.
    """

    module: fx.GraphModule
    unfollowed: str | None = None
    untraceable: bool = False


# Takes the submodules that are to be called as they are, to which it may add, and a list for the one in which it fails.
Tracer = Callable[[list[nn.Module], list[nn.Module]], fx.GraphModule]


def in_both_modes(model: nn.Module, trace: Tracer, *, takes_leaves: bool) -> Traced:
    """Return a traced graph that follows `train()` and `eval()`.

    The model is traced in both modes. Where the two graphs differ in numbers and flags (dropout, batch norm), the graph
    chooses them by its mode; where training does more with a value on its way, that is a part of the graph which runs
    in training alone. A module without tensors of its own that differs by more than numbers is called as it is, if the
    front end can do that, and so is the innermost one in which the graphs differ by more, or one mode cannot be traced.
    Otherwise the graph is that of the model's present mode, in which only dropout and batch norm follow its mode.

    Args:
        model: the module. Its training mode is the modes its parts are in, where it is in training mode itself.
        trace: traces the model in the mode it is in.
        takes_leaves: whether submodules can be called as they are.
    """
    leaves: list[nn.Module] = []
    while True:
        known = len(leaves)
        traced, wanted = _merged(model, trace, leaves, takes_leaves)
        leaves += [part for part in wanted if takes_leaves and all(part is not leaf for leaf in leaves)]
        if len(leaves) == known:
            break
    traced.module.training = model.training
    for part in traced.module.children():
        if isinstance(part, (TrainingFlag, InTraining, Inputs, Outputs)):
            part.train(model.training)
        elif isinstance(part, Region):
            part.training = model.training
    return traced


def _merged(
    model: nn.Module, trace: Tracer, leaves: list[nn.Module], takes_leaves: bool
) -> tuple[Traced, list[nn.Module]]:
    """Return a graph for both modes as far as that goes, and the submodules that had better be called as they are."""
    failed: list[nn.Module] = []
    present, drawn = _in_mode(model, model.training, lambda: trace(leaves, []), takes_leaves)
    try:
        other, drawn_otherwise = _in_mode(model, not model.training, lambda: trace(leaves, failed), takes_leaves)
    except Exception as error:
        _follow_flags(present, model.training)
        told = f"in {_NAMES[not model.training]} it cannot be traced ({_first_line(error)})"
        return Traced(present, told, untraceable=True), [part for part in failed if part is not model]
    evaluated, trained = (other, present) if model.training else (present, other)
    try:
        alignment = align(evaluated, trained)
    except DifferentError as error:
        _follow_flags(present, model.training)
        owners = [_owner(model, node) for node in error.nodes]
        place = path_of(error.nodes[1])
        inner = [] if owners[0] is None or owners[0] is not owners[1] else [owners[0]]
        return Traced(present, f"{error}{f', in {place}' if place else ''}"), inner
    parts = [_owner(model, *region.nodes) for region in alignment.regions if region.nodes]
    _Writer(evaluated, trained, alignment).run()
    without = [part for part in parts if part is not None and not tensor_slots(part)]
    return Traced(evaluated, drawn or drawn_otherwise), without


_NAMES = {True: "training", False: "evaluation"}


def _in_mode(
    model: nn.Module, mode: bool, trace: Callable[[], fx.GraphModule], takes_leaves: bool
) -> tuple[fx.GraphModule, str | None]:
    """Trace a model in a mode; where it cannot be since single random numbers decide what is run, as if these were high.

    Returns the graph, and what it does not follow, in words.
    """
    with nullcontext() if mode == model.training else training(model) if mode else evaluating(model):
        try:
            return trace(), None
        except Exception:
            if takes_leaves:
                raise
            with drawing(ALMOST_ONE) as drawers:
                graph = _or_none(trace)
            if graph is None or not drawers:
                raise
        with drawing(0.0):
            low = _or_none(trace)
    if low is not None and low.code == graph.code:
        return graph, None
    names = {id(part): f"{type(part).__name__} {name!r}" for name, part in model.named_modules()}
    place = names.get(id(drawers[0]), type(model).__name__)
    told = f"in {_NAMES[mode]} a random number decides what {place} runs (layer drop), and the graph always runs all"
    return graph, told


def _or_none(trace: Callable[[], fx.GraphModule]) -> fx.GraphModule | None:
    try:
        return trace()
    except Exception:
        return None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__


def _owner(model: nn.Module, *nodes: fx.Node) -> nn.Module | None:
    """Return the innermost submodule whose code made all of some nodes, or None where that is the model itself."""
    paths = [path_of(node).split(".") for node in nodes]
    common = []
    for names in zip(*paths, strict=False):
        if len(set(names)) > 1:
            break
        common.append(names[0])
    path = ".".join(common)
    try:
        return model.get_submodule(path) if path else None
    except AttributeError:
        return None


def warn_of_modes(model: nn.Module, unfollowed: str | None) -> None:
    """Warn where a graph does not follow `train()` and `eval()` as its model does."""
    if unfollowed is not None:
        warnings.warn(
            f"The graph of {type(model).__name__} does not follow train() and eval() in all: {unfollowed}. It is that of "
            f"the mode that the model is in, {_NAMES[model.training]}, beside dropout and batch norm. Trace the model in "
            "the mode that is wanted, switch off what is random there, or put it into a submodule of its own that takes "
            "a tensor and returns one.",
            FxwidthWarning,
            stacklevel=4,
        )


class _Writer:
    """Adds to a graph of evaluation what one of training does otherwise."""

    def __init__(self, evaluated: fx.GraphModule, trained: fx.GraphModule, alignment: Alignment) -> None:
        self._evaluated = evaluated
        self._graph = evaluated.graph
        self._trained = trained
        self._alignment = alignment
        self._written: dict[TrainingRegion, fx.Node] = {}

    def run(self) -> None:
        """Change the graph of evaluation."""
        found = self._alignment
        if not found.arguments and not found.counters:
            return
        chooser = _Chooser(self._evaluated)
        for region in found.regions:
            self._written[region] = self._write(region)
        for node, arguments in found.arguments.items():
            filled = replaced(arguments, self._filled)
            chooser.set_arguments(node, filled)
        for counter, place in found.counters:
            name = str(counter.all_input_nodes[0].target)
            _share(self._trained, self._evaluated, name)
            with self._graph.inserting_before(place):
                counted = self._graph.get_attr(name), chooser.node(Choice(counter.args[1], 0))
                self._graph.create_node("call_function", counter.target, counted)
        chooser.done()

    def _filled(self, leaf: Any) -> Any:
        return self._written[leaf] if isinstance(leaf, TrainingRegion) else leaf

    def _write(self, region: TrainingRegion) -> fx.Node:
        """Insert the nodes of a region; return that of its value."""
        with self._graph.inserting_before(region.before):
            if not region.nodes and region.instead_of.target in _NEUTRAL:
                return region.instead_of
            if region.nodes and all(node.target in _NEUTRAL for node in region.nodes):
                return self._graph.node_copy(region.result, self._value)
            body = fx.Graph()
            known: dict[fx.Node, fx.Node] = {}
            operands = []
            for source in _operands(region):
                operands.append(self._value(source))
                known[source] = body.placeholder(source.name)
            for node in region.nodes:
                known[node] = body.node_copy(node, known.__getitem__)
            body.output(known[region.result])
            number = sum(isinstance(part, InTraining) for part in self._evaluated.children())
            name = f"fxwidth_in_training_{number}"
            self._evaluated.add_submodule(name, InTraining(fx.GraphModule(self._trained, body, "Body")))
            return self._graph.call_module(name, (region.instead_of, *operands))

    def _value(self, source: fx.Node) -> fx.Node:
        """Return the node that is in training what a node of the graph of training is."""
        if source.op == "get_attr":
            return self._graph.get_attr(_share(self._trained, self._evaluated, str(source.target)))
        written = (node for region, node in self._written.items() if region.result is source and region.nodes)
        return self._alignment.partner.get(source) or next(written)


def _operands(region: TrainingRegion) -> list[fx.Node]:
    """Return what the nodes of a region take from outside of it."""
    if not region.nodes:
        return [region.result]
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
        _set_named_arguments(node, filled)

    def done(self) -> None:
        """Make the changed graph the code of its module."""
        self._graph.lint()
        self._module.recompile()


def _follow_flags(module: fx.GraphModule, present: bool) -> None:
    """Let the flags of dropout and batch norm, and the counters of the latter, follow the mode."""
    changes = []
    for node in module.graph.nodes:
        if node.op == "call_function":
            named = named_arguments(node)
            flags = [name for name in _FLAGS if named.get(name) is present and _is_stochastic(node)]
            changes += [(node, {**named, name: Choice(True, False)}) for name in flags]
            if is_counter(node):
                changes.append((node, {**named, "other": Choice(named["other"], 0)}))
    if not changes:
        return
    chooser = _Chooser(module)
    for node, arguments in changes:
        chooser.set_arguments(node, arguments)
    chooser.done()


def _is_stochastic(node: fx.Node) -> bool:
    name = str(getattr(node.target, "__name__", node.target))
    return "dropout" in name or "norm" in name


def _set_named_arguments(node: fx.Node, arguments: dict[str, Any]) -> None:
    if isinstance(node.target, torch._ops.OpOverload):
        node.args, node.kwargs = unbind(node.target, arguments)
        return
    # Named in order: what was positional stays so, and a default is written out only where it has become a choice.
    names, count = list(arguments), len(node.args)
    named = {name: arguments[name] for name in names[count:]}
    node.args = tuple(arguments[name] for name in names[:count])
    node.kwargs = {name: value for name, value in named.items() if name in node.kwargs or isinstance(value, fx.Node)}


def _share(source: fx.GraphModule, target: fx.GraphModule, name: str) -> str:
    """Let a module hold a tensor that another has; return the path at which it does."""
    tensor = attribute(source, name)
    path, _, last = name.rpartition(".")
    holder: nn.Module = target
    for part in path.split(".") if path else []:
        if not hasattr(holder, part):
            holder.add_module(part, nn.Module())
        holder = getattr(holder, part)
    if not hasattr(holder, last):
        if isinstance(tensor, nn.Parameter):
            holder.register_parameter(last, tensor)
        else:
            persistent = last not in source.get_submodule(path)._non_persistent_buffers_set
            holder.register_buffer(last, tensor, persistent=persistent)
    elif getattr(holder, last) is not tensor and not _same_values(getattr(holder, last), tensor):
        number = 0
        while hasattr(target, f"fxwidth_training_constant_{number}"):
            number += 1
        name = f"fxwidth_training_constant_{number}"
        target.register_buffer(name, tensor, persistent=False)
    return name


def _same_values(own: Any, other: Any) -> bool:
    both = isinstance(own, Tensor) and isinstance(other, Tensor) and own.shape == other.shape
    return both and own.dtype == other.dtype and not own.is_meta and torch.equal(own, other)
