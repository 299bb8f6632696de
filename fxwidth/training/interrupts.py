"""Ctrl-C and SIGTERM as requests that are answered between two steps, so that no resize and no file is cut in half."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_KILLED = 128  # the exit status of a program that a signal has ended is this plus the signal's number


class StopRequest:
    """While entered, counts the Ctrl-Cs (SIGINT) and SIGTERMs received instead of raising or ending the process.

    Handlers belong to the main thread; in any other thread nothing is counted.
    """

    def __init__(self) -> None:
        self.count = 0
        self._last = signal.SIGINT
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def exit_status(self) -> int:
        """The exit status of a program that the last one has ended."""
        return _KILLED + self._last

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self._last = signal.Signals(number)
        self.count += 1
