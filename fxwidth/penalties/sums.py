"""Sums of terms that may be on several devices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def total(terms: Sequence[Tensor], module: nn.Module) -> Tensor:
    """Return the sum of numbers, wherever they are; zero, where the module is, for none."""
    if not terms:
        return torch.zeros((), device=next((parameter.device for parameter in module.parameters()), None))
    return torch.stack([term.to(terms[0].device) for term in terms]).sum()
