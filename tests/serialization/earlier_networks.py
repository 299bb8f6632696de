"""Networks that were saved by an earlier version, and what they answered there.

The files beside were written by `write`, run with that version and this module outside of any package.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torchvision.ops import StochasticDepth

WIDTH, HIDDEN, OUT = 4, 6, 3
ANSWERS = "answers.safetensors"


class Two(nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, OUT)
        self.depth, self.norm = StochasticDepth(0.4, "row"), nn.BatchNorm1d(HIDDEN)
        self.register_buffer("n", torch.zeros(OUT))
        self.register_buffer("scratch", torch.ones(OUT), persistent=False)


class ByMode(Two):
    """Numbers, parts and random numbers by mode; constants that the code makes, and noise of a fixed width."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x).relu()
        if self.training:
            h = h + 0.1 * torch.randn_like(h)
        table = torch.zeros(OUT, dtype=x.dtype).masked_fill(torch.arange(OUT) > 0, 2.0)
        noise = torch.randn(OUT, dtype=x.dtype)
        return self.down(self.norm(self.depth(h))) * (0.5 if self.training else 1.0) + table + noise * self.scratch


class Counts(Two):
    """Writes to a buffer, by an operator, and takes an argument that is left out."""

    def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:
        self.n += 1
        return self.down(F.dropout(self.up(x), 0.3, self.training)) * scale + self.n


class Structured(Two):
    """Takes a dict and returns one that keeps its order; a shape is checked, so that it has to be exported."""

    def forward(self, inputs: dict[str, Tensor]) -> Any:
        x = inputs["x"]
        if x.shape[-1] != WIDTH:
            raise ValueError("the wrong width")
        h = self.up(x)
        with torch.no_grad():
            self.n.lerp_(x.mean(0)[:OUT], 0.1)
        p = 0.2 if self.training else 0.0
        q = h[:, None]
        h = F.scaled_dot_product_attention(q, q, q, dropout_p=p, scale=0.3)[:, 0]
        mask = torch.arange(OUT, dtype=x.dtype) > 0.5
        return OrderedDict(y=self.down(h) * mask + self.n, more=[x.sum(1), torch.rand(2, dtype=x.dtype)])


def _rows() -> Tensor:
    return torch.linspace(-1, 1, 5 * WIDTH, dtype=torch.float64).view(5, WIDTH)


# By name: the network, its arguments, and a plan for its graph.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...], dict[str, int]]] = {
    "by_mode": (ByMode, (_rows(),), {}),
    "counts": (Counts, (_rows(),), {}),
    "structured": (Structured, ({"x": _rows()},), {}),
    "of_width_one": (lambda: nn.Sequential(Two().up, nn.ReLU(), Two().down), (_rows(),), {"0": 1}),
}


def answers(name: str, gm: fx.GraphModule) -> Iterator[tuple[str, Tensor]]:
    """Yield what a graph returns in two calls in each mode, by mode, call and place."""
    for mode in (False, True):
        gm.train(mode)
        for call in range(2):
            torch.manual_seed(call)
            with torch.no_grad():
                result = gm(*copy.deepcopy(NETWORKS[name][1]))
            for place, value in enumerate(pytree.tree_leaves(result)):
                yield f"{name} {'train' if mode else 'eval'} {call} {place}", value.clone()


def write(folder: Path) -> None:
    """Write the files."""
    import fxwidth

    found: dict[str, Tensor] = {}
    for name, (make, inputs, plan) in NETWORKS.items():
        torch.manual_seed(0)
        gm = fxwidth.trace(make().double().eval(), inputs)
        if plan:
            fxwidth.resize(gm, plan)
        fxwidth.save(gm, folder / f"{name}.pt")
        fxwidth.save(gm, folder / f"{name}.safetensors")
        found |= dict(answers(name, gm))
    save_file(found, folder / ANSWERS)


class Stream(nn.Module):
    """A residual stream with a norm and attention, of which a later version has written a file."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(WIDTH, HIDDEN), nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, OUT)
        self.attention = nn.MultiheadAttention(HIDDEN, 2, batch_first=True)
        self.up, self.down = nn.Linear(HIDDEN, 8), nn.Linear(8, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.head(x + self.down(F.gelu(self.up(x))))


REPLAYED = "replayed"


def stream() -> nn.Module:
    """Return the network of that file, before its resizes."""
    torch.manual_seed(0)
    return Stream().double().eval()


def stream_inputs() -> Tensor:
    """Return its inputs, small ones, for which the eps of its norm matters."""
    return torch.linspace(-1e-2, 1e-2, 5 * 3 * WIDTH, dtype=torch.float64).view(5, 3, WIDTH)


def write_replayed(folder: Path) -> None:
    """Write that file, by the version before files told the whole graph."""
    import fxwidth

    x = stream_inputs()
    gm = fxwidth.trace(stream(), x)
    free = [group.name for group in fxwidth.analyze(gm).free]
    fxwidth.resize(gm, {"embed": 4}, data=[x])
    fxwidth.resize(gm, {"up": 10})
    fxwidth.resize(gm, {name: fxwidth.analyze(gm)[name].width - 1 for name in free}, data=[x], exact=False)
    fxwidth.save(gm, folder / f"{REPLAYED}.safetensors")
    save_file({"answer": gm(x).detach()}, folder / f"{REPLAYED}-answers.safetensors")


class Placed(nn.Module):
    """Adds a row of a table for each position; it must be exported, which kept the length in earlier versions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, 8), nn.Linear(8, OUT)
        self.places = nn.Parameter(torch.randn(7, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError
        h = self.embed(x) + self.places[: x.shape[1]]
        q = h.unflatten(-1, (2, -1)).transpose(1, 2)
        h = h + F.scaled_dot_product_attention(q, q, q).transpose(1, 2).reshape(h.shape[0], x.shape[1], -1)
        return self.down(F.gelu(self.up(h)))


OF_ONE_LENGTH = "of_one_length"
OF_TORCH = "2.14.1"


def placed() -> nn.Module:
    """Return the network of that file, before its resize."""
    torch.manual_seed(0)
    return Placed().double().eval()


def write_of_one_length(folder: Path) -> None:
    """Write that file, by the version before exported graphs took other lengths."""
    import fxwidth

    x = stream_inputs()
    gm = fxwidth.trace(placed(), x)
    fxwidth.resize(gm, {"up": 5})
    fxwidth.save(gm, folder / f"{OF_ONE_LENGTH}.safetensors")
    save_file({"answer": gm(x).detach()}, folder / f"{OF_ONE_LENGTH}-answers.safetensors")
