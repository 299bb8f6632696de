"""Random runs of moves, each done to a tensor and to a list of channel numbers: the table is that list."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import fxwidth
from fxwidth.recording.channel_copies import NOTHING, copied_channels
from fxwidth.tracing.analyze import analyze_module
from tests.oracles.judges import assert_replays, randomise
from tests.untying.networks import NARROW, Joined, images

Step = tuple[Callable[[Tensor], Tensor], Callable[[list[int]], list[int]]]
_MOST = 16


def _part(values: list[int], start: int, count: int) -> list[int]:
    return values[start : start + count]


def _by_last_dim(move: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: move(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@st.composite
def steps(draw: st.DrawFn, size: int) -> Step:
    """Draw one move of so many channels."""
    kind = draw(
        st.sampled_from(["repeat", "repeat last", "interleave", "cut", "cat", "numbers", "pad", "flip", "expand"])
    )
    start = draw(st.integers(0, size - 1))
    count = draw(st.integers(1, size - start))
    numbers = draw(st.lists(st.integers(0, size - 1), min_size=2, max_size=_MOST))
    if kind == "cut" and count > 1:
        return lambda x: x[:, start : start + count], lambda own: _part(own, start, count)
    if kind == "repeat":
        return lambda x: x.repeat(1, 2, 1, 1), lambda own: own + own
    if kind == "repeat last":
        return _by_last_dim(lambda x: x.tile(1, 1, 1, 2)), lambda own: own + own
    if kind == "interleave":
        return lambda x: x.repeat_interleave(2, 1), lambda own: [one for one in own for _ in range(2)]
    if kind == "cat":
        return lambda x: torch.cat([x[:, start : start + count], x], 1), lambda own: _part(own, start, count) + own
    if kind == "numbers":
        return lambda x: x[:, numbers], lambda own: [own[number] for number in numbers]
    if kind == "pad":
        return lambda x: F.pad(x, (0, 0, 0, 0, 1, 0)), lambda own: [NOTHING, *own]
    if kind == "flip":
        return lambda x: x.flip(1), lambda own: own[::-1]
    return lambda x: x[:, None].expand(-1, 2, -1, -1, -1).flatten(1, 2), lambda own: own + own


@st.composite
def moves(draw: st.DrawFn) -> tuple[Callable[[Tensor], Tensor], list[int]]:
    """Draw a run of moves, and what it does to channel numbers."""
    sources, run = list(range(NARROW)), []
    for _ in range(draw(st.integers(1, 4))):
        step, numbers = draw(steps(len(sources)))
        if len(numbers(sources)) > _MOST:
            continue
        sources = numbers(sources)
        run.append(step)

    def copies(x: Tensor) -> Tensor:
        for step in run:
            x = step(x)
        return x

    return copies, sources


@settings(max_examples=40, deadline=None, derandomize=True)
@given(moves())
def test_the_table_is_what_the_moves_do(drawn):
    copies, sources = drawn
    model = randomise(Joined(copies, len(sources)).double()).eval()
    gm = fxwidth.untie_copies(fxwidth.trace(model, images()))
    tables = [list(node.args[1]) for node in gm.graph.nodes if node.target is copied_channels]
    with torch.no_grad():
        assert float((gm(images(4)) - model(images(4))).abs().max()) < 1e-12
    if len(set(sources)) < len(sources) or NOTHING in sources:
        assert tables == [sources]
    assert tables in ([], [sources])
    if tables:
        assert {group.name: group.width for group in fxwidth.analyze(gm).free} == {"a": NARROW, "b": len(sources)}
    assert_replays(analyze_module(gm), [images()])
