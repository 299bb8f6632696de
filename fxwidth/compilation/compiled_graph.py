"""Graphs compiled anew when their widths change, and by code that is there already when they come back."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxwidth.compilation.counted_backend import Backend, CountedBackend
from fxwidth.compilation.network_state import PresentNetwork, fresh_function, modes_of
from fxwidth.errors import FxwidthError
from fxwidth.plain_numbers import is_integer

_OWN_OPTIONS = frozenset({"model", "backend"})


def compile(  # noqa: A001 - the name that users look for, as in torch.compile
    gm: fx.GraphModule, *, backend: Backend = "inductor", cache_size: int = 32, **options: Any
) -> CompiledGraph:
    """Return a graph compiled by `torch.compile`, which follows each resize.

    `torch.compile` itself gives a function up after a few versions of it, and then runs it eagerly. Here each network
    that the graph becomes has versions of its own, and one whose widths come back is run by the code that it had: with
    `align=8` in the options of a plan or an Evolver, that is more often so. Parameters are looked up at each call.

    Args:
        gm: a graph from `fxwidth.trace`, or any GraphModule; it is called in its own modes, and is trained as ever.
        backend: as for `torch.compile`.
        cache_size: of how many networks, in training and in evaluation, the code is kept: that used last.
        options: those of `torch.compile`, such as `mode=` and `dynamic=`; `fullgraph` is True unless it is given.

    Returns:
        A callable that takes what the graph takes, and returns what it returns.

    Raises:
        FxwidthError: it is no GraphModule, or an option is none.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> gm = fxwidth.trace(net, torch.randn(2, 8))
        >>> compiled = fxwidth.compile(gm, backend="eager")
        >>> for width in (12, 8, 12):
        ...     gm = fxwidth.resize(gm, {"0": width})
        ...     same = torch.equal(compiled(torch.ones(2, 8)), gm(torch.ones(2, 8)))
        >>> compiled
        <CompiledGraph of 2 networks in 2 graphs by 'eager'>
    """
    return CompiledGraph(gm, backend, cache_size, options)


@dataclass
class _Versions:
    """A function of a network, and how many of its calls had to compile."""

    function: Callable[..., Any]
    compilations: int = 0


class CompiledGraph:
    """A graph compiled by `torch.compile`, which follows each resize; made by `fxwidth.compile`.

    Args:
        gm: the graph.
        backend: as for `torch.compile`.
        cache_size: of how many networks the code is kept.
        options: those of `torch.compile`.

    Attributes:
        gm: the graph.
        networks: how many networks it has been when it was called: codes, modules and shapes that differ.
        graphs: how many graphs the backend has compiled for them.

    Raises:
        FxwidthError: it is no GraphModule, or an option is none.

    Example:
        >>> gm = fxwidth.trace(torch.nn.Sequential(torch.nn.Linear(8, 4)), torch.randn(2, 8))
        >>> fxwidth.compile(gm, backend="eager")
        <CompiledGraph of 0 networks in 0 graphs by 'eager'>
    """

    def __init__(self, gm: fx.GraphModule, backend: Backend, cache_size: int, options: dict[str, Any]) -> None:
        if not isinstance(gm, fx.GraphModule):
            raise FxwidthError(
                f"compile takes a torch.fx.GraphModule, but received {_kind(gm)}; call fxwidth.trace first, or for a "
                "model that does not change, torch.compile."
            )
        if not is_integer(cache_size) or cache_size < 1:
            raise FxwidthError(f"cache_size={cache_size!r} must be an integer of at least 1: networks to keep code of.")
        _refuse_unknown(options)
        self._backend = CountedBackend(backend, options.get("dynamic"), "backend")
        _refuse_unusable(backend, options)
        self.gm = gm
        self._present = PresentNetwork(gm)
        self._options = {"fullgraph": True, **options}
        self._cache_size = cache_size
        self._known: OrderedDict[Hashable, _Versions] = OrderedDict()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph as it is at present.

        Raises:
            FxwidthError: a hook of the graph itself, or a forward put over its own, would not run; or the graph calls
                what `torch.compile` cannot look into.
        """
        key = self._present.number(), modes_of(self.gm)
        versions, before = self._versions(key), self._backend.graphs
        try:
            return versions.function(*args, **kwargs)
        except torch._dynamo.exc.Unsupported as error:
            raise FxwidthError(
                f"torch.compile cannot take the graph as a whole: {_first_lines(error)} Pass fullgraph=False to have "
                "it compiled in parts, with what is between them run eagerly."
            ) from error
        finally:
            versions.compilations += self._backend.graphs != before

    def __repr__(self) -> str:
        return f"<CompiledGraph of {self.networks} networks in {self.graphs} graphs by {self._backend.__name__!r}>"

    @property
    def networks(self) -> int:
        """How many networks the graph has been."""
        return self._present.known

    @property
    def graphs(self) -> int:
        """How many graphs have been compiled."""
        return self._backend.graphs

    def _versions(self, key: Hashable) -> _Versions:
        known = self._known.pop(key, None)
        # Of other kinds of inputs there may be more versions than torch.compile keeps.
        if known is None or known.compilations >= torch._dynamo.config.recompile_limit:
            function = torch.compile(fresh_function(self.gm), backend=self._backend, **self._options)
            known = _Versions(function)
        self._known[key] = known
        while len(self._known) > self._cache_size:
            self._known.popitem(last=False)
        return known


def _kind(given: Any) -> str:
    return "a compiled module" if hasattr(given, "_orig_mod") else type(given).__name__


def _first_lines(error: Exception) -> str:
    lines = [line.strip().removeprefix("Explanation: ") for line in str(error).splitlines()[:2]]
    return " ".join(line if line.endswith(".") else f"{line}." for line in lines if line)


def _refuse_unknown(options: dict[str, Any]) -> None:
    taken = [name for name in inspect.signature(torch.compile).parameters if name not in _OWN_OPTIONS]
    for name in options:
        if name not in taken:
            hint = ""
            if name == "align":
                hint = " Widths are the plan's: give align= to the Evolver, fxwidth.plan or fxwidth.evolve."
            raise FxwidthError(f"{name}= is no option of torch.compile; they are {', '.join(taken)}.{hint}")


def _refuse_unusable(backend: Backend, options: dict[str, Any]) -> None:
    """Check the values of options as torch does for a function of one's own: it is not compiled before its call."""
    try:
        torch.compile(lambda: None, backend=backend, **options)
    except Exception as error:
        told = ", ".join(f"{name}={value!r}" for name, value in options.items())
        raise FxwidthError(f"torch.compile does not take {told}: {error}") from error
