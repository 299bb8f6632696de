"""The faults that benchmarks/faults.py plants: each a small, plausible mistake in a function of its own."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """A mistake.

    Attributes:
        file: where it is planted, from the root of the repository.
        what: what is wrong, in words.
        old: the text that it replaces, which stands once in the file.
        new: the text in its place.
        tests: test files or tests that are run first, below tests/.
    """

    file: str
    what: str
    old: str
    new: str
    tests: tuple[str, ...] = ()


FAULTS: tuple[Fault, ...] = ()
