"""Tracing in both modes: one graph for `train()` and `eval()`, as far as the two are one network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import fx, nn

from fxwidth.errors import warn
from fxwidth.frontends.alignment import DifferentError, path_of
from fxwidth.frontends.as_traced import Differences, differences, keep_as_traced
from fxwidth.frontends.call_signature import Inputs, Outputs
from fxwidth.frontends.export_reassembly import Region
from fxwidth.frontends.own_modes import OwnModes, SetByCode, are_in_modes, in_modes, keep_modes
from fxwidth.frontends.random_draws import ALMOST_ONE, drawing
from fxwidth.frontends.train_eval_alignment import align
from fxwidth.frontends.train_eval_merge import InTraining, TrainingFlag, Writer, follow_flags
from fxwidth.runtime.module_state import walk
from fxwidth.runtime.tensor_slots import tensor_slots


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


# Takes the submodules that are to be called as they are, to which it may add, a list for the one in which it fails, and
# a dict for the modes of those that are called as they are.
Tracer = Callable[[list[nn.Module], list[nn.Module], dict[nn.Module, bool]], fx.GraphModule]


def in_both_modes(model: nn.Module, trace: Tracer, own: OwnModes, *, takes_leaves: bool) -> Traced:
    """Return a traced graph that follows `train()` and `eval()`.

    The model is traced in both modes. Where the two graphs differ in numbers and flags (dropout, batch norm), the graph
    chooses them by its mode; where training does more with a value on its way, that is a part of the graph which runs
    in training alone. A module without tensors of its own that differs by more than numbers is called as it is, if the
    front end can do that, and so is the innermost one in which the graphs differ by more, or training cannot be traced.
    Otherwise the graph is that of the model's present mode, in which only dropout and norms follow its mode. Its
    `train()` and `eval()` give parts that are called as they are the modes that those of the model, and its code, do;
    until they are called, the graph does what the model does with its parts in the modes that they are in.

    Args:
        model: the module. Its present mode is the modes its parts are in; the other one is that of `own`.
        trace: traces the model in the mode it is in.
        own: what `train()` and `eval()` of the model do.
        takes_leaves: whether submodules can be called as they are.
    """
    leaves: list[nn.Module] = []
    while True:
        known = len(leaves)
        modes = _BothModes(model, trace, own, leaves, takes_leaves)
        traced = modes.merged()
        traced = traced and modes.as_it_is_now(traced)
        leaves += [part for part in modes.wanted if all(part is not leaf for leaf in leaves)]
        if traced is not None and len(leaves) == known:
            break
    traced.module.training = model.training
    for part in traced.module.children():
        if isinstance(part, (TrainingFlag, InTraining, Inputs, Outputs)):
            part.train(model.training)
        elif isinstance(part, Region):
            part.training = model.training
    if not _is_one_call(traced.module, model):
        keep_modes(traced.module, own, modes.set_by_code)
    return traced


class _BothModes:
    """A model traced in both modes.

    Attributes:
        wanted: the submodules that had better be called as they are.
        set_by_code: the modes that the model sets while it runs.
    """

    def __init__(
        self, model: nn.Module, trace: Tracer, own: OwnModes, leaves: list[nn.Module], takes_leaves: bool
    ) -> None:
        self._model = model
        self._trace = trace
        self._own = own
        self._leaves = leaves
        self._takes_leaves = takes_leaves
        self._drawn: str | None = None
        # What the model does as it is and not after its train() or eval(), or where that is more than numbers; and what
        # the nodes of the graph in the model's mode have become.
        self._as_it_is: Differences | DifferentError | None = None
        self._partner: Mapping[fx.Node, fx.Node] | None = None
        self.wanted: list[nn.Module] = []
        self.set_by_code = SetByCode()

    def merged(self) -> Traced | None:
        """Return a graph for both modes as far as that goes, or None where it takes the wanted leaves."""
        evaluated, error = self._in_mode(False)
        if error is not None and not self._model.training:
            raise error
        failed: list[nn.Module] = []
        trained, other_error = self._in_mode(True, failed)
        if other_error is not None and evaluated is not None:
            self._want(*failed)
        if other_error is not None and self._model.training:
            if self.wanted:
                return None
            raise other_error
        if evaluated is None or trained is None:
            mode, reason = (False, error) if evaluated is None else (True, other_error)
            assert reason is not None
            return self._present(evaluated, trained, f"in {_NAMES[mode]} it cannot be traced ({_first_line(reason)})")
        whole = [_is_one_call(graph, self._model) for graph in (evaluated, trained)]
        if whole[self._model.training]:
            return Traced(trained if self._model.training else evaluated)
        if any(whole):
            return self._present(evaluated, trained, f"in {_NAMES[whole[True]]} it can only be called as a whole")
        try:
            alignment = align(evaluated, trained)
        except DifferentError as different:
            self._want(_owner(self._model, *different.nodes))
            place = path_of(different.nodes[1])
            return self._present(evaluated, trained, f"{different}{f', in {place}' if place else ''}")
        for region in alignment.regions:
            owner = _owner(self._model, *region.nodes) if region.nodes else None
            self._want(owner if owner is None or not tensor_slots(owner) else None)
        Writer(evaluated, trained, alignment).run()
        if self._model.training:
            self._partner = alignment.partner
        return Traced(evaluated, self._drawn)

    def as_it_is_now(self, traced: Traced) -> Traced:
        """Let a merged graph do what the model does as it is, until somebody puts the graph in a mode."""
        if self._as_it_is is None or _is_one_call(traced.module, self._model):
            return traced
        try:
            if isinstance(self._as_it_is, DifferentError):
                raise self._as_it_is
            keep_as_traced(traced.module, self._as_it_is, self._partner, self._model.training)
        except DifferentError as error:
            self._want(_owner(self._model, *error.nodes))
            method = "train()" if self._model.training else "eval()"
            place = path_of(error.nodes[0])
            told = (
                f"its parts are in other modes than its {method} leads to, which makes another network"
                f"{f' in {place}' if place else ''}; the graph is that after {method}"
            )
            return replace(traced, unfollowed=f"{told}. Besides, {traced.unfollowed}" if traced.unfollowed else told)
        return traced

    def _want(self, *parts: nn.Module | None) -> None:
        if self._takes_leaves:
            known = [self._model, *self._leaves]
            self.wanted += [part for part in parts if part is not None and all(part is not one for one in known)]

    def _present(self, evaluated: fx.GraphModule | None, trained: fx.GraphModule | None, told: str) -> Traced:
        module = trained if self._model.training else evaluated
        assert module is not None
        mode = self._model.training
        follow_flags(module, mode)
        told = (
            f"{told}; the graph is that of {_NAMES[mode]}, in which only dropout and norms with running statistics "
            f"follow the mode{'' if mode else _uncounted(self._model, module)}"
        )
        return Traced(module, told, untraceable=evaluated is None or trained is None)

    def _in_mode(
        self, mode: bool, failed: list[nn.Module] | None = None
    ) -> tuple[fx.GraphModule | None, Exception | None]:
        """Trace the model in a mode; return its graph, or why there is none."""
        is_present, after = mode == self._model.training, self._own.after[mode]
        failed = [] if failed is None else failed
        with in_modes(after):
            try:
                graph = self._noting(self.set_by_code.after[mode], self._leaves, failed)
            except Exception as error:
                drawn = None if self._takes_leaves else self._as_if_drawn(mode)
                return drawn, error if drawn is None else None
        if is_present and are_in_modes(after):
            self.set_by_code.now.update(self.set_by_code.after[mode])
        elif is_present:
            try:
                self._compare(self._noting(self.set_by_code.now, self._leaves, failed), graph)
            except Exception as error:
                return None, error
        return graph, None

    def _compare(self, as_it_is: fx.GraphModule, after: fx.GraphModule) -> None:
        """Note what the model does otherwise as it is than after its `train()` or `eval()`."""
        try:
            self._as_it_is = differences(as_it_is, after)
        except DifferentError as error:
            self._as_it_is = error

    def _noting(
        self, set_by_code: dict[nn.Module, bool], leaves: list[nn.Module], failed: list[nn.Module]
    ) -> fx.GraphModule:
        """Trace the model, and note which parts it calls in other modes than they were in."""
        before = {part: part.training for _, part in walk(self._model)}
        called: dict[nn.Module, bool] = {}
        graph = self._trace(leaves, failed, called)
        set_by_code.update({part: mode for part, mode in called.items() if before.get(part, mode) != mode})
        return graph

    def _as_if_drawn(self, mode: bool) -> fx.GraphModule | None:
        """Trace the model where single random numbers decide what is run: as if these were as high as can be."""
        with drawing(ALMOST_ONE) as drawers:
            graph = _or_none(lambda: self._trace([], [], {}))
        if graph is None or not drawers:
            return None
        with drawing(0.0):
            low = _or_none(lambda: self._trace([], [], {}))
        if low is None or low.code != graph.code:
            names = {id(part): f"{type(part).__name__} {name!r}" for name, part in self._model.named_modules() if name}
            place = names.get(id(drawers[0]), type(self._model).__name__)
            self._drawn = (
                f"in {_NAMES[mode]} a random number decides what {place} runs, as layer drop does, and the graph runs "
                "what that runs for numbers near 1"
            )
        return graph


_NAMES = {True: "training", False: "evaluation"}


def _is_one_call(graph: fx.GraphModule, model: nn.Module) -> bool:
    """Tell whether a graph calls the model itself, which knows its mode."""
    return any(child is model for child in graph.children())


def _uncounted(model: nn.Module, evaluated: fx.GraphModule) -> str:
    """Tell which batch norms count no batches in the training of a graph of evaluation, which has no counters."""
    called = {id(part) for _, part in walk(evaluated)}
    norms = {name: part for name, part in walk(model) if isinstance(part, nn.modules.batchnorm._BatchNorm)}
    counting = {n: part for n, part in norms.items() if part.num_batches_tracked is not None and id(part) not in called}
    averaging = [name for name, part in counting.items() if part.momentum is None]
    told = f", but no batches are counted in {', '.join(map(repr, counting))}" if counting else ""
    if averaging:
        told += (
            f", and the running statistics of {', '.join(map(repr, averaging))} with momentum=None, averages over all "
            "batches, are not those of the model"
        )
    return told


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
        warn(
            f"The graph of {type(model).__name__} does not do in train() and eval() all that the model does there: "
            f"{unfollowed}. Trace the model in the mode that is wanted, switch off what differs, or put it into a "
            "submodule of its own that takes a tensor and returns one.",
        )
