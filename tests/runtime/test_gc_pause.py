"""What an analysis does to Python's garbage collector."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterator

import pytest

from fxwidth.runtime import gc_pause
from fxwidth.runtime.gc_pause import without_collections


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    gc.collect()
    monkeypatch.setattr(gc_pause, "_last_look", gc_pause._LastLook())
    yield
    gc.unfreeze()
    gc.enable()


class Cycle:
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
