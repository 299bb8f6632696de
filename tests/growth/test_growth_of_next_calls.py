"""Growth is exact in the next calls too: what a call writes to a buffer is a result, as the outputs are."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxwidth
from fxwidth.growth import tape_index
from fxwidth.growth.interpreter import Interpretation
from fxwidth.verification.replay_oracle import largest_difference
from tests.oracles.judges import randomise

Write = Callable[["Memory", Tensor], object]
Read = Callable[["Memory", Tensor], Tensor]


class Memory(nn.Module):
    """Channels that a buffer of one number, or one with an entry per channel, is written from and read by."""

    def __init__(self, write: Write, read: Read, reads_first: bool, alone: bool) -> None:
        super().__init__()
        self.into = nn.Linear(6, 8)
        self.out = nn.Linear(8, 3)
        self.register_buffer("number", torch.tensor(0.5))
        self.register_buffer("pair", torch.ones(2))
        self.register_buffer("channels", torch.ones(8))
        self.register_buffer("steps", torch.tensor(0))
        self.write, self.read = write, read
        self.reads_first, self.alone = reads_first, alone

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.into(x))
        y = self.read(self, h) if self.reads_first else h
        if self.training or not self.alone:
            self.write(self, h.detach())
            self.steps += 1
        return self.out(y if self.reads_first else self.read(self, h))


def assigned(memory: Memory, h: Tensor) -> None:
    memory.number = h.mean() + 1


def normalised(memory: Memory, h: Tensor) -> None:
    nn.functional.batch_norm(h, memory.channels, torch.ones_like(memory.channels), training=True)


# How buffers are written to, and what of it stands in the way of growth, if anything.
WRITES: dict[str, tuple[Write, str | None]] = {
    "running statistics": (normalised, None),
    "mean": (lambda m, h: m.number.mul_(0.9).add_(0.1 * h.mean()), "number"),
    "maximum": (lambda m, h: m.number.copy_(h.max() + 1), "number"),
    "deviation": (lambda m, h: m.number.copy_(h.std() + 1), "number"),
    "mean by lerp": (lambda m, h: m.number.lerp_(h.mean(), 0.1), "number"),
    "into a view": (lambda m, h: m.pair[1].copy_(h.mean() + 1), "pair"),
    "into a part": (lambda m, h: m.pair.narrow(0, 0, 1).fill_(h.mean()), "pair"),
    "assigned": (assigned, "number"),
    "softmax": (lambda m, h: m.channels.copy_(h.mean(0).softmax(0)), "channels"),
    "sum": (lambda m, h: m.number.copy_(h.sum() + 1), None),
    "norm": (lambda m, h: m.number.copy_(h.norm() + 1), None),
    "per channel": (lambda m, h: m.channels.lerp_(h.mean(0), 0.1), None),
    "per channel, shifted": (lambda m, h: m.channels.copy_(h.mean(0) + 1), None),
    "count": (lambda m, h: m.number.add_(1), None),
}
READS: dict[str, Read] = {
    "all": lambda m, h: h / (1 + m.number * m.pair.sum()) + 0.1 * m.channels,
    "sum over channels": lambda m, h: h / (1 + m.number * m.pair[0] + m.pair[1]) + m.channels + m.channels.sum(),
    "mean over channels": lambda m, h: h + m.channels + m.channels.mean() + m.number * m.pair.sum(),
    "product over channels": lambda m, h: h + (h @ m.channels)[:, None] * m.number + m.pair[0] - m.pair[1],
}


def rows() -> Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def network(write: str, read: str, reads_first: bool, alone: bool) -> nn.Module:
    torch.manual_seed(0)
    return randomise(Memory(WRITES[write][0], READS[read], reads_first, alone)).double()


def outputs(module: nn.Module, mode: bool) -> list[Tensor]:
    with torch.no_grad():
        return [module.train(now)(rows()) for now in (mode, mode, mode, not mode, mode)]


def difference_grown(model: nn.Module, mode: bool) -> tuple[str | None, float]:
    """Return why growth of a network is refused, or else how far off its next calls are from those of its twin."""
    twin = copy.deepcopy(model)
    gm = fxwidth.trace(model.train(mode), rows())
    (group,) = (one for one in fxwidth.analyze(gm).free if one.width == 8)
    if group.inexact_growth is not None:
        with pytest.raises(fxwidth.FxwidthError, match="would change the function"):
            fxwidth.resize(gm, {group.name: 13})
        return group.inexact_growth, 0.0
    fxwidth.resize(gm, {group.name: 13})
    return None, largest_difference(outputs(gm, mode), outputs(twin, mode))


def cases(write: str, read: str, reads_first: bool) -> list[tuple[nn.Module, bool]]:
    """Return networks that write in every call or in training alone, each with the mode that it is traced in."""
    found = [(False, False), (False, True)]
    if write != "assigned" and reads_first:
        # Where training alone assigns, there are two graphs.
        found.append((True, read == "all"))
    return [(network(write, read, reads_first, alone), mode) for alone, mode in found]


@pytest.mark.parametrize("reads_first", [True, False], ids=["read, written", "written, read"])
@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("write", WRITES)
def test_what_grows_is_equal_in_the_next_calls(write: str, read: str, reads_first: bool) -> None:
    buffer = WRITES[write][1]
    for model, mode in cases(write, read, reads_first):
        told, off = difference_grown(model, mode)
        assert off < 1e-12
        if buffer is not None:
            assert told is not None
        elif read == "all":
            assert told is None


@pytest.mark.parametrize("write", [name for name, (_, buffer) in WRITES.items() if buffer is not None])
def test_the_buffer_that_keeps_what_it_sees_is_named(write: str) -> None:
    told, _ = difference_grown(network(write, "all", reads_first=True, alone=False), mode=False)
    assert told is not None
    assert f"buffer {WRITES[write][1]!r} keeps the result for the next call" in told


def test_a_buffer_whose_new_entries_do_not_stay_at_the_mean_is_named() -> None:
    told, _ = difference_grown(network("per channel", "mean over channels", reads_first=True, alone=False), mode=False)
    assert told is not None
    assert told.startswith("it takes the mean over new channels")
    assert told.endswith("once a call has written to 'channels'")


def test_only_what_is_zero_after_a_call_meets_the_next_as_zero() -> None:
    told, off = difference_grown(
        network("per channel, shifted", "product over channels", reads_first=True, alone=False), mode=False
    )
    assert told is None
    assert off < 1e-12


class Keeper(nn.Module):
    """Keeps the mean over all channels in a dict, which no graph can show."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(6, 8), nn.Linear(8, 3)
        self.kept: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.into(x))
        y = h + self.kept.get("mean", 0.0)
        self.kept["mean"] = h.detach().mean()
        return self.out(y)


