"""Small networks that are called in every way, each with an example call; they branch where only export can follow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH, HIDDEN, OUT = 6, 10, 3


@dataclass
class Answer:
    """A dataclass that nobody has registered."""

    logits: Tensor
    hidden: tuple[Tensor, ...]
    note: str = "as it was"


class Cache:
    """An object with a state of its own, such as the keys and values of a language model."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.calls = 0

    def update(self, key: Tensor) -> Tensor:
        self.keys.append(key)
        self.calls += 1
        return key


class Network(nn.Module):
    """Two layers; `exported` makes it branch on a shape, which symbolic tracing cannot follow."""

    def __init__(self, exported: bool) -> None:
        super().__init__()
        self.exported = exported
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, OUT)

    def hidden(self, x: Tensor) -> Tensor:
        if self.exported and x.shape[-1] != WIDTH:
            raise ValueError("the wrong width")
        return torch.relu(self.up(x))


class Masked(Network):
    def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: float = 2.0, flag: bool = False) -> Tensor:
        h = self.hidden(x)
        if mask is not None:
            h = h * mask[:, None]
        return self.down(-h if flag else h) * scale


class Normalised(Network):
    """A call of its own around its forward, with another name and an answer of another form."""

    def __call__(self, image: Tensor, gain: float = 2.0) -> dict[str, Tensor]:
        return {"logits": super().__call__((image - 0.5) / 0.25) * gain}

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.hidden(x))


class PassedOn(Network):
    """A call of its own that takes anything."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().__call__(*args, **kwargs) * 3

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.hidden(x))


class DictToDict(Network):
    def forward(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        h = self.hidden(batch["image"] + batch["shift"])
        return {"logits": self.down(h), "parts": [h[:, :2].sum(1), None], "name": "dict"}


class OfList(Network):
    def forward(self, views: list[Tensor]) -> tuple[Tensor, ...]:
        return tuple(self.down(self.hidden(view)) for view in views)


class ToDataclass(Network):
    def forward(self, x: Tensor) -> Answer:
        h = self.hidden(x)
        return Answer(self.down(h), (h,))


class ToCache(Network):
    def forward(self, x: Tensor, cache: Cache | None = None) -> dict[str, Any]:
        cache = Cache() if cache is None else cache
        return {"logits": self.down(cache.update(self.hidden(x))), "cache": cache}


class AnyArguments(Network):
    def forward(self, *views: Tensor, **more: Any) -> Tensor:
        total = sum(self.hidden(view) for view in views)
        return self.down(total * more["gain"] if "gain" in more else total)


class Tokens(Network):
    def __init__(self, exported: bool) -> None:
        super().__init__(exported)
        self.embed, self.position = nn.Embedding(11, WIDTH), nn.Embedding(5, WIDTH)

    def forward(self, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        # One row of positions serves all samples.
        h = self.hidden(self.embed(tokens) + self.position(positions))
        return self.down(h.masked_fill(~mask[..., None], 0.0)).sum(1)


def _x(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _tokens() -> dict[str, Tensor]:
    tokens = torch.randint(11, (2, 5), generator=torch.Generator().manual_seed(2))
    return {"tokens": tokens, "positions": torch.arange(5)[None], "mask": tokens > 3}


@dataclass(frozen=True)
class Case:
    """A network, the arguments it is traced with, and how many groups of it are free."""

    build: Callable[[bool], nn.Module]
    args: Any
    kwargs: dict[str, Any] | None = None
    free: int = 1


CASES: dict[str, Case] = {
    "one tensor": Case(Masked, _x(2, WIDTH)),
    "batch of one": Case(Masked, _x(1, WIDTH)),
    "two by position": Case(Masked, (_x(2, WIDTH), _x(2))),
    "all by name": Case(Masked, {"mask": _x(2), "x": _x(2, WIDTH), "flag": True}),
    "position and name": Case(Masked, _x(2, WIDTH), {"scale": 3.0, "mask": _x(2)}),
    "dict in a tuple": Case(DictToDict, ({"image": _x(2, WIDTH), "shift": _x(1, WIDTH)},), free=2),
    "list": Case(OfList, [_x(2, WIDTH), _x(2, WIDTH)]),
    "dataclass": Case(ToDataclass, _x(2, WIDTH), free=0),
    "cache": Case(ToCache, _x(2, WIDTH)),
    "empty cache": Case(ToCache, (_x(2, WIDTH), Cache())),
    "any arguments": Case(AnyArguments, (_x(2, WIDTH), _x(2, WIDTH)), {"gain": _x(2, 1)}),
    "tokens": Case(Tokens, _tokens(), free=2),
    "a call of its own": Case(Normalised, _x(2, WIDTH), {"gain": 3.0}),
    "a call that passes on": Case(PassedOn, _x(2, WIDTH)),
}


class Modes(nn.Module):
    """What training does otherwise: dropout of both kinds, attention with dropout, batch norm."""

    def __init__(self, exported: bool) -> None:
        super().__init__()
        self.exported = exported
        self.up, self.norm, self.drop = nn.Linear(WIDTH, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.Dropout(0.3)
        self.down = nn.Linear(HIDDEN, OUT)

    def forward(self, x: Tensor) -> Tensor:
        if self.exported and x.shape[-1] != WIDTH:
            raise ValueError("the wrong width")
        h = self.drop(self.norm(self.up(x)))
        h = functional.dropout(h, 0.2, training=self.training)
        q = h[:, None]
        h = functional.scaled_dot_product_attention(q, q, q, dropout_p=0.5 if self.training else 0.0)[:, 0]
        return self.down(h)


class OtherPathInTraining(Modes):
    """Noise on two paths in training alone: a graph of one mode cannot follow the other."""

    def forward(self, x: Tensor) -> Tensor:
        if self.exported and x.shape[-1] != WIDTH:
            raise ValueError("the wrong width")
        h = self.norm(self.up(x))
        first, second = h.sin(), h.cos()
        if self.training:
            noise = torch.rand_like(h[:1])
            first, second = first * noise, second * (1 - noise)
        for _ in range(10):  # longer than what is taken for one region
            first, second = first.sin(), second.cos()
        first, second = (self.down(functional.dropout(h, 0.2, training=self.training)) for h in (first, second))
        return first - second


class Regions(Network):
    """Parts without gradients, and without autocast."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden(x)
        with torch.no_grad():
            scale = self.up(x).norm(dim=1, keepdim=True)
        with torch.autocast("cpu", enabled=False):
            h = torch.tanh(h.float() @ self.up.weight) @ self.up.weight.T
        return self.down(h * scale)


class OnBatchSize(Network):
    """Another function for an odd number of samples."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden(x)
        return self.down(h if x.shape[0] % 2 else -h)
