"""The pass that makes two layers of one whose own rank is low."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from fxwidth.costs.budget import Budget, bounds_of
from fxwidth.errors import FxwidthError
from fxwidth.factorization.chosen_ranks import Candidate, ranks_for_cost, ranks_for_error
from fxwidth.factorization.two_layers import LowRankLayer, factorize, separable_layers, with_spectra
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.importance.estimates import refuse_negative_variances
from fxwidth.passes.conditions import ALONE, OF_THE_GRAPH, SHAPES
from fxwidth.passes.width_pass import WidthPass
from fxwidth.plain_numbers import plain_number
from fxwidth.recording.graph_meta import refuse_groups_of_one
from fxwidth.rewriting.optimizers import Optimizers, check_optimizer, refuse_other_than_optimizers
from fxwidth.rewriting.originals import resize_transaction
from fxwidth.rewriting.transaction import Transaction
from fxwidth.runtime.finiteness import refuse_nan
from fxwidth.statistics.calibration_data import refuse_other_than_batches, replayed
from fxwidth.statistics.moments import has_values
from fxwidth.tracing.analyze import analyze_module


class FactorizeLinear(WidthPass):
    """Makes two layers of each linear layer, and convolution over single positions, whose own rank is low.

    Weights of low rank are those that lose least of the outputs for what the layer reads. Only where two layers have
    fewer parameters than one does it become two. Layers with hooks, and weights that are shared, computed or used
    several times stay. The model that was traced stays as it was, with tensors of its own from then on. `fxwidth.save`
    writes such a graph to ".pt2" and pickle, and not to ".safetensors".

    Args:
        params: what the network may cost: an int is a count of parameters, a float a part of the present ones.
        flops: likewise; give one of `params`, `flops` and `error`.
        error: the largest share of its outputs that a layer may lose, in [0, 1): 0 for what is of low rank exactly.
        data: batches as for `fxwidth.resize`, of which the first 1024 inputs show what layers read; by default noise is
            sent through. Layers of more than 4096 inputs go by their weights alone.
        only: names, or patterns as of fnmatch, of the layers that may change: paths of modules or of weights.
        keep: likewise of those that must not.
        optimizer: what trains the graph, or several; new parameters begin without state.

    Raises:
        FxwidthError: an option is out of range.

    Source: C. Eckart, G. Young, The Approximation of One Matrix by Another of Lower Rank (1936).

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> with torch.no_grad():
        ...     net[0].weight.copy_(torch.randn(16, 2) @ torch.randn(2, 16)).shape
        torch.Size([16, 16])
        >>> gm = fxwidth.trace(net, torch.randn(2, 16))
        >>> fxwidth.passes.FactorizeLinear(error=0.0)(gm).graph_module.get_submodule("0")
        Sequential(
          (0): Linear(in_features=16, out_features=2, bias=False)
          (1): Linear(in_features=2, out_features=16, bias=True)
        )
    """

    needs = (SHAPES, ALONE)
    spoils = OF_THE_GRAPH

    def __init__(
        self,
        *,
        params: float | None = None,
        flops: float | None = None,
        error: float | None = None,
        data: Iterable[Any] | None = None,
        only: str | Sequence[str] | None = None,
        keep: str | Sequence[str] | None = None,
        optimizer: Optimizers | None = None,
    ) -> None:
        super().__init__()
        given = {
            name: value for name, value in (("params", params), ("flops", flops), ("error", error)) if value is not None
        }
        if len(given) != 1:
            raise FxwidthError(
                f"FactorizeLinear takes one of params=, flops= and error=, but received {', '.join(given) or 'none'}."
            )
        refuse_other_than_batches(data)
        refuse_other_than_optimizers(optimizer)
        self._error = None if error is None else _checked_error(error)
        self._budget = Budget(params=params, flops=flops) if error is None else None
        self._data, self._optimizer = replayed(data), optimizer
        self._only, self._keep = _patterns(only, "only"), _patterns(keep, "keep") or ()

    @property
    def optimizer(self) -> Optimizers | None:
        """What trains the graph."""
        return self._optimizer

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Make two layers of some, in place.

        Args:
            graph_module: the graph.

        Raises:
            FxwidthError: the graph cannot be analysed, it has no values, the budget is out of reach, `only=` or `keep=`
                names no layer, or the data do not fit; nothing has changed.
        """
        check_optimizer(self._optimizer, graph_module)
        transaction = resize_transaction(graph_module, optimizer=self._optimizer)
        return PassResult(graph_module, transaction.run(lambda: self._factorized(graph_module, transaction)))

    def _factorized(self, graph_module: fx.GraphModule, transaction: Transaction) -> bool:
        refuse_nan(graph_module)
        width_graph = WidthGraph(analyze_module(graph_module))
        if not has_values(width_graph.analysis):
            raise FxwidthError("FactorizeLinear looks at weights, which are on the meta device; load them first.")
        layers = [layer for layer in separable_layers(width_graph.analysis) if self._may_change(layer.weight)]
        self._refuse_unknown(graph_module)
        refuse_negative_variances(width_graph.analysis)
        found = with_spectra(width_graph, layers, self._data)
        ranks = self._ranks(width_graph, found)
        if ranks:
            refuse_groups_of_one(graph_module, self.name)
            factorize(graph_module, found, ranks, transaction, self.name, self._optimizer)
        return bool(ranks)

    def _ranks(self, width_graph: WidthGraph, layers: Sequence[LowRankLayer]) -> dict[str, int]:
        if self._budget is None:
            assert self._error is not None
            return ranks_for_error([_candidate(one, 1) for one in layers], self._error)
        (bound,) = bounds_of(width_graph, self._budget)
        # An entry of a weight is multiplied and added at each position.
        candidates = [_candidate(one, 1 if bound.name == "params" else 2 * one.positions) for one in layers]
        return ranks_for_cost(candidates, int(bound.cost({})), bound.limit, f"{bound.name}={bound.given}")

    def _may_change(self, weight: str) -> bool:
        return (self._only is None or _matches(weight, self._only)) and not _matches(weight, self._keep)

    def _refuse_unknown(self, graph_module: fx.GraphModule) -> None:
        names = [name for name, _ in graph_module.named_parameters(remove_duplicate=False)]
        for option, patterns in (("only", self._only or ()), ("keep", self._keep)):
            for one in patterns:
                if not any(_matches(name, (one,)) for name in names):
                    raise FxwidthError(
                        f"{option}={one!r} names no layer; give paths of modules of the graph, or patterns of them."
                    )


def _candidate(one: LowRankLayer, unit: int) -> Candidate:
    outputs, inputs = one.weight.shape
    return Candidate(one.layer.weight, inputs, outputs, unit, one.spectrum.lost)


def _matches(weight: str, patterns: Iterable[str]) -> bool:
    names = (weight, weight.rpartition(".")[0])
    return any(fnmatchcase(name, one) for name in names for one in patterns)


def _patterns(given: str | Sequence[str] | None, option: str) -> tuple[str, ...] | None:
    if given is None:
        return None
    found = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, (list, tuple, set)) else ()
    if not found or not all(isinstance(one, str) for one in found):
        raise FxwidthError(f"{option}= takes names or patterns of layers, but received {given!r}.")
    return found


def _checked_error(error: Any) -> float:
    number = plain_number(error)
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 <= number < 1:
        raise FxwidthError(f"error={error!r} is the largest share of its outputs that a layer may lose, in [0, 1).")
    return float(number)
