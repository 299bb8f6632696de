"""Names of groups as they are typed: folded ones and patterns stand for several, misspelt ones are near to others."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from difflib import SequenceMatcher, get_close_matches
from fnmatch import fnmatchcase

from fxwidth.groups.repeated_blocks import NUMBER

LEGEND = (
    "a group is named after the first layer that writes it, or else reads it (fc:1: by its dim 1; qkv#0: by a factor "
    "of a dim); only= and keep= (--only, --keep) take these names, folded ones (layers.0..3.fc) and patterns (layer1.*)"
)
# The numbers of repeated blocks as one, as `folded` writes them: 0..11, or 0..2,4.
_NUMBERS = re.compile(r"(?<![A-Za-z0-9])\d+(?:(?:\.\.|,)\d+)+(?![A-Za-z0-9])")
# What the last layer of a network is called, in one library or another.
_LAST = frozenset({"head", "heads", "lm_head", "fc", "classifier", "logits", "output", "score"})
# How near a name must be, how much less so than the nearest, and how many of these are shown.
_NEAR, _BEHIND, _SHOWN = 0.3, 0.3, 3
# How near to a name for the last layer another is a misspelt one.
_MISSPELT = 0.75


def named(given: str, names: Collection[str]) -> list[str]:
    """Return those of some names that a name, a pattern (fnmatch) or a folded name stands for.

    Example:
        >>> named("layers.0..1,3.up", ["layers.0.up", "layers.1.up", "layers.2.up", "layers.3.up", "layers.3.down"])
        ['layers.0.up', 'layers.1.up', 'layers.3.up']
    """
    patterns = [given, *_unfolded(given, {number for name in names for number in NUMBER.findall(name)})]
    return [name for name in names if any(name == one or fnmatchcase(name, one) for one in patterns)]


def near_names(given: str, names: Iterable[str], last: Collection[str] = ()) -> list[str]:
    """Return the names that may be meant by one that is none of them, the nearest first.

    Args:
        given: what was typed.
        names: those that there are.
        last: those among them that a name for the last layer of a network, such as "head", means in any case.

    Example:
        >>> near_names("head", ["conv1", "layer1.0.conv1", "heads.head", "fc"])
        ['heads.head', 'fc']
    """
    means_last = bool(get_close_matches(_word(given), _LAST, 1, _MISSPELT))
    found = {name: _nearness(given, name, means_last, name in last) for name in names}
    least = max(_NEAR, max((by_word for by_word, _ in found.values()), default=0) - _BEHIND)
    near = [name for name, (by_word, _) in found.items() if by_word >= least]
    return sorted(near, key=lambda name: found[name], reverse=True)[:_SHOWN]


def proposed(near: Sequence[str]) -> str:
    """Return the question that proposes some names, or nothing."""
    return f"did you mean {', '.join(map(repr, near))}?" if near else ""


def _unfolded(given: str, numbers: Collection[str]) -> list[str]:
    """Return a folded name at each of some numbers that it has."""
    found = _NUMBERS.search(given)
    if found is None:
        return []
    ends = [[int(end) for end in part.split("..")] for part in found[0].split(",")]
    own = [one for one in numbers if any(part[0] <= int(one) <= part[-1] for part in ends)]
    at_each = [f"{given[: found.start()]}{one}{given[found.end() :]}" for one in own]
    return [name for one in at_each for name in (_unfolded(one, numbers) or [one])]


def _nearness(given: str, name: str, means_last: bool, is_last: bool) -> tuple[float, float]:
    """Return how near a name is as a whole or by its last word, whichever is more, and then as a whole."""
    whole = _likeness(given, name)
    one, other = _word(given), _word(name)
    by_word = _likeness(one, other) if one and other else 0.0
    if means_last and (is_last or other in _LAST):
        by_word = max(by_word, 0.95 if is_last else 0.9)
    return max(whole, by_word), whole


def _likeness(one: str, other: str) -> float:
    return SequenceMatcher(None, one.lower(), other.lower()).ratio()


def _word(name: str) -> str:
    """Return the last part of a path that is no number, without a dim behind it."""
    parts = re.split(r"[:#]", name.lower())[0].removesuffix(".weight").split(".")
    return next((part for part in reversed(parts) if part and not part.isdigit()), "")
