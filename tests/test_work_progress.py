"""How far long work has come is told in order, shown in terminals alone, and may end the work with nothing changed."""

from __future__ import annotations

import ast
import copy
import io
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn
from torch.nn import functional as F

import fxwidth
from fxwidth import FxwidthError, ProgressUpdate, work_progress
from fxwidth.statistics import data_impressions
from fxwidth.statistics.remembered_noise import forget_noise
from fxwidth.statistics.synthetic_inputs import noise_draws
from fxwidth.work_progress import each, listening, tell
from tests.oracles.interruptions import differences, state_of
from tests.zoo.nets import conv, images, trained_like

PACKAGE = Path(fxwidth.__file__).parent


def traced() -> fx.GraphModule:
    torch.manual_seed(0)
    return fxwidth.trace(trained_like(conv()), images(4))


@cache
def plain() -> tuple[nn.Module, torch.Tensor]:
    """Return a model that is no graph, and its inputs; the same each time, since they are made by random numbers."""
    return trained_like(conv()), images(4)


def labelled() -> Any:
    return [(images(16), torch.arange(16) % 3)] * 2


# The long work, on a graph, and what it goes through.
WORK: dict[str, tuple[Callable[[fxwidth.WidthGraph, Any], Any], set[str]]] = {
    "trace": (
        lambda graph, progress: fxwidth.trace(*plain(), progress=progress),
        {"tracing by torch.fx.symbolic_trace", "analysing"},
    ),
    "analyze": (
        lambda graph, progress: fxwidth.analyze(graph.analysis.module, progress=progress),
        {"analysing"},
    ),
    "plan": (
        lambda graph, progress: fxwidth.plan(graph, params=0.6, progress=progress),
        {"drawing inputs", "running noise", "weighing groups", "choosing widths"},
    ),
    "plan with a loss": (
        lambda graph, progress: fxwidth.plan(
            graph, params=0.6, data=labelled(), loss=F.cross_entropy, progress=progress
        ),
        {"running data", "weighing groups", "probing the loss", "choosing widths"},
    ),
    "thresholds": (
        lambda graph, progress: fxwidth.plan(graph, progress=progress),
        {"looking at spectra"},
    ),
    "frontier": (
        lambda graph, progress: fxwidth.frontier(graph, params=[0.8, 0.6], evaluate=lambda _: 0.0, progress=progress),
        {"drawing inputs", "running noise", "weighing groups", "choosing widths", "measuring"},
    ),
    "spectrum": (
        lambda graph, progress: fxwidth.spectrum(graph, progress=progress),
        {"drawing inputs", "running noise", "weighing groups"},
    ),
    "page": (
        lambda graph, progress: fxwidth.report(graph.analysis.module).to_html(os.devnull, progress=progress),
        {"looking at spectra"},
    ),
    "resize": (
        lambda graph, progress: fxwidth.resize(graph.analysis.module, {"0": 3}, data=labelled(), progress=progress),
        {
            "running data",
            "choosing channels",
            "refitting readers",
            "computing new tensors",
            "recalibrating batch norms",
        },
    ),
    "evolve": (
        lambda graph, progress: fxwidth.evolve(graph.analysis.module, params=0.6, data=labelled(), progress=progress),
        {"analysing", "running data", "weighing groups", "choosing widths", "computing new tensors"},
    ),
}


@pytest.mark.parametrize("name", WORK)
def test_stages_are_told_in_order(name: str) -> None:
    run, stages = WORK[name]
    updates: list[ProgressUpdate] = []
    run(fxwidth.analyze(traced()), updates.append)
    assert stages <= {update.stage for update in updates}
    # What is drawn in several batches is counted over all of them.
    drawn = [update for update in updates if update.stage == "drawing inputs"]
    assert [update.done for update in drawn] == sorted(update.done for update in drawn)
    assert len({update.total for update in drawn}) <= 1
    by_stage: dict[str, list[ProgressUpdate]] = {}
    for update in updates:
        by_stage.setdefault(update.stage, []).append(update)
    for told in by_stage.values():
        counted = [update for update in told if update.total is not None]
        assert all(0 <= update.done <= (update.total or 0) for update in counted)
        # A stage that begins ends.
        assert not counted or counted[-1].done == counted[-1].total


