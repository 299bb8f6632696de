"""A backend of `torch.compile` that shrinks what is captured, and has another one compile it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Unpack

import torch
from torch import fx, nn

from fxwidth.compilation.autocast_regions import with_autocast_regions
from fxwidth.compilation.captured_graphs import (
    Captured,
    captured,
    refuse_gradients,
    refuse_other_constants,
    refuse_writes,
)
from fxwidth.compilation.compiled_graph import CompiledGraph
from fxwidth.compilation.counted_backend import Backend, CountedBackend
from fxwidth.compilation.same_weights import floats_of, with_same_weights
from fxwidth.compilation.watched_weights import WatchedWeights
from fxwidth.errors import FxwidthError, warn
from fxwidth.evolution.evolve import evolve
from fxwidth.frontends.call_signature import Call
from fxwidth.frontends.lifted_parameters import Bound, with_parameters
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.option_keywords import EvolveKeywords
from fxwidth.options import PlanOptions, ResizeOptions, both_options, tells_options
from fxwidth.statistics.calibration_data import replayed
from fxwidth.tracing.analyze import analyze_module
from fxwidth.tracing.live_batch import read_batch_of_input

_FLAG = "_is_compiling_flag"
_NOT_OF_A_GRAPH = {
    "optimizer": "trains the parameters of a model, and not those of a shrunken copy",
    "for_module": "holds widths in attributes of a class",
    "also": "resizes other graphs too",
}


@tells_options(PlanOptions, ResizeOptions, but=tuple(_NOT_OF_A_GRAPH))
def compile_backend(
    *, inner: Backend = "inductor", **options: Unpack[EvolveKeywords]
) -> Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]:
    """Return a backend for `torch.compile` that shrinks what it captures, and has another backend compile that.

    For inference: the model itself stays as it is, and so do its weights. What is compiled is what `fxwidth.evolve`
    makes of the captured graph with the same options. Where the model's code breaks the graph, each part is shrunk
    alone to the same share, and a part in which nothing can be is compiled as it is, with a warning. Further graphs of
    a part, as for other sizes of inputs, get the same weights. Each model that it compiles is shrunk by itself, and so
    is one whose parameters were replaced; a call is refused if they have been written to since.

    Args:
        inner: the backend that compiles what is shrunk, as for `torch.compile`.
        options: those of `fxwidth.plan` and `fxwidth.resize`, such as `params=0.5`; `data=` of several inputs are
            dicts of them by name.

    Raises:
        FxwidthError: an option cannot be used. A call of the compiled model raises one where gradients are needed, the
            model writes to its buffers or inputs, calls ops that take functions, such as `torch.cond`, or cannot be
            shrunk to the target, and where its weights have been written to.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)).eval()
        >>> backend = fxwidth.compile_backend(params=0.5, inner="eager")
        >>> compiled = torch.compile(net, backend=backend)
        >>> with torch.no_grad():
        ...     compiled(torch.randn(2, 8)).shape
        torch.Size([2, 4])
        >>> backend
        <compile_backend by 'eager': 212 -> 95 parameters>
    """
    told: Mapping[str, Any] = options
    for name, why in _NOT_OF_A_GRAPH.items():
        if told.get(name):
            raise FxwidthError(f"{name}= {why}, which a backend of torch.compile does not see; call fxwidth.evolve.")
    given = options.copy()
    given["data"] = replayed(options.get("data"))
    planning, _ = both_options(given, None)
    return _ShrinkingBackend(inner, planning, given)


@dataclass(frozen=True)
class _Part:
    """A graph that has been shrunk: its weights of before, its real numbers of before, and what has become of it."""

    weights: WatchedWeights
    floats: list[float]
    before: int
    shrunk: fx.GraphModule


class _ShrinkingBackend:
    """What `compile_backend` returns."""

    def __init__(self, inner: Backend, planning: PlanOptions, options: EvolveKeywords) -> None:
        # An unknown backend is refused now, and not by the first call.
        self._name = CountedBackend(inner, None, "inner").__name__
        self._inner = inner
        self._planning = planning
        self._options = options
        self._parts: list[_Part] = []
        self.__name__ = "fxwidth"

    def __repr__(self) -> str:
        before = sum(part.before for part in self._parts)
        after = sum(_count(part.shrunk) for part in self._parts)
        told = f"{before:,} -> {after:,} parameters" if self._parts else "nothing captured yet"
        return f"<compile_backend by {self._name!r}: {told}>"

    def __call__(self, module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        """Return what runs in the place of a graph of dynamo's."""
        runner = _Runner(partial(self._compiled_outside, module))
        try:
            runner.prepare(inputs)
        except Exception as error:
            # Raised in here it would come out as an error of torch's, and could be suppressed. Versions of torch differ
            # in whether they capture a graph anew where its weights need gradients no longer.
            runner.error = error
        return runner

    def _compiled_outside(self, module: fx.GraphModule, inputs: Sequence[Any]) -> _Version:
        with _outside_of_compilation():
            return self._compiled(module, inputs)

    def _compiled(self, module: fx.GraphModule, examples: Sequence[Any]) -> _Version:
        found = captured(module, examples)
        bound = with_parameters(found.module, Call(found.inputs, {}))
        if bound is None or not WidthGraph(analyze_module(bound.module, bound.call)).free:
            what = "holds no parameters" if bound is None else "has no group whose width may change"
            warn(
                f"a graph that torch.compile has captured {what}, and is compiled as it is: {_described(found)}. To "
                "see why, trace the model by fxwidth.trace and print fxwidth.analyze of it."
            )
            every = tuple(range(len(examples)))
            return _Version(every, {}, every, False, WatchedWeights({}, ()), self._inside(module))
        read_batch_of_input(bound.module, bound.call)
        refuse_writes(found.module, found.inputs, bound.paths)
        weights = WatchedWeights(bound.paths, found.inputs)
        compiled = self._inside(self._shrunk(bound, weights, found.inputs))
        return _Version(found.positions, found.constants, bound.inputs, found.is_single, weights, compiled)

    def _inside(self, module: fx.GraphModule) -> CompiledGraph:
        # What torch.compile took apart itself may hold what it does not take a second time.
        return CompiledGraph(with_autocast_regions(module), self._inner, 1, {"fullgraph": False})

    def _shrunk(self, bound: Bound, weights: WatchedWeights, inputs: Sequence[Any]) -> fx.GraphModule:
        self._parts = [part for part in self._parts if part.weights.are_unchanged()]
        known = [part for part in self._parts if part.weights.are_those(weights)]
        for part in known:
            module, names = copy.deepcopy(bound.module), set(bound.paths.values())
            same = with_same_weights(module, names, part.floats, part.shrunk, self._planning.exact)
            if same is not None:
                return same
        self._refuse_for_whole_model()
        if known:
            warn(
                "torch.compile has captured a part of the model anew, by other ops, as for other sizes of inputs; it "
                "is shrunk by itself, and may answer otherwise than the first. Compare an output of both, or compile "
                "with dynamic=True."
            )
        floats, before = floats_of(bound.module), _count(bound.module)
        options, data = self._options.copy(), self._options.get("data")
        options["data"] = None if data is None else _Fitting(data, len(bound.inputs))
        for name in ("only", "keep"):
            options[name] = _with_parts_of(bound, inputs, options.get(name))
        shrunk = evolve(bound.module, bound.call.args, bound.call.kwargs, **options)
        self._parts.append(_Part(weights, floats, before, shrunk))
        return shrunk

    def _refuse_for_whole_model(self) -> None:
        """Check that no option is for the whole of a model of which this is not the first part."""
        target = self._planning.target
        absolute = [
            f"{name}={bound}" for name, bound in (target.bounds if target else {}).items() if type(bound) is int
        ]
        if self._parts and (absolute or self._options.get("data") is not None):
            what = "data= are inputs" if not absolute else f"{absolute[0]} is a budget"
            raise FxwidthError(
                f"{what} of the whole model, but torch.compile has captured a further graph of other weights: the "
                "model's code breaks the graph (torch.compile(model, fullgraph=True) tells where), or the backend "
                "compiles another model, which takes a backend of its own. Give shares, such as params=0.5, and no "
                "data; or shrink the model by fxwidth.evolve, and compile the graph by fxwidth.compile."
            )


