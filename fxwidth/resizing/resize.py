"""Carrying out a plan in one transaction: what is new is checked, then put in place, or all is taken back."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Unpack

import torch
from torch import fx
from torch.distributed import ProcessGroup

from fxwidth.axes.index_maps import IndexMaps
from fxwidth.distributed.replicas import Replicas
from fxwidth.distributed.sharded import Shard
from fxwidth.distributed.wrappers import unwrapped
from fxwidth.errors import FxwidthError
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.option_keywords import ResizeKeywords
from fxwidth.options import ResizeOptions, options_from, tells_options
from fxwidth.plans import FOR_MODULE, Plan
from fxwidth.reconstruction.bn_recalibration import Recalibration, statistics_used_elsewhere
from fxwidth.recording.graph_meta import AXES, HISTORY, drop_notes_of_passes, note_original, notes_of
from fxwidth.registration import name_of
from fxwidth.resizing.channel_selection import select_channels
from fxwidth.resizing.companions import (
    companions_of,
    options_for_companions,
    plan_for_companions,
    take_new_entries,
)
from fxwidth.resizing.edits import prepare_edits
from fxwidth.resizing.informed_growth import InformedGrowth
from fxwidth.resizing.requested import Known, Requested, refuse_too_narrow, requested
from fxwidth.rewriting.optimizers import Optimizers, check_optimizer
from fxwidth.rewriting.originals import resize_transaction
from fxwidth.rewriting.other_sizes import other_size
from fxwidth.rewriting.transaction import Transaction
from fxwidth.runtime.finiteness import refuse_nan
from fxwidth.runtime.process_groups import ranks_at_work
from fxwidth.statistics.calibration_data import replayed
from fxwidth.statistics.moments import has_values
from fxwidth.statistics.remembered_noise import forget_noise
from fxwidth.tracing.analyze import analyze_module, refuse_other_than_graph
from fxwidth.weights.readers import wiring_of
from fxwidth.work_progress import Progress, listening

_LOGGER = logging.getLogger(__name__)


@tells_options(ResizeOptions)
def resize(
    gm: fx.GraphModule,
    plan: Mapping[str, int | Sequence[int]],
    *,
    optimizer: Optimizers | None = None,
    process_group: ProcessGroup | None = None,
    shard: Shard | None = None,
    progress: Progress = True,
    **options: Unpack[ResizeKeywords],
) -> fx.GraphModule:
    """Give channel groups new widths, in place.

    Dropped channels are folded into their readers by least squares; grown channels leave the function as it was.
    Parameters whose shape changes are replaced, in the module and in the optimizer, and so is their state; hooks,
    Python attributes, gradients, class and memory format go over to the new ones.

    The model that `gm` was traced from is resized with it if its own code does at the new widths what the graph does;
    else it stays as it was before, with parameters of its own from now on. `fxwidth.report` says which it was. Other
    graphs that were traced from the model, or from a part of it, stay as they were before in the same way.

    Args:
        gm: a graph from `fxwidth.trace`, or any GraphModule that carries shapes; or a DistributedDataParallel of one.
        plan: group name -> new width, or the channels to keep, ascending, as in `{"conv1": 24, "conv2": [0, 2, 5]}`;
            groups that are not named stay.
        optimizer: the optimizer that trains `gm` or a part of it; a list where several do, each for its parameters.
        process_group: the ranks of `torch.distributed` that hold the same network and do this together, each with
            `data` of its own. Needless where a DistributedDataParallel is around the graph: that tells it, and its
            reducer is made anew.
        shard: for a graph sharded by `torch.distributed.fsdp.fully_shard`, the function that does it; see `Evolver`.
        data: batches of inputs from which to see what the readers see: any iterable of tensors, of tuples that begin
            with the inputs, or of dicts of them by name; without them, that is estimated from the weights and batch
            norm statistics.
        selection: the method by which channels are chosen: "greedy" (forward, by what readers can be told), "cholesky"
            (pivoted), "leverage" (ridge leverage scores), "backward" (Optimal Brain Surgeon), "spectral_pruning"
            (Suzuki et al.), "magnitude" (largest weights), or "projection" (by the writers' singular vectors, from
            which alone readers are refitted then); or a function `(group, width_graph) -> scores`, one number per
            channel, of which the highest stay: `group.sites` tells where the channels lie in the parameters.
        recalibrate: whether to correct batch norm's running statistics by what the data show before and after; None
            for doing so where data are given.
        rotate: whether groups with nothing nonlinear between writers and readers, such as values and outputs of
            attention, queries and keys, and mobilenet's bottlenecks with their batch norms, are brought to the basis of
            their spectrum first; not done with an optimizer, whose state knows the old basis, nor without folding.
        fold: whether readers take over what they read from dropped channels.
        exact: whether to refuse the growth of groups whose new channels would change the function.
        directions: what new channels are where they may be anything: "orthogonal" to the present ones and to each
            other, as far as there is room; "random"; "split", copies of present ones; "gradmax", for which the gradient
            of what reads them is largest, or "tiny", which best add what present channels lack, both by `data` and
            `loss`; or a function `(rows, count, generator) -> new rows`; see `fxwidth.growth_direction`. What reads
            them is zero, so that the function stays.
        loss: what directions that look at the task, and `reader_step`, go by: a function of the output and the targets
            that follow the inputs in a batch of `data`; returns the mean over the batch.
        reader_step: whether what reads new channels then takes a step down the loss, which changes the function. Its
            length is that which lowers the loss most on batches held out, every fourth, in the mode that `gm` is in;
            where none does, the function stays as it was.
        also: companions of the graph that take the same channels, such as an average of its weights or a teacher:
            copies of it, made by `copy.deepcopy(gm)`, or wrappers that hold one as their `module`, as
            `torch.optim.swa_utils.AveragedModel` does. New channels begin in them with what they are in the graph, so
            that averaging goes on; bases stay as they are.
        progress: whether to show in a terminal, or else to log, after a second, how far the work has come; or a
            function that is called with a `ProgressUpdate` each time. An exception of it ends the work as Ctrl-C does.

    Raises:
        FxwidthError: the plan, the data or the optimizer cannot be used; nothing has changed. So it is after any other
            exception, Ctrl-C included.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> gm = fxwidth.trace(net, torch.randn(2, 8))
        >>> fxwidth.resize(gm, {"0": 10}).get_parameter("2.weight").shape
        torch.Size([4, 10])
        >>> gm = fxwidth.resize(gm, {"0": [0, 3, 5]})
        >>> fxwidth.report(gm).resizes[-1]["kept"]
        {'0': [0, 3, 5]}
        >>> gm = fxwidth.resize(gm, {"0": 2}, selection=lambda group, graph: [0.1, 0.3, 0.2])
        >>> fxwidth.report(gm).resizes[-1]["kept"]
        {'0': [1, 2]}
    """
    checked = options_from(ResizeOptions, {"optimizer": optimizer, **options})
    wrapper, gm = gm, unwrapped(gm)
    refuse_other_than_graph(gm)
    listening(progress, lambda: resize_with(gm, plan, checked, process_group, shard))
    # The wrapper must not be garbage before.
    del wrapper
    return gm


@dataclass(frozen=True)
class Resized:
    """A resize that was carried out.

    Attributes:
        width_graph: the groups as they were before.
        maps: what has become of each dim; None where nothing was to be done.
    """

    width_graph: WidthGraph
    maps: IndexMaps | None


def resize_with(
    gm: fx.GraphModule,
    plan: Mapping[str, int | Sequence[int]],
    options: ResizeOptions,
    process_group: ProcessGroup | None = None,
    shard: Shard | None = None,
) -> Resized:
    """Do what `resize` does, with options that have been checked."""

    def work(transaction: Transaction) -> Resized:
        width_graph = WidthGraph(analyze_module(gm))
        _refuse_different_plans(plan)
        _refuse_needless_data(requested(width_graph, plan, options.exact), options)
        return Resized(width_graph, _resize(width_graph, plan, options, Known(keeps_eps=_keeps_eps(plan)), transaction))

    modules = [gm, *options.graphs_beside]
    replicas = Replicas.of(gm, process_group, (), shard)
    return replicas.run(work, modules, lambda _: modules, optimizer=options.optimizer)


def resize_analyzed(
    width_graph: WidthGraph,
    plan: Mapping[str, int | Sequence[int]],
    options: ResizeOptions | None = None,
    *,
    transaction: Transaction | None = None,
    **known: Any,
) -> fx.GraphModule:
    """Carry out a plan on a graph that has just been analysed.

    Args:
        width_graph: the analysed graph.
        plan: as for `resize`.
        options: those of `resize`; by default its defaults.
        transaction: that of which this is a part, which takes everything back on failure; by default one of its own.
        known: the fields of `Known`.

    Raises:
        FxwidthError: the plan or the data cannot be used.
    """
    options, before = options or ResizeOptions(), Known(**{"keeps_eps": _keeps_eps(plan), **known})
    module = width_graph.analysis.module
    if transaction is not None:
        _resize(width_graph, plan, options, before, transaction)
        return module
    whole = resize_transaction(module, *options.graphs_beside, optimizer=options.optimizer)
    whole.run(lambda: _resize(width_graph, plan, options, before, whole))
    return module


def _resize(
    width_graph: WidthGraph,
    plan: Mapping[str, int | Sequence[int]],
    options: ResizeOptions,
    known: Known,
    transaction: Transaction,
) -> IndexMaps | None:
    """Go through the stages of a resize: what is asked, which channels stay, what changes by that, and the change.

    Returns what has become of each dim.
    """
    module = width_graph.analysis.module
    check_optimizer(options.optimizer, module)
    width_graph.refuse_outdated()
    asked = requested(width_graph, plan, options.exact)
    if not asked.widths:
        return None
    note_original(module)
    if not known.blind:
        refuse_nan(module)
        refuse_too_narrow(width_graph, asked)
    data = replayed(options.data)
    other = None if known.blind else other_size(width_graph.analysis)
    # What can be trained stays so, wherever the resize is called: parameters, their gradients, and optimizer state.
    with torch.inference_mode(False):
        selection = select_channels(width_graph, asked, data, options, known)
        moments = selection.change_bases(transaction)
        # Batch norms that a change of basis changes are compared with what they are then; and modules take on new sizes
        # with what follows: the network is run as it was before that.
        recalibration, elsewhere = _recalibration(width_graph, asked, data, options, known)
        companions = companions_of(width_graph, options)
        informed = InformedGrowth.of(selection, data, options, known)
        edits = prepare_edits(selection, moments, options, known, informed.rows)
        edits.put_in_place(module, transaction)
        if other is not None:
            other.check(width_graph.analysis, edits.maps)
        if recalibration is not None:
            edits.recalibrate(module, recalibration, transaction)
            edits.record["not_refitted"] |= elsewhere
        informed.step(module, edits.record, transaction)
        for companion in companions:
            same, as_it_is = plan_for_companions(edits.record), options_for_companions(options)
            _resize(companion, same, replace(as_it_is, data=data), Known(), transaction)
            take_new_entries(companion.analysis.module, edits.replacements, transaction)
        if edits.update is not None:
            edits.update.commit()
        forget_noise(module)
        before, after = edits.record["parameters"]
        _LOGGER.info("resized %d groups: %d -> %d parameters", len(asked.widths), before, after)
        notes = notes_of(module)
        # In one step: nothing can come between the two.
        notes |= {HISTORY: [*notes.get(HISTORY, ()), edits.record], AXES: edits.axes}
        drop_notes_of_passes(notes)
    return edits.maps


def _recalibration(
    width_graph: WidthGraph, asked: Requested, data: Iterable[Any] | None, options: ResizeOptions, known: Known
) -> tuple[Recalibration | None, dict[str, str]]:
    """Return what batch norms see before a resize, where they are corrected after it, and what else reads them."""
    wanted = options.recalibrate is not False and asked.drops and not known.blind
    if data is None or not wanted or not has_values(width_graph.analysis):
        return None, {}
    elsewhere = statistics_used_elsewhere(wiring_of(width_graph))
    return Recalibration(width_graph.analysis, data, elsewhere), elsewhere


def _keeps_eps(plan: Mapping[str, int | Sequence[int]]) -> bool:
    """Tell whether the module for which a plan was made has one number for the eps of several norms."""
    told = plan.notes.get(FOR_MODULE) if isinstance(plan, Plan) else None
    return isinstance(told, Mapping) and bool(told.get("keeps_eps"))


def _refuse_different_plans(plan: Mapping[str, int | Sequence[int]]) -> None:
    """Check that all ranks, if there are several, were given the same plan."""
    ranks = ranks_at_work()
    for rank, other in enumerate(ranks.gather("the plan", Plan(plan)) if ranks is not None else ()):
        if other != Plan(plan):
            raise FxwidthError(
                f"rank {rank} was given another plan than this one; make it on one rank, and broadcast it to all."
            )


def _refuse_needless_data(asked: Requested, options: ResizeOptions) -> None:
    """Check that data which were given for this resize alone are looked at: a plan that is made with them does so."""
    grows_only = bool(asked.widths) and not asked.drops
    if options.data is not None and grows_only and not options.looks_at_task:
        raise FxwidthError(
            f"data= would be ignored: the plan drops no channels, and directions={name_of(options.directions)!r} does "
            'not look at data. Leave data out, or choose directions that do, such as "tiny".'
        )
