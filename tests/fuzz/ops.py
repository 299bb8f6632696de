"""The ops that random networks are made of, on values of shape (batch, channels, positions)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

POSITIONS = 4


class Choices:
    """Where random decisions come from: a function that returns a number below its argument."""

    def __init__(self, below: Callable[[int], int]) -> None:
        self._below = below

    def between(self, low: int, high: int) -> int:
        return low + self._below(high - low + 1)

    def one_of(self, options: Sequence[Any]) -> Any:
        return options[self._below(len(options))]

    def order(self, items: Sequence[int]) -> list[int]:
        rest = list(items)
        return [rest.pop(self._below(len(rest))) for _ in items]


Numbers = tuple[int, ...]
# A proposal draws the literals of a step for given widths of its operands; None where the op does not fit them.
Proposed = tuple[Numbers, Numbers] | None
Proposal = Callable[[Choices, int, int], Proposed]
Run = Callable[[Any, Numbers, Tensor, Tensor], "Tensor | Sequence[Tensor]"]


@dataclass(frozen=True)
class Op:
    """How a kind of step is drawn, which layer it owns, and what it does with its layer, literals and operands."""

    propose: Proposal
    run: Run
    layer: Callable[[int, tuple[int, ...]], nn.Module | None] = lambda width, numbers: None
    same_width: bool = False
    operands: int = 1


def divisor(choose: Choices, width: int, choices: Sequence[int] = (2, 3, 4, 6)) -> int | None:
    """Draw a proper divisor of a width."""
    fitting = [n for n in choices if width % n == 0 and width > n]
    return choose.one_of(fitting) if fitting else None


def new_width(choose: Choices, width: int, other: int) -> Proposed:
    new = choose.one_of([6, 8, 12, 16, 24])
    return (new,), (new,)


def kept(choose: Choices, width: int, other: int) -> Proposed:
    return (), (width,)


def _grouped(choose: Choices, width: int, other: int) -> Proposed:
    groups = divisor(choose, width)
    if groups is None:
        return None
    new = groups * choose.between(1, 4)
    return (groups, new, choose.one_of([1, 3])), (new,)


def _depthwise(choose: Choices, width: int, other: int) -> Proposed:
    times = choose.between(1, 2)
    return (times,), (width * times,)


def _by_divisor(result: Callable[[int, int], int]) -> Proposal:
    def propose(choose: Choices, width: int, other: int) -> Proposed:
        groups = divisor(choose, width)
        return None if groups is None else ((groups,), (result(width, groups),))

    return propose


def _split(choose: Choices, width: int, other: int) -> Proposed:
    if width < 4:
        return None
    at = choose.between(1, width - 1)
    return (at, width - at), (at, width - at)


def _chunk(choose: Choices, width: int, other: int) -> Proposed:
    count = choose.between(2, 3)
    sizes = [len(part) for part in torch.arange(width).chunk(count)]
    return ((len(sizes),), tuple(sizes)) if len(sizes) > 1 else None


def _slice(choose: Choices, width: int, other: int) -> Proposed:
    if width < 6:
        return None
    start = choose.between(0, width // 2)
    stop = choose.between(start + 2, width)
    return (start, stop), (stop - start,)


def _fold(choose: Choices, width: int, other: int) -> Proposed:
    fitting = [(a, b) for a in (2, 3, 4) for b in (2, 3, 4) if width % (a * b) == 0]
    if not fitting:
        return None
    order = choose.order([1, 2, 3])
    return (*choose.one_of(fitting), *order), (width,)


def _tile(choose: Choices, width: int, other: int) -> Proposed:
    new = choose.between(width, 3 * width)
    return (new,), (new,)


def _place(choose: Choices, width: int, other: int) -> Proposed:
    return ((choose.between(1, width - 1),), (width,)) if width > 1 else None


def _pad(choose: Choices, width: int, other: int) -> Proposed:
    before, after = choose.between(0, 3), choose.between(0, 3)
    return (before, after), (width + before + after,)


def _halved(choose: Choices, width: int, other: int) -> Proposed:
    return ((choose.between(0, 1),), (width // 2,)) if width % 2 == 0 else None


def _update(choose: Choices, width: int, other: int) -> Proposed:
    return ((choose.between(0, width - other),), (width,)) if other < width else None


def _per_channel(width: int, numbers: Numbers) -> nn.Module:
    return nn.ParameterList([nn.Parameter(torch.randn(width, 1))])


def _tiled(layer: Any, n: Numbers, x: Tensor, y: Tensor) -> Tensor:
    return torch.tile(x, (1, -(-n[0] // x.shape[1]), 1))[:, : n[0]]


def _over_positions(layer: Any, n: Numbers, x: Tensor, y: Tensor) -> Tensor:
    query, key = x.transpose(1, 2), torch.tanh(y)
    return (torch.bmm(query, key).softmax(-1) @ query).transpose(1, 2)


def _over_channels(layer: Any, n: Numbers, x: Tensor, y: Tensor) -> Tensor:
    return torch.bmm(x, torch.tanh(y).transpose(1, 2)).softmax(-1) @ x


def _self_attention(layer: Any, n: Numbers, x: Tensor, y: Tensor) -> Tensor:
    x = x.transpose(1, 2)
    return (x + layer(x, x, x)[0]).transpose(1, 2)


def _updated(layer: Any, n: Numbers, x: Tensor, y: Tensor) -> Tensor:
    x = x.clone()
    x.narrow(1, n[0], y.shape[1]).add_(y)
    return x


def _interleaved(layer: Any, n: Numbers, x: Tensor, y: Tensor) -> Tensor:
    return torch.stack([x, y], 2).flatten(1, 2)


def _channels_to_positions(layer: Any, n: Numbers, x: Tensor, y: Tensor) -> Tensor:
    return F.avg_pool1d(x.reshape(x.shape[0], -1, n[0] * POSITIONS), n[0])


def _spread(x: Tensor) -> Tensor:
    return x.unsqueeze(-1).expand(-1, -1, POSITIONS)


OPS: dict[str, Op] = {
    "pointwise conv": Op(new_width, lambda m, n, x, y: m(x), lambda w, n: nn.Conv1d(w, n[0], 1)),
    "linear": Op(new_width, lambda m, n, x, y: m(x.transpose(1, 2)).transpose(1, 2), lambda w, n: nn.Linear(w, n[0])),
    "conv": Op(new_width, lambda m, n, x, y: m(x), lambda w, n: nn.Conv1d(w, n[0], 3, padding=1)),
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
    "flatten": Op(new_width, lambda m, n, x, y: _spread(m(x.flatten(1))), lambda w, n: nn.Linear(w * POSITIONS, n[0])),
    "flatten last": Op(
        new_width,
        lambda m, n, x, y: _spread(m(x.transpose(1, 2).flatten(1))),
        lambda w, n: nn.Linear(w * POSITIONS, n[0]),
    ),
    "cat": Op(lambda choose, w, o: ((), (w + o,)), lambda m, n, x, y: torch.cat([x, y], 1), operands=2),
    "split": Op(_split, lambda m, n, x, y: x.split(list(n), 1)),
    "chunk": Op(_chunk, lambda m, n, x, y: x.chunk(n[0], 1)),
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
    "ones": Op(_pad, lambda m, n, x, y: torch.cat([x, x.new_ones(x.shape[0], n[0] + n[1], POSITIONS)], 1)),
    "zeros": Op(kept, lambda m, n, x, y: x + x.new_zeros(x.shape[1], 1)),
    "add": Op(kept, lambda m, n, x, y: x + y, same_width=True, operands=2),
    "mul": Op(kept, lambda m, n, x, y: x * torch.sigmoid(y), same_width=True, operands=2),
    "interleave": Op(lambda choose, w, o: ((), (2 * w,)), _interleaved, same_width=True, operands=2),
    "attend over positions": Op(kept, _over_positions, same_width=True, operands=2),
    "attend over channels": Op(kept, _over_channels, same_width=True, operands=2),
    "outer": Op(
        lambda choose, w, o: ((), (w * o,)),
        lambda m, n, x, y: (x.unsqueeze(2) * y.unsqueeze(1)).flatten(1, 2),
        operands=2,
    ),
    "update": Op(_update, _updated, operands=2),
    "heads": Op(
        _by_divisor(lambda w, g: w),
        _self_attention,
        lambda w, n: nn.MultiheadAttention(w, n[0], batch_first=True),
    ),
    "relu": Op(kept, lambda m, n, x, y: F.relu(x)),
    "cosine": Op(kept, lambda m, n, x, y: torch.cos(x)),
    "glu": Op(_halved, lambda m, n, x, y: F.glu(x, 1)),
    "gain": Op(kept, lambda m, n, x, y: x * m[0], _per_channel),
    "sum of groups": Op(_by_divisor(lambda w, g: w // g), lambda m, n, x, y: x.unflatten(1, (n[0], -1)).sum(1)),
    "maxout": Op(_by_divisor(lambda w, g: w // g), lambda m, n, x, y: x.unflatten(1, (-1, n[0])).amax(2)),
    "positions": Op(_by_divisor(lambda w, g: w // g), _channels_to_positions),
    "batch norm": Op(kept, lambda m, n, x, y: m(x), lambda w, n: nn.BatchNorm1d(w)),
    "group norm": Op(_by_divisor(lambda w, g: w), lambda m, n, x, y: m(x), lambda w, n: nn.GroupNorm(n[0], w)),
    "layer norm": Op(kept, lambda m, n, x, y: m(x.transpose(1, 2)).transpose(1, 2), lambda w, n: nn.LayerNorm(w)),
    "rms norm": Op(kept, lambda m, n, x, y: m(x.transpose(1, 2)).transpose(1, 2), lambda w, n: nn.RMSNorm(w)),
}
