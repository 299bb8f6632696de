"""Sizes of one, of which a model has asked: where its graph gives the same for them, they need not be refused.

Code asks whether a size is one to save work as often as to do something else: attention that need not mask one token,
a mean over one position. What is answered otherwise is run on inputs of that size, by the model and by its graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, fx, nn

from fxwidth.frontends.call_signature import INPUTS_MODULE, Argument, Inputs
from fxwidth.frontends.same_results import give_the_same
from fxwidth.runtime.pytrees import Structure, rebuild_each
from fxwidth.runtime.tensor_slots import tensor_slots

Places = Sequence[tuple[int, int]]


def allow_ones(
    graph: fx.GraphModule,
    model: nn.Module,
    arguments: Sequence[Argument],
    structures: Sequence[Structure],
    leaves: Sequence[Tensor],
    guards: Mapping[str, Places],
) -> None:
    """Take those guards from a graph that refuse sizes of one for which it gives what the model gives.

    Args:
        graph: the graph, in the mode of the model.
        model: the module.
        arguments: those of its forward.
        structures: those of the arguments.
        leaves: the tensors among the arguments of an example.
        guards: the conditions, each with the dims of leaves that it is about, as (leaf, dim).
    """
    checks = getattr(graph, INPUTS_MODULE, None)
    known = [*leaves, *(tensor for tensor, _ in tensor_slots(model).values())]
    if not guards or not isinstance(checks, Inputs) or any(tensor.is_meta for tensor in known):
        return
    kept = checks.guards
    checks.guards = tuple(guard for guard in kept if guard not in guards)

    def holds(places: Places) -> bool:
        narrow = [_of_one(leaf, [dim for one, dim in places if one == number]) for number, leaf in enumerate(leaves)]
        try:
            return give_the_same(model, graph, arguments, rebuild_each(structures, narrow))
        except Exception:
            # What the model cannot do for a size of one, or the graph cannot, is refused.
            return False

    same = [guard for guard, places in guards.items() if holds(places)]
    # And for all of them together.
    if len(same) > 1 and not holds([place for guard in same for place in guards[guard]]):
        same = []
    checks.guards = tuple(guard for guard in kept if guard not in same)


def _of_one(leaf: Tensor, dims: Sequence[int]) -> Tensor:
    for dim in dims:
        leaf = leaf.narrow(dim, 0, 1)
    return leaf.clone()
