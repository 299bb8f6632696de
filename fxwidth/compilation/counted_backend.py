"""A backend of `torch.compile` that counts the graphs which it is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxwidth.errors import FxwidthError

Backend = str | Callable[..., Callable[..., Any]]
_INDUCTOR = "inductor"


class CountedBackend:
    """Compiles by another backend, and counts what it compiles.

    Args:
        backend: the name of a backend of `torch.compile`, or a function of a graph and its inputs.
        dynamic: as for `torch.compile`.
        option: by which keyword the backend is given, for errors.

    Attributes:
        graphs: how many have been compiled.

    Raises:
        FxwidthError: it is neither, or no backend has that name.
    """

    def __init__(self, backend: Backend, dynamic: bool | None, option: str) -> None:
        self.graphs = 0
        self._dynamic = dynamic
        self._compiler: Callable[..., Callable[..., Any]] = _found(backend, option)
        self._is_inductor = backend == _INDUCTOR
        self.__name__ = backend if isinstance(backend, str) else getattr(backend, "__name__", type(backend).__name__)

    def __call__(
        self,
        graph_module: fx.GraphModule,
        inputs: Sequence[Any],
        *,
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Callable[..., Any]:
        """Return a graph compiled; the arguments are those that `torch.compile` passes to a backend."""
        self.graphs += 1
        if not self._is_inductor:
            told: dict[str, Any] = {"mode": mode, "options": options}
            given = {name: value for name, value in told.items() if value is not None}
            return self._compiler(graph_module, inputs, **given)
        # A backend that is given by its name alone has mode and options read by torch.compile itself.
        found: dict[str, Any] = torch._inductor.list_mode_options(mode, self._dynamic) if mode else {}
        found |= {name.replace("-", "_"): value for name, value in (options or {}).items()}
        compiled: Callable[..., Any] = torch._inductor.compile(graph_module, list(inputs), options=found)
        return compiled


def _found(backend: Any, option: str) -> Callable[..., Any]:
    found: Callable[..., Any]
    if callable(backend):
        found = backend
        return found
    if not isinstance(backend, str):
        raise FxwidthError(
            f"{option}={backend!r} must be the name of a backend of torch.compile, such as 'inductor', or a function "
            "of a graph and its inputs."
        )
    try:
        found = torch._dynamo.lookup_backend(backend)
    except Exception as error:
        known = ", ".join(map(repr, torch._dynamo.list_backends(None)))
        raise FxwidthError(f"{option}={backend!r} is no backend of torch.compile; there are {known}.") from error
    return found
