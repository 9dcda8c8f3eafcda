"""Reads back the results in an output, so that a run can resume, split or rewrite it."""

from array import array
from bisect import bisect_left
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from heapq import merge
from pathlib import Path

from smolcli.batch.chat_ids import ChatIds
from smolcli.batch.statistics import StatisticsCollector
from smolcli.data.compression import LONGEST_MAGIC, DecompressionError, codec_of_name
from smolcli.data.jsonl import replacing_lines
from smolcli.errors import ResumeError
from smolcli.protocol.json_text import parse_json
from smolcli.protocol.line_formats import LineFormat
from smolcli.types import Result


@dataclass(frozen=True, slots=True)
class Entry:
    """A complete line of an output: its bytes, and its result without the text."""

    result: Result
    data: bytes

    @property
    def line(self) -> int:
        """Number of the input line that it answers."""
        assert self.result.line is not None
        return self.result.line


class LineSet:
    """A compact set of line numbers, 8 bytes each, which are added in increasing order."""

    def __init__(self) -> None:
        self._lines = array("Q")

    def add(self, line: int) -> None:
        """Add a number larger than all before it."""
        self._lines.append(line)

    def __contains__(self, line: object) -> bool:
        assert isinstance(line, int)
        at = bisect_left(self._lines, line)
        return at < len(self._lines) and self._lines[at] == line

    def __len__(self) -> int:
        return len(self._lines)

    def __iter__(self) -> Iterator[int]:
        return iter(self._lines)


class Journal:
    """A summary of the entries in an output.

    `num_bytes` is the size of all complete lines; anything after them was torn by a kill.
    `num_failed_bytes` of them are errors. Line numbers are those of the input.
    """

    def __init__(self) -> None:
        self.ids = ChatIds()
        self.statistics = StatisticsCollector()
        self.last_line = 0
        self.num_bytes = 0
        self.num_failed_bytes = 0
        self.failed_lines = LineSet()

    def add(self, entry: Entry) -> None:
        """Account for one entry."""
        if entry.result.chat_id:
            self.ids.claim(entry.result.chat_id)
        self.statistics.add(entry.result)
        self.last_line = entry.line
        self.num_bytes += len(entry.data)
        if entry.result.is_error:
            self.num_failed_bytes += len(entry.data)
            self.failed_lines.add(entry.line)


def read_journal(entries: Iterable[Entry]) -> Journal:
    """Summarize the entries of an output."""
    journal = Journal()
    for entry in entries:
        journal.add(entry)
    return journal


def read_entries(output: Path, errors: Path | None, format: LineFormat) -> Iterator[Entry]:
    """Yield the entries of an output in input order, including failed ones moved to `errors`.

    A torn last line is skipped, and a missing file has no entries.

    Args:
        output: the output.
        errors: where failed lines were moved to, if anywhere.
        format: the format of the lines.

    Raises:
        ResumeError: a line is not a result of this run.
    """
    if errors is None:
        return _read_file(output, format)
    files = (_read_file(output, format), _read_file(errors, format))
    return _first_per_line(merge(*files, key=lambda entry: entry.line))


def split_errors(output: Path, errors: Path, format: LineFormat) -> None:
    """Move the failed lines of an output to a separate file, which exists only if there are any.

    Each file is replaced atomically, `errors` first. Whenever the process is killed, a failed line
    is in at least one of them, and splitting again completes the job.

    Args:
        output: the output.
        errors: where failed lines go.
        format: the format of the lines.

    Raises:
        ResumeError: a line is not a result of this run.
        RunError: a file cannot be written.
    """
    has_failed = False
    with replacing_lines(errors) as file:
        for entry in read_entries(output, errors, format):
            if entry.result.is_error:
                has_failed = True
                file.write(entry.data)
    with replacing_lines(output) as file:
        for entry in _read_file(output, format):
            if not entry.result.is_error:
                file.write(entry.data)
    if not has_failed:
        errors.unlink()


def rewrite(output: Path, errors: Path | None, format: LineFormat) -> None:
    """Write all entries to the output, with failed lines in place and without a torn line.

    Args:
        output: the output.
        errors: where failed lines were moved to, if anywhere; kept until the next split.
        format: the format of the lines.

    Raises:
        ResumeError: a line is not a result of this run.
        RunError: the output cannot be written.
    """
    with replacing_lines(output) as file:
        for entry in read_entries(output, errors, format):
            file.write(entry.data)


def is_split(output: Path, errors: Path, journal: Journal) -> bool:
    """Whether `errors` has all failed lines and the output has none.

    Args:
        output: the output.
        errors: where failed lines go.
        journal: the summary of both.
    """
    num_bytes = content_size(errors) if errors.exists() else 0
    if num_bytes != journal.num_failed_bytes or not output.exists():
        return False
    return content_size(output) == journal.num_bytes - journal.num_failed_bytes


def content_size(path: Path) -> int | None:
    """Size of a file in bytes after decompression; None if it is damaged or torn."""
    codec = codec_of_name(path)
    if codec is None:
        return path.stat().st_size
    size = 0
    try:
        with path.open("rb") as packed, codec.open(packed) as file:
            while data := file.read(1 << 20):
                size += len(data)
    except (OSError, DecompressionError):
        return None
    return size


def _first_per_line(entries: Iterable[Entry]) -> Iterator[Entry]:
    """Drop the second of two entries for one line; the output's own comes first and is newer."""
    last_line = 0
    for entry in entries:
        if entry.line > last_line:
            yield entry
        last_line = entry.line


def _read_file(path: Path, format: LineFormat) -> Iterator[Entry]:
    last_line = 0
    if not path.exists():
        return
    with closing(_complete_lines(path)) as lines:
        for number, data in enumerate(lines, start=1):
            try:
                entry = Entry(format.read_back(parse_json(data)), data)
                if entry.line <= last_line:
                    raise ValueError("line numbers must increase")
            except (ValueError, LookupError, TypeError) as exc:
                raise ResumeError(
                    f"line {number} of {path} is not a result of this run; "
                    "choose another --output, or start over with --overwrite"
                ) from exc
            last_line = entry.line
            yield entry


def _complete_lines(path: Path) -> Generator[bytes]:
    """Yield the lines of a file up to a torn one, or up to a torn compressed member.

    Raises:
        ResumeError: the file is not compressed as its name says.
    """
    codec = codec_of_name(path)
    with path.open("rb") as packed:
        head = packed.read(LONGEST_MAGIC)
        packed.seek(0)
        if codec is not None and not head.startswith(codec.magic[: len(head)]):
            raise ResumeError(
                f"{path} is not a {codec.name} file; "
                "choose another --output, or start over with --overwrite"
            )
        file = packed if codec is None else codec.open(packed)
        with suppress(*(() if codec is None else (OSError, DecompressionError))):
            for data in file:
                if not data.endswith(b"\n"):
                    return
                yield data
