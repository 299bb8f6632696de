"""fxwidth: the width compiler for PyTorch. Where each decision is made: the first table of docs/architecture.md."""

from __future__ import annotations

import logging
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from fxwidth.version import __version__ as __version__

if TYPE_CHECKING:
    from fxwidth.public import *

__all__ = [
    "Budget",
    "ChannelGroup",
    "CompiledGraph",
    "Evolver",
    "Frontier",
    "FxwidthError",
    "FxwidthWarning",
    "GroupSpectrum",
    "GrowingPenalty",
    "LayerCosts",
    "Plan",
    "Polynomial",
    "ProgressUpdate",
    "Replacement",
    "Report",
    "Site",
    "Spectra",
    "TaskMoments",
    "WidthGraph",
    "analyze",
    "compile",
    "compile_backend",
    "cost",
    "cost_polynomial",
    "evolve",
    "frontier",
    "growth_direction",
    "load",
    "optimizer_state_rule",
    "plan",
    "report",
    "resize",
    "save",
    "selection_method",
    "spectral_penalty",
    "spectrum",
    "trace",
    "untie_copies",
    "write_back",
]
# A library is silent until whoever uses it says where its messages go.
logging.getLogger(__name__).addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    """Import what is public, or a package of ours, when it is first asked for: `fxwidth --help` goes without torch."""
    if name in __all__:
        public = import_module("fxwidth.public")
        globals().update({one: getattr(public, one) for one in __all__})
        return globals()[name]
    # Tools ask any module for names such as __wrapped__, and for _names of their own.
    if not name.startswith("_") and find_spec(f"fxwidth.{name}") is not None:
        return import_module(f"fxwidth.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