@pytest.mark.parametrize("name", WORK)
def test_an_exception_of_the_listener_leaves_all_as_it_was(name: str) -> None:
    run, _ = WORK[name]
    gm = traced()
    updates: list[ProgressUpdate] = []
    run(fxwidth.analyze(copy.deepcopy(gm)), updates.append)
    graph = fxwidth.analyze(gm)
    before = state_of(gm)
    # Each stage's first and last, and some between.
    places = [i for i in range(len(updates)) if i % 7 == 0 or updates[i].stage != updates[i - 1].stage]
    for place in {*places, len(updates) - 1}:
        seen: list[ProgressUpdate] = []

        def failing(update: ProgressUpdate, seen: Any = seen, place: int = place) -> None:
            if len(seen) == place:
                raise ZeroDivisionError(update.stage)
            seen.append(update)

        # Known of an earlier try, the noise would be passed over.
        forget_noise(gm)
        with pytest.raises(ZeroDivisionError):
            run(graph, failing)
        # A page is of a new analysis, which notes the axes anew.
        allowed = ["0:.meta"] if name in ("page", "analyze") else []
        assert differences(before, state_of(gm)) in ([], allowed), updates[place]
    # The graph is as good as before.
    run(graph, False)


def test_no_code_on_the_way_takes_the_listener_s_exception_for_its_own() -> None:
    def work() -> int:
        for _ in each(range(2), "trying"):
            pass
        return 1

    def failing(_: ProgressUpdate) -> None:
        raise ValueError("of the listener")

    def swallowing() -> int:
        try:
            return work()
        except ValueError:
            return work()

    with pytest.raises(ValueError, match="of the listener"):
        listening(failing, swallowing)


def test_an_unknown_length_is_told_as_such() -> None:
    updates: list[ProgressUpdate] = []
    assert listening(updates.append, lambda: list(each(iter("ab"), "reading"))) == ["a", "b"]
    assert updates == [ProgressUpdate("reading", done, None) for done in range(3)]


@pytest.mark.parametrize("moving", [True, False, "without gradient"])
def test_inputs_are_counted_over_all_batches(moving: bool | str, monkeypatch: pytest.MonkeyPatch) -> None:
    analysis = fxwidth.analyze(traced()).analysis
    draw = next(iter(noise_draws(analysis, [], 0, 1e6)))
    draws = [replace(draw, movable=bool(moving))] * 3
    if moving == "without gradient":
        monkeypatch.setattr(data_impressions, "_gradients", lambda *_: None)
    updates: list[ProgressUpdate] = []
    listening(updates.append, lambda: list(data_impressions.impressions(analysis, draws, 1e12, 0)))
    counts = list(dict.fromkeys((update.done, update.total) for update in updates))
    last = 15 if moving else 3
    assert counts == [(done, last) for done in range(last + 1)]
    assert {update.stage for update in updates} == {"drawing inputs"}


def test_work_within_work_is_told_to_its_own_listener_alone() -> None:
    outer: list[ProgressUpdate] = []
    inner: list[ProgressUpdate] = []

    def work() -> None:
        tell("outer")
        listening(True, lambda: tell("shown"))
        listening(False, lambda: tell("silent"))
        listening(inner.append, lambda: tell("inner"))
        tell("outer again")

    listening(outer.append, work)
    assert [update.stage for update in outer] == ["outer", "outer again"]
    assert [update.stage for update in inner] == ["inner"]
    tell("nobody listens")
    assert len(outer) == 2


@pytest.mark.parametrize("progress", [None, "yes", 1, 0.5])
def test_other_values_are_refused(progress: Any) -> None:
    with pytest.raises(FxwidthError, match=r"progress=.* must be True, False, or a function of a fxwidth\.Prog"):
        fxwidth.plan(fxwidth.analyze(traced()), progress=progress)
    assert listening(np.bool_(False), lambda: 1) == 1


class Terminal(io.StringIO):
    """What is written to a terminal."""

    is_seen = True

    def isatty(self) -> bool:
        return self.is_seen

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """Be no terminal for a while."""
        self.is_seen = False
        yield
        self.is_seen = True


