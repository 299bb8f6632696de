"""What a resize may change, as it was before: whatever ends a resize on its way puts all of it back."""

from __future__ import annotations

import random
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable
from contextlib import ExitStack, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, fx, nn

from fxwidth.rewriting.optimizers import Optimizers, optimizers_in
from fxwidth.runtime.contexts import plain_surroundings
from fxwidth.runtime.global_state import GlobalState
from fxwidth.runtime.held_interrupts import uninterrupted
from fxwidth.runtime.kept_objects import SIMPLE
from fxwidth.runtime.module_state import finish, handing_on, is_plain_layer, kept_by, values_taken, walk
from fxwidth.runtime.tensor_slots import overwrite

_Result = TypeVar("_Result")
# Of these the contents are put back too; what a model keeps in objects of other classes is not written to.
_CONTAINERS = frozenset({dict, OrderedDict, defaultdict, list, set})
# The modules that the transactions under way put back, by identity.
_UNDER_WAY: ContextVar[frozenset[int]] = ContextVar("under_way", default=frozenset())
# The innermost transaction under way that takes those inside of it back with itself.
_HOLDING: ContextVar[Transaction | None] = ContextVar("holding", default=None)


def is_put_back(module: nn.Module) -> bool:
    """Tell whether a transaction is under way that puts a module back, should it end before its time."""
    return id(module) in _UNDER_WAY.get()


class Transaction:
    """A change of modules, of tensors in them, and of an optimizer, that is made as a whole or not at all.

    What is put back is not what was noted step by step but the state from before the first one, so there is no moment
    between a step and its note.

    Args:
        modules: all that may change: their attributes, containers, parameters, buffers, submodules, and graphs.
        optimizer: likewise: its groups and its state, by identity.
        objects: others of which attributes may change.
        is_run_only: whether modules are but run, so that of plain layers only tensors and modes change meanwhile.
        holds: whether transactions inside of this one, which have ended well, are taken back with it: what they knew
            and this one does not, such as tensors that were written to, and companions.
    """

    def __init__(
        self,
        *modules: nn.Module,
        optimizer: Optimizers | None = None,
        objects: Iterable[object] = (),
        is_run_only: bool = False,
        holds: bool = False,
    ) -> None:
        self._holds = holds
        self._ended_well: list[Transaction] = []
        self._global_state = GlobalState()
        self.undo = ExitStack()
        self._values: dict[int, tuple[Tensor, Tensor]] = {}
        self._unfinished: list[Any] = []
        self._modules = frozenset(map(id, modules))
        parts = list({id(part): part for module in modules for _, part in walk(module)}.values())
        # What is deeper in attributes than below, on classes, and what the code of the modules reaches elsewhere.
        self._reached = kept_by(parts)
        self._run = modules[0] if is_run_only else None
        plain = [part for part in parts if is_run_only and (type(part) is nn.Module or is_plain_layer(part))]
        self._plain = [(part, part.training, part._parameters.copy(), part._buffers.copy()) for part in plain]
        known = set(map(id, plain))
        self._kept = [_Kept(one.__dict__) for one in (*parts, *objects) if id(one) not in known]
        self._forwards = [
            (type(part), vars(type(part)).get("forward"))
            for part in parts
            if isinstance(part, fx.GraphModule) and "forward" in vars(type(part))
        ]
        for one in optimizers_in(optimizer):
            self._kept += [_Kept(one.__dict__), _Kept(one.state), *map(_Kept, one.param_groups)]
            self._kept += [_Kept(state) for state in one.state.values() if isinstance(state, dict)]

    def run(self, work: Callable[[], _Result]) -> _Result:
        """Return what the work returns; if it is ended by an exception or by Ctrl-C, nothing has changed."""
        outer, holder = _UNDER_WAY.get(), _HOLDING.get()
        try:
            _UNDER_WAY.set(outer | self._modules)
            # Each hands itself to the one right around it: taken back in reverse, each finds what it has left.
            _HOLDING.set(self if self._holds or holder is not None else None)
            handing = handing_on(self._run, self._reached) if self._run is not None else nullcontext()
            with plain_surroundings(), values_taken(self._unfinished), handing:
                result = work()
            if holder is not None:
                holder._ended_well.append(self)
            return result
        except BaseException:
            self.roll_back()
            raise
        finally:
            _UNDER_WAY.set(outer)
            _HOLDING.set(holder)

    def overwrite(self, tensor: Tensor, values: Tensor) -> None:
        """Give a tensor other values, in place."""
        if id(tensor) not in self._values:
            self._values[id(tensor)] = tensor, tensor.detach().clone()
        overwrite(tensor, values)

    def before(self, tensor: Tensor) -> Tensor:
        """Return the values of a tensor before it was overwritten: itself where it was not."""
        return self._values[id(tensor)][1] if id(tensor) in self._values else tensor

    def roll_back(self) -> None:
        """Make everything what it was before."""
        # A step that fails must not keep the others from being taken.
        with uninterrupted(), ExitStack() as steps:
            for reached in self._reached:
                steps.callback(reached.put_back, lambda _: True)
            for kept in self._kept:
                steps.callback(kept.put_back)
            for part, mode, parameters, buffers in self._plain:
                steps.callback(setattr, part, "training", mode)
                steps.callback(_refill, part._parameters, parameters)
                steps.callback(_refill, part._buffers, buffers)
            for kind, forward in self._forwards:
                steps.callback(setattr, kind, "forward", forward)
            for tensor, values in self._values.values():
                steps.callback(overwrite, tensor, values)
            steps.callback(finish, self._unfinished)
            steps.callback(self.undo.close)
            steps.callback(self._global_state.put_back)
            # The steps are taken from the last one: what was done inside goes first, the latest of it before the rest.
            for inner in self._ended_well:
                steps.callback(inner.roll_back)


@dataclass
class _Kept:
    """A dict as it is now, with the contents of the containers in it and the states of generators."""

    owner: Any
    items: dict[Any, Any]
    contents: list[tuple[Any, Any]]
    generators: list[tuple[random.Random, Any]]

    def __init__(self, owner: Any) -> None:
        self.owner = owner
        self.items = dict(owner)
        held = [value for value in self.items.values() if type(value) not in SIMPLE]
        # Nearly all are empty, and a copy takes a while.
        self.contents = [(value, value.copy() if value else ()) for value in held if type(value) in _CONTAINERS]
        self.generators = [(one, one.getstate()) for one in held if isinstance(one, random.Random)]

    def put_back(self) -> None:
        """Make the dict what it was, its order included."""
        _refill(self.owner, self.items)
        for container, old in self.contents:
            _refill(container, old)
        for generator, state in self.generators:
            generator.setstate(state)


def _refill(container: Any, old: Any) -> None:
    if isinstance(container, list):
        container[:] = old
    elif (
        isinstance(container, set)
        or len(container) != len(old)
        or any(key is not other or container[key] is not old[other] for key, other in zip(container, old, strict=True))
    ):
        container.clear()
        container.update(old)
