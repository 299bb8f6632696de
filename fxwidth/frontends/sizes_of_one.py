"""Sizes of one, of which a model has asked: where its graph gives the same for them, they need not be refused.

Code asks whether a size is one to save work as often as to do something else: attention that need not mask one token,
a mean over one position. What is answered otherwise is run on inputs of that size, by the model and by its graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, fx, nn

from fxwidth.errors import FxwidthError
from fxwidth.frontends.call_signature import INPUTS_MODULE, Argument, Inputs, refuse_guarded
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
    """Let a graph take sizes of one for which it gives what the model gives, where its guards refuse them.

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
    if not isinstance(checks, Inputs) or not checks.guards or any(tensor.is_meta for tensor in known):
        return
    kept = checks.guards
    checks.guards = tuple(guard for guard in kept if guard not in guards)

    def narrowed(places: Places) -> list[Tensor]:
        return [_of_one(leaf, [dim for one, dim in places if one == number]) for number, leaf in enumerate(leaves)]

    def holds(places: Places) -> bool:
        try:
            return give_the_same(model, graph, arguments, rebuild_each(structures, narrowed(places)))
        except Exception:
            # What the model cannot do for a size of one, or the graph cannot, is refused.
            return False

    same = [guard for guard, places in guards.items() if holds(places)]
    # And for all of them together.
    if len(same) > 1 and not holds([place for guard in same for place in guards[guard]]):
        same = []
    checks.guards = tuple(guard for guard in kept if guard not in same)
    batch = leaves[0].shape[0] if leaves and leaves[0].dim() else 1
    wholes = [(place, 0) for place, leaf in enumerate(leaves) if leaf.dim() and leaf.shape[0] == batch]
    refusing = [guard for guard in checks.guards if batch > 1 and _refuses(guard, narrowed(wholes))]
    if refusing:
        # Comparisons of sizes with each other, as of a batch times a width with a number of places.
        rest, checks.guards = checks.guards, tuple(guard for guard in checks.guards if guard not in refusing)
        is_same = holds(wholes)
        alone = {guard: f"leaves[0].size()[0] == 1 or ({guard})" for guard in refusing if is_same}
        checks.guards = tuple(alone.get(guard, guard) for guard in rest)


def _refuses(guard: str, leaves: Sequence[Tensor]) -> bool:
    try:
        refuse_guarded([guard], leaves)
    except FxwidthError:
        return True
    return False


def _of_one(leaf: Tensor, dims: Sequence[int]) -> Tensor:
    for dim in dims:
        leaf = leaf.narrow(dim, 0, 1)
    return leaf.clone()
