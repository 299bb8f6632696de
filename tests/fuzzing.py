"""Random networks: programs of ops on values of shape (batch, channels, positions), run by one module."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from fxwidth.groups import WidthGraph

BATCH, INPUTS, POSITIONS, OUTPUTS = 3, 10, 4, 3
WIDEST = 60


@dataclass(frozen=True)
class Step:
    """One op: which values it takes, its literals, and the widths of its results."""

    op: str
    sources: tuple[int, ...]
    numbers: tuple[int, ...]
    widths: tuple[int, ...]


@dataclass(frozen=True)
class Program:
    """The widths of the first values, the steps, and which values are read by a head."""

    stems: tuple[int, ...]
    steps: tuple[Step, ...]
    heads: tuple[int, ...]

    def widths(self) -> list[int]:
        return [*self.stems, *(width for step in self.steps for width in step.widths)]


# A proposal draws the literals of a step for given widths of its operands; None where the op does not fit them.
Proposal = Callable[[Any, int, int], "tuple[tuple[int, ...], tuple[int, ...]] | None"]
Run = Callable[[Any, tuple[int, ...], Tensor, Tensor], "Tensor | Sequence[Tensor]"]


@dataclass(frozen=True)
class Op:
    """How a kind of step is drawn, which layer it owns, and what it does with its layer, literals and operands."""

    propose: Proposal
    run: Run
    layer: Callable[[int, tuple[int, ...]], nn.Module | None] = lambda width, numbers: None
    same_width: bool = False
    operands: int = 1


def divisor(draw: Any, width: int, choices: Sequence[int] = (2, 3, 4, 6)) -> int | None:
    """Draw a proper divisor of a width."""
    fitting = [n for n in choices if width % n == 0 and width > n]
    return draw(st.sampled_from(fitting)) if fitting else None


def _new_width(draw: Any, width: int, other: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    new = draw(st.sampled_from([6, 8, 12, 16, 24]))
    return (new,), (new,)


def _kept(draw: Any, width: int, other: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return (), (width,)


def _grouped(draw: Any, width: int, other: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    groups = divisor(draw, width)
    if groups is None:
        return None
    new = groups * draw(st.integers(1, 4))
    return (groups, new, draw(st.sampled_from([1, 3]))), (new,)


def _depthwise(draw: Any, width: int, other: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    times = draw(st.integers(1, 2))
    return (times,), (width * times,)


def _by_divisor(result: Callable[[int, int], int]) -> Proposal:
    def propose(draw: Any, width: int, other: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        groups = divisor(draw, width)
        return None if groups is None else ((groups,), (result(width, groups),))

    return propose


def _split(draw: Any, width: int, other: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    if width < 4:
        return None
    at = draw(st.integers(1, width - 1))
    return (at, width - at), (at, width - at)


def _chunk(draw: Any, width: int, other: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    count = draw(st.integers(2, 3))
    sizes = [len(part) for part in torch.arange(width).chunk(count)]
    return ((len(sizes),), tuple(sizes)) if min(sizes) > 0 else None


def _slice(draw: Any, width: int, other: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    if width < 6:
        return None
    start = draw(st.integers(0, width // 2))
    stop = draw(st.integers(start + 2, width))
    return (start, stop), (stop - start,)


def _fold(draw: Any, width: int, other: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    fitting = [(a, b) for a in (2, 3, 4) for b in (2, 3, 4) if width % (a * b) == 0]
    if not fitting:
        return None
    order = draw(st.permutations([1, 2, 3]))
    return (*draw(st.sampled_from(fitting)), *order), (width,)


def _tile(draw: Any, width: int, other: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    new = draw(st.integers(width, 3 * width))
    return (new,), (new,)


def _place(draw: Any, width: int, other: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    return ((draw(st.integers(1, width - 1)),), (width,)) if width > 1 else None


def _pad(draw: Any, width: int, other: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    before, after = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    return (before, after), (width + before + after,)


def _halved(draw: Any, width: int, other: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    return ((draw(st.integers(0, 1)),), (width // 2,)) if width % 2 == 0 else None


def _update(draw: Any, width: int, other: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    return ((draw(st.integers(0, width - other)),), (width,)) if other < width else None


def _per_channel(width: int, numbers: tuple[int, ...]) -> nn.Module:
    return nn.ParameterList([nn.Parameter(torch.randn(width, 1))])


def _tiled(layer: Any, n: tuple[int, ...], x: Tensor, y: Tensor) -> Tensor:
    return torch.tile(x, (1, -(-n[0] // x.shape[1]), 1))[:, : n[0]]


def _over_positions(layer: Any, n: tuple[int, ...], x: Tensor, y: Tensor) -> Tensor:
    query, key = x.transpose(1, 2), torch.tanh(y)
    return (torch.bmm(query, key).softmax(-1) @ query).transpose(1, 2)


def _over_channels(layer: Any, n: tuple[int, ...], x: Tensor, y: Tensor) -> Tensor:
    return torch.bmm(x, torch.tanh(y).transpose(1, 2)).softmax(-1) @ x


def _self_attention(layer: Any, n: tuple[int, ...], x: Tensor, y: Tensor) -> Tensor:
    x = x.transpose(1, 2)
    return (x + layer(x, x, x)[0]).transpose(1, 2)


def _updated(layer: Any, n: tuple[int, ...], x: Tensor, y: Tensor) -> Tensor:
    x = x.clone()
    x.narrow(1, n[0], y.shape[1]).add_(y)
    return x


def _interleaved(layer: Any, n: tuple[int, ...], x: Tensor, y: Tensor) -> Tensor:
    return torch.stack([x, y], 2).flatten(1, 2)


def _channels_to_positions(layer: Any, n: tuple[int, ...], x: Tensor, y: Tensor) -> Tensor:
    return F.avg_pool1d(x.reshape(x.shape[0], -1, n[0] * POSITIONS), n[0])


def _spread(x: Tensor) -> Tensor:
    return x.unsqueeze(-1).expand(-1, -1, POSITIONS)


OPS: dict[str, Op] = {
    "pointwise conv": Op(_new_width, lambda m, n, x, y: m(x), lambda w, n: nn.Conv1d(w, n[0], 1)),
    "linear": Op(_new_width, lambda m, n, x, y: m(x.transpose(1, 2)).transpose(1, 2), lambda w, n: nn.Linear(w, n[0])),
    "conv": Op(_new_width, lambda m, n, x, y: m(x), lambda w, n: nn.Conv1d(w, n[0], 3, padding=1)),
    "grouped conv": Op(
        _grouped,
        lambda m, n, x, y: m(x),
        lambda w, n: nn.Conv1d(w, n[1], n[2], padding=n[2] // 2, groups=n[0]),
    ),
    "transposed conv": Op(
        _grouped,
        lambda m, n, x, y: m(x),
        lambda w, n: nn.ConvTranspose1d(w, n[1], n[2], padding=n[2] // 2, groups=n[0]),
    ),
    "depthwise conv": Op(
        _depthwise, lambda m, n, x, y: m(x), lambda w, n: nn.Conv1d(w, w * n[0], 3, padding=1, groups=w)
    ),
    "flatten": Op(_new_width, lambda m, n, x, y: _spread(m(x.flatten(1))), lambda w, n: nn.Linear(w * POSITIONS, n[0])),
    "flatten last": Op(
        _new_width,
        lambda m, n, x, y: _spread(m(x.transpose(1, 2).flatten(1))),
        lambda w, n: nn.Linear(w * POSITIONS, n[0]),
    ),
    "cat": Op(lambda draw, w, o: ((), (w + o,)), lambda m, n, x, y: torch.cat([x, y], 1), operands=2),
    "split": Op(_split, lambda m, n, x, y: x.split(list(n), 1)),
    "chunk": Op(_chunk, lambda m, n, x, y: [x.chunk(n[0], 1)[i] for i in range(n[0])]),
    "slice": Op(_slice, lambda m, n, x, y: x[:, n[0] : n[1]]),
    "stride": Op(_halved, lambda m, n, x, y: x[:, n[0] :: 2]),
    "shuffle": Op(
        _by_divisor(lambda w, g: w),
        lambda m, n, x, y: x.view(x.shape[0], n[0], -1, POSITIONS).transpose(1, 2).reshape(x.shape),
    ),
    "fold": Op(
        _fold,
        lambda m, n, x, y: x.reshape(x.shape[0], n[0], n[1], -1, POSITIONS).permute(0, *n[2:], 4).flatten(1, 3),
    ),
    "tile": Op(_tile, _tiled),
    "repeat": Op(_depthwise, lambda m, n, x, y: x.repeat_interleave(n[0], 1)),
    "roll": Op(_place, lambda m, n, x, y: torch.cat([x[:, n[0] :], x[:, : n[0]]], 1)),
    "pad": Op(_pad, lambda m, n, x, y: F.pad(x, (0, 0, n[0], n[1]))),
    "ones": Op(
        _pad, lambda m, n, x, y: torch.cat([x, torch.ones(x.shape[0], n[0] + n[1], POSITIONS, dtype=x.dtype)], 1)
    ),
    "zeros": Op(_kept, lambda m, n, x, y: x + torch.zeros(x.shape[1], 1, dtype=x.dtype)),
    "add": Op(_kept, lambda m, n, x, y: x + y, same_width=True, operands=2),
    "mul": Op(_kept, lambda m, n, x, y: x * torch.sigmoid(y), same_width=True, operands=2),
    "interleave": Op(lambda draw, w, o: ((), (2 * w,)), _interleaved, same_width=True, operands=2),
    "attend over positions": Op(_kept, _over_positions, same_width=True, operands=2),
    "attend over channels": Op(_kept, _over_channels, same_width=True, operands=2),
    "outer": Op(
        lambda draw, w, o: ((), (w * o,)),
        lambda m, n, x, y: (x.unsqueeze(2) * y.unsqueeze(1)).flatten(1, 2),
        operands=2,
    ),
    "update": Op(_update, _updated, operands=2),
    "heads": Op(
        _by_divisor(lambda w, g: w),
        _self_attention,
        lambda w, n: nn.MultiheadAttention(w, n[0], batch_first=True),
    ),
    "relu": Op(_kept, lambda m, n, x, y: F.relu(x)),
    "cosine": Op(_kept, lambda m, n, x, y: torch.cos(x)),
    "glu": Op(_halved, lambda m, n, x, y: F.glu(x, 1)),
    "gain": Op(_kept, lambda m, n, x, y: x * m[0], _per_channel),
    "sum of groups": Op(_by_divisor(lambda w, g: w // g), lambda m, n, x, y: x.unflatten(1, (n[0], -1)).sum(1)),
    "maxout": Op(_by_divisor(lambda w, g: w // g), lambda m, n, x, y: x.unflatten(1, (-1, n[0])).amax(2)),
    "positions": Op(_by_divisor(lambda w, g: w // g), _channels_to_positions),
    "batch norm": Op(_kept, lambda m, n, x, y: m(x), lambda w, n: nn.BatchNorm1d(w)),
    "group norm": Op(_by_divisor(lambda w, g: w), lambda m, n, x, y: m(x), lambda w, n: nn.GroupNorm(n[0], w)),
    "layer norm": Op(_kept, lambda m, n, x, y: m(x.transpose(1, 2)).transpose(1, 2), lambda w, n: nn.LayerNorm(w)),
    "rms norm": Op(_kept, lambda m, n, x, y: m(x.transpose(1, 2)).transpose(1, 2), lambda w, n: nn.RMSNorm(w)),
}


@st.composite
def programs(draw: Any, longest: int = 12) -> Program:
    """Return a random program."""
    stems = tuple(draw(st.lists(st.sampled_from([8, 12, 12, 16, 24]), min_size=2, max_size=3)))
    widths, steps = list(stems), []
    for _ in range(draw(st.integers(3, longest))):
        step = _draw_step(draw, widths)
        if step is not None:
            steps.append(step)
            widths += step.widths
    used = {source for step in steps for source in step.sources}
    heads = tuple(i for i in range(len(widths)) if i not in used or draw(st.integers(0, 3)) == 0)
    return Program(stems, tuple(steps), heads)


def _draw_step(draw: Any, widths: list[int]) -> Step | None:
    name = draw(st.sampled_from(list(OPS)))
    op = OPS[name]
    first = draw(st.integers(0, len(widths) - 1))
    sources = (first,)
    if op.operands == 2:
        others = [i for i, width in enumerate(widths) if i != first and (width == widths[first] or not op.same_width)]
        if not others:
            return None
        sources = (first, draw(st.sampled_from(others)))
    drawn = op.propose(draw, widths[first], widths[sources[-1]])
    if drawn is None or max(drawn[1]) > WIDEST:
        return None
    return Step(name, sources, *drawn)


class RandomNetwork(nn.Module):
    """Runs a program."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        widths = program.widths()
        self.stems = nn.ModuleList(nn.Conv1d(INPUTS, width, 1) for width in program.stems)
        layers = [OPS[step.op].layer(widths[step.sources[0]], step.numbers) for step in program.steps]
        self.layers = nn.ModuleDict({str(i): layer for i, layer in enumerate(layers) if layer is not None})
        self.heads = nn.ModuleList(nn.Conv1d(widths[i], OUTPUTS, 1) for i in program.heads)

    def forward(self, x: Tensor) -> list[Tensor]:
        values = [stem(x) for stem in self.stems]
        for i, step in enumerate(self.program.steps):
            layer = self.layers[str(i)] if str(i) in self.layers else None  # noqa: SIM401 - no get in ModuleDict
            operands = [values[source] for source in step.sources]
            result = OPS[step.op].run(layer, step.numbers, operands[0], operands[-1])
            values += list(result[: len(step.widths)]) if len(step.widths) > 1 else [result]
        return [head(values[i]) for i, head in zip(self.program.heads, self.heads, strict=True)]


def example_input() -> Tensor:
    return torch.randn(BATCH, INPUTS, POSITIONS, dtype=torch.float64)


@dataclass
class Tally:
    """How many groups were found in many networks, and why those that are pinned are."""

    networks: int = 0
    free: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, width_graph: WidthGraph) -> None:
        self.networks += 1
        for group in width_graph.groups:
            # The widths of the network's inputs and outputs are fixed from the start.
            if all(_is_outer(site.parameter, site.dim) for site in group.sites):
                continue
            if group.pinned is None:
                self.free += 1
            else:
                self.reasons[re.sub(r" at node \w+", "", group.pinned)] += 1

    def __str__(self) -> str:
        pinned = self.reasons.total()
        share = pinned / max(1, pinned + self.free)
        lines = [f"{self.networks} networks, {self.free} free groups, {pinned} pinned ({share:.1%})"]
        return "\n  ".join([*lines, *(f"{count:5d}  {reason}" for reason, count in self.reasons.most_common())])


def _is_outer(parameter: str, dim: int) -> bool:
    return (parameter.startswith("stems.") and dim == 1) or (parameter.startswith("heads.") and dim == 0)
