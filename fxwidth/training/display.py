"""What the terminal shows during a training run: progress and a live table of widths."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from fxwidth.training.runs import EpochRecord, TrainingObserver

_ROWS = 14  # of the table of widths; what is left is summed up in one row
_BAR = 24  # characters


class LiveDisplay(TrainingObserver):
    """Shows a training run on a console; to be used as a context manager."""

    def __init__(self, console: Console) -> None:
        self.console = console
        columns = (
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("step {task.fields[step]}, loss {task.fields[loss]}, accuracy {task.fields[accuracy]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self.progress = Progress(*columns, console=console)
        self.task = self.progress.add_task("training", total=1.0, step=0, loss="-", accuracy="-")
        self.before: dict[str, int] = {}
        self.now: dict[str, int] = {}
        self.params = 0
        self.reason = ""
        # Output that is no terminal gets the final state only, and one line an epoch.
        self.live = Live(get_renderable=self._render, console=console, refresh_per_second=4)

    def __enter__(self) -> LiveDisplay:
        self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.live.stop()
        if not self.console.is_terminal:
            self.console.line()  # after its last frame the display leaves the line open

    def on_start(self, before: Mapping[str, int], now: Mapping[str, int], params: int) -> None:
        """Show the widths and parameters before the first step."""
        self.before, self.now, self.params = dict(before), dict(now), params

    def on_step(self, step: int, progress: float) -> None:
        """Move the progress bar."""
        self.progress.update(self.task, completed=progress, step=step)

    def on_loss(self, step: int, loss: float) -> None:  # noqa: ARG002
        """Show the training loss."""
        self.progress.update(self.task, loss=f"{loss:.4f}")

    def on_resize(self, step: int, widths: Mapping[str, int], params: int, reason: str) -> None:
        """Show the new widths and why they are new, and a line for each resize."""
        self.now, self.params, self.reason = dict(widths), params, reason
        self.console.print(f"step {step}: {reason}: {params:,} parameters", highlight=False, soft_wrap=True)

    def on_epoch(self, record: EpochRecord) -> None:
        """Print a line for each epoch."""
        self.progress.update(self.task, accuracy=f"{100 * record.test_accuracy:.2f} %")
        self.console.print(
            f"epoch {record.epoch}: loss {record.train_loss:.4f} (test {record.test_loss:.4f}), "
            f"accuracy {100 * record.test_accuracy:.2f} %, {record.params:,} parameters, {record.seconds:.0f} s",
            highlight=False,
            soft_wrap=True,
        )

    def _render(self) -> Group:
        return Group(self._table(), self.progress)

    def _table(self) -> Table:
        title = f"{self.params:,} parameters" + (f", {self.reason}" if self.reason else "")
        table = Table(title=title, title_justify="left", title_style="bold")
        table.add_column("channel group", overflow="fold")
        table.add_column("before", justify="right")
        table.add_column("now", justify="right")
        table.add_column("part left", width=_BAR)
        widest = sorted(self.before, key=lambda group: -self.before[group])
        shown = [group for group in self.before if group in set(widest[:_ROWS])]
        for group in shown:
            self._add_row(table, group, self.before[group], self.now.get(group))
        if rest := widest[_ROWS:]:
            before, now = (sum(widths.get(group, 0) for group in rest) for widths in (self.before, self.now))
            self._add_row(table, f"({len(rest)} more groups)", before, now)
        return table

    @staticmethod
    def _add_row(table: Table, name: str, before: int, now: int | None) -> None:
        if now is None:  # the group became one with another
            table.add_row(Text(name), str(before), "-", "")
            return
        filled = max(1, round(_BAR * min(1.0, now / before)))
        table.add_row(Text(name), str(before), str(now), Text("█" * filled, style="green"))
