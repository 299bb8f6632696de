"""What callbacks of all training loops have in common: an Evolver that is made when training begins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from fxwidth.errors import FxwidthError
from fxwidth.evolution.evolver import Evolver
from fxwidth.rewriting.optimizers import Optimizers


class Evolving:
    """The Evolver of a training that has not begun yet, or that goes on.

    Args:
        options: those of `fxwidth.Evolver`.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = dict(options)
        self._state: Mapping[str, Any] | None = None
        self.evolver: Evolver | None = None

    @property
    def by_epoch(self) -> bool:
        """Whether epochs are counted, and not steps."""
        return self._options.get("every") == "epoch"

    def begin(self, gm: object, optimizer: Optimizers, devices: int) -> None:
        """Make the Evolver, where it was if a state has been loaded.

        Raises:
            FxwidthError: it is no graph, several processes train it, or an option cannot be used.
        """
        if not isinstance(gm, fx.GraphModule):
            raise FxwidthError(
                f"an EvolverCallback evolves a torch.fx.GraphModule, but received {type(gm).__name__}. Train what "
                "fxwidth.trace returns."
            )
        if devices > 1:
            raise FxwidthError(
                f"{devices} processes train this network, and each would be resized by itself. Train in one process."
            )
        self.evolver = Evolver(gm, optimizer, **self._options)
        if self._state is not None:
            self.evolver.load_state_dict(self._state)
            self._state = None

    def state_dict(self) -> dict[str, Any]:
        """Return all that makes an interrupted evolution go on."""
        return {} if self.evolver is None else self.evolver.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another one was, now or when training begins."""
        if self.evolver is None:
            self._state = dict(state) or None
        elif state:
            self.evolver.load_state_dict(state)