@dataclass(frozen=True, eq=False)
class _Version:
    """Runs what is compiled with those of dynamo's inputs that are left, if the weights are what they were.

    Attributes:
        positions: of the tensors among what dynamo gives.
        constants: numbers among it that the graph has, by their positions.
        inputs: the positions of what is no weight among the tensors.
        is_single: whether dynamo takes a tuple of what it returns.
        weights: those that the model had.
        compiled: what is compiled.
    """

    positions: tuple[int, ...]
    constants: Mapping[int, float]
    inputs: tuple[int, ...]
    is_single: bool
    weights: WatchedWeights
    compiled: CompiledGraph

    def is_for(self, given: Sequence[Any]) -> bool:
        """Tell whether what dynamo gives holds these weights."""
        return self.weights.are_among(self._tensors(given))

    def is_current(self) -> bool:
        """Tell whether the weights are there, and as they were."""
        return self.weights.are_unchanged()

    def __call__(self, *given: Any) -> Any:
        refuse_other_constants(self.constants, given)
        refuse_gradients(given)
        tensors = self._tensors(given)
        self.weights.refuse_changed(tensors)
        answer = self.compiled(*(tensors[position] for position in self.inputs))
        return (answer,) if self.is_single else answer

    def _tensors(self, given: Sequence[Any]) -> list[Any]:
        return [given[position] for position in self.positions]


