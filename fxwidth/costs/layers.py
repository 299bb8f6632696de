"""What each layer of a network costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, TypeVar, overload

from torch import fx, nn

from fxwidth.axes.polynomials import Polynomial, entries_polynomial
from fxwidth.costs.counts import call_flops, flop_polynomial, parameter_polynomial
from fxwidth.costs.registry import CostFunction, of_examples, register
from fxwidth.errors import FxwidthError
from fxwidth.groups.repeated_blocks import folded
from fxwidth.groups.width_graph import WidthGraph, refuse_other_than_groups
from fxwidth.recording.tape import OpCall
from fxwidth.rewriting.looks import looking_at
from fxwidth.tables import Table

_Function = TypeVar("_Function", bound=CostFunction)


@dataclass(frozen=True)
class LayerCost:
    """What one layer costs.

    Attributes:
        name: the path of its module, or the node of an op that belongs to none.
        kind: the class of the module, or the op.
        params: entries of its parameters; shared ones count where they are first.
        flops: floating-point operations of one forward pass on the example inputs, their whole batch.
    """

    name: str
    kind: str
    params: int
    flops: int


@dataclass(frozen=True)
class LayerCosts:
    """What a network costs, layer by layer; `print` it for a table.

    Attributes:
        layers: those with parameters or operations, in the order in which they are used first.
        params: of all.
        flops: of all.

    Example:
        >>> fxwidth.LayerCosts((), 0, 0)
        <LayerCosts: 0 layers, 0 parameters, 0 flops>
    """

    layers: tuple[LayerCost, ...]
    params: int
    flops: int

    def __repr__(self) -> str:
        return f"<LayerCosts: {len(self.layers)} layers, {self.params:,} parameters, {self.flops:,} flops>"

    def __str__(self) -> str:
        """Return a table with a row for each layer, and one for all."""
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table(folds=True)._repr_html_()

    def table(self, *, folds: bool = False) -> Table:
        """Return a table with a row for each layer, and one for all.

        Args:
            folds: whether layers of repeated blocks that cost the same are one row, with what each of them costs.
        """
        rows = [(one.name, one.kind, *self._cells(one.params, one.flops)) for one in self.layers]
        if folds:
            rows = [(name, *cells) for name, cells, _ in folded((name, tuple(cells)) for name, *cells in rows)]
        columns = ("layer", "kind", "params", "share", "flops", "share")
        return Table(columns, (*rows, ("all", "", *self._cells(self.params, self.flops))))

    def as_plain(self) -> dict[str, Any]:
        """Return the costs as a dict of numbers, lists and strings, fit for JSON."""
        return asdict(self)

    def _cells(self, params: int, flops: int) -> Iterator[str]:
        for own, total in ((params, self.params), (flops, self.flops)):
            yield f"{own:,}"
            yield f"{own / total:.1%}" if total else ""


@overload
def cost(what: WidthGraph) -> LayerCosts: ...
@overload
def cost(what: str, unit: str) -> Callable[[_Function], _Function]: ...
def cost(what: WidthGraph | str, unit: str | None = None) -> LayerCosts | Callable[[_Function], _Function]:
    """Return what each layer of a graph costs; with a name and a unit, register a function as a cost.

    A registered cost is one that `Budget(costs={name: bound})` can bound: a function from a `WidthGraph` to a
    `Polynomial` in the widths.

    Args:
        what: the groups, from `fxwidth.analyze`, or the name of a new cost, an identifier that is not taken.
        unit: of a new cost, the unit that it is counted in, in the plural, for errors. Absolute bounds are whole
            numbers of it, so choose one of which a network costs many.

    Raises:
        FxwidthError: the graph has changed since it was analysed, or the name is no identifier, or taken.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> gm = fxwidth.trace(net, torch.randn(2, 8))
        >>> print(fxwidth.cost(fxwidth.analyze(gm)))
        layer  kind    params  share   flops  share
        0      Linear  144     67.9%   512    66.7%
        2      Linear  68      32.1%   256    33.3%
        all            212     100.0%  768    100.0%
        >>> @fxwidth.cost("quantized", unit="bytes")
        ... def quantized(width_graph):
        ...     return fxwidth.Polynomial.sum([(0.5, fxwidth.cost_polynomial(width_graph, "params"))])
        >>> dict(fxwidth.plan(fxwidth.analyze(gm), budget=fxwidth.Budget(costs={"quantized": 0.5})))
        {'0': 7}
    """
    if unit is not None:
        return register(what, unit)  # type: ignore[arg-type]
    if isinstance(what, str):
        raise FxwidthError(f"cost({what!r}) lacks the unit; register a cost by @fxwidth.cost({what!r}, unit=...).")
    refuse_other_than_groups(what)
    return looking_at(what.analysis.module, lambda: _layer_costs(what))


def _layer_costs(width_graph: WidthGraph) -> LayerCosts:
    analysis, module = width_graph.analysis, width_graph.analysis.module
    nodes = {node.name: node for node in module.graph.nodes}
    kinds: dict[str, str] = {}
    flops: dict[str, float] = {}
    params: dict[str, float] = {}
    for call in analysis.calls:
        name, kind = _layer_of(width_graph, call, nodes)
        kinds.setdefault(name, kind)
        flops[name] = flops.get(name, 0) + of_examples(width_graph, call_flops(width_graph, call))({})
    for parameter, entry in analysis.parameters.items():
        if isinstance(entry.tensor, nn.Parameter):
            owner = parameter.rpartition(".")[0]
            kinds.setdefault(owner, _class_name(module, owner))
            size: Polynomial = entries_polynomial(analysis.space, [entry.axes])
            params[owner] = params.get(owner, 0) + size({})
    found = [LayerCost(name, kind, int(params.get(name, 0)), int(flops.get(name, 0))) for name, kind in kinds.items()]
    polynomials = (find(width_graph) for find in (parameter_polynomial, flop_polynomial))
    totals = (int(of_examples(width_graph, polynomial)({})) for polynomial in polynomials)
    return LayerCosts(tuple(one for one in found if one.params or one.flops), *totals)


def _layer_of(width_graph: WidthGraph, call: OpCall, nodes: dict[str, fx.Node]) -> tuple[str, str]:
    """Return the layer that an op belongs to, and of what kind it is: that of its weights, else that which calls it."""
    analysis = width_graph.analysis
    provenance = width_graph.roles.provenance
    weights = (name for tensor in call.inputs for dims in provenance.get(tensor, ()) for name, _ in sorted(dims))
    weight = next(weights, None)
    if weight is not None:
        owner = weight.rpartition(".")[0]
        return owner, _class_name(analysis.module, owner)
    node = nodes.get(call.node)
    if node is not None and node.op == "call_module":
        path = ".".join(part for part in (str(node.target), call.part) if part)
        return path, _class_name(analysis.module, path)
    stack = list((node.meta.get("nn_module_stack") or {}).values()) if node is not None else []
    if stack:
        path, kind = stack[-1]
        return path, kind if isinstance(kind, str) else kind.__name__
    return call.node, call.name


def _class_name(module: nn.Module, path: str) -> str:
    try:
        kind = type(module.get_submodule(path))
    except AttributeError:
        return ""
    # A trace keeps of a container of layers but its name.
    return "" if kind is nn.Module else kind.__name__
