"""Outputs whose sizes may change since their callers follow: how they are named, and which dims they free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from fxwidth.analysis.result import Analysis
from fxwidth.axes.factors import Axis, axis_size
from fxwidth.axes.index_maps import IndexMaps
from fxwidth.errors import FxwidthError
from fxwidth.runtime.pytrees import deep_tensors, named_attributes

FreeOutputs = Literal[True] | tuple[str, ...]
"""All outputs, or those of some names and all that is inside of them."""

# A single tensor is in nothing that would give it a name.
_ALONE = "output"


def output_names(value: Any) -> dict[Tensor, str]:
    """Return by which names a caller finds the tensors of a nested value, such as "features.0".

    They are keys of dicts, positions in lists and tuples, and names of fields and attributes.

    Example:
        >>> one, two = torch.zeros(1), torch.ones(1)
        >>> list(output_names({"y": one, "rest": [two]}).values())
        ['y', 'rest.0']
    """
    found: dict[Tensor, str] = {}
    for path, tensor in _leaves(value, (), set()):
        found.setdefault(tensor, ".".join(path) or _ALONE)
    return found


def _leaves(value: Any, path: tuple[str, ...], seen: set[int]) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
        return
    if id(value) in seen or not deep_tensors(value):
        return
    seen.add(id(value))
    for name, part in _parts(value):
        yield from _leaves(part, (*path, str(name)), seen)


def _parts(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        yield from value.items()
    elif isinstance(value, (list, tuple)):
        # Of named tuples.
        yield from zip(getattr(value, "_fields", range(len(value))), value, strict=True)
    yield from named_attributes(value)


def is_freed(name: str, free: FreeOutputs) -> bool:
    """Tell whether an output is among those whose sizes may change."""
    return free is True or any(name == one or name.startswith(f"{one}.") for one in free)


def checked(free: object) -> FreeOutputs:
    """Return what was given for the outputs to be freed.

    Raises:
        FxwidthError: it is neither a bool nor names.
    """
    names = (free,) if isinstance(free, str) else free
    if isinstance(names, bool):
        return True if names else ()
    if not isinstance(names, (Sequence, set, frozenset)) or not all(isinstance(name, str) for name in names):
        raise FxwidthError(
            f"free_outputs is True, False or names of outputs, but received {free!r}; print(fxwidth.analyze(gm)) and "
            "what the model returns tell the names."
        )
    return tuple(sorted(names))


def refuse_unknown(free: FreeOutputs, analysis: Analysis) -> None:
    """Check that outputs have the names that were given.

    Raises:
        FxwidthError: there is none of a name.
    """
    known = analysis.output_names
    for one in () if free is True else free:
        if not any(is_freed(name, (one,)) for name in known):
            raise FxwidthError(
                f"free_outputs names {one!r}, and the model returns no such tensor; its outputs are "
                f"{', '.join(map(repr, known))}, and free_outputs=True frees all of them."
            )


def output_dims(analysis: Analysis) -> Iterator[tuple[str, Axis]]:
    """Yield each dim of what a model returns, as a caller names it, and what it is made of; caches are left out."""
    for tensor, name in zip(analysis.outputs, analysis.output_names, strict=True):
        if tensor not in analysis.states:
            for dim, axis in enumerate(analysis.axes_of(tensor)):
                yield f"{name} dim {dim}", axis


def outputs_after(analysis: Analysis, maps: IndexMaps) -> dict[str, list[int]]:
    """Return the old and new size of each dim of what a model returns that a resize changes."""
    sizes = {name: [axis_size(axis), maps.size(axis)] for name, axis in output_dims(analysis)}
    return {name: [old, new] for name, (old, new) in sizes.items() if old != new}
