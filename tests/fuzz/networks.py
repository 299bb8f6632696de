"""Random networks: programs of ops on values of shape (batch, channels, positions), run by one module."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from fxwidth.analysis.roles import Role
from fxwidth.axes.pins import BY_STRIDES
from fxwidth.groups.width_graph import WidthGraph
from tests.fuzz.odd_ops import ODD_OPS
from tests.fuzz.ops import OPS as PLAIN_OPS
from tests.fuzz.ops import POSITIONS, Choices, Op
from tests.fuzz.state_ops import STATE_OPS

OPS: dict[str, Op] = {**PLAIN_OPS, **ODD_OPS, **STATE_OPS}
# What keeps something or draws noise is compared with the model, call by call, and not with itself.
REPEATABLE = (*PLAIN_OPS, *ODD_OPS)
BATCH, INPUTS, OUTPUTS = 3, 10, 3
WIDEST = 100


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


def draw_program(choose: Choices, longest: int = 12, ops: Sequence[str] = REPEATABLE) -> Program:
    """Return a random program of some ops."""
    stems = tuple(choose.one_of([8, 12, 12, 16, 24]) for _ in range(choose.between(2, 3)))
    widths, steps = list(stems), []
    for _ in range(choose.between(3, longest)):
        step = _draw_step(choose, widths, ops)
        if step is not None:
            steps.append(step)
            widths += step.widths
    used = {source for step in steps for source in step.sources}
    heads = tuple(i for i in range(len(widths)) if i not in used or choose.between(0, 3) == 0)
    return Program(stems, tuple(steps), heads)


def _draw_step(choose: Choices, widths: list[int], ops: Sequence[str]) -> Step | None:
    name = choose.one_of(ops)
    op = OPS[name]
    first = choose.between(0, len(widths) - 1)
    sources = (first,)
    if op.operands == 2:
        others = [i for i, width in enumerate(widths) if i != first and (width == widths[first] or not op.same_width)]
        if not others:
            return None
        sources = (first, choose.one_of(others))
    drawn = op.propose(choose, widths[first], widths[sources[-1]])
    if drawn is None or max(drawn[1]) > WIDEST:
        return None
    return Step(name, sources, *drawn)


@st.composite
def programs(draw: Any) -> Program:
    """Return random programs that hypothesis can shrink."""
    return draw_program(Choices(lambda count: draw(st.integers(0, count - 1))))


def seeded_program(seed: int, ops: Sequence[str] = REPEATABLE) -> Program:
    """Return the random program of a seed: these are less alike than hypothesis's."""
    return draw_program(Choices(random.Random(seed).randrange), ops=ops)


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
            values += [result[k] for k in range(len(step.widths))] if len(step.widths) > 1 else [result]
        return [head(values[i]) for i, head in zip(self.program.heads, self.heads, strict=True)]


def example_input() -> Tensor:
    return torch.randn(BATCH, INPUTS, POSITIONS, dtype=torch.float64)


@dataclass
class Tally:
    """How many groups of channels were found in many networks, and why those that are pinned are."""

    networks: int = 0
    free: int = 0
    by_strides: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, width_graph: WidthGraph) -> None:
        self.networks += 1
        for group in width_graph.groups:
            # What is only read has the pins of what writes it; the widths of the outputs are fixed from the start. The
            # network is one node where no tracer gets through it.
            if not any("heads." not in site.parameter for site in group.sites_as(Role.WRITER)):
                continue
            if group.pinned is None:
                self.free += 1
            else:
                self.reasons[re.sub(r" at node \w+|, in [\w.]+", "", group.pinned)] += 1
                self.by_strides += BY_STRIDES in group.pinned

    def merge(self, other: Tally) -> None:
        """Add what was found in other networks."""
        self.networks += other.networks
        self.free += other.free
        self.by_strides += other.by_strides
        self.reasons.update(other.reasons)

    def needless(self) -> int:
        """Count the pinned groups, but for those of which a view by strides shows the numbers in memory."""
        return self.reasons.total() - self.by_strides

    def __str__(self) -> str:
        pinned = self.reasons.total()
        share = pinned / max(1, pinned + self.free)
        lines = [f"{self.networks} networks, {self.free} free groups, {pinned} pinned ({share:.1%})"]
        return "\n  ".join([*lines, *(f"{count:5d}  {reason}" for reason, count in self.reasons.most_common())])
