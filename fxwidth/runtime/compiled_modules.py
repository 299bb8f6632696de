"""Modules in the wrapper that `torch.compile(module)` puts around them."""

from __future__ import annotations

from typing import Any

from torch import nn


def uncompiled(model: Any) -> Any:
    """Return the module in a wrapper of `torch.compile`; anything else as it is."""
    while type(model).__name__ == "OptimizedModule" and isinstance(getattr(model, "_orig_mod", None), nn.Module):
        model = model._orig_mod
    return model
