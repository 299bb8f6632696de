"""Keeping Python's garbage collector from going through what is about to be kept."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

from fxwidth.runtime import memory_in_use

# By how much the memory blocks in use may grow from one look among all objects to the next.
_GROWTH = 2
# A tensor of any size is a few blocks: by which share the bytes may grow, and by how many at least, until all objects
# are looked at again.
_SHARE, _LEAST = 0.25, 256 << 20


@dataclass(frozen=True)
class _InUse:
    """What was in use at some time: Python's memory blocks, and the bytes of the process and on CUDA devices."""

    blocks: int
    memories: tuple[int, ...]


# For how many times as long as it took no one asks again what is in use: Python counts its blocks one arena after the
# other, which is half a millisecond in a process of a gigabyte.
_REST = 20


@dataclass
class _LastLook:
    """What was in use when all objects were looked at; none before. And until when that is not asked again."""

    in_use: _InUse | None = None
    rests_until: float = 0.0


_last_look = _LastLook()


@contextmanager
def without_collections() -> Iterator[None]:
    """Keep Python from looking for garbage, neither now nor, once this ends, among all that was made meanwhile.

    An analysis keeps nearly all that it makes, so that going through it finds nothing and costs a sixth of its time.
    What it made becomes garbage all the same, in cycles: once there are twice as many objects as when all were looked
    at last, or the memory has grown by a quarter, all are looked at again.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            try:
                # There and back, without looking at any of it, all objects come to be of the oldest generation. Those
                # that the caller has frozen would come back too, so then the collector may look.
                is_kept_away = gc.get_freeze_count() == 0
                if is_kept_away:
                    gc.freeze()
                    gc.unfreeze()
            finally:
                # Before anything that an interruption could end.
                gc.enable()
            if is_kept_away:
                _collect_if_due()


def _collect_if_due() -> None:
    # The collector counts what grows old in its own rounds, not what comes to be so: by itself it would never be due.
    started = perf_counter()
    if started < _last_look.rests_until:
        return
    now, before = _in_use(), _last_look.in_use
    ended = perf_counter()
    _last_look.rests_until = ended + _REST * (ended - started)
    if before is None:
        _last_look.in_use = now
    elif _is_due(before, now):
        # What has been freed is resident until it is handed back, which is quicker than to look at all objects.
        memory_in_use.give_back_free_memory()
        if _is_due(before, _in_use()):
            gc.collect()
            memory_in_use.give_back_free_memory()
            _last_look.in_use = _in_use()


def _in_use() -> _InUse:
    return _InUse(sys.getallocatedblocks(), (memory_in_use.resident_bytes(), memory_in_use.cuda_bytes()))


def _is_due(before: _InUse, now: _InUse) -> bool:
    grown = (new - old > max(_SHARE * old, _LEAST) for old, new in zip(before.memories, now.memories, strict=True))
    return now.blocks > _GROWTH * before.blocks or any(grown)
