"""The modes that a model gives its parts: its own `train()` and `eval()`, and code that sets them in a call.

Layers that are frozen, as batch norms in detectors, are so by a `train()` of their own that leaves them in evaluation,
or by `part.eval()` in `forward`. A graph has neither; it is given the modes that these lead to.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxwidth.errors import warn
from fxwidth.frontends.as_traced import AsTraced
from fxwidth.runtime.kept_objects import SIMPLE
from fxwidth.runtime.module_copies import put_copies, shallow_copies
from fxwidth.runtime.module_state import GraphPart, restored, walk
from fxwidth.runtime.tensor_slots import Slots, copies_of, substituted, tensor_slots

MODES_MODULE = "fxwidth_modes"
Modes = Mapping[nn.Module, bool]


@dataclass(frozen=True, eq=False)
class OwnModes:
    """What `train()` and `eval()` of a model do.

    Attributes:
        after: the mode of each part after `eval()` (False) and after `train()` (True).
        more: the parts whose own methods do more than set modes, and what that is, in words.
    """

    after: Mapping[bool, Modes]
    more: Mapping[nn.Module, str]


def own_modes(model: nn.Module) -> OwnModes:
    """Return what `train()` and `eval()` of a model do, found by calling those of its own on copies of its tensors."""
    parts = [part for _, part in walk(model)]
    after: dict[bool, Modes] = {mode: dict.fromkeys(parts, mode) for mode in (False, True)}
    if not any(map(_sets_modes, parts)):
        return OwnModes(after, {})
    slots = tensor_slots(model)
    more: dict[nn.Module, str] = {}
    with restored(model) as held:
        copies = copies_of(slots)
        with substituted(model, copies, slots, nullcontext):
            before = _State(model, slots, copies, held.unregistered)
            # First the other one: what sets modes and nothing else can be called again without an effect.
            for mode in (not model.training, model.training):
                try:
                    model.train() if mode else model.eval()
                except Exception as error:
                    more.setdefault(model, f"they fail ({type(error).__name__}: {str(error).partition(chr(10))[0]})")
                    continue
                after[mode] = {part: part.training for part in parts}
                for path, what in before.changes():
                    more.setdefault(_responsible(model, path), f"they change {what}")
    return OwnModes(after, more)


def switch_modes(model: nn.Module) -> None:
    """Put a model in the other mode and back, where it has methods of its own for that."""
    if any(_sets_modes(part) for _, part in walk(model)):
        for mode in (not model.training, model.training):
            model.train() if mode else model.eval()


def _sets_modes(part: nn.Module) -> bool:
    """Tell whether a module has a `train` or `eval` of its own, by its class or put over that."""
    names = ("train", "eval")
    return any(name in vars(part) or getattr(type(part), name) is not getattr(nn.Module, name) for name in names)


def _responsible(model: nn.Module, path: str) -> nn.Module:
    """Return the innermost module with methods of its own around what has been changed."""
    owners = [(name, part) for name, part in walk(model) if _sets_modes(part)]
    around = [part for name, part in owners if not name or f"{path}.".startswith(f"{name}.")]
    return around[-1] if around else model


class _State:
    """What a model holds, but for the modes of its parts."""

    def __init__(self, model: nn.Module, slots: Slots, copies: Mapping[str, Tensor], others: Sequence[Tensor]) -> None:
        self._slots = slots
        self._copies = copies
        self._others = [(tensor, tensor._version) for tensor in others if not tensor.is_inference()]
        self._parts = [(path, part, _attributes(part)) for path, part in walk(model)]

    def changes(self) -> Iterator[tuple[str, str]]:
        """Yield the path of each module, or of a tensor of it, that has changed since, and what did."""
        for name, (tensor, places) in self._slots.items():
            own = self._copies[name]
            if any(getattr(holder, attribute, None) is not own for holder, attribute in places):
                yield name, f"which tensor {name!r} is"
            elif own.requires_grad != tensor.requires_grad:
                yield name, f"whether {name!r} is trained"
            elif not _same_values(own, tensor):
                yield name, f"the values of {name!r}"
        for path, part, before in self._parts:
            for attribute, value in _attributes(part).items():
                if attribute not in before or not _same(before[attribute], value):
                    name = f"{path}.{attribute}" if path else attribute
                    yield path, f"the attribute {name!r}"
        if any(tensor._version != version for tensor, version in self._others):
            yield "", "a tensor that is in an attribute"


def _attributes(part: nn.Module) -> dict[str, Any]:
    """Return what a module keeps besides its mode and tensors, containers as copies."""
    others = {"training", "_parameters", "_buffers"} | ({"is_unchanged"} if isinstance(part, AsTraced) else set())
    kept = {name: value for name, value in vars(part).items() if name not in others}
    # What is new or gone among the tensors is seen by the names.
    names = {"_parameters": list(part._parameters), "_buffers": list(part._buffers)}
    return names | {n: copy.copy(v) if isinstance(v, (dict, list, set)) else v for n, v in kept.items()}


def _same(one: Any, other: Any) -> bool:
    if one is other or (type(one) in SIMPLE and type(one) is type(other) and one == other):
        return True
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return isinstance(one, set) and isinstance(other, set) and one == other


def _same_values(one: Tensor, other: Tensor) -> bool:
    if one.is_meta or one.layout != torch.strided:
        return one.shape == other.shape
    with torch.no_grad():
        return torch.equal(one, other)


def warn_of_own_methods(model: nn.Module, module: fx.GraphModule, own: OwnModes) -> None:
    """Warn of a `train()` or `eval()` that does more than set modes, but of parts that the graph calls as they are."""
    called = {id(part) for _, part in walk(module)}
    for path, part in walk(model):
        if part in own.more and id(part) not in called:
            place = f"{type(part).__name__}, {path!r} of the model," if path else f"{type(part).__name__}"
            warn(
                f"train() and eval() of {place} do more than set modes: {own.more[part]}. Those of the graph set modes "
                "alone: it computes in both what the model computes in the state that it is in now. Trace the model in "
                "the mode in which it is to be trained, and call train() and eval() of the graph from then on, not of "
                "the model.",
            )


# -- modes that code sets while it runs -------------------------------------------------------------------------------


@contextmanager
def in_modes(modes: Modes) -> Iterator[None]:
    """Have modules for a while as `train()` or `eval()` leaves them, in given modes."""
    before = [(part, part.training) for part in modes]
    graphs = [part for part in modes if isinstance(part, AsTraced) and part.is_unchanged]
    for part, mode in modes.items():
        part.training = mode
    for graph in graphs:
        graph.is_unchanged = False
    try:
        yield
    finally:
        for part, mode in before:
            part.training = mode
        for graph in graphs:
            graph.is_unchanged = True


def are_in_modes(modes: Modes) -> bool:
    """Tell whether modules are as `train()` or `eval()` leaves them, in given modes."""
    as_traced = (part for part in modes if isinstance(part, AsTraced))
    return all(part.training == mode for part, mode in modes.items()) and not any(part.forward() for part in as_traced)


@dataclass(frozen=True, eq=False)
class SetByCode:
    """The modes that the code of a model sets while it runs, as far as a trace shows them.

    Attributes:
        now: of parts that are called in another mode than they are in at present.
        after: the same in the modes after `eval()` (False) and `train()` (True).
    """

    now: dict[nn.Module, bool] = field(default_factory=dict)
    after: dict[bool, dict[nn.Module, bool]] = field(default_factory=lambda: {False: {}, True: {}})


class PartModes(GraphPart):
    """Gives parts of a graph the modes that `train()` and `eval()` of its model lead to.

    Args:
        parts: modules, outer ones first, each with its modes in evaluation and in training.
    """

    def __init__(self, parts: Sequence[tuple[nn.Module, bool, bool]]) -> None:
        super().__init__()
        # In a list, which registers none of them: a graph has them in their own places.
        self.parts = list(parts)

    def train(self, mode: bool = True) -> PartModes:
        """Set the modes of the parts, after a graph has set its own for all."""
        super().train(mode)
        for part, in_evaluation, in_training in self.parts:
            for inner in part.modules():
                inner.training = in_training if mode else in_evaluation
        return self


def keep_modes(module: fx.GraphModule, own: OwnModes, code: SetByCode) -> None:
    """Let `train()` and `eval()` of a graph give its parts the modes that those of its model, and its code, give them.

    A part that the model calls in another mode than the part is in now becomes a copy: the model's is only looked at.
    """
    wanted = {mode: {**own.after[mode], **code.after[mode]} for mode in (False, True)}
    shared = [part for _, part in walk(module) if part in own.after[True]]
    odd = [part for part in shared if wanted[False][part] or not wanted[True][part]]
    inside = {inner for part in odd for inner in part.modules()}
    copies = shallow_copies(part for part in shared if any(inner in code.now for inner in part.modules()))
    put_copies(module, copies)
    for part, mode in code.now.items():
        if id(part) in copies:
            copies[id(part)].training = mode
    listed = [(copies.get(id(p), p), wanted[False][p], wanted[True][p]) for p in shared if p in inside]
    if listed:
        module.add_submodule(MODES_MODULE, PartModes(listed))
