"""Ctrl-C as a request that is answered between two steps, so that no resize and no file is ever cut in half."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class StopRequest:
    """While entered, counts the Ctrl-Cs (SIGINT) received instead of raising KeyboardInterrupt.

    Handlers belong to the main thread; in any other thread nothing is counted.
    """

    def __init__(self) -> None:
        self.count = 0
        self._previous: Any = None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _receive(self, _number: int, _frame: FrameType | None) -> None:
        self.count += 1
