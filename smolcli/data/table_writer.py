"""A table made from a journal of results, in one step, when a run is over."""

import csv
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from smolcli.data.parquet import require_pyarrow, write_parquet
from smolcli.data.rows import delimiter, format_of
from smolcli.errors import RunError, UsageError
from smolcli.protocol.line_formats import smol_record

_BEFORE: dict[str, type] = {"chat_id": str}
_AFTER: dict[str, type] = {
    "response": str,
    "finish_reason": str,
    "prompt_tokens": int,
    "completion_tokens": int,
    "error": str,
    "error_code": str,
    "field": str,
    "line": int,
}
_INT64 = range(-(2**63), 2**63)


def check_table(table: Path, journal: Path, fields: Sequence[str], overwrite: bool) -> None:
    """Check that a table can be written in the end.

    Raises:
        UsageError: where it cannot, or would replace a file that no run made.
    """
    if taken := [name for name in fields if name in _BEFORE | _AFTER]:
        raise UsageError(f"--fields {taken[0]}: {table} has a column of that name for the result")
    if format_of(table) == ".parquet":
        require_pyarrow(table)
    if table.exists() and not journal.exists() and not overwrite:
        raise UsageError(
            f"{table} exists, and no run made it; "
            "give another --output, or --overwrite to replace it"
        )


def write_table(journal: Path, table: Path, fields: Sequence[str]) -> None:
    """Make a table of the results in a journal, unless it is newer than they are.

    Each of `fields` is a column; other metadata, and whatever else is no number and no text,
    stands as JSON in its own.

    Raises:
        RunError: where it cannot be written.
    """
    unfinished = table.with_name(f".{table.name}.tmp")
    try:
        if table.exists() and table.stat().st_mtime_ns >= journal.stat().st_mtime_ns:
            return
        types = _types(_records(journal, fields), fields)
        records = _records(journal, fields)
        if format_of(table) == ".parquet":
            write_parquet(unfinished, (_cells(record, types) for record in records), types)
        else:
            _write_csv(unfinished, records, list(types), delimiter(table))
        _sync(unfinished)
        unfinished.replace(table)
    except OSError as exc:
        raise RunError(f"cannot write {table}: {exc.strerror or exc}") from exc
    finally:
        unfinished.unlink(missing_ok=True)


def _records(journal: Path, fields: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The results with nothing nested in them that has columns of its own."""
    with journal.open("rb") as file:
        for line in file:
            record = dict(smol_record(json.loads(line)))
            record |= record.pop("usage", {}) | record.pop("timings", {})
            metadata = record.pop("metadata", {})
            record |= {name: metadata.pop(name) for name in fields if name in metadata}
            yield record | ({"metadata": metadata} if metadata else {})


def _types(records: Iterable[Mapping[str, Any]], fields: Sequence[str]) -> dict[str, type]:
    """Every column and the type that holds all of its values; JSON as text holds any."""
    found: dict[str, type | None] = {**_BEFORE, **dict.fromkeys(fields), **_AFTER}
    fixed = {*_BEFORE, *_AFTER}
    for record in records:
        for name, value in record.items():
            if name not in fixed:
                found[name] = _wider(found.get(name), value)
    return {name: type_ or str for name, type_ in found.items()}


def _wider(seen: type | None, value: object) -> type | None:
    if value is None:
        return seen
    kind = type(value) if isinstance(value, bool | int | float) else str
    if kind is int and value not in _INT64:
        kind = str
    if seen is None or seen is kind:
        return kind
    return float if {seen, kind} == {int, float} else str


def _cells(record: Mapping[str, Any], types: Mapping[str, type]) -> dict[str, Any]:
    return {
        name: _text(value) if types[name] is str and value is not None else value
        for name, value in record.items()
    }


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _write_csv(
    path: Path, records: Iterable[Mapping[str, Any]], columns: Sequence[str], delimiter: str
) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, delimiter=delimiter, lineterminator="\n")
        writer.writeheader()
        types = dict.fromkeys(columns, str)
        writer.writerows(_cells(record, types) for record in records)


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
