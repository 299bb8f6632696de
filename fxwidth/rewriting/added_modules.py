"""What rewriting adds to a module beside its graph: constants as buffers, and dropouts as modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from torch import Tensor, fx, nn

from fxwidth.rewriting.training_runs import Dropout
from fxwidth.runtime.module_state import walk

_CONSTANT, _DROPOUT = "_fxwidth_constant_", "fxwidth_dropout_"


@dataclass(frozen=True)
class Additions:
    """Constants and dropout modules by the paths at which a graph finds them, not yet in the module itself."""

    module: fx.GraphModule
    constants: dict[str, Tensor] = field(default_factory=dict)
    modules: dict[str, nn.Module] = field(default_factory=dict)

    def constant(self, value: Tensor) -> str:
        """Return the path of a new buffer."""
        path = self._free("", _CONSTANT)
        self.constants[path] = value
        return path

    def dropout(self, dropout: Dropout) -> str:
        """Return the path of a new dropout module, below the module whose mode it must follow."""
        path = self._free(dropout.owner, _DROPOUT)
        self.modules[path] = dropout.kind(dropout.p)
        return path

    def _free(self, owner: str, prefix: str) -> str:
        holder = self.module.get_submodule(owner)
        paths = (f"{owner}.{prefix}{number}" if owner else f"{prefix}{number}" for number in count())
        added = {*self.constants, *self.modules}
        return next(path for path in paths if path not in added and not hasattr(holder, path.rpartition(".")[2]))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Have them in the module for a while, for a run of the graph that needs them."""
        with ExitStack() as undo:
            for name, constant in self.constants.items():
                undo.callback(_put_back, self.module._buffers, dict(self.module._buffers))
                self.module._buffers[name] = constant
            for path, part in self.modules.items():
                owner, _, name = path.rpartition(".")
                table = self.module.get_submodule(owner)._modules
                undo.callback(_put_back, table, dict(table))
                table[name] = part.eval()
            yield


def drop_unread_constants(graph: fx.Graph) -> None:
    """Take nodes out of a graph that read a constant for nobody."""
    for node in graph.find_nodes(op="get_attr"):
        if not node.users and str(node.target).startswith(_CONSTANT):
            graph.erase_node(node)


def remove_unused(module: fx.GraphModule, undo: ExitStack) -> None:
    """Take away what was added for earlier graphs of a module and is not in its present one, in a way to be undone."""
    targets = {str(node.target) for op in ("get_attr", "call_module") for node in module.graph.find_nodes(op=op)}
    for holder, name in list(_additions(module, targets)):
        for table in (holder._buffers, holder._modules):
            if name in table:
                # As a whole: what comes back must be at its place in the order.
                undo.callback(_put_back, table, dict(table))
                del table[name]


def _additions(module: fx.GraphModule, used: set[str]) -> Iterator[tuple[nn.Module, str]]:
    """Yield what was added and is not among the paths that a graph uses, and the module that holds it."""
    yield from ((module, name) for name in module._buffers if name.startswith(_CONSTANT) and name not in used)
    for path, part in walk(module):
        # A module that is called as a whole may use what it has by itself.
        parents = path.split(".")
        if any(".".join(parents[:k]) in used for k in range(1, len(parents) + 1)):
            continue
        for name in part._modules:
            if name.startswith(_DROPOUT) and (f"{path}.{name}" if path else name) not in used:
                yield part, name


def _put_back(table: dict[str, Any], before: dict[str, Any]) -> None:
    table.clear()
    table.update(before)
