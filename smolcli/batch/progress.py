"""Progress of a run: a bar on a terminal, log lines elsewhere."""

import logging
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from smolcli.batch.statistics import RunStatistics, StatisticsCollector
from smolcli.batch.status_line import waiting

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

LOG_INTERVAL_S = 10.0
BAR_INTERVAL_S = 0.1
READING = "reading prompts"  # until the first result
_WIDTH_WITH_LEFT, _WIDTH_WITH_BAR, _WIDTH_WITH_ELAPSED = 52, 60, 76  # of a terminal

logger = logging.getLogger(__name__)


class RunProgress(Protocol):
    """Shows the progress of a run to the user."""

    def waiting(self, message: str) -> AbstractContextManager[None]:
        """Show what the run is waiting for before its first result."""
        ...

    def start(self, total: int | None, statistics: StatisticsCollector) -> None:
        """Show progress towards `total` lines; None if their number is unknown."""
        ...

    def update(self) -> None:
        """Reflect the current statistics; called for each result, so it must be cheap."""
        ...

    def stop(self) -> None:
        """Stop showing progress."""
        ...

    def note(self, message: str) -> None:
        """Show one message."""
        ...

    def summary(self, statistics: RunStatistics, output: Path) -> None:
        """Show the final statistics."""
        ...


def open_progress(is_quiet: bool) -> RunProgress:
    """A bar if stderr is a terminal, otherwise the log; `is_quiet` silences the bar."""
    return BarProgress() if sys.stderr.isatty() and not is_quiet else LogProgress()


class LogProgress:
    """Logs one line every LOG_INTERVAL_S seconds while results arrive."""

    def __init__(self) -> None:
        self._statistics = StatisticsCollector()
        self._total = ""
        self._next_s = 0.0

    def waiting(self, message: str) -> AbstractContextManager[None]:
        return nullcontext()

    def start(self, total: int | None, statistics: StatisticsCollector) -> None:
        self._statistics = statistics
        self._total = "" if total is None else f" of {total:,}"
        self._next_s = time.monotonic() + LOG_INTERVAL_S

    def update(self) -> None:
        if (now := time.monotonic()) >= self._next_s:
            self._next_s = now + LOG_INTERVAL_S
            logger.info("%s", self._progress())

    def stop(self) -> None:
        pass

    def note(self, message: str) -> None:
        logger.info("%s", message)

    def summary(self, statistics: RunStatistics, output: Path) -> None:
        rows = [*statistics.rows(), ("output", str(output))]
        width = max(len(name) for name, _ in rows)
        for name, value in rows:
            logger.info("%-*s  %s", width, name, value)

    def _progress(self) -> str:
        rate = self._statistics.tokens_per_second or 0.0
        done = f"{self._statistics.num_lines:,}{self._total} lines"
        return f"{done}, {self._statistics.num_failed:,} failed, {rate:,.1f} tokens/s"


class BarProgress:
    """Draws a progress bar with rich, and a table at the end."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True)
        self._bar = new_bar(self._console)
        self._statistics = StatisticsCollector()
        self._num_resumed = 0
        self._next_s = 0.0

    def waiting(self, message: str) -> AbstractContextManager[None]:
        return waiting(message)

    def start(self, total: int | None, statistics: StatisticsCollector) -> None:
        self._statistics = statistics
        self._num_resumed = statistics.num_lines
        self._bar.add_task(READING, total=total, completed=statistics.num_lines, failed=0)
        self._bar.start()

    def update(self) -> None:
        if (now := time.monotonic()) >= self._next_s:
            self._next_s = now + BAR_INTERVAL_S
            self._redraw()

    def stop(self) -> None:
        self._redraw()
        self._bar.stop()

    def note(self, message: str) -> None:
        self._console.print(message, markup=False, highlight=False)

    def summary(self, statistics: RunStatistics, output: Path) -> None:
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        for name, value in [*statistics.rows(), ("output", str(output))]:
            table.add_row(Text(name, style="dim"), Text(value, overflow="fold"))
        self._console.print(table)

    def _redraw(self) -> None:
        rate = f"{self._statistics.tokens_per_second or 0.0:,.0f} tokens/s"
        for task_id in self._bar.task_ids:
            self._bar.update(
                task_id,
                description=rate if self._statistics.num_lines > self._num_resumed else READING,
                completed=self._statistics.num_lines,
                failed=self._statistics.num_failed,
            )


def new_bar(console: "Console") -> "Progress":
    """A bar that estimates the time left from this session's rate alone.

    It takes the space that the numbers leave; a narrow terminal has no room for everything.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Column

    columns: list[ProgressColumn] = [
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[failed]} failed"),
        TextColumn("{task.description}", markup=False),
    ]
    if console.width >= _WIDTH_WITH_ELAPSED:
        columns += [TextColumn("elapsed"), TimeElapsedColumn()]
    if console.width >= _WIDTH_WITH_LEFT:
        columns += [TextColumn("left"), TimeRemainingColumn()]
    if has_bar := console.width >= _WIDTH_WITH_BAR:
        columns.insert(0, BarColumn(None, table_column=Column(ratio=1)))
    return Progress(*columns, console=console, expand=has_bar)
