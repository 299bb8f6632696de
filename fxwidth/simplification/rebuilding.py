"""Other nodes for a graph, and what must be said and parted before."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, fx

from fxwidth.recording.graph_meta import REBUILT, VALUES, drop_notes_of_passes, note_original, notes_of
from fxwidth.rewriting.attributes import AttributeEdits
from fxwidth.rewriting.originals import leave_behind, own_copies
from fxwidth.rewriting.transaction import Transaction


def rebuild(module: fx.GraphModule, graph: fx.Graph, by: str) -> None:
    """Give a module a graph with other nodes, and note that its model no longer makes it when it is traced anew.

    Args:
        module: the module; whoever calls this has a transaction of it under way.
        graph: a changed copy of its graph.
        by: the name of the pass that has changed it.
    """
    graph.lint()
    note_original(module)
    notes = notes_of(module)
    module.graph = graph
    notes[REBUILT] = (*notes.get(REBUILT, ()), by)
    # What was on record of ops that depend on values was so node by node.
    notes.pop(VALUES, None)
    drop_notes_of_passes(notes)


def part(module: fx.GraphModule, paths: Iterable[str], replaced: Iterable[Tensor], transaction: Transaction) -> None:
    """Give a graph submodules of its own, and whatever shares tensors with it copies of these: it is about to change.

    Models and graphs of which it is not known that they share modules keep these as they are, too.

    Args:
        module: the graph.
        paths: the modules that will change; they and those around them become copies.
        replaced: the tensors in whose place the graph is about to get others.
        transaction: takes what brings all back.
    """
    leave_behind(module, False, replaced, AttributeEdits(), transaction)
    prefixes = (path.split(".")[:count] for path in paths for count in range(1, path.count(".") + 2))
    around = {id(part): part for part in (module.get_submodule(".".join(names)) for names in prefixes)}
    own_copies(module, around.values())
