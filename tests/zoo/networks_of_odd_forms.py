"""Models written in ways of their own: whatever a stranger may call a model."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Pair = namedtuple("Pair", ["first", "second"])


class Two(nn.Module):
    """Two layers, to be called in some odd way."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 3)


class Positional(Two):
    def forward(self, *args: Tensor, **kwargs: Any) -> Tensor:
        return self.down(torch.relu(self.up(args[0] + args[1]))) * kwargs.get("scale", 1.0)


class NamedTuples(Two):
    def forward(self, pair: Pair) -> Pair:
        h = self.up(pair.first) + self.up(pair.second)
        return Pair(self.down(h), {"mean": h.mean(1), "text": "a text", "none": None})


class OptionalParts(Two):
    def forward(self, inputs: dict[str, Any], mask: Tensor | None = None) -> Tensor:
        h = self.up(inputs["x"])
        if inputs.get("more") is not None and "y" in inputs["more"]:
            h = h + self.up(inputs["more"]["y"])
        return self.down(h if mask is None else h * mask)


class Generator(Two):
    def _each(self, x: Tensor) -> Iterator[Tensor]:
        for factor in (1.0, 2.0):
            yield torch.relu(self.up(x * factor))

    def forward(self, x: Tensor) -> Tensor:
        return sum(self.down(h) for h in self._each(x))


class NotOnlyTensors(Two):
    def forward(self, x: Tensor) -> tuple[Tensor, int, str, None]:
        h = self.up(x)
        return self.down(h), 3, "done", None


class KeepsItsLast(Two):
    def forward(self, x: Tensor) -> Tensor:
        self.last = torch.relu(self.up(x))
        return self.down(self.last)


class Counts(Two):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(10))

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        self.total = self.total + h.detach().sum(0)
        return self.down(h)


class Complex(Two):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.fft.fft(self.up(x)[:, None].expand(-1, 4, -1), dim=1)
        return self.down((h * h.conj()).real.sum(1))


class Autocast(Two):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            h = torch.relu(self.up(x))
        return self.down(h)


class Checkpointed(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(checkpoint(self._inner, x, use_reentrant=False))

    def _inner(self, x: Tensor) -> Tensor:
        return torch.relu(self.up(x))


class NoGrad(Two):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = torch.relu(self.up(x))
        return self.down(h)


class InPlace(Two):
    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2.0)
        h = self.up(x)
        h.add_(1.0).relu_()
        return self.down(h)


class Interpolated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        b = F.interpolate(self.b(a), size=a.shape[-2:], mode="bilinear")
        return F.interpolate(self.c(a + b), size=(x.shape[2], x.shape[3]))


class Einsum(Two):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.einsum("bi,oi->bo", x, self.up.weight)
        return torch.einsum("...i,oi->...o", h, self.down.weight)


class Vmapped(Two):
    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(lambda one: self.down(torch.relu(self.up(one))))(x)


class Looped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 10), nn.Linear(10, 12), nn.Linear(12, 3)])
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(n)) for n in (10, 12, 3)])
        self.norms = nn.ModuleDict({str(i): nn.LayerNorm(n) for i, n in enumerate((10, 12))})

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x) * self.scales[i]
            if str(i) in self.norms:
                x = self.norms[str(i)](x)
        return x


class Hooked(Two):
    def __init__(self) -> None:
        super().__init__()
        self.up.register_forward_hook(lambda _, args, output: torch.relu(output) + 1)
        self.down.register_forward_pre_hook(lambda _, args: (args[0] * 2,))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight - weight.mean(1, keepdim=True)


class Parametrized(Two):
    def __init__(self) -> None:
        super().__init__()
        nn.utils.parametrize.register_parametrization(self.up, "weight", Symmetric())

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


class Plain(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def forward_of_its_own() -> nn.Module:
    """Return a model whose class has another forward than it has."""
    model = Plain()
    model.forward = MethodType(lambda self, x: self.down(torch.sigmoid(self.up(x))), model)
    return model


def hooked() -> nn.Module:
    """Return a model that is changed by hooks on itself."""
    model = Plain()
    model.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    model.register_forward_hook(lambda _, args, output: output * 3)
    return model


class Generated(Two):
    """Calls a layer with weights made for the call."""

    def forward(self, x: Tensor) -> Tensor:
        weights = {name: tensor * 2 for name, tensor in self.up.named_parameters()}
        return self.down(torch.func.functional_call(self.up, weights, (x,)))


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class StraightThrough(Two):
    """Has a function with a gradient of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(Sign.apply(self.up(x)))


class Reentrant(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(checkpoint(torch.relu, self.up(x), use_reentrant=True))


class FrozenPart(Two):
    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        return torch.relu(self.up(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.features(x))


class Strict(Two):
    def forward(self, x: Tensor, /, *, gain: Tensor) -> Tensor:
        return self.down(self.up(x) * gain)


def x(batch: int = 4) -> Tensor:
    return torch.randn(batch, 6, generator=torch.Generator().manual_seed(batch), dtype=torch.float64)


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(batch), dtype=torch.float64)


Call = Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]


def _one(make: Callable[[int], Any] = x) -> Call:
    return lambda batch: ((make(batch),), {})


# By name: the model, and its arguments for a batch size.
FORMS: dict[str, tuple[Callable[[], nn.Module], Call]] = {
    "args and kwargs": (Positional, lambda batch: ((x(batch), x(batch)), {"scale": 2.0})),
    "named tuples": (NamedTuples, lambda batch: ((Pair(x(batch), x(batch)),), {})),
    "optional parts": (OptionalParts, lambda batch: (({"x": x(batch), "more": {"y": x(batch)}},), {})),
    "no optional parts": (OptionalParts, lambda batch: (({"x": x(batch), "more": None},), {})),
    "a generator": (Generator, _one()),
    "not only tensors": (NotOnlyTensors, _one()),
    "keeps its last": (KeepsItsLast, _one()),
    "counts in a buffer": (Counts, _one()),
    "complex numbers": (Complex, _one()),
    "autocast": (Autocast, _one()),
    "checkpointed": (Checkpointed, _one()),
    "no gradients inside": (NoGrad, _one()),
    "in place": (InPlace, _one()),
    "interpolated": (Interpolated, _one(images)),
    "einsum": (Einsum, _one()),
    "vmap": (Vmapped, _one()),
    "lists of modules": (Looped, _one()),
    "hooks": (Hooked, _one()),
    "a parametrisation": (Parametrized, _one()),
    "a forward of its own": (forward_of_its_own, _one()),
    "hooks on the model": (hooked, _one()),
    "generated weights": (Generated, _one()),
    "a gradient of its own": (StraightThrough, _one()),
    "checkpointed by a function": (Reentrant, _one()),
    "a frozen part": (FrozenPart, _one()),
    "positional and named alone": (Strict, lambda batch: ((x(batch),), {"gain": x(batch)[:, :1]})),
}