def _terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Have standard error be a terminal; in the test itself, since pytest puts its own there when that begins."""
    pytest.importorskip("rich")
    found = Terminal()
    monkeypatch.setattr(sys, "stderr", found)
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    return found


def _clock(monkeypatch: pytest.MonkeyPatch, step: float) -> None:
    """Have every look at the clock be so many seconds after the last."""
    seconds = iter(i * step for i in range(10**6))
    monkeypatch.setattr(work_progress.time, "monotonic", lambda: next(seconds))


def test_a_terminal_shows_what_takes_longer_than_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _terminal(monkeypatch)
    _clock(monkeypatch, 0.4)
    before = sys.stderr
    with terminal.unseen():
        gm = traced()
    fxwidth.evolve(gm, params=0.6)
    assert "choosing widths" in terminal.getvalue()
    assert sys.stderr is before
    assert terminal.getvalue().count("\x1b[?25h") == terminal.getvalue().count("\x1b[?25l") == 1  # the cursor is back


def test_a_bar_is_taken_away_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _terminal(monkeypatch)
    _clock(monkeypatch, 0.7)

    def failing(_: Any, __: Any) -> Any:
        raise ZeroDivisionError

    with terminal.unseen():
        graph = fxwidth.analyze(traced())
    with pytest.raises(FxwidthError):
        fxwidth.plan(graph, params=0.6, data=labelled(), loss=failing)
    assert terminal.getvalue().count("\x1b[?25h") == terminal.getvalue().count("\x1b[?25l") == 1
    assert sys.stderr is terminal


@pytest.mark.parametrize("case", ["quick", "off", "no terminal", "without rich", "listener"])
def test_nothing_is_shown_otherwise(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _terminal(monkeypatch)
    progress: Any = {"off": False, "listener": lambda _: None}.get(case, True)
    if case != "quick":
        _clock(monkeypatch, 0.7)
    if case == "no terminal":
        monkeypatch.setattr(terminal, "isatty", lambda: False)
    if case == "without rich":
        monkeypatch.setitem(sys.modules, "rich.console", None)
    listening(progress, lambda: list(each(range(50), "counting")))
    assert terminal.getvalue() == ""


def test_messages_go_to_the_logger(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    with caplog.at_level(logging.INFO, logger="fxwidth"):
        gm = fxwidth.evolve(traced(), params=0.6)
    texts = [record.getMessage() for record in caplog.records]
    assert all(record.name.startswith("fxwidth.") for record in caplog.records)
    before, after = fxwidth.report(gm).resizes[0]["parameters"]
    count = len(fxwidth.report(gm).resizes[0]["widths"])
    assert texts == [
        f"planned new widths for {count} groups: {before} -> {after} parameters",
        f"resized {count} groups: {before} -> {after} parameters",
    ]
    assert capfd.readouterr() == ("", "")


class Clock:
    """Seconds that pass only where a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(work_progress.time, "monotonic", lambda: self.now)


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what is logged of progress."""
    return [record.getMessage() for record in caplog.records if record.name == "fxwidth.work_progress"]


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO, logger="fxwidth"):
        yield caplog


def test_a_log_has_a_line_for_each_long_stage_and_one_in_ten_seconds(
    logged: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)

    def work() -> None:
        tell("short")
        clock.now = 0.9
        tell("short too")
        clock.now = 2.0
        for _ in each(range(30), "counted"):
            clock.now += 1
        clock.now += 1
        tell("the next one", 7)

    listening(True, work)
    assert lines(logged) == [
        "counted: 0 of 30",
        "counted: 10 of 30",
        "counted: 20 of 30",
        "counted: 30 of 30",
        "the next one: 7",
    ]
    assert {record.levelno for record in logged.records} == {logging.INFO}


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.floats(0, 5), st.booleans()), max_size=60))
def test_a_log_is_never_flooded_and_never_silent_for_long(told: list[tuple[str, float, bool]]) -> None:
    written: list[tuple[float, str]] = []
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock(patch)
        patch.setattr(work_progress._LOGGER, "info", lambda _, stage, *__: written.append((clock.now, stage)))
        log = work_progress._Log()
        for stage, passed, is_long in told:
            clock.now += passed
            (log.announce if is_long else log)(ProgressUpdate(stage, 0, None))
            if clock.now >= 1:
                assert written
                # The last line is no older than ten seconds where there is anything to tell of.
                assert clock.now - written[-1][0] < 10
    for place, (when, stage) in enumerate(written):
        assert place <= 3 + when / 10
        if place:
            before, other = written[place - 1]
            assert when - before >= (10 if stage == other else 1)


def test_off_a_terminal_long_calls_are_logged_and_nothing_is_printed(
    logged: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    _clock(monkeypatch, 0.4)
    gm = fxwidth.trace(trained_like(conv()), images(4))
    fxwidth.analyze(gm)
    plan = fxwidth.plan(fxwidth.analyze(gm), params=0.6)
    fxwidth.resize(gm, plan)
    found = lines(logged)
    for stage in ("tracing by torch.fx.symbolic_trace", "analysing: ", "drawing inputs: ", "choosing channels: "):
        assert any(line.startswith(stage) for line in found), stage
    logged.clear()
    fxwidth.evolve(trained_like(conv()), images(4), params=0.6)
    assert len(lines(logged)) > 3
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("case", ["quick", "off", "terminal", "listener", "not asked for", "work within work"])
def test_nothing_is_logged_otherwise(
    case: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    if case == "terminal":
        _terminal(monkeypatch)
    if case != "quick":
        _clock(monkeypatch, 0.7)
    progress: Any = {"off": False, "listener": lambda _: None}.get(case, True)
    work: Callable[[], Any] = lambda: list(each(range(50), "counting"))  # noqa: E731
    if case == "work within work":
        inner, progress = work, False
        work = lambda: listening(True, inner)  # noqa: E731
    with caplog.at_level(logging.WARNING if case == "not asked for" else logging.INFO, logger="fxwidth"):
        listening(progress, work)
    assert lines(caplog) == []


class Iterating(nn.Module):
    """A network that torch.fx cannot trace by itself."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 6), nn.Sequential(*(nn.Linear(6, 6) for _ in range(depth)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.stack([row.relu() for row in self.a(x).unbind(1)], 1))


