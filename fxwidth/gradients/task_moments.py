"""What data and a loss tell of new channels, summed up batch by batch in memory that does not grow with the data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from fxwidth.analysis.result import Analysis
from fxwidth.gradients.channel_places import ChannelPlaces, Read, Written, channel_places
from fxwidth.gradients.gradient_run import Batch, GradientRun, run_with_gradients
from fxwidth.gradients.weight_inputs import applied, input_rows, output_sums, plus, weight_of_rows, weight_rows
from fxwidth.groups.channel_group import ChannelGroup
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.growth.directions import TaskMoments
from fxwidth.option_keywords import Loss
from fxwidth.rules.family_table import family_of
from fxwidth.rules.op_names import rule_name
from fxwidth.rules.registry import POINTWISE
from fxwidth.runtime.finiteness import accumulation_dtype
from fxwidth.statistics.observers import OTHER_OPS

TOO_WIDE = "its moments are larger than what is kept in memory"
NO_GRADIENT = "no gradient comes to it"
# How many numbers a moment may have.
_LARGEST = 2**25
# How often gradients are taken from readers to writers for a batch; entries beyond that are mixed at random.
_PASSES = 24
# What the inputs explain is taken away where they vary, in units of their mean variance.
_RIDGE = 1e-6


@dataclass(frozen=True)
class GroupMoments:
    """What was found for one group.

    Attributes:
        places: where it is written and read.
        moments: of all that is written, side by side; None where nothing could be found.
        untold: the weights of which nothing was found, and why.
    """

    places: ChannelPlaces
    moments: TaskMoments | None
    untold: dict[str, str]


def gather_task_moments(
    width_graph: WidthGraph, groups: Sequence[ChannelGroup], batches: Iterable[Batch], loss: Loss, needs: frozenset[str]
) -> dict[ChannelGroup, GroupMoments]:
    """Return what a loss tells of new channels of some groups.

    The derivative by a new row and by what reads it is the gradient at the readers' outputs, led back through readers
    that hold one entry each to the rows of the present channels: each of these stands for an entry, and the
    nonlinearities between have slope one, as in the sources, since the slopes of a new channel are not known yet.

    Args:
        width_graph: the graph; it is run in eval mode and left as it was.
        groups: those that grow.
        batches: one value per placeholder and the targets; they are gone through twice for residuals.
        loss: a function of the graph's output and the targets; returns the mean over a batch.
        needs: the fields of `TaskMoments` that are asked for.

    Raises:
        FxwidthError: the graph does not run on a batch, or the loss does not return one finite number.
    """
    analysis = width_graph.analysis
    sums = [_Sums(channel_places(width_graph, group)) for group in groups]
    runs = _Runs(analysis, batches, loss, sums)
    if "residual" in needs:
        runs.each(lambda one, run, gradients: one.explain(run, gradients))
        for one in sums:
            one.solve()
    runs.each(lambda one, run, gradients: one.add(run, gradients, needs))
    return {group: one.result(runs.samples, needs) for group, one in zip(groups, sums, strict=True)}


class _Runs:
    """All batches, run with gradients."""

    def __init__(self, analysis: Analysis, batches: Iterable[Batch], loss: Loss, sums: Sequence[_Sums]) -> None:
        self.samples = 0
        self._analysis, self._batches, self._loss, self._sums = analysis, batches, loss, sums
        self._readers = sorted({reader.call.index for one in sums for reader in one.readers})
        writers = {op.call.index for one in sums for written in one.places.written for op in written.ops}
        self._wanted = writers | set(self._readers)
        self._slopes = _nonlinear(analysis)

    def each(self, take: Callable[[_Sums, GradientRun, dict[int, Tensor]], None]) -> None:
        """Have every group take in every batch."""
        self.samples = 0
        for batch in self._batches:
            with run_with_gradients(self._analysis, batch, self._loss, self._wanted, self._slopes) as (run, loss):
                self.samples += run.samples
                seen = [index for index in self._readers if index in run.calls]
                gradients = {i: -run.samples * one for i, one in run.gradients(loss, seen).items()}
                for one in self._sums:
                    if one.check(run):
                        take(one, run, gradients)


def _nonlinear(analysis: Analysis) -> frozenset[int]:
    """Return the ops that make something else of each number of one activation, such as a ReLU."""
    parameters = {entry.fake for entry in analysis.parameters.values()}
    result = set()
    for call in analysis.calls:
        is_pointwise = rule_name(call.func) in POINTWISE or torch.Tag.pointwise in call.func.tags
        inputs = [tensor for tensor in call.inputs if tensor.is_floating_point()]
        is_function = len(inputs) == 1 and len(call.outputs) == 1 and inputs[0] not in parameters
        if is_pointwise and is_function and family_of(call.func) is None and call.name != "neg":
            result.add(call.index)
    return frozenset(result)


class _Explained:
    """The regression of gradients at a reader's outputs on its inputs and a constant."""

    def __init__(self, read: Read) -> None:
        self._reader = read.readers[0]
        self._left: Tensor | None = None
        self._right: Tensor | None = None
        self._weight: Tensor | None = None
        self._constant: Tensor | None = None

    def add(self, run: GradientRun, index: int, gradient: Tensor) -> None:
        """Take in the inputs of an op, and the gradient at its outputs."""
        call = run.calls[index]
        weight = call.arguments[self._reader.weight].detach().requires_grad_()
        with torch.enable_grad():
            made = applied(call, {self._reader.weight: weight})
        (product,) = torch.autograd.grad(made, weight, gradient.to(made))
        wide = accumulation_dtype(product)
        right = torch.cat([weight_rows(self._reader, product), output_sums(self._reader, gradient)[..., None]], 2)
        left = None
        for rows in input_rows(self._reader, call):
            own = torch.cat([rows, torch.ones_like(rows[..., :1])], 2)
            left = (own.mT @ own).to(wide) if left is None else left + (own.mT @ own).to(wide)
        assert left is not None
        self._left = left if self._left is None else self._left + left
        self._right = right.to(wide) if self._right is None else self._right + right

    def solve(self) -> None:
        """Find what the inputs explain."""
        assert self._left is not None
        assert self._right is not None
        left = self._left
        ridge = _RIDGE * left.diagonal(dim1=1, dim2=2).mean(1) + torch.finfo(left.dtype).tiny
        left = left + ridge[:, None, None] * torch.eye(left.shape[1]).to(left)
        solution = torch.linalg.solve(left, self._right.mT).mT
        self._weight, self._constant = solution[..., :-1], solution[..., -1]

    def residual(self, run: GradientRun, index: int, gradient: Tensor) -> Tensor:
        """Return what the inputs do not explain of a gradient."""
        assert self._weight is not None
        assert self._constant is not None
        call = run.calls[index]
        like = call.arguments[self._reader.weight].detach()
        weight = weight_of_rows(self._reader, self._weight.to(like), like)
        explained = applied(call, {self._reader.weight: weight})
        return gradient - plus(self._reader, explained, self._constant.to(explained))


class _Sums:
    """The sums of one group."""

    def __init__(self, places: ChannelPlaces) -> None:
        self.places = places
        self.untold = dict(places.untold)
        self.readers = [reader for read in places.read for reader in read.readers]
        self._explained = [_Explained(read) for read in places.read]
        self._columns = sum(written.columns for written in places.written)
        self._entries = sum(read.entries for read in places.read)
        channels = len(places.written[0].positions) if places.written else 1
        self._passes = min(_PASSES, -(-self._entries // channels))
        self._width = min(self._entries, self._passes * channels)
        self._channels = channels
        self._second: list[Tensor | None] = [None] * len(places.written)
        self._cross: dict[str, Tensor] = {}
        squares = sum(written.columns**2 for written in places.written)
        largest = max(squares, self._columns * self._width, *(_regressors(read) for read in places.read), 0)
        if largest > _LARGEST:
            self._leave_out(TOO_WIDE)

    def _leave_out(self, reason: str) -> None:
        self.untold |= {written.parameter: reason for written in self.places.written}

    @property
    def _is_told(self) -> bool:
        return bool(self.places.written) and not any(one.parameter in self.untold for one in self.places.written)

    def check(self, run: GradientRun) -> bool:
        """Tell whether a run has come to all that is asked for; where not, it is not asked again."""
        ops = [*self.readers, *(op for written in self.places.written for op in written.ops)]
        if any(op.call.index not in run.calls or run.is_unseen(op.call) for op in ops):
            self._leave_out(OTHER_OPS)
        elif any(written.parameter not in run.leaves for written in self.places.written):
            self._leave_out(NO_GRADIENT)
        return self._is_told

    def explain(self, run: GradientRun, gradients: dict[int, Tensor]) -> None:
        """Take in a batch for what the present channels explain."""
        for read, explained in zip(self.places.read, self._explained, strict=True):
            for reader in read.readers:
                explained.add(run, reader.call.index, gradients[reader.call.index])

    def solve(self) -> None:
        """Find what they explain."""
        if self._is_told:
            for explained in self._explained:
                explained.solve()

    def add(self, run: GradientRun, gradients: dict[int, Tensor], needs: frozenset[str]) -> None:
        """Take in a batch for the moments."""
        if "inputs_second" in needs:
            for place, written in enumerate(self.places.written):
                known, found = self._second[place], _second_moment(written, run)
                self._second[place] = found if known is None else known + found
        for name in needs & {"cross", "residual"}:
            own = gradients if name == "cross" else self._residuals(run, gradients)
            found = self._led_back(run, own)
            self._cross[name] = self._cross[name] + found if name in self._cross else found

    def _residuals(self, run: GradientRun, gradients: dict[int, Tensor]) -> dict[int, Tensor]:
        return {
            reader.call.index: explained.residual(run, reader.call.index, gradients[reader.call.index])
            for read, explained in zip(self.places.read, self._explained, strict=True)
            for reader in read.readers
        }

    def _led_back(self, run: GradientRun, gradients: dict[int, Tensor]) -> Tensor:
        """Return the products of what is written with gradients, [columns, entries or mixtures of them]."""
        names = list(dict.fromkeys(written.parameter for written in self.places.written))
        leaves = [run.leaves[name] for name in names]
        parts = []
        for first in range(0, self._width, self._channels):
            entries = self._probes(first, leaves[0])
            edges, cotangents = self._cotangents(run, gradients, entries)
            with run.within_group([reader.call.index for reader in self.readers]):
                found = torch.autograd.grad(edges, leaves, cotangents, retain_graph=True, allow_unused=True)
            by_name = {
                name: torch.zeros_like(leaf) if one is None else one
                for name, leaf, one in zip(names, leaves, found, strict=True)
            }
            rows = torch.cat([written.rows(by_name[written.parameter]) for written in self.places.written], 1)
            parts.append(rows.to(accumulation_dtype(rows)).mT)
        return torch.cat(parts, 1)[:, : self._width]

    def _probes(self, first: int, like: Tensor) -> Tensor:
        """Return what each present channel stands for, [channels, entries]: an entry, or a mixture of many."""
        if self._width == self._entries:
            places = first + torch.arange(self._channels)
            return torch.eq(places[:, None], torch.arange(self._entries)).to(like)
        generator = torch.Generator().manual_seed(first)
        mixed = torch.randn(self._channels, self._entries, generator=generator, dtype=torch.float64, device="cpu")
        return mixed.to(like) * (1 / sqrt(self._width))

    def _cotangents(
        self, run: GradientRun, gradients: dict[int, Tensor], entries: Tensor
    ) -> tuple[list[GradientEdge], list[Tensor]]:
        """Return where the readers take their inputs, and the gradients there if they held given entries."""
        edges, cotangents = [], []
        sizes = [read.entries for read in self.places.read]
        for read, own in zip(self.places.read, entries.split(sizes, 1), strict=True):
            for reader in read.readers:
                call, edge = run.calls[reader.call.index], run.edge(reader.call.index, reader.source)
                if edge is None:
                    continue
                source = call.arguments[reader.source].detach().requires_grad_()
                weight = read.weight(own, call.arguments[reader.weight].detach())
                with torch.enable_grad():
                    made = applied(call, {reader.source: source, reader.weight: weight})
                (cotangent,) = torch.autograd.grad(made, source, gradients[reader.call.index].to(made))
                edges.append(edge)
                cotangents.append(cotangent)
        return edges, cotangents

    def result(self, samples: int, needs: frozenset[str]) -> GroupMoments:
        """Return the means over samples."""
        if not self._is_told:
            return GroupMoments(self.places, None, self.untold)
        moments: dict[str, Any] = {name: total / samples for name, total in self._cross.items()}
        if any(not bool(total.isfinite().all()) or not bool(total.any()) for total in moments.values()):
            self._leave_out(NO_GRADIENT)
            return GroupMoments(self.places, None, self.untold)
        if "inputs_second" in needs:
            moments["inputs_second"] = tuple(one / samples for one in self._second if one is not None)
        return GroupMoments(self.places, TaskMoments(**moments), self.untold)


def _regressors(read: Read) -> int:
    reader = read.readers[0]
    groups, _, inputs = weight_rows(reader, reader.call.arguments[reader.weight]).shape
    return groups * (inputs + 1) ** 2


def _second_moment(written: Written, run: GradientRun) -> Tensor:
    """Return the sum of h h^T over all places where the rows are multiplied with h."""
    total: Tensor | None = None
    for op in written.ops:
        for rows in input_rows(op, run.calls[op.call.index]):
            own = rows[written.group]
            found = (own.mT @ own).to(accumulation_dtype(own))
            total = found if total is None else total + found
    assert total is not None
    order = written.order.to(total.device)
    return total[order][:, order]
