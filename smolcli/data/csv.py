"""The rows of a CSV (RFC 4180) or TSV file, one at a time."""

import csv
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from io import BufferedIOBase
from pathlib import Path

from smolcli.data.jsonl import MAX_LINE_BYTES, Line, physical_lines, without_marks
from smolcli.data.rows import Row
from smolcli.errors import InputError, QueryError, counted
from smolcli.types import ErrorCode

Cells = list[str] | QueryError


def read_csv(
    file: BufferedIOBase,
    path: Path,
    delimiter: str,
    choose: Callable[[Sequence[str]], list[str]],
) -> Generator[Row]:
    """Yield the rows below the header, numbered by the line on which they begin.

    After an invalid row, reading continues with the line after the row's first one. Empty cells are
    None. A first line such as `sep=;`, which tells Excel the delimiter, is skipped. In a
    tab-separated file, a cell that begins with a quote but is not a quoted cell is taken literally,
    because most programs that write such files never quote.

    Args:
        file: the file, in UTF-8.
        path: the file's path, for error messages.
        delimiter: separates two cells.
        choose: selects the columns to read from the names of all of them.

    Raises:
        InputError: the file or its header cannot be read.
    """
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE_BYTES))  # of the whole process
    source = _Source(physical_lines(file, path))
    rows = _rows(source, delimiter)
    header = _header(path, rows)
    columns = {name: header.index(name) for name in choose(header)}
    for number, cells in rows:
        if delimiter == "\t" and (isinstance(cells, QueryError) or len(cells) != len(header)):
            cells = source.literal_row(len(header)) or cells
        yield _row(number, cells, len(header), columns)


def _header(path: Path, rows: Iterator[tuple[int, Cells]]) -> list[str]:
    _, header = next(rows, (0, []))
    if header == ["sep=", ""]:  # tells Excel the delimiter
        _, header = next(rows, (0, []))
    if isinstance(header, QueryError):
        raise InputError(f"cannot read the header of {path}: {header}")
    if not header:
        raise InputError(f"{path} is empty; a table begins with the names of its columns")
    return header


def _row(number: int, cells: Cells, width: int, columns: Mapping[str, int]) -> Row:
    if isinstance(cells, QueryError):
        return Row(number, error=cells)
    if len(cells) != width:
        error = QueryError(
            f"the row has {counted(len(cells), 'cell')}, but the header has {width:,}"
        )
        return Row(number, error=error)
    return Row(number, {name: cells[at] or None for name, at in columns.items()})


def _rows(source: "_Source", delimiter: str) -> Iterator[tuple[int, Cells]]:
    """The number of each non-blank row, and its cells or its error."""
    reader = csv.reader(source, delimiter=delimiter, strict=True)
    while True:
        source.begin_row()
        try:
            cells = next(reader)
            "".join(cells).encode()
        except StopIteration:
            return
        except UnicodeEncodeError:
            yield source.number, QueryError("the row is not valid UTF-8; set --encoding")
        except (csv.Error, QueryError) as exc:
            number, error = source.number, _csv_error(exc)
            source.replay()
            yield number, error
        else:
            if cells:
                yield source.number, cells


def _csv_error(exc: csv.Error | QueryError) -> QueryError:
    if isinstance(exc, QueryError):
        return exc
    reasons = {
        "unexpected end of data": "unterminated quoted cell",
        "expected after": "text after the closing quote of a cell",
        "new-line character": "a carriage return outside quotes",
    }
    reason = next((own for theirs, own in reasons.items() if theirs in str(exc)), "quotes misused")
    return QueryError(f"the row is not valid CSV: {reason}")


class _Source:
    """Feeds lines to csv.reader; replays an invalid row from its second line on."""

    def __init__(self, lines: Iterator[Line]) -> None:
        self._lines = lines
        self._ahead: deque[Line] = deque()
        self._row: list[Line] = []
        self._num_bytes = 0

    @property
    def number(self) -> int:
        """The line on which the row begins."""
        return self._row[0].number

    def begin_row(self) -> None:
        self._row = []
        self._num_bytes = 0

    def replay(self) -> None:
        """Continue with the second line of the current row."""
        self._ahead.extendleft(reversed(self._row[1:]))
        del self._row[1:]

    def literal_row(self, width: int) -> list[str] | None:
        """The cells of the row's first line with literal quotes; None if their number is wrong."""
        data = self._row[0].data or b""
        try:
            cells = data.decode().rstrip("\r\n").split("\t")
        except UnicodeDecodeError:
            return None
        if len(cells) != width:
            return None
        self.replay()
        return cells

    def __iter__(self) -> "_Source":
        return self

    def __next__(self) -> str:
        line = self._ahead.popleft() if self._ahead else next(self._lines)
        if line.data is not None and not self._row:
            line = Line(line.number, without_marks(line.data))
        self._row.append(line)
        self._num_bytes += len(line.data or b"")
        if line.data is None or self._num_bytes > MAX_LINE_BYTES + 2:
            message = f"the row is longer than {MAX_LINE_BYTES:,} bytes"
            raise QueryError(message, ErrorCode.LINE_TOO_LONG)
        return line.data.decode(errors="surrogateescape")