@dataclass
class _Runner:
    """Runs a graph of dynamo's by what is compiled for the weights that it is called with.

    One graph serves all models of a class: dynamo passes it the weights of the one that is called.

    Attributes:
        make: compiles the graph for what it is given.
        versions: what is compiled.
        error: what the first call has to raise, since dynamo would change it.
    """

    make: Callable[[Sequence[Any]], _Version]
    versions: list[_Version] = field(default_factory=list)
    error: Exception | None = None

    def prepare(self, given: Sequence[Any]) -> _Version:
        """Return what is compiled for the weights among what dynamo gives, compiled now if it is not there."""
        for version in self.versions:
            if version.is_for(given):
                return version
        self.versions = [version for version in self.versions if version.is_current()]
        self.versions.append(self.make(given))
        return self.versions[-1]

    def __call__(self, *given: Any) -> Any:
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        return self.prepare(given)(*given)


@dataclass(frozen=True)
class _Fitting:
    """Batches for a graph of several inputs, whose order is not that of the model's arguments."""

    data: Iterable[Any]
    inputs: int

    def __iter__(self) -> Iterator[Any]:
        for batch in self.data:
            if self.inputs > 1 and not isinstance(batch, Mapping):
                raise FxwidthError(
                    f"the captured graph takes {self.inputs} inputs, whose order is not that of the model's arguments: "
                    "give each batch of data= as a dict of them by name."
                )
            yield batch


@contextmanager
def _outside_of_compilation() -> Iterator[None]:
    """Have torch take what runs for eager code: it is no part of what is compiled.

    Optimizers of torch compute otherwise in a compilation, and inputs that are drawn are moved by one.
    """
    before = getattr(torch.compiler, _FLAG, None)
    try:
        if before is not None:
            setattr(torch.compiler, _FLAG, False)
        yield
    finally:
        if before is not None:
            setattr(torch.compiler, _FLAG, before)


def _with_parts_of(bound: Bound, inputs: Sequence[Any], chosen: Any) -> Any:
    """Return what is chosen of a model with its modules as those of a graph that holds copies of its parameters."""
    if chosen is None or isinstance(chosen, str):
        return chosen
    found: list[Any] = []
    for one in [chosen] if isinstance(chosen, nn.Module) else chosen:
        own = set(map(id, one.parameters())) if isinstance(one, nn.Module) else set()
        paths = [path for position, path in bound.paths.items() if id(inputs[position]) in own]
        found += [bound.module.get_submodule(path.rpartition(".")[0]) for path in paths] or [one]
    return found


def _count(module: fx.GraphModule) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _described(found: Captured) -> str:
    names = [node.name for node in found.module.graph.nodes if node.op not in ("placeholder", "output", "get_attr")]
    told = ", ".join(names[:4])
    return f"{len(names)} ops ({told}{', ...' if len(names) > 4 else ''}) of {len(found.positions)} inputs"
