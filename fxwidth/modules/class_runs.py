"""Runs of a model's own code at given widths, under fake tensors, judged op by op against what a tape prescribes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from fxwidth.analysis.op_signatures import Signature, is_silent, observed_signature, prescribed_signatures
from fxwidth.analysis.result import Analysis, ParameterAxes
from fxwidth.axes.index_maps import IndexMaps
from fxwidth.frontends.call_signature import Argument
from fxwidth.modules.exported_answers import answering_as_exported
from fxwidth.modules.split_attention import with_whole_attention
from fxwidth.recording.tape import OpCall
from fxwidth.rewriting.batch_checks import enlarged
from fxwidth.rewriting.model_runs import Signals, run_model
from fxwidth.runtime.code_places import LIBRARIES
from fxwidth.runtime.contexts import evaluating, quiet, training
from fxwidth.runtime.fake_tensors import fake_like
from fxwidth.runtime.module_state import restored, walk
from fxwidth.runtime.pytrees import deep_tensors, map_leaves
from fxwidth.runtime.tensor_slots import Slots, named_tensors, substituted, tensor_slots


@dataclass(frozen=True)
class Failure:
    """Where a model's own code does not do what is prescribed.

    Attributes:
        reached: how many ops it did as prescribed before.
        part: the path of the module whose code was at work.
        place: file and line of that code.
        what: what it did, and what was needed.
    """

    reached: int
    part: str
    place: str
    what: str

    def __str__(self) -> str:
        return f"{self.part or 'the model itself'} ({self.place}): {self.what}"


class _OtherwiseError(Exception):
    """An op was run that is not the prescribed one."""


@dataclass(frozen=True)
class SeenOp:
    """An op of a run: what it did, the shapes that it took, and the module whose code ran it."""

    signature: Signature
    shapes: tuple[tuple[int, ...], ...]
    part: str


class ClassRuns:
    """Runs a model's own code on fake tensors of the sizes that a tape prescribes.

    Args:
        analysis: that of the graph.
        model: of the class that the graph was traced from; its tensors have the names that they have in the graph.
        arguments: how it is called.
    """

    def __init__(self, analysis: Analysis, model: nn.Module, arguments: Sequence[Argument]) -> None:
        self.analysis = analysis
        self.model = model
        self._arguments = arguments
        self._surroundings: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.looks_at_values_in_training = False

    def of(self, model: nn.Module) -> ClassRuns:
        """Return the runs of another model of the class."""
        return ClassRuns(self.analysis, model, self._arguments)

    @property
    def goes_as_exported(self) -> bool:
        """Whether the model's code goes the way here that it goes when it is exported."""
        return self._surroundings is answering_as_exported

    def go_as_graph(self, other: ClassRuns | None = None) -> None:
        """Have the model's code go the way of the graph from now on: as it is exported, where that is what was traced.

        That is told by the ops which it runs at its own sizes, or, where it may have others by now, another model of
        its class, which tells too what its code does not use.
        """
        if other is not None:
            other.go_as_graph()
            self._surroundings, self.dead = other._surroundings, other.dead
            return
        wanted = self.wanted(IndexMaps(self.analysis.space, {}))
        done: dict[Callable[[], AbstractContextManager[Any]], int] = {}
        for way in (nullcontext, answering_as_exported):
            self._surroundings = way
            found, _ = self.seen(IndexMaps(self.analysis.space, {}), self.own_fakes())
            alike = (op.signature[0] == needed[0] for op, needed in zip(found, wanted, strict=False))
            done[way] = sum(takewhile(bool, alike))
            if done[way] == len(wanted):
                break
        self._surroundings = max(done, key=lambda way: done[way])

    @cached_property
    def slots(self) -> Slots:
        """The parameters and buffers of the model."""
        return tensor_slots(self.model)

    @cached_property
    def entries(self) -> dict[str, str]:
        """The names in the graph of the model's tensors, by their first names in the model."""
        by_tensor = {id(entry.tensor): name for name, entry in self.analysis.parameters.items()}
        in_graph = {name: by_tensor.get(id(one)) for name, one in named_tensors(self.analysis.module).items()}
        found: dict[str, str] = {}
        first = {id(tensor): name for name, (tensor, _) in self.slots.items()}
        for name, tensor in named_tensors(self.model).items():
            known = in_graph.get(name)
            if known is not None:
                found.setdefault(first[id(tensor)], known)
        return found

    def fakes(self, maps: IndexMaps) -> dict[str, Tensor]:
        """Return what stands for the model's tensors at some widths."""

        def made(_: Tensor, entry: ParameterAxes) -> Tensor:
            sizes = [maps.size(axis) for axis in entry.axes]
            # Which ops a linear layer runs depends on the gradient too.
            same = sizes == list(entry.fake.shape)
            return entry.fake if same else self._empty(sizes, entry).requires_grad_(entry.fake.requires_grad)

        return self._stand_ins(made)

    def own_fakes(self) -> dict[str, Tensor]:
        """Return what stands for the model's tensors at the sizes that they have themselves, on the graph's device."""
        return self._stand_ins(lambda t, entry: self._empty(t.shape, entry).requires_grad_(t.requires_grad))

    def _stand_ins(self, made: Callable[[Tensor, ParameterAxes], Tensor]) -> dict[str, Tensor]:
        result: dict[str, Tensor] = {}
        for name, (tensor, _) in self.slots.items():
            entry = self.analysis.parameters.get(self.entries.get(name, ""))
            result[name] = fake_like(self.analysis.mode, tensor) if entry is None else made(tensor, entry)
        return result

    def _empty(self, sizes: Sequence[int], entry: ParameterAxes) -> Tensor:
        with self.analysis.mode:
            return torch.empty(tuple(sizes), dtype=entry.fake.dtype, device=entry.fake.device)

    def wanted(self, maps: IndexMaps) -> list[Signature]:
        """Return what the model must do at some widths; what it makes of nothing is a constant in the graph."""
        return list(map(_in_one_form, prescribed_signatures(self.calls, maps)))

    @cached_property
    def calls(self) -> list[OpCall]:
        """The ops of the tape that are compared: those that work on the inputs, or on tensors that the model has."""
        held = [self.analysis.parameters[name].fake for name in self.entries.values()]
        own_parts = frozenset(self.paths.values())
        calls = with_whole_attention(self.analysis.calls, self.analysis.module.graph, own_parts)
        own = filter(Signals([*self._leaves(self.analysis.inputs), *held]), calls)
        return [call for call in own if not (is_silent(call.func) or _is_idle(call))]

    def failure(
        self,
        maps: IndexMaps,
        fakes: Mapping[str, Tensor] | None = None,
        mode: AbstractContextManager[Any] | None = None,
        wanted: Sequence[Signature] | None = None,
    ) -> Failure | None:
        """Return where the model does not do what is prescribed, or None.

        Args:
            maps: the widths; with a larger batch, that is given to the model.
            fakes: what stands for its tensors.
            mode: in which mode; evaluation by default.
            wanted: what it must do; None for what the maps prescribe.
        """
        wanted = self.wanted(maps) if wanted is None else wanted
        seen: list[SeenOp] = []

        def judge(op: SeenOp) -> None:
            if len(seen) > len(wanted) or op.signature != wanted[len(seen) - 1]:
                needed = wanted[len(seen) - 1] if len(seen) <= len(wanted) else "no more"
                raise _OtherwiseError(f"it does {_told(op.signature)} where {_told(needed)} is needed")

        error = self._run(maps, fakes, mode, seen, judge)
        if error is not None:
            otherwise = isinstance(error, _OtherwiseError)
            part, place = self._where(error.__traceback__)
            return Failure(len(seen) - otherwise, part, place, _first_line(error))
        if len(seen) < len(wanted):
            what = f"it does {len(seen)} ops where {len(wanted)} are needed"
            return Failure(len(seen), "", type(self.model).__name__, what)
        return None

    def seen(
        self,
        maps: IndexMaps,
        fakes: Mapping[str, Tensor] | None = None,
        mode: AbstractContextManager[Any] | None = None,
    ) -> tuple[list[SeenOp], Exception | None]:
        """Return what the model does at some widths, and by what error it was ended, if by any."""
        found: list[SeenOp] = []
        error = self._run(maps, fakes, mode, found, lambda _: None, with_parts=True)
        return found, error

    @cached_property
    def dead(self) -> frozenset[str]:
        """The names of the parameters that neither the graph nor the model's own code uses, in any mode.

        Their sizes and values make no difference to what the model does.
        """
        calls = [*self.analysis.calls, *(one for some in self.analysis.training_calls.values() for one in some)]
        used = {id(tensor) for call in calls for tensor in call.inputs}
        entries = {name: self.analysis.parameters[in_graph] for name, in_graph in self.entries.items()}
        waiting = {
            name
            for name, entry in entries.items()
            if id(entry.fake) not in used and isinstance(self.slots[name][0], nn.Parameter)
        }
        fakes = self.own_fakes()
        names = {id(fakes[name]): name for name in waiting}
        for mode in (evaluating, training) if waiting else ():
            read: set[str] = set()
            look = lambda call, read=read: read.update(names.get(id(one), "") for one in call.inputs)  # noqa: E731
            error = self._run(
                IndexMaps(self.analysis.space, {}), fakes, mode(self.model), [], lambda _: None, look=look
            )
            waiting = set() if error is not None else waiting - read
        return frozenset(waiting)

    def _run(
        self,
        maps: IndexMaps,
        fakes: Mapping[str, Tensor] | None,
        mode: AbstractContextManager[Any] | None,
        seen: list[SeenOp],
        judge: Callable[[SeenOp], None],
        with_parts: bool = False,
        look: Callable[[OpCall], None] = lambda _: None,
    ) -> Exception | None:
        analysis, model = self.analysis, self.model
        fakes = self.fakes(maps) if fakes is None else fakes
        inputs = [map_leaves(lambda t: enlarged(t, analysis.axes_of(t), maps), value) for value in analysis.inputs]
        signals = Signals([*self._leaves(inputs), *fakes.values()])

        def see(call: OpCall) -> None:
            look(call)
            if not signals(call) or is_silent(call.func) or _is_idle(call):
                return
            shapes = tuple(tuple(one.shape) for one in call.inputs) if with_parts else ()
            part = self._part_at_work() if with_parts else ""
            seen.append(SeenOp(_in_one_form(observed_signature(call)), shapes, part))
            judge(seen[-1])

        with (
            substituted(model, fakes, self.slots, restored),
            evaluating(model) if mode is None else mode,
            analysis.mode,
            quiet(),
            self._surroundings(),
        ):
            try:
                run_model(analysis, model, self._arguments, see, inputs)
            except Exception as error:
                return error
        return None

    @staticmethod
    def _leaves(values: Any) -> list[Tensor]:
        return deep_tensors(tuple(values))

    @cached_property
    def paths(self) -> dict[int, str]:
        """The paths of the model's modules, by identity."""
        return {id(part): path for path, part in walk(self.model)}

    def _part_at_work(self) -> str:
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            owner = frame.f_locals.get("self")
            if isinstance(owner, nn.Module) and id(owner) in self.paths:
                return self.paths[id(owner)]
            frame = frame.f_back
        return ""

    def _where(self, traceback: TracebackType | None) -> tuple[str, str]:
        part, place = "", "?"
        while traceback is not None:
            frame = traceback.tb_frame
            owner = frame.f_locals.get("self")
            if isinstance(owner, nn.Module) and id(owner) in self.paths:
                part = self.paths[id(owner)]
            name = frame.f_code.co_filename
            if not name.startswith(LIBRARIES) or place == "?":
                place = f"{'/'.join(name.split('/')[-3:])}:{traceback.tb_lineno}"
            traceback = traceback.tb_next
        return part, place


def _in_one_form(signature: Signature) -> Signature:
    """Return a signature in the form that it has in eager code: exported graphs have the kernel of a weight norm."""
    name, results, *rest = signature
    return ("weight_norm", results[:1], *rest) if name == "_weight_norm_interface" else signature


def _is_idle(call: OpCall) -> bool:
    """Tell whether an op does nothing.

    Exported graphs have slices that eager code leaves out, and count no batches in evaluation by adding zero.
    """
    if call.func.overloadpacket in (torch.ops.aten.add, torch.ops.aten.add_):
        return type(call.arguments["other"]) is int and call.arguments["other"] == 0
    return call.func.overloadpacket is torch.ops.aten.slice and call.inputs[0].shape == call.outputs[0].shape


def _told(signature: Any) -> str:
    if isinstance(signature, str):
        return signature
    name, results, *literals = signature
    shapes = ", ".join(str(list(shape)) for shape in results)
    given = f" with {literals}" if literals and literals != [()] else ""
    return f"{name} -> {shapes}{given}"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]
