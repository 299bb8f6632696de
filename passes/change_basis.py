"""The pass that brings linear groups to the basis of their spectrum."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from fxwidth.groups.width_graph import WidthGraph
from fxwidth.importance.estimates import gather_evidence
from fxwidth.option_keywords import Chosen
from fxwidth.passes.conditions import ALONE, PLANNED, SHAPES
from fxwidth.passes.width_pass import WidthPass
from fxwidth.planning.group_choice import chosen_groups
from fxwidth.reconstruction.basis_change import Rotation, rotated, rotation
from fxwidth.recording.graph_meta import PLAN, PLAN_NOTES, notes_of
from fxwidth.rewriting.attributes import AttributeEdits
from fxwidth.rewriting.originals import leave_behind, resize_transaction
from fxwidth.rewriting.transaction import Transaction
from fxwidth.runtime.finiteness import refuse_nan
from fxwidth.statistics.calibration_data import refuse_other_than_batches, replayed
from fxwidth.tracing.analyze import analyze_module
from fxwidth.weights.readers import wiring_of


class ChangeBasis(WidthPass):
    """Brings linear groups to the basis of their spectrum, in which the first channels matter most.

    Linear groups are those with nothing nonlinear between writers and readers, as values and outputs of attention,
    queries and keys, and mobilenet's bottlenecks. What the graph computes in evaluation stays as it is; the model that
    was traced keeps its own basis, with tensors of its own from then on. An optimizer knows the old basis: make a new
    one for `gm.parameters()`.

    Args:
        data: batches as for `fxwidth.resize`, from which to see what readers read; by default noise is sent through.
        only: names, patterns or modules of the groups that may change, as for `fxwidth.plan`.
        keep: likewise of those that must not.

    Raises:
        FxwidthError: data cannot be gone through batch by batch.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4))
        >>> x = torch.randn(32, 8)
        >>> gm = fxwidth.trace(net, x)
        >>> gm = fxwidth.passes.ChangeBasis([x])(gm).graph_module
        >>> torch.allclose(gm(x), net(x), atol=1e-4), bool((gm(x) - gm.get_submodule("1").bias).any())
        (True, True)
        >>> torch.allclose(gm.get_parameter("0.weight"), net[0].weight)
        False
    """

    needs = (SHAPES, ALONE)
    spoils = (PLANNED,)

    def __init__(
        self, data: Iterable[Any] | None = None, *, only: Chosen | None = None, keep: Chosen | None = None
    ) -> None:
        super().__init__()
        refuse_other_than_batches(data)
        self._data, self._only, self._keep = replayed(data), only, keep

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Change the bases of a graph, in place.

        Args:
            graph_module: the graph.

        Raises:
            FxwidthError: the graph cannot be analysed, the data do not fit, or an option names no group; nothing has
                changed.
        """
        transaction = resize_transaction(graph_module)
        return PassResult(graph_module, transaction.run(lambda: self._changed(graph_module, transaction)))

    def _changed(self, graph_module: fx.GraphModule, transaction: Transaction) -> bool:
        refuse_nan(graph_module)
        width_graph = WidthGraph(analyze_module(graph_module))
        groups = chosen_groups(width_graph, self._only, self._keep)
        moments = gather_evidence(width_graph, self._data).moments if groups else None
        if moments is None:
            return False
        # All bases are found before any weight changes: readers of one group write another.
        found = (rotation(width_graph, group, moments) for group in groups)
        bases: list[Rotation] = [basis for basis in found if basis is not None]
        if not bases:
            return False
        leave_behind(graph_module, False, (), AttributeEdits(), transaction)
        wiring = wiring_of(width_graph)
        # What can be trained stays so, wherever the pass is called.
        with torch.inference_mode(False):
            for basis in bases:
                moments = rotated(wiring, basis, moments, transaction)
        notes = notes_of(graph_module)
        # It was made by what channels were.
        notes.pop(PLAN, None)
        notes.pop(PLAN_NOTES, None)
        refuse_nan(graph_module)
        return True
