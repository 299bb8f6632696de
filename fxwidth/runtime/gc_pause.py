"""Keeping Python's garbage collector from going through what is about to be kept."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

# By how much the memory blocks in use may grow from one look among all objects to the next.
_GROWTH = 2


@dataclass
class _LastLook:
    """The memory blocks that were in use when all objects were looked at; none before."""

    blocks: int = 0


_last_look = _LastLook()


@contextmanager
def without_collections() -> Iterator[None]:
    """Keep Python from looking for garbage, neither now nor, once this ends, among all that was made meanwhile.

    An analysis keeps nearly all that it makes, so that going through it finds nothing and costs a sixth of its time.
    What it made becomes garbage all the same, in cycles: once there are twice as many objects as when all were looked
    at last, all are looked at again.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            # There and back, without looking at any of it, all objects come to be of the oldest generation. Those that
            # the caller has frozen would come back too, so then the collector may look.
            if gc.get_freeze_count() == 0:
                gc.freeze()
                gc.unfreeze()
                _collect_if_due()
            gc.enable()


def _collect_if_due() -> None:
    # The collector counts what grows old in its own rounds, not what comes to be so: by itself it would never be due.
    blocks = sys.getallocatedblocks()
    if _last_look.blocks and blocks > _GROWTH * _last_look.blocks:
        gc.collect()
        blocks = sys.getallocatedblocks()
    elif _last_look.blocks:
        return
    _last_look.blocks = blocks
