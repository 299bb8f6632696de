"""The widths that groups have had, from what a graph's notes tell of its resizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import fx, nn
from torch.export import ExportedProgram

from fxwidth.recording.graph_meta import HISTORY, notes_of

RESIZED, UNTOUCHED, WRITTEN_BACK = "resized", "untouched", "written back"
"""What has become of the model that was traced."""


def resizes_of(module: fx.GraphModule) -> tuple[dict[str, Any], ...]:
    """Return what was noted of each resize of a graph, oldest first."""
    return tuple(notes_of(module).get(HISTORY, ()))


# A module keeps nothing of ours: it is of the user's class, saved and compared as such.
_of_modules: WeakKeyDictionary[nn.Module | ExportedProgram, tuple[dict[str, Any], ...]] = WeakKeyDictionary()


def note_written_back(model: nn.Module | ExportedProgram, module: fx.GraphModule, is_traced: bool | None) -> None:
    """Note that a module or a program has the widths of a graph now.

    Args:
        model: the module or program.
        module: the graph.
        is_traced: whether that is the model which was traced, and so is no longer as it was before resizes; None where
            that is not known.
    """
    told = [
        {**record, "original": WRITTEN_BACK if is_traced else None} if record.get("original") == UNTOUCHED else record
        for record in resizes_of(module)
    ]
    if is_traced and told:
        notes_of(module)[HISTORY] = told
    _of_modules[model] = resizes_of(module) if is_traced is False else tuple(told)


def resizes_written_back(model: object) -> tuple[dict[str, Any], ...] | None:
    """Return the resizes of the graph that a module or a program was written back from; None where it was not."""
    return _of_modules.get(model) if isinstance(model, (nn.Module, ExportedProgram)) else None


def courses(resizes: Sequence[Mapping[str, Any]]) -> dict[str, list[int]]:
    """Return the widths of each group that was resized, first and after each resize.

    Example:
        >>> courses([{"widths": {"a": [8, 4]}}, {"widths": {"b": [6, 3]}}, {"widths": {"a": [4, 5]}}])
        {'a': [8, 4, 4, 5], 'b': [6, 6, 3, 3]}
    """
    names = dict.fromkeys(name for record in resizes for name in record["widths"])
    return {name: _course([record["widths"].get(name) for record in resizes]) for name in names}


def first_widths(module: fx.GraphModule) -> dict[str, int]:
    """Return the widths that groups had before all resizes, of those that were resized."""
    return {name: widths[0] for name, widths in courses(resizes_of(module)).items()}


def _course(changes: Sequence[Sequence[int] | None]) -> list[int]:
    found = [next(change[0] for change in changes if change is not None)]
    for change in changes:
        found.append(found[-1] if change is None else change[1])
    return found
