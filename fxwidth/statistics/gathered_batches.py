"""Some batches of training, kept for the next look at what a network computes."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any

from fxwidth.errors import FxwidthError
from fxwidth.runtime.pytrees import sample_count


class Gathered:
    """Batches of training, a few of them kept such that each had the same chance: those that are kept can be iterated.

    Args:
        samples: about how many inputs are kept.

    Source: algorithm R of J. S. Vitter, Random Sampling with a Reservoir (1985).
    """

    def __init__(self, samples: int = 512) -> None:
        self.batches: list[Any] = []
        self._samples = samples
        self._seen = 0
        self._random = random.Random(0)

    def add(self, batch: Any) -> None:
        """Take in one batch."""
        self._seen += 1
        size = sample_count(batch)
        if len(self.batches) < max(4, -(-self._samples // max(1, size))):
            self.batches.append(batch)
            return
        place = self._random.randrange(self._seen)
        if place < len(self.batches):
            self.batches[place] = batch

    def state_dict(self) -> dict[str, Any]:
        """Return what is kept, and how many have been seen."""
        return {"batches": list(self.batches), "seen": self._seen, "random": self._random.getstate()}

    def load_state_dict(self, state: Any) -> None:
        """Go on where another one was.

        Raises:
            FxwidthError: the state is none of these.
        """
        if not isinstance(state, Mapping) or state.keys() != self.state_dict().keys():
            raise FxwidthError(f"the state of gathered batches is {type(state).__name__}, and not what was saved.")
        self.batches, self._seen = list(state["batches"]), state["seen"]
        version, numbers, spare = state["random"]
        self._random.setstate((version, tuple(numbers), spare))

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches that are kept."""
        return iter(self.batches)
