"""What an analysis does to Python's garbage collector."""

from __future__ import annotations

import gc
import platform
import subprocess
import sys
import weakref
from collections.abc import Iterator, Sequence

import pytest
import torch

from fxwidth.runtime import gc_pause, memory_in_use
from fxwidth.runtime.gc_pause import without_collections


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    gc.collect()
    monkeypatch.setattr(gc_pause, "_last_look", gc_pause._LastLook())
    yield
    gc.unfreeze()
    gc.enable()


class Cycle:
    tensors: list[torch.Tensor]

    def __init__(self) -> None:
        self.itself = self


def collections() -> int:
    return sum(generation["collections"] for generation in gc.get_stats())


def test_what_was_made_is_not_gone_through_afterwards() -> None:
    kept: list[list[int]] = []
    before = collections()
    with without_collections():
        kept.extend([] for _ in range(100_000))
        assert collections() == before
    assert collections() == before
    # Lists enough to begin a collection of the youngest, which those from before are no longer of.
    assert gc.get_count()[0] < 100


def test_garbage_is_found_later() -> None:
    with without_collections():
        one = weakref.ref(Cycle())
        assert one() is not None
    assert one() is not None
    gc.collect()
    assert one() is None


def test_garbage_is_found_before_memory_has_doubled_twice() -> None:
    """Nobody calls the collector, as in a loop that analyses again and again."""
    with without_collections():
        one = weakref.ref(Cycle())
    most = 4 * sys.getallocatedblocks()
    while one() is not None:
        with without_collections():
            cycles = [Cycle() for _ in range(100_000)]
        del cycles
        assert sys.getallocatedblocks() < most


MIB, GIB = 1 << 20, 1 << 30
MEASURES = ("resident_bytes", "cuda_bytes")


def is_found(monkeypatch: pytest.MonkeyPatch, measure: str, amounts: Sequence[int]) -> list[bool]:
    """Whether a cycle that is left in each of several pauses is found by its end, with so many bytes in use there."""
    monkeypatch.setattr(gc_pause, "_REST", 0)  # the pauses follow each other at once
    for name in MEASURES:
        monkeypatch.setattr(memory_in_use, name, lambda: 0)
    result = []
    for amount in amounts:
        monkeypatch.setattr(memory_in_use, measure, lambda amount=amount: amount)
        with without_collections():
            one = weakref.ref(Cycle())
        result.append(one() is None)
    return result


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize(
    ("amounts", "found"),
    [
        ((GIB, GIB + 255 * MIB, GIB + 257 * MIB), [False, False, True]),
        ((8 * GIB, 9 * GIB, 10 * GIB, 10 * GIB + MIB), [False, False, False, True]),
        ((10 * MIB, 200 * MIB, 260 * MIB, 270 * MIB), [False, False, False, True]),
        ((GIB, 2 * GIB, 2 * GIB, 2 * GIB + 500 * MIB, 3 * GIB), [False, True, False, False, True]),
        ((4 * GIB, GIB, 3 * GIB, 6 * GIB), [False, False, False, True]),
    ],
)
def test_garbage_is_found_when_the_memory_has_grown(
    monkeypatch: pytest.MonkeyPatch, measure: str, amounts: Sequence[int], found: list[bool]
) -> None:
    """Tensors of any size are a few memory blocks each."""
    assert is_found(monkeypatch, measure, amounts) == found


def test_what_was_freed_is_handed_back_before_all_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    handed_back: list[bool] = []
    monkeypatch.setattr(gc_pause, "_REST", 0)  # the pauses follow each other at once
    monkeypatch.setattr(memory_in_use, "give_back_free_memory", lambda: handed_back.append(True))
    amounts = iter((GIB, 2 * GIB, GIB))
    monkeypatch.setattr(memory_in_use, "resident_bytes", lambda: next(amounts))
    with without_collections():
        pass
    with without_collections():
        one = weakref.ref(Cycle())
    assert handed_back == [True]
    assert one() is not None


def test_what_is_in_use_is_not_asked_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """That would take as long as the analysis of a small network."""
    monkeypatch.setattr(gc_pause, "_REST", 1e6)
    asked: list[bool] = []
    monkeypatch.setattr(memory_in_use, "resident_bytes", lambda: len(asked.append(True) or asked))
    for _ in range(3):
        with without_collections():
            pass
    assert asked == [True]
    gc_pause._last_look.rests_until = 0.0
    with without_collections():
        pass
    assert asked == [True, True]


def test_large_garbage_is_found_by_itself() -> None:
    """Cycles with 64 MiB each, of which a loop may not leave more than a few alive."""
    alive: weakref.WeakSet[Cycle] = weakref.WeakSet()
    most = memory_in_use.resident_bytes() // 4 + 512 * MIB
    for _ in range(most // (64 * MIB) + 4):
        with without_collections():
            one = Cycle()
            one.tensors = [torch.ones(16 * MIB)]
            alive.add(one)
        del one
        assert len(alive) * 64 * MIB < most


GROWTH = """
import torch
from fxwidth.runtime import memory_in_use
before = memory_in_use.resident_bytes()
kept = torch.ones(128 << 20)
print(memory_in_use.resident_bytes() - before, float(kept[-1]))
"""


def test_the_memory_of_the_process_is_told() -> None:
    """In a process of its own: what earlier tests mapped may be taken back by the system meanwhile."""
    done = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True, check=True)
    grown = int(done.stdout.split()[0])
    assert grown == 0 if sys.platform == "win32" else 384 * MIB < grown < 640 * MIB


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="elsewhere nothing hands memory back")
def test_what_the_c_library_kept_is_not_taken_for_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory of small tensors that were freed stays resident, and would hide the growth up to the next look."""
    without_growth = memory_in_use.resident_bytes()
    monkeypatch.setattr(memory_in_use, "cuda_bytes", lambda: 0)
    with without_collections():
        pass
    monkeypatch.setattr(memory_in_use, "cuda_bytes", lambda: GIB)
    kept = []
    with without_collections():
        for _ in range(100):
            Cycle().tensors = [torch.ones(15_000) for _ in range(50)]
            kept.append(torch.ones(15_000))
    assert memory_in_use.resident_bytes() < without_growth + 100 * MIB
    assert len(kept) == 100


def test_the_memory_on_all_cuda_devices_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10**device)
    assert memory_in_use.cuda_bytes() == 111
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert memory_in_use.cuda_bytes() == 0


def test_an_allocator_may_tell_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(device: int) -> int:
        raise RuntimeError("this allocator does not yet support getDeviceStats")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "memory_allocated", refusing)
    assert memory_in_use.cuda_bytes() == 0


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("enabled", [False, True])
def test_the_collector_is_as_it_was(enabled: bool, fails: bool) -> None:
    if not enabled:
        gc.disable()
    try:
        with without_collections(), without_collections():
            assert not gc.isenabled()
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert gc.isenabled() == enabled


def test_what_the_caller_has_frozen_stays_frozen() -> None:
    gc.freeze()
    count = gc.get_freeze_count()
    with without_collections():
        pass
    # A few of them may have died of themselves.
    assert gc.get_freeze_count() > count // 2 > 0


def test_an_interruption_while_memory_is_asked_for_leaves_the_collector_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(gc_pause.memory_in_use, "resident_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt), without_collections():
        pass
    assert gc.isenabled()