def test_what_can_tell_nothing_on_its_way_is_logged_when_it_begins(
    logged: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    Clock(monkeypatch)
    fxwidth.trace(Iterating(3), torch.randn(2, 8))
    assert lines(logged) == [], "that is quick"
    fxwidth.trace(Iterating(50), torch.randn(2, 8))
    assert lines(logged) == ["tracing by torch.export"]


def test_a_trace_is_logged_while_it_goes_on(logged: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    _clock(monkeypatch, 0.4)
    fxwidth.trace(nn.Sequential(*(nn.Linear(8, 8) for _ in range(8))), torch.randn(2, 8))
    # By the first look at the clock after a second, which a layer takes that is gone through.
    assert lines(logged)[0] == "tracing by torch.fx.symbolic_trace"


def test_an_analysis_calls_no_listener_of_the_user_s_on_its_way() -> None:
    updates: list[ProgressUpdate] = []
    fxwidth.analyze(traced(), progress=updates.append)
    assert updates == [ProgressUpdate("analysing", 0, None)]


def test_without_handlers_nothing_is_written(capfd: pytest.CaptureFixture[str]) -> None:
    logging.getLogger("fxwidth.some_module").warning("of nobody's interest")
    assert any(isinstance(handler, logging.NullHandler) for handler in logging.getLogger("fxwidth").handlers)


# Commands and training runs write to a terminal; a bar is drawn there too.
_WRITING = ("commands", "training")


def writes_in(text: str) -> list[int]:
    """Return the lines of code that print, or write to the standard streams."""
    found = []
    for node in ast.walk(ast.parse(text)):
        is_print = (
            isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("print", "pprint")
        )
        is_stream = (
            isinstance(node, ast.Attribute)
            and node.attr in ("write", "writelines")
            and isinstance(node.value, ast.Attribute)
            and node.value.attr in ("stdout", "stderr", "__stdout__", "__stderr__")
        )
        if is_print or is_stream:
            found.append(node.lineno)
    return found


def test_nothing_in_the_library_prints() -> None:
    files = [path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] not in _WRITING]
    assert len(files) > 200
    found = {str(path.relative_to(PACKAGE)): lines for path in files if (lines := writes_in(path.read_text("utf-8")))}
    assert not found
    planted = ["print('x')", "import sys\nsys.stderr.write('x')", "f = lambda: print()"]
    assert [writes_in(text) for text in planted] == [[1], [2], [1]]


def test_every_warning_says_what_to_do() -> None:
    """Warnings end in what helps: a sentence with a verb in the imperative, as `Trace`, `load` or `compare`."""
    remedies = ("trace the model", "compare an output", "load it with", "ask for less", "pass data=")
    texts = [
        "".join(part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str))
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "warn"
    ]
    assert len(texts) >= 4
    told = [text for text in texts if not any(remedy in text.lower() for remedy in remedies)]
    # This one tells that nothing is amiss.
    assert [text for text in told if "both gave the same" not in text] == []
