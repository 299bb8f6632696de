"""The table of methods of selection: each is registered once, by us or by users, beside the function that it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from fxwidth.registration import refuse_name, refuse_unknown
from fxwidth.selection.scores import Scores

# A method by its name, or a function that scores the channels of a group.
Selection = str | Scores
_Function = TypeVar("_Function", bound=Callable[..., Any])

PROJECTION = "projection"


@dataclass(frozen=True)
class Method:
    """One method of selection.

    Attributes:
        name: what `selection=` calls it.
        function: of the evidence and of how many channels are to be kept, (Grams, count) -> order [width]; or, without
            evidence, of the group, (group, width_graph) -> scores [width].
        nested: whether the order does not depend on how many channels are to be kept.
        needs_moments: whether it asks what readers see of the channels.
    """

    name: str
    function: Callable[..., Any]
    nested: bool
    needs_moments: bool


METHODS: dict[str, Method] = {}


def selection_method(
    name: str, *, nested: bool = False, needs_moments: bool = True
) -> Callable[[_Function], _Function]:
    """Register a function as a method of selection, for `selection=name` in all that takes it.

    Args:
        name: a name that is not taken.
        nested: whether the order of the channels does not depend on how many of them are kept, so that it is found once
            for all widths.
        needs_moments: whether the function is given the evidence, and not the group. With it the function is called as
            `function(grams, count)`, where `grams.activation` and `grams.weight`, [places, width, width], are for each
            place where the group is read the channels' second moments S and the weights' D = W^T W, scaled so that
            trace(D S) is one; it returns all channels, [width], whose first `count` are kept. Without, it is called as
            `function(group, width_graph)` and returns one score per channel, [width], higher ones for those to keep.

    Raises:
        FxwidthError: the name is no text, or taken.

    Example:
        >>> @fxwidth.selection_method("largest variance", nested=True)
        ... def largest_variance(grams, count):
        ...     return grams.activation.diagonal(dim1=1, dim2=2).sum(0).argsort(descending=True)
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> gm = fxwidth.trace(net, torch.randn(2, 8))
        >>> gm = fxwidth.resize(gm, {"0": 10}, selection="largest variance")
    """
    refuse_name(METHODS, name, "selection_method")

    def registering(function: _Function) -> _Function:
        # What scores channels gives one order for all counts.
        METHODS[name] = Method(name, function, nested or not needs_moments, needs_moments)
        return function

    return registering


def check_selection(selection: Selection) -> Selection:
    """Return a method of selection.

    Raises:
        FxwidthError: there is no such method.
    """
    refuse_unknown(METHODS, selection, "selection", "(group, width_graph) -> scores")
    return selection


def is_nested(selection: Selection) -> bool:
    """Tell whether the order of the channels does not depend on how many of them are to be kept."""
    return callable(selection) or METHODS[selection].nested


def reads_moments(selection: Selection) -> bool:
    """Tell whether a method asks what readers see of the channels; one that is not registered here does not."""
    return not callable(selection) and selection in METHODS and METHODS[selection].needs_moments
