"""Sizes that a model's own code keeps in attributes, found by trial: set, run, compared op by op.

What an attribute must become is proposed by the sizes that its old value has in the ops of its module, at the old
widths and at the new ones; whether it does is told by the ops alone. Its name plays no part.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Any

from torch import nn
from torch.utils._pytree import tree_leaves

from fxwidth.analysis.op_signatures import Signature
from fxwidth.axes.index_maps import IndexMaps
from fxwidth.modules.class_runs import ClassRuns, Failure, SeenOp
from fxwidth.modules.model_edits import ModelEdits
from fxwidth.recording.tape import OpCall
from fxwidth.rewriting.attributes import UnsettableError, sizes_by_shape
from fxwidth.rules.registry import resized_call
from fxwidth.runtime.kept_objects import SIMPLE
from fxwidth.runtime.module_state import walk
from fxwidth.runtime.tensor_slots import substituted

Number = int | float
Pairs = Mapping[Number, Sequence[Number]]
Run = Callable[[], Failure | None]
# How many attributes of one module are set at once where no single one leads on, and how many trials a place gets.
_TOGETHER, _TRIALS = 2, 60


@dataclass(frozen=True)
class _Trial:
    """An attribute, and a value for it."""

    owner: Any
    name: str
    value: Any

    @property
    def habit(self) -> tuple[type, str]:
        """What is the same in other modules of the same kind."""
        return type(self.owner), self.name


def fit_sizes(runs: ClassRuns, run: Run, known: Mapping[str, Pairs], edits: ModelEdits) -> Failure | None:
    """Set attributes of a model's modules until its code does what is prescribed; return where that does not succeed.

    Args:
        runs: the model.
        run: tells where the model, as it is now, does otherwise.
        known: what sizes become in the ops of each module, by its path.
        edits: takes the changes.
    """
    habits: dict[tuple[type, str], None] = {}
    failure = run()
    while failure is not None:
        tried, unset = 0, ""
        for trial in _trials(runs, failure, known, habits):
            tried += 1
            mark = edits.mark()
            try:
                edits.apply_together((one.owner, one.name, one.value) for one in trial)
                after = run()
            except Exception as error:
                edits.undo(mark)
                unset = unset or (f"; {error}" if isinstance(error, UnsettableError) else "")
                continue
            if after is None or after.reached > failure.reached:
                habits |= dict.fromkeys(one.habit for one in trial)
                failure = after
                break
            edits.undo(mark)
            if tried > _TRIALS:
                return replace(failure, what=f"{failure.what}{unset}")
        else:
            return replace(failure, what=f"{failure.what}{unset}")
    return None


def _trials(
    runs: ClassRuns, failure: Failure, known: Mapping[str, Pairs], habits: Mapping[tuple[type, str], None]
) -> Iterator[tuple[_Trial, ...]]:
    """Yield what may help where a model fails: attributes of the module at work, of those in it, and around it."""
    parts = dict(walk(runs.model))
    own = [path for path in parts if path == failure.part or path.startswith(f"{failure.part}.")]
    around = [failure.part.rpartition(".")[0]] if failure.part else []
    while around and around[-1]:
        around.append(around[-1].rpartition(".")[0])
    rounds: list[list[_Trial]] = []
    for derive in (_direct, _derived):
        found = []
        for path in dict.fromkeys([failure.part, *around, *(own if failure.part else [])]):
            pairs = derive(known.get(path, {}))
            found += list(_of_module(parts[path], pairs))
        # What has helped in a module of the same class comes first.
        found.sort(key=lambda one: one.habit not in habits)
        rounds.append(found)
    for found in rounds:
        yield from ((one,) for one in found)
    for found in rounds:
        of_part = [one for one in found if one.owner is parts.get(failure.part)]
        for together in combinations(of_part, _TOGETHER):
            if len({one.name for one in together}) == _TOGETHER:
                yield together


def _of_module(part: nn.Module, pairs: Pairs) -> Iterator[_Trial]:
    for owner, name, value in held_numbers(part):
        for new in _replaced(value, pairs):
            if new != value:
                yield _Trial(owner, name, new)


def held_numbers(part: nn.Module) -> Iterator[tuple[Any, str, Any]]:
    """Yield the numbers, and sequences of them, that a module keeps itself or in a plain object: owner, name, value."""
    for name, value in list(vars(part).items()):
        if _is_number(value) or _is_numbers(value):
            yield part, name, value
        elif type(value) not in SIMPLE and hasattr(value, "__dict__") and _is_plain_object(value):
            for inner, own in list(vars(value).items()):
                if _is_number(own) or _is_numbers(own):
                    yield value, inner, own


def _is_plain_object(value: Any) -> bool:
    kind = type(value)
    return not isinstance(value, (nn.Module, type)) and not callable(value) and not kind.__module__.startswith("torch.")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _is_numbers(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and bool(value) and all(map(_is_number, value))


def _replaced(value: Any, pairs: Pairs) -> Iterator[Any]:
    if _is_number(value):
        # Signatures have floats rounded.
        yield from pairs.get(_rounded(value), ())
        return
    choices = [pairs.get(one, (one,)) for one in value]
    for number, entries in enumerate(product(*choices)):
        if number >= 8:
            return
        yield type(value)(entries) if type(value) in (tuple, list) else tuple(entries)


def _direct(pairs: Pairs) -> Pairs:
    return pairs


def _derived(pairs: Pairs) -> Pairs:
    """Return what quotients and products of two sizes become."""
    found: dict[Number, dict[Number, None]] = defaultdict(dict)
    whole = [(old, new) for old, news in pairs.items() if isinstance(old, int) and old > 1 for new in news]
    for (one, new_one), (other, new_other) in product(whole, repeat=2):
        if other and new_other and one % other == 0 and new_one % new_other == 0:
            found[one // other][new_one // new_other] = None
        found[one * other][new_one * new_other] = None
    return {old: [new for new in news if new != old] for old, news in found.items()}


def sizes_in_ops(
    before: Sequence[SeenOp], calls: Sequence[OpCall], maps: IndexMaps, wanted: Sequence[Signature]
) -> dict[str, Pairs]:
    """Return what sizes and literals in the ops of each module, and of those in it, become at new widths.

    Args:
        before: what the model does at its old widths, as far as it went.
        calls: the tape, op by op the same.
        maps: the new widths.
        wanted: what is prescribed for them.
    """
    found: dict[str, dict[Number, dict[Number, None]]] = defaultdict(lambda: defaultdict(dict))
    for op, call, signature in zip(before, calls, wanted, strict=False):
        if op.signature[0] != signature[0]:
            break
        shapes = [tuple(map(maps.size, call.axes[one])) if one in call.axes else () for one in call.inputs]
        exact: dict[Number, Number] = {
            _rounded(n): n for n in tree_leaves(resized_call(call, maps)[1]) if isinstance(n, float)
        }
        old, new = _numbers(op.signature[1:]), [exact.get(n, n) for n in _numbers(signature[1:])]
        pairs = list(zip(old, new, strict=True)) if len(old) == len(new) else []
        for own, other in zip(op.shapes, shapes, strict=False):
            pairs += zip(own, other, strict=True) if len(own) == len(other) else ()
        path = op.part
        while True:
            for size, new_size in pairs:
                found[path][size][new_size] = None
            if not path:
                break
            path = path.rpartition(".")[0]
    return {path: {old: list(news) for old, news in pairs.items()} for path, pairs in found.items()}


def _rounded(value: Number) -> Number:
    return float(f"{value:.10g}") if isinstance(value, float) else value


def _numbers(value: Any) -> list[Number]:
    if isinstance(value, tuple):
        return [number for one in value for number in _numbers(one)]
    return [value] if _is_number(value) else []


def set_layer_sizes(runs: ClassRuns, fakes: Mapping[str, Any], edits: ModelEdits) -> None:
    """Set the sizes that layers of torch keep beside their parameters, which these tell."""
    with substituted(runs.model, fakes, runs.slots, nullcontext):
        for _, part in walk(runs.model):
            edits.apply(part, sizes_by_shape(part))
