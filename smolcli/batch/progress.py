"""How far a run is: a bar on a terminal, a line in a log now and then elsewhere."""

import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from smolcli.batch.statistics import RunStatistics, StatisticsCollector

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

LOG_INTERVAL_S = 10.0
BAR_INTERVAL_S = 0.1

logger = logging.getLogger(__name__)


class RunProgress(Protocol):
    """What a run tells of itself."""

    def start(self, total: int | None, tally: StatisticsCollector) -> None:
        """Begin to show progress towards `total` lines, where their number is known."""
        ...

    def update(self) -> None:
        """The tally has grown; called for each result, so it must cost next to nothing."""
        ...

    def stop(self) -> None:
        """Show no more progress."""
        ...

    def note(self, message: str) -> None:
        """Say one sentence."""
        ...

    def summary(self, report: RunStatistics, output: Path) -> None:
        """Tell how a run ended."""
        ...


def open_progress(is_quiet: bool) -> RunProgress:
    """A bar where stderr is a terminal, else a log, which `is_quiet` keeps to errors."""
    return BarProgress() if sys.stderr.isatty() and not is_quiet else LogProgress()


class LogProgress:
    """Writes to the log, every ten seconds while there is progress."""

    def __init__(self) -> None:
        self._tally = StatisticsCollector()
        self._total = ""
        self._next_s = 0.0

    def start(self, total: int | None, tally: StatisticsCollector) -> None:
        self._tally = tally
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

    def summary(self, report: RunStatistics, output: Path) -> None:
        rows = [*report.rows(), ("output", str(output))]
        width = max(len(name) for name, _ in rows)
        for name, value in rows:
            logger.info("%-*s  %s", width, name, value)

    def _progress(self) -> str:
        tally = self._tally
        rate = tally.tokens_per_second or 0.0
        done = f"{tally.num_lines:,}{self._total} lines"
        return f"{done}, {tally.num_failed:,} failed, {rate:,.1f} tokens/s"


class BarProgress:
    """Draws a progress bar, and at the end a table, with rich."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True)
        self._bar = _new_bar(self._console)
        self._tally = StatisticsCollector()
        self._next_s = 0.0

    def start(self, total: int | None, tally: StatisticsCollector) -> None:
        self._tally = tally
        self._bar.add_task("", total=total, completed=tally.num_lines, failed=0, rate=0.0)
        self._bar.start()

    def update(self) -> None:
        if (now := time.monotonic()) >= self._next_s:
            self._next_s = now + BAR_INTERVAL_S
            self._show()

    def stop(self) -> None:
        self._show()
        self._bar.stop()

    def note(self, message: str) -> None:
        self._console.print(message, markup=False, highlight=False)

    def summary(self, report: RunStatistics, output: Path) -> None:
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        for name, value in [*report.rows(), ("output", str(output))]:
            table.add_row(Text(name, style="dim"), Text(value, overflow="fold"))
        self._console.print(table)

    def _show(self) -> None:
        tally = self._tally
        for task_id in self._bar.task_ids:
            self._bar.update(
                task_id,
                completed=tally.num_lines,
                failed=tally.num_failed,
                rate=tally.tokens_per_second or 0.0,
            )


def _new_bar(console: "Console") -> "Progress":
    """A bar whose time left rests on this session's pace, not on what was there before."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[failed]} failed"),
        TextColumn("{task.fields[rate]:,.0f} tokens/s"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )
