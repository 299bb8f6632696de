"""Small networks and their data, the same on every rank, and what tells whether two are equal to the bit."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn


def mlp() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 3)]
    return nn.Sequential(*layers).double()


def cnn(*, norms: bool = False) -> nn.Module:
    torch.manual_seed(0)
    norm = [nn.BatchNorm2d(12)] if norms else []
    other = [nn.BatchNorm2d(12)] if norms else []
    layers = [nn.Conv2d(3, 12, 3, padding=1), *norm, nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1), *other, nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 3)).double()


def inputs(step: int, count: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randn(count, *shape, generator=generator, dtype=torch.float64)


def digest(*parts: Any) -> str:
    """Return a digest of modules, optimizers and plain values."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, nn.Module):
            named = [*part.named_parameters(), *part.named_buffers()]
            for name, tensor in named:
                found.update(f"{name}{tuple(tensor.shape)}".encode() + tensor.detach().numpy().tobytes())
        elif isinstance(part, torch.optim.Optimizer):
            for group in part.param_groups:
                for parameter in group["params"]:
                    for key, value in sorted(part.state.get(parameter, {}).items()):
                        found.update(key.encode() + (value.numpy().tobytes() if isinstance(value, Tensor) else b""))
        else:
            found.update(repr(part).encode())
    return found.hexdigest()
