"""Reads the rows of any input as query fields."""

import io
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from smolcli.data.arrow import read_arrow
from smolcli.data.compression import LONGEST_MAGIC, codec_of_bytes, read_some
from smolcli.data.csv import read_csv
from smolcli.data.detection import (
    TEXT_COLUMN,
    Kind,
    Sample,
    detect_kind,
    guess_delimiter,
    kind_of_name,
    reject_unsupported,
)
from smolcli.data.json_values import json_values
from smolcli.data.jsonl import MAX_LINE_BYTES, Line, is_stream, nonblank_lines
from smolcli.data.partitions import partition_columns, with_columns
from smolcli.data.row_mapper import RowMapper, named_columns
from smolcli.data.rows import Row
from smolcli.data.source import READ_ERRORS, Prefixed, open_source
from smolcli.data.sqlite import read_sqlite
from smolcli.errors import InputError, QueryError, UsageError, error_reason
from smolcli.protocol.json_text import load_json
from smolcli.settings import RowSettings
from smolcli.types import ErrorCode

# Kinds that a library opens by the path of the file.
BY_PATH: dict[Kind, str] = {
    "parquet": "Parquet",
    "arrow": "Arrow",
    "sqlite": "an SQLite database",
}


@dataclass(frozen=True, slots=True)
class _Input:
    """An open input whose kind is known; one in BY_PATH is opened by its path."""

    path: Path
    kind: Kind
    file: BufferedIOBase
    delimiter: str = ","

    def lines(self) -> Iterator[Line]:
        """The JSON text of each row."""
        read = json_values if self.kind == "json" else nonblank_lines
        return read(self.file, self.path)


class _CarriageReturns(io.RawIOBase):
    """Converts carriage returns to line feeds, for files of old Macs and some spreadsheets."""

    def __init__(self, file: BufferedIOBase) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = read_some(self._file, len(buffer)).replace(b"\r", b"\n")
        buffer[: len(data)] = data
        return len(data)


def read_rows(
    path: Path, settings: RowSettings, after: int = 0, id_prefix: str = "", name: str = ""
) -> Iterator[Row]:
    """Yield the rows of an input as query fields.

    Args:
        path: the file, or `-` for stdin.
        settings: how it is read, and how rows become queries.
        after: skip rows up to this number.
        id_prefix: prefix for ids that are made from row numbers.
        name: path or URL whose directories may be partitions; see `partition_columns`.

    Raises:
        UsageError: the format is not supported, or the input lacks a column that `settings`
            name.
        InputError: the input cannot be read to its end.
    """
    with _open(path, settings) as source:
        if source.kind != "sqlite" and (settings.query or settings.table) is not None:
            option = "--table" if settings.query is None else "--query"
            raise UsageError(f"{option} needs an SQLite database, which {path} is not")
        partitions = partition_columns(name, settings)
        if source.kind == "text":
            settings = replace(settings, prompt=settings.prompt or f"{{{TEXT_COLUMN}}}")
        mapper = RowMapper(settings, id_prefix)
        if source.kind in ("jsonl", "json", "text"):
            load = _prompt_row if source.kind == "text" else load_row
            rows = (load(line) for line in source.lines() if line.number > after)
            if not settings.maps_rows:
                yield from rows
                return
            yield from (mapper.query(with_columns(row, partitions)) for row in rows)
            return

        added: dict[str, str | None] = {}

        def choose(header: Sequence[str]) -> list[str]:
            others = [column for column in partitions if column not in header]
            chosen = mapper.choose([*header, *others])
            added.update((column, partitions[column]) for column in others if column in chosen)
            return [column for column in chosen if column not in added]

        try:
            with closing(_read_table(source, settings, choose)) as table:
                rows = (row for row in table if row.number > after)
                yield from (mapper.query_of_cells(with_columns(row, added)) for row in rows)
        except UsageError as exc:
            raise UsageError(f"{path}: {exc}") from exc


def _read_table(
    source: _Input, settings: RowSettings, choose: Callable[[Sequence[str]], list[str]]
) -> Generator[Row]:
    match source.kind:
        case "parquet" | "arrow":
            return read_arrow(source.path, source.kind, choose)
        case "sqlite":
            return read_sqlite(source.path, settings.query, settings.table, choose)
    return read_csv(source.file, source.path, source.delimiter, choose)


def row_numbers(path: Path, settings: RowSettings, name: str = "") -> Iterator[int]:
    """The numbers of the rows that `read_rows` yields; JSON is not parsed for them."""
    with _open(path, settings) as source:
        if source.kind in ("jsonl", "json", "text"):
            yield from (line.number for line in source.lines())
            return
    yield from (row.number for row in read_rows(path, settings, name=name))


def load_row(line: Line) -> Row:
    """The JSON value of a line or, if it is invalid, its bytes and the error."""
    try:
        if line.data is None:
            raise _too_long()
        return Row(line.number, load_json(line.data))
    except QueryError as exc:
        return Row(line.number, line.data, exc)


def _prompt_row(line: Line) -> Row:
    """A line of plain text, as the column `text`."""
    if line.data is None:
        return Row(line.number, error=_too_long())
    try:
        return Row(line.number, {TEXT_COLUMN: line.data.decode()})
    except UnicodeDecodeError:
        return Row(line.number, error=QueryError("the line is not valid UTF-8; set --encoding"))


def _too_long() -> QueryError:
    message = f"the line is longer than {MAX_LINE_BYTES:,} bytes"
    return QueryError(message, ErrorCode.LINE_TOO_LONG)


@contextmanager
def _open(path: Path, settings: RowSettings) -> Iterator[_Input]:
    """Open an input and detect its kind.

    Raises:
        UsageError: its format is not supported.
        InputError: it cannot be opened.
    """
    kind = kind_of_name(path, settings.input_format)
    if kind in BY_PATH and not is_stream(path):
        _reject_compressed(path, BY_PATH[kind])
        yield _Input(path, kind, io.BytesIO())
        return
    with open_source(path, settings.encoding) as file:
        sample = Sample(file)
        try:
            columns = named_columns(settings)
            kind = kind or detect_kind(sample, path, settings.input_format, columns)
            if kind in ("csv", "tsv"):
                next(sample.lines(), None)
                delimiter = settings.delimiter or _delimiter(kind, sample)
                reject_unsupported(sample.head, path)
            else:
                delimiter = ""
        except READ_ERRORS as exc:
            raise InputError(f"cannot read {path}: {error_reason(exc)}") from exc
        if kind in BY_PATH and is_stream(path):
            raise UsageError(f"{path}: {BY_PATH[kind]} cannot be read from a pipe; pass a file")
        rest: BufferedIOBase = io.BufferedReader(Prefixed(sample.head, file))
        if kind in ("csv", "tsv") and b"\r" in sample.head and b"\n" not in sample.head:
            rest = io.BufferedReader(_CarriageReturns(rest))
        yield _Input(path, kind, rest, delimiter)


def _reject_compressed(path: Path, name: str) -> None:
    """Reject a file that is opened by its path, if it is compressed as a whole.

    Raises:
        UsageError: it is.
    """
    with suppress(OSError), path.open("rb") as file:  # its reader reports errors
        if codec := codec_of_bytes(file.read(LONGEST_MAGIC)):
            raise UsageError(
                f"{path} is compressed with {codec.name}; decompress it first: smol reads "
                f"compressed text, but not {name} that is compressed as a whole"
            )


def _delimiter(kind: Kind, sample: Sample) -> str:
    return "\t" if kind == "tsv" else guess_delimiter(sample)
