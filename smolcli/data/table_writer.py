"""Writes the results of a finished run as a table, in a file or in an SQLite database."""

import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from smolcli.atomic import replacing_path
from smolcli.data.arrow import ArrowKind, require_pyarrow, write_arrow
from smolcli.data.compression import codec_of_name
from smolcli.data.detection import table_kind
from smolcli.data.sqlite import check_sqlite, write_sqlite
from smolcli.errors import UsageError, cannot_write
from smolcli.protocol.line_formats import smol_record
from smolcli.settings import ALL_FIELDS, RESULTS_TABLE
from smolcli.types import Timings

_BEFORE: dict[str, type] = {"chat_id": str}
_AFTER: dict[str, type] = {
    "response": str,
    "finish_reason": str,
    "prompt_tokens": int,
    "completion_tokens": int,
    "error": str,
    "error_code": str,
    "field": str,
    "file": str,
    "line": int,
}
_ROW_KEY = ("file", "line")
_INT64 = range(-(2**63), 2**63)
_EXACT_FLOATS = range(-(2**53), 2**53 + 1)  # beyond, a float cannot represent every integer


def journal_path(output: Path, table_name: str = RESULTS_TABLE) -> Path:
    """Where a run writes its results: next to a table, otherwise to the output itself.

    Args:
        output: the run's output.
        table_name: name of the table, if `output` is a database.

    Raises:
        UsageError: for a compressed table.
    """
    kind = table_kind(output)
    if kind is None:
        return output
    if codec_of_name(output) is not None:
        raise UsageError(
            f"{output}: compressed tables cannot be written; leave out {output.suffix}"
        )
    table = f".{quote(table_name, safe=' ')}" if kind == "sqlite" else ""
    return output.with_name(f"{output.name}{table}.jsonl")


def check_table(
    table: Path, name: str, journal: Path, fields: Sequence[str], overwrite: bool
) -> None:
    """Check that a table can be written when the run is finished.

    Args:
        table: the file to write.
        name: name of the table, if the file is a database.
        journal: the results that it is made from.
        fields: columns of the input to copy.
        overwrite: whether an existing file may be replaced.

    Raises:
        UsageError: it cannot, or would replace a file that no run has written.
    """
    if taken := [field for field in fields if field in _BEFORE | _AFTER]:
        raise UsageError(f"--fields {taken[0]}: {table} already has a result column of that name")
    kind = table_kind(table)
    if kind in ("parquet", "arrow"):
        require_pyarrow(table)
    if kind == "sqlite":
        check_sqlite(table, name, overwrite or journal.exists())
    elif table.exists() and not journal.exists() and not overwrite:
        raise UsageError(
            f"{table} exists but was not written by a run; "
            "choose another --output, or replace it with --overwrite"
        )


def write_table(
    journal: Path,
    table: Path,
    name: str,
    fields: Sequence[str],
    overwrite: bool = False,
    is_current: bool = False,
) -> None:
    """Write the results of a journal as a table, unless the table has them already.

    Each of `fields` is a column; ALL_FIELDS is all metadata. Other metadata, and every other value
    that is not a number or text, is written as JSON. A column of values of several types is text.

    Args:
        journal: the results.
        table: the file to write; a symbolic link stays one.
        name: name of the table, if the file is a database.
        fields: columns of the input to copy.
        overwrite: whether to replace a table in a database that has the results already.
        is_current: whether a table in a database was written from this journal, so that cells that
            differ have been edited since.

    Raises:
        RunError: the table cannot be written.
    """
    kind = table_kind(table)
    try:
        is_file = kind != "sqlite"
        if is_file and table.exists() and table.stat().st_mtime_ns >= journal.stat().st_mtime_ns:
            return
        if tuple(fields) == ALL_FIELDS:
            fields = _metadata_names(journal)
        types = _types(_records(journal, fields), fields)
        if kind == "sqlite":
            records = functools.partial(_typed_records, journal, fields, types)
            write_sqlite(table, name, records, types, overwrite, _ROW_KEY if is_current else None)
            return
        with replacing_path(table) as unfinished:
            if kind in ("parquet", "arrow"):
                _write_arrow(unfinished, kind, journal, fields, types)
            else:
                delimiter = "\t" if kind == "tsv" else ","
                _write_csv(unfinished, _records(journal, fields), list(types), delimiter)
    except OSError as exc:
        raise cannot_write(table, exc) from exc


def _records(journal: Path, fields: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The results, in which the members of usage and timings and the fields are top-level."""
    with journal.open("rb") as file:
        for line in file:
            record = dict(smol_record(json.loads(line)))
            record |= record.pop("usage", {}) | record.pop("timings", {})
            metadata = record.pop("metadata", {})
            record |= {name: metadata.pop(name) for name in fields if name in metadata}
            yield record | ({"metadata": metadata} if metadata else {})


def _metadata_names(journal: Path) -> list[str]:
    """The keys of all metadata, in order, except those that are columns of every table."""
    names: dict[str, None] = {}
    for record in _records(journal, ()):
        names |= dict.fromkeys(record.get("metadata", ()))
    return [name for name in names if name not in {*_BEFORE, *_AFTER, *Timings.__slots__}]


def _types(records: Iterable[Mapping[str, Any]], fields: Sequence[str]) -> dict[str, type]:
    """All columns, each with the narrowest type that fits its values; text fits any, as JSON."""
    found: dict[str, type | None] = {**_BEFORE, **dict.fromkeys(fields), **_AFTER}
    fixed, has_files = {*_BEFORE, *_AFTER}, False
    for record in records:
        has_files |= "file" in record
        for name, value in record.items():
            if name not in fixed:
                found[name] = _wider(found.get(name), value)
    if not has_files:
        del found["file"]
    return {name: int if kind is _BigInt else kind or str for name, kind in found.items()}


class _BigInt:
    """The type of a column with integers that a float cannot represent."""


def _wider(seen: type | None, value: object) -> type | None:
    if value is None:
        return seen
    kind: type = type(value) if isinstance(value, bool | int | float) else str
    if kind is int and value not in _EXACT_FLOATS:
        kind = _BigInt if value in _INT64 else str
    if seen is None or seen is kind:
        return kind
    if {seen, kind} == {int, _BigInt}:
        return _BigInt
    return float if {seen, kind} == {int, float} else str


def _cells(record: Mapping[str, Any], types: Mapping[str, type]) -> dict[str, Any]:
    return {
        name: _text(value) if types[name] is str and value is not None else value
        for name, value in record.items()
    }


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _typed_records(
    journal: Path, fields: Sequence[str], types: Mapping[str, type]
) -> Iterator[dict[str, Any]]:
    return (_cells(record, types) for record in _records(journal, fields))


def _write_arrow(
    path: Path, kind: ArrowKind, journal: Path, fields: Sequence[str], types: Mapping[str, type]
) -> None:
    """Write the results with the types of their columns, or as text if these do not fit."""
    try:
        write_arrow(path, kind, _typed_records(journal, fields, types), types)
    except (ValueError, TypeError, OverflowError):  # pyarrow's own errors derive from these
        types = dict.fromkeys(types, str)
        write_arrow(path, kind, _typed_records(journal, fields, types), types)


def _write_csv(
    path: Path, records: Iterable[Mapping[str, Any]], columns: Sequence[str], delimiter: str
) -> None:
    """Write the results, quoting every cell that any reader might otherwise misread.

    Python's csv.writer does not quote a carriage return unless it is part of the line terminator.
    """
    special = re.compile(f'[{delimiter}"\r\n]|^\\s|\\s$|^$')

    def quoted(text: str) -> str:
        return '"' + text.replace('"', '""') + '"' if special.search(text) else text

    with path.open("w", encoding="utf-8", errors="replace", newline="") as file:
        file.write(delimiter.join(map(quoted, columns)) + "\n")
        for record in records:
            values = (record.get(name) for name in columns)
            cells = ("" if value is None else quoted(_text(value)) for value in values)
            file.write(delimiter.join(cells) + "\n")