def test_what_a_module_keeps_is_a_result() -> None:
    torch.manual_seed(0)
    told, _ = difference_grown(randomise(Keeper()).double(), mode=False)
    assert told is not None
    assert told.endswith("and the module of node model keeps the result for the next call")


class Carry(nn.Module):
    """Writes the mean over all channels to a tensor that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, carry: Tensor) -> Tensor:
        h = torch.relu(self.into(x))
        y = self.out(h + carry)
        carry.copy_(h.mean(1, keepdim=True))
        return y


def test_what_is_written_to_an_input_is_a_result() -> None:
    torch.manual_seed(0)
    carry = torch.zeros(5, 1, dtype=torch.float64)
    gm = fxwidth.trace(randomise(Carry()).double().eval(), (rows(), carry))
    told = next(group for group in fxwidth.analyze(gm).free if group.width == 8).inexact_growth
    assert told is not None
    assert told.endswith("and a tensor of its input keeps the result for the next call")


FAULTS = {
    "what lasts is no result": (tape_index, "lasting", lambda _: {}, "mean", "all"),
    "zeros are thought to last": (
        Interpretation,
        "_less_in_next_call",
        lambda _: False,
        "per channel, shifted",
        "sum over channels",
    ),
    "means are thought to last": (
        Interpretation,
        "_less_in_next_call",
        lambda _: False,
        "per channel",
        "mean over channels",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_growth_that_looks_at_one_call_alone_is_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place, name, wrong, write, read = FAULTS[fault]
    monkeypatch.setattr(place, name, wrong)
    told, off = difference_grown(network(write, read, reads_first=True, alone=False), mode=False)
    assert told is None
    assert off > 1e-4
