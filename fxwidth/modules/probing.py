"""Which widths a module can hold: groups that its code or its configuration has one number for, and sizes that stay.

It is learnt by probing the module once: groups are narrowed, its own code is run under fake tensors, and what it does
is compared with what is prescribed. Where it fails, groups that occur there are narrowed by the same ratio, as long as
that leads further.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch import nn

from fxwidth.errors import FxwidthError
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.modules.class_runs import ClassRuns
from fxwidth.modules.code_holdings import InCode
from fxwidth.modules.config_holdings import InConfig
from fxwidth.modules.holdings import Holdings, Widths
from fxwidth.modules.rebuilding import Rebuilding, plain_objects, unsaved_tensors
from fxwidth.modules.trials import Trials
from fxwidth.rewriting.graph_calls import arguments_of_graph
from fxwidth.rewriting.transaction import Transaction


def module_holdings(width_graph: WidthGraph, model: nn.Module) -> Holdings:
    """Return which widths of a graph's groups a module of the class that was traced can hold.

    It is found once for each module; that is left as it was, after any exception too, Ctrl-C included.

    Raises:
        FxwidthError: the module does not do what the graph does at its present widths.
    """
    key = ("holdings", id(model))
    if key not in width_graph.memo:
        runs = ClassRuns(width_graph.analysis, model, arguments_of_graph(width_graph.analysis.module))
        transaction = Transaction(model, objects=plain_objects(model))
        width_graph.memo[key] = model, transaction.run(lambda: holdings_of(width_graph, runs))
    found: Holdings = width_graph.memo[key][1]
    return found


def holdings_of(width_graph: WidthGraph, runs: ClassRuns) -> Holdings:
    """Return which widths of a graph's groups a module can hold; it is left as it was."""
    runs.go_as_graph()
    trials = Trials(width_graph, runs)
    failure = runs.failure(trials.maps({}))
    if failure is not None:
        raise FxwidthError(
            f"for_module: {type(runs.model).__name__} does not do what the graph does at the widths that this has now: "
            f"{failure}. Pass the model that was traced, or one of the same class and sizes."
        )
    staying = dict(_made_anew(width_graph, runs))
    groups = [group for group in width_graph.free if group.name not in staying and group.width > group.least.width]
    rebuilding = Rebuilding.of(runs.model)
    found = InCode(trials, groups).found() if rebuilding is None else InConfig(trials, groups, rebuilding).found()
    found.staying |= staying
    found.problem = partial(_problem, trials, rebuilding)
    return found


def _problem(trials: Trials, rebuilding: Rebuilding | None, widths: Widths) -> str | None:
    model = trials.runs.model
    transaction = Transaction(model, objects=plain_objects(model))
    return transaction.run(lambda: trials.problem(widths, rebuilding))


def _made_anew(width_graph: WidthGraph, runs: ClassRuns) -> Iterator[tuple[str, str]]:
    """Yield the groups that occur in tensors whose numbers a class makes itself, such as positions or frequencies."""
    unsaved = unsaved_tensors(runs.model)
    own = {graph: name for name, graph in runs.entries.items()}
    for group in width_graph.free:
        for site in group.sites:
            name = own.get(site.parameter)
            tensor = runs.slots[name][0] if name is not None else None
            if tensor is None or isinstance(tensor, nn.Parameter):
                continue
            if name in unsaved or not (tensor.is_floating_point() or tensor.is_complex()):
                yield group.name, f"the class makes the numbers in {name} itself"
                break
