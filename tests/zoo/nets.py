"""Small networks with every way in which parameters read channels, and what tests need to take them apart."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxwidth.rules  # noqa: F401
from fxwidth.analysis.axis_propagation import analyze_axes
from fxwidth.axes.index_maps import IndexMaps, Indices
from fxwidth.groups.width_graph import WidthGraph
from fxwidth.verification.replay_oracle import resized_outputs


class Tile(nn.Module):
    """A shortcut that repeats its channels and cuts them off: one factor several times in one axis."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3)
        self.body = nn.Conv2d(4, 10, 3, padding=1)
        self.head = nn.Conv2d(10, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.head((self.body(x) + x.repeat(1, 3, 1, 1)[:, :10]).relu()).mean((2, 3))


class Attention(nn.Module):
    """Self-attention by hand, with a layer norm."""

    def __init__(self, width: int = 12, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, 8) for _ in range(3))
        self.out = nn.Linear(8, width)
        self.embed = nn.Linear(16, width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = self.norm(x)
        q, k, v = (f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = (q @ k.transpose(-1, -2) / 2).softmax(-1) @ v
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return self.head(x).mean(1)


class Shared(nn.Module):
    """One layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(4, 6)
        self.shared = nn.Linear(6, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.shared(self.first(x).relu()).relu() + self.shared(self.second(x).tanh()).relu())


class Tied(nn.Module):
    """One table that writes a stream and reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 6)
        self.body = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.table(x)
        return F.linear(x + self.body(x).relu(), self.table.weight)


class InPlace(nn.Module):
    """An activation read before and after it is overwritten."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 5, 3)
        self.before, self.after = nn.Conv2d(5, 3, 1), nn.Conv2d(5, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.before(x)
        return (y + self.after(x.relu_())).mean((2, 3))


class PackedAttention(nn.Module):
    """torch's own attention with one packed weight, of which keys and values read another input than queries."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.other = nn.Linear(16, 8), nn.Linear(16, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, z = self.embed(x), self.other(x).relu()
        return self.head(self.attention(y, z, z, need_weights=False)[0]).mean(1)


def images(n: int = 64, channels: int = 1, size: int = 8, seed: int = 1) -> Tensor:
    """Return smooth random images, so that neighbouring pixels are correlated."""
    noise = torch.randn(n, channels, size + 2, size + 2, generator=torch.Generator().manual_seed(seed))
    return F.avg_pool2d(noise, 3, 1).double() * 3 + 0.5


def tokens(n: int = 64, seed: int = 1) -> Tensor:
    """Return random sequences."""
    return torch.randn(n, 6, 16, generator=torch.Generator().manual_seed(seed)).double()


def batch_norm_bottleneck() -> nn.Sequential:
    """Return convolutions with batch norms, one of them between two layers with nothing nonlinear."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 5, 1, bias=False),
        nn.BatchNorm2d(5), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3),
    )  # fmt: skip


def conv() -> nn.Module:
    """Convolutions with biases, batch norm without, and a flattened linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 5, 3, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(20, 3),
    )


def grouped() -> nn.Module:
    """Grouped, depthwise and transposed convolutions."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, groups=2),
        nn.ReLU(),
        nn.Conv2d(12, 12, 3, groups=12, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(12, 6, 2, stride=2, groups=3),
        nn.ReLU(),
        nn.ConvTranspose2d(6, 5, 1),
        nn.ReLU(),
        nn.Conv2d(5, 3, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor]]] = {
    "conv": (conv, images),
    "grouped": (grouped, images),
    "tile": (Tile, images),
    "in place": (InPlace, images),
    "attention": (Attention, tokens),
    "packed attention": (PackedAttention, tokens),
    "shared": (Shared, lambda n=64, seed=1: tokens(n, seed)[:, 0, :4]),
    "tied": (Tied, lambda n=64, seed=1: torch.randint(7, (n, 4), generator=torch.Generator().manual_seed(seed))),
}


def trained_like(module: nn.Module, seed: int = 0) -> nn.Module:
    """Return a network in float64 with norm statistics, gains and biases away from their defaults."""
    module = module.double().eval()
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
            is_positive = name.endswith("running_var") or (tensor.dim() == 1 and name.endswith("weight"))
            with torch.no_grad():
                tensor.copy_(0.5 + noise.abs() if is_positive else noise / max(1, tensor[0].numel()) ** 0.5)
    return module


def width_graph(module: nn.Module, example: Tensor) -> WidthGraph:
    """Analyse a network."""
    return WidthGraph(analyze_axes(torch.fx.symbolic_trace(module), [example[:4]]))


def build(name: str) -> tuple[WidthGraph, Tensor]:
    """Return one of the networks above, analysed, and inputs for it."""
    make, inputs = NETS[name]
    torch.manual_seed(0)
    x = inputs()
    return width_graph(trained_like(make()), x), x


def inputs_of(module: nn.Module, x: Tensor) -> dict[str, list[Tensor]]:
    """Return what each submodule of a network is given, by its path."""
    seen: dict[str, list[Tensor]] = {}
    handles = [
        part.register_forward_pre_hook(lambda _, args, path=path: seen.setdefault(path, []).append(args[0].clone()))
        for path, part in module.named_modules()
        if path
    ]
    with torch.no_grad():
        module(x)
    for handle in handles:
        handle.remove()
    return seen


def rows_of(layer: nn.Module, x: Tensor, channels: int) -> Tensor:
    """Return the vectors of channels a layer is given, whatever it is."""
    if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
        return x.movedim(1, -1).flatten(0, -2)
    rows = x.flatten(0, -2)
    return rows.unflatten(1, (channels, -1)).transpose(1, 2).flatten(0, 1)


def maps_for(graph: WidthGraph, kept: dict[str, Indices]) -> IndexMaps:
    """Return the index maps that keep some channels of some groups."""
    return IndexMaps(graph.analysis.space, {graph[name].factor: indices for name, indices in kept.items()})


def outputs_after(graph: WidthGraph, maps: IndexMaps, folded: dict[str, Tensor], x: Tensor) -> Tensor:
    """Return what the resized network makes of inputs, from the prescribed ops on folded and sliced parameters."""
    parameters = graph.analysis.parameters
    old = {name: parameters[name].tensor.detach().clone() for name in folded}
    try:
        with torch.no_grad():
            for name, tensor in folded.items():
                parameters[name].tensor.copy_(tensor)
            return torch.cat([resized_outputs(graph.analysis, maps, [part])[0] for part in x.split(4)])
    finally:
        with torch.no_grad():
            for name, tensor in old.items():
                parameters[name].tensor.copy_(tensor)
