"""Names of repeated blocks as one: `layers.0.up` to `layers.11.up` are `layers.0..11.up`."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

_Rest = TypeVar("_Rest", bound=Hashable)

# A number that is a part of a path by itself, as in "layers.3.up" or "encoder_layer_3", and not as in "conv1".
NUMBER = re.compile(r"(?<![A-Za-z0-9])\d+(?![A-Za-z0-9])")
_ANY_NUMBER = re.compile(r"\d+")


def folded(rows: Iterable[tuple[str, _Rest]]) -> list[tuple[str, _Rest, tuple[str, ...]]]:
    """Fold rows that are alike but for a number in their names.

    Args:
        rows: a name and what must be equal, in order.

    Returns:
        The folded name, what was equal, and the names that it stands for; where the first of them was.

    Example:
        >>> folded([("layers.0.up", 8), ("layers.0.down", 4), ("layers.1.up", 8), ("layers.1.down", 5)])
        [('layers.0..1.up', 8, ('layers.0.up', 'layers.1.up')), ('layers.0.down', 4, ('layers.0.down',)), \
('layers.1.down', 5, ('layers.1.down',))]
    """
    alike: defaultdict[tuple[str, _Rest], list[str]] = defaultdict(list)
    order = []
    for name, rest in rows:
        order.append(name)
        alike[NUMBER.sub("#", name), rest].append(name)
    blocks = [(block, rest) for (_, rest), names in alike.items() for block in _blocks(names)]
    found = {block[0]: (_name(block), rest, tuple(block)) for block, rest in blocks}
    return [found[name] for name in order if name in found]


def without_numbers(text: str) -> str:
    """Return a text with a # in the place of each number: reasons name nodes by them."""
    return _ANY_NUMBER.sub("#", text)


def _blocks(names: Sequence[str]) -> list[list[str]]:
    """Divide names of one form into those that differ in one of their numbers: that of which there are most."""
    numbers = {name: tuple(map(int, NUMBER.findall(name))) for name in names}
    if len(names) == 1 or not numbers[names[0]]:
        return [list(names)]
    columns = list(zip(*numbers.values(), strict=True))
    varying = max(range(len(columns)), key=lambda i: len(set(columns[i])))
    blocks: defaultdict[tuple[int, ...], list[str]] = defaultdict(list)
    for name in names:
        own = numbers[name]
        blocks[own[:varying] + own[varying + 1 :]].append(name)
    return list(blocks.values())


def _name(names: Sequence[str]) -> str:
    first = names[0]
    if len(names) == 1:
        return first
    found = [[match.group() for match in NUMBER.finditer(name)] for name in names]
    varying = next(i for i, column in enumerate(zip(*found, strict=True)) if len(set(column)) > 1)
    match = list(NUMBER.finditer(first))[varying]
    shown = _range([int(own[varying]) for own in found])
    return first[: match.start()] + shown + first[match.end() :]


def _range(numbers: Sequence[int]) -> str:
    """Return numbers as `0..11`, or, with gaps, as `0..2,4`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs)
