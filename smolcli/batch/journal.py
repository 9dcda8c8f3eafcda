"""What an output file already holds, in as far as going on from there needs it."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from heapq import merge
from pathlib import Path

from filelock import FileLock, Timeout

from smolcli.batch.queries import ChatIds
from smolcli.batch.statistics import StatisticsCollector
from smolcli.data.jsonl import replacing
from smolcli.errors import ResumeRefused, RunError, UsageError
from smolcli.protocol.line_formats import LineFormat
from smolcli.types import Result


@dataclass(frozen=True, slots=True)
class Written:
    """A whole line of an output: the result that it tells of, without its text, and its bytes."""

    result: Result
    data: bytes

    @property
    def line(self) -> int:
        """The line of the input that it answers."""
        assert self.result.line is not None
        return self.result.line


class Journal:
    """The results an output holds: whose they are, how many, and where they end.

    `num_bytes` counts the whole lines; what lies behind them is a line that a dying process tore.
    `num_failed_bytes` of them are errors.
    """

    def __init__(self) -> None:
        self.ids = ChatIds()
        self.tally = StatisticsCollector()
        self.last_line = 0  # of the input
        self.num_bytes = 0
        self.num_failed_bytes = 0
        self.failed_lines: set[int] = set()  # of the input

    def add(self, written: Written) -> None:
        """Take in one line of the output."""
        if written.result.chat_id:
            self.ids.claim(written.result.chat_id)
        self.tally.add(written.result)
        self.last_line = written.line
        self.num_bytes += len(written.data)
        if written.result.is_error:
            self.num_failed_bytes += len(written.data)
            self.failed_lines.add(written.line)


def read_journal(lines: Iterable[Written]) -> Journal:
    """Go through an output once."""
    journal = Journal()
    for written in lines:
        journal.add(written)
    return journal


def read_output(output: Path, errors: Path | None, format: LineFormat) -> Iterator[Written]:
    """The whole lines of an output, those that were split off into `errors` in their places.

    Raises:
        ResumeRefused: where a line is not a result.
    """
    if errors is None:
        return _read_lines(output, format)
    parts = (_read_lines(output, format), _read_lines(errors, format))
    return _first_of_each(merge(*parts, key=lambda written: written.line))


def split_off(output: Path, errors: Path, format: LineFormat) -> None:
    """Move the failed lines of an output to a file of their own, which goes where none failed.

    Each file is replaced in one step, `errors` first: whenever the process dies, a line is in
    one of them or in both, and doing it again completes it.
    """
    with replacing(errors) as file:
        for written in read_output(output, errors, format):
            if written.result.is_error:
                file.write(written.data)
    with replacing(output) as file:
        for written in _read_lines(output, format):
            if not written.result.is_error:
                file.write(written.data)
    if errors.stat().st_size == 0:
        errors.unlink()


def put_back(output: Path, errors: Path, format: LineFormat) -> None:
    """Undo `split_off`, but for `errors`, which stays until the next time."""
    with replacing(output) as file:
        for written in read_output(output, errors, format):
            file.write(written.data)


def is_split_off(output: Path, errors: Path, journal: Journal) -> bool:
    """Whether no failed line is left to be moved."""
    num_bytes = errors.stat().st_size if errors.exists() else 0
    if num_bytes != journal.num_failed_bytes or not output.exists():
        return False
    return output.stat().st_size == journal.num_bytes - journal.num_failed_bytes


def _first_of_each(lines: Iterable[Written]) -> Iterator[Written]:
    """One result for each line of the input; of two that of the output itself, which is newer."""
    last_line = 0
    for written in lines:
        if written.line > last_line:
            yield written
        last_line = written.line


def _read_lines(path: Path, format: LineFormat) -> Iterator[Written]:
    """The whole lines of one file, if there is one; a torn last line is left out."""
    last_line = 0
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, data in enumerate(file, start=1):
            if not data.endswith(b"\n"):
                break
            try:
                written = Written(format.read_back(json.loads(data)), data)
                if written.line <= last_line:
                    raise ValueError("line numbers must rise")
            except (ValueError, LookupError, TypeError, RecursionError) as exc:
                raise ResumeRefused(
                    f"line {number} of {path} is not a result of the run to go on with; "
                    "give another --output, or --overwrite to start anew"
                ) from exc
            last_line = written.line
            yield written


@contextmanager
def output_lock(output: Path) -> Iterator[None]:
    """Keep other runs off an output; the system lets go of it however this process ends.

    Raises:
        UsageError: where another run has it.
    """
    path = output.with_name(f".{output.name}.lock")
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout as exc:
        raise UsageError(f"another run is writing {output}") from exc
    except OSError as exc:
        raise RunError(f"cannot write beside {output}: {exc.strerror or exc}") from exc
    try:
        yield
    finally:
        with suppress(OSError):  # where an open file cannot be removed, release() does it
            path.unlink()  # while held: who waits for it sees that it is gone, and tries again
        lock.release()
