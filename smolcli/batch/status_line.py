"""A line on a terminal that shows what a command waits for before its first result."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

_STEPS = ("weights", "backends")  # packages whose log messages name the steps of loading a model


@contextmanager
def waiting(message: str) -> Iterator[None]:
    """Show on a terminal what a command is waiting for, and for how long.

    Log messages of smol, down to level DEBUG, replace the message, because they name the steps of
    opening a backend. Warnings are printed above it.

    Args:
        message: what is shown until the first log message.
    """
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    line = Progress(*columns, console=Console(stderr=True), transient=True)
    line.add_task(message, total=None)
    root, package = logging.getLogger(), logging.getLogger("smolcli")
    loggers = [package, *(package.getChild(name) for name in _STEPS)]
    levels = [logger.level for logger in loggers]
    handlers, root.handlers = root.handlers, [_StatusHandler(line)]
    for each in loggers:
        each.setLevel(logging.DEBUG)
    try:
        with line:
            yield
    finally:
        root.handlers = handlers
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)


class _StatusHandler(logging.Handler):
    """Shows log messages in a status line."""

    def __init__(self, line: "Progress") -> None:
        super().__init__()
        self._line = line

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if record.levelno >= logging.WARNING:
            self._line.console.print(message, markup=False, highlight=False)
        elif record.name.startswith("smolcli."):
            self._line.update(self._line.task_ids[0], description=message)
            if message.startswith("downloading"):
                self._line.stop()  # the downloader draws a bar of its own
                self._line.console.print(message, markup=False, highlight=False)
            else:
                self._line.start()
