"""The rows of a CSV or TSV file (RFC 4180), of which no more than one is in memory."""

import csv
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from smolcli.data.jsonl import MAX_LINE_BYTES, Line, physical_lines
from smolcli.data.rows import Row, delimiter
from smolcli.errors import InputError, QueryError
from smolcli.types import ErrorCode


def read_csv(path: Path, choose: Callable[[Sequence[str]], list[str]]) -> Iterator[Row]:
    """Yield the rows below the header, numbered by the physical line on which they begin.

    A row that cannot be read costs its first line alone: reading goes on with the next. Empty
    cells are None.

    Args:
        path: the file, gzipped perhaps.
        choose: picks from the names of all columns those to read.

    Raises:
        InputError: where the file or its header cannot be read.
    """
    csv.field_size_limit(MAX_LINE_BYTES)
    rows = _read(path)
    header = _header(path, rows)
    columns = {name: header.index(name) for name in choose(header)}
    for number, cells in rows:
        yield _row(number, cells, len(header), columns)


def _header(path: Path, rows: Iterator[tuple[int, list[str] | QueryError]]) -> list[str]:
    _, header = next(rows, (0, []))
    if isinstance(header, QueryError):
        raise InputError(f"cannot read the header of {path}: {header}")
    if not header:
        raise InputError(f"{path} is empty; a table begins with the names of its columns")
    if twice := {name for name in header if name and header.count(name) > 1}:
        raise InputError(f"{path} has more than one column {min(twice)!r}")
    return header


def _row(number: int, cells: list[str] | QueryError, width: int, columns: Mapping[str, int]) -> Row:
    if isinstance(cells, QueryError):
        return Row(number, fault=cells)
    if len(cells) != width:
        fault = QueryError(f"the row has {len(cells)} cells, the header {width}")
        return Row(number, fault=fault)
    return Row(number, {name: cells[at] or None for name, at in columns.items()})


def _read(path: Path) -> Iterator[tuple[int, list[str] | QueryError]]:
    """Number and cells of each row that is not blank, or what is wrong with it."""
    source = _Source(physical_lines(path))
    reader = csv.reader(source, delimiter=delimiter(path), strict=True)
    while True:
        source.begin_row()
        try:
            cells = next(reader)
            "".join(cells).encode()
        except StopIteration:
            return
        except UnicodeEncodeError:
            yield source.number, QueryError("the row is not UTF-8")
        except (csv.Error, QueryError) as exc:
            yield source.number, _fault(exc)
            source.give_back()
        else:
            if cells:
                yield source.number, cells


def _fault(exc: csv.Error | QueryError) -> QueryError:
    if isinstance(exc, QueryError):
        return exc
    return QueryError(f"the row is not valid CSV: {exc}; is there a quote too many?")


class _Source:
    """Gives csv.reader the lines of a file, and those of a bad row again but for the first."""

    def __init__(self, lines: Iterator[Line]) -> None:
        self._lines = lines
        self._ahead: deque[Line] = deque()
        self._row: list[Line] = []
        self._num_bytes = 0

    @property
    def number(self) -> int:
        """The physical line on which the row begins."""
        return self._row[0].number

    def begin_row(self) -> None:
        self._row = []
        self._num_bytes = 0

    def give_back(self) -> None:
        self._ahead.extendleft(reversed(self._row[1:]))

    def __iter__(self) -> "_Source":
        return self

    def __next__(self) -> str:
        line = self._ahead.popleft() if self._ahead else next(self._lines)
        self._row.append(line)
        self._num_bytes += len(line.data or b"")
        if line.data is None or self._num_bytes > MAX_LINE_BYTES:
            message = f"the row is longer than {MAX_LINE_BYTES:,} bytes"
            raise QueryError(message, ErrorCode.LINE_TOO_LONG)
        return line.data.decode(errors="surrogateescape") + "\n"
