"""How far long work has come: told by the work where it is done, and shown or handed on where it was called."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from fxwidth.errors import FxwidthError

# After how many seconds anything is shown, how often a terminal draws that anew, and how often a log has a line.
_PATIENCE, _INTERVAL, _PACE = 1.0, 0.1, 10.0
# So many lines of a log may come sooner, since most stages are short.
_AT_FIRST = 3
_LOGGER = logging.getLogger(__name__)

_Item = TypeVar("_Item")
_Found = TypeVar("_Found")


@dataclass(frozen=True)
class ProgressUpdate:
    """How far a piece of work has come.

    Attributes:
        stage: what is being done.
        done: how many parts of that are done.
        total: how many there are; None where that is not known.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> gm, updates = fxwidth.trace(net, torch.randn(2, 8)), []
        >>> plan = fxwidth.plan(fxwidth.analyze(gm), params=0.5, progress=updates.append)
        >>> updates[-1]
        ProgressUpdate(stage='choosing widths', done=1, total=1)
    """

    stage: str
    done: int
    total: int | None


Listener = Callable[[ProgressUpdate], Any]
Progress = bool | Listener
_LISTENER: ContextVar[Listener | None] = ContextVar("listener", default=None)


def tell(
    stage: str, done: int = 0, total: int | None = None, *, is_inside: bool = False, is_long: bool = False
) -> None:
    """Tell whoever listens how far the work has come.

    Args:
        stage: what is being done.
        done: how many parts of that are done.
        total: how many there are; None where that is not known.
        is_inside: whether functions of Python or torch are others just now, or ops are watched: then no code of the
            user's is called.
        is_long: whether nothing more can be told until it is done, and that is known to take a while: a log has a line
            at once.
    """
    listener = _LISTENER.get()
    if listener is None or (is_inside and not isinstance(listener, (_Bar, _Log))):
        return
    update = ProgressUpdate(stage, done, total)
    if is_long and isinstance(listener, _Log):
        listener.announce(update)
    else:
        listener(update)


def go_on() -> None:
    """Write to a log that the work goes on, if it is time: called where nothing can be counted, and all is watched."""
    listener = _LISTENER.get()
    if isinstance(listener, _Log):
        listener.go_on()


def each(items: Iterable[_Item], stage: str, part: tuple[int, int] = (0, 1)) -> Iterator[_Item]:
    """Yield items, and tell before each of them, and after the last, how many are done.

    Args:
        items: what is gone through.
        stage: what is being done.
        part: which part of the stage this is, and of how many that have as many items each.
    """
    number, parts = part
    total = len(items) * parts if isinstance(items, Sized) else None
    done = len(items) * number if isinstance(items, Sized) else 0
    for item in items:
        tell(stage, done, total)
        yield item
        done += 1
    tell(stage, done, total)


def listening(progress: Progress, work: Callable[[], _Found]) -> _Found:
    """Return what some work returns, and show meanwhile how far it has come.

    Args:
        progress: True to show it in a terminal, or in the log where there is none, False for nothing, or what takes the
            updates.
        work: what is done; an exception of the listener ends it as any other does.

    Raises:
        FxwidthError: `progress` is nothing of that.
    """
    shown: _Bar | None = None
    outer = _LISTENER.get()
    if isinstance(progress, (bool, np.bool_)):
        if not progress:
            inner: Listener = _ignored
        elif outer is not None:
            # Work within work is a part of that, whose listener has not asked for it.
            inner = _ignored
        else:
            shown = _Bar.where_seen()
            inner = shown or (_Log() if _LOGGER.isEnabledFor(logging.INFO) else _ignored)
    elif callable(progress):
        inner = _Insisting(progress)
    else:
        raise FxwidthError(f"progress={progress!r} must be True, False, or a function of a fxwidth.ProgressUpdate.")
    try:
        _LISTENER.set(inner)
        return work()
    finally:
        _LISTENER.set(outer)
        if shown is not None:
            shown.close()


def _ignored(_: ProgressUpdate) -> None:
    pass


class _Insisting:
    """A listener of the user's: once it has failed it fails at every update, so that no code on the way goes on."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._fault: BaseException | None = None

    def __call__(self, update: ProgressUpdate) -> None:
        if self._fault is not None:
            raise self._fault
        try:
            self._listener(update)
        except BaseException as fault:
            self._fault = fault
            raise


class _Log:
    """Lines in the log: one where a stage begins, if the work takes more than a second, and one every ten seconds.

    They are written by the work itself and not by a thread, as a bar is.
    """

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._written: float | None = None
        self._lines = 0
        self._stage: str | None = None
        self._last: ProgressUpdate | None = None

    def go_on(self) -> None:
        """Tell what was told last."""
        if self._last is not None:
            self(self._last)

    def __call__(self, update: ProgressUpdate) -> None:
        self._last = update
        if time.monotonic() - self._started >= _PATIENCE:
            self.announce(update)

    def announce(self, update: ProgressUpdate) -> None:
        """Write a line, if there have not been too many."""
        now = time.monotonic()
        passed = now - self._started
        since = passed if self._written is None else now - self._written
        is_new = update.stage != self._stage
        is_early = self._written is None or (is_new and since >= _PATIENCE and self._lines < _AT_FIRST + passed / _PACE)
        if not is_early and since < _PACE:
            return
        self._written, self._lines, self._stage = now, self._lines + 1, update.stage
        if update.total is not None:
            _LOGGER.info("%s: %d of %d", update.stage, update.done, update.total)
        elif update.done:
            _LOGGER.info("%s: %d", update.stage, update.done)
        else:
            _LOGGER.info("%s", update.stage)


class _Bar:
    """A bar in a terminal, from the first update after a second on, drawn by the work itself and not by a thread.

    While a network is looked at, functions of Python and torch may be others for a while, and a thread would call them.
    """

    def __init__(self, console: Any) -> None:
        self._console = console
        self._started = time.monotonic()
        self._drawn = 0.0
        self._stage = ""
        self._progress: Any = None
        self._task: Any = None

    @classmethod
    def where_seen(cls) -> _Bar | None:
        """Return a bar, if standard error is a terminal and rich is installed."""
        if sys.stderr is None or not sys.stderr.isatty():
            return None
        try:
            from rich.console import Console
        except ImportError:
            return None
        console = Console(stderr=True)
        return cls(console) if console.is_terminal and not console.is_dumb_terminal else None

    def __call__(self, update: ProgressUpdate) -> None:
        now = time.monotonic()
        is_new = update.stage != self._stage
        if now - self._started < _PATIENCE or (now - self._drawn < _INTERVAL and not is_new):
            return
        self._drawn, self._stage = now, update.stage
        if self._progress is None:
            self._progress = _columns_on(self._console)
        if is_new:
            # Of another length: a task's own cannot become unknown.
            if self._task is not None:
                self._progress.remove_task(self._task)
            self._task = self._progress.add_task(update.stage, total=update.total)
        known: dict[str, int] = {} if update.total is None else {"total": update.total}
        self._progress.update(self._task, completed=update.done, **known)
        self._progress.start()
        self._progress.refresh()

    def close(self) -> None:
        """Take the bar away."""
        if self._progress is not None:
            self._progress.stop()


def _columns_on(console: Any) -> Any:
    from rich import progress

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
    )
    return progress.Progress(*columns, console=console, auto_refresh=False, transient=True)
