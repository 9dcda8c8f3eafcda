"""Parquet files, by pyarrow, which is an optional extra."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

from smolcli.data.jsonl import MAX_LINE_BYTES
from smolcli.data.rows import Row
from smolcli.errors import InputError, QueryError, UsageError
from smolcli.types import ErrorCode

BATCH_ROWS = 256


def read_parquet(path: Path, choose: Callable[[Sequence[str]], list[str]]) -> Iterator[Row]:
    """Yield the rows, numbered from 1, with JSON's types; what JSON has no type for is text.

    Args:
        path: the file.
        choose: picks from the names of all columns those to read.

    Raises:
        InputError: where the file cannot be read.
        UsageError: where pyarrow is not installed.
    """
    pyarrow = _pyarrow(path)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            batches = file.iter_batches(BATCH_ROWS, columns=choose(file.schema_arrow.names))
            rows = (values for batch in batches for values in batch.to_pylist())
            for number, values in enumerate(rows, start=1):
                yield _row(number, values)
    except (pyarrow.ArrowException, ValueError, OSError) as exc:
        raise InputError(f"cannot read {path}: {exc}") from exc


def write_parquet(
    path: Path, records: Iterable[Mapping[str, Any]], types: Mapping[str, type]
) -> None:
    """Write records as the rows of a new file.

    Raises:
        UsageError: where pyarrow is not installed.
    """
    pyarrow = _pyarrow(path)
    names = {str: pyarrow.string(), int: pyarrow.int64(), float: pyarrow.float64()}
    names[bool] = pyarrow.bool_()
    schema = pyarrow.schema([(column, names[type_]) for column, type_ in types.items()])
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        for batch in _batched(records):
            writer.write_table(pyarrow.Table.from_pylist(batch, schema))


def require_pyarrow(path: Path) -> None:
    """Check that Parquet files can be read and written here.

    Raises:
        UsageError: naming the extra to install.
    """
    _pyarrow(path)


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as exc:
        raise UsageError(f"{path} needs pyarrow: pip install 'smolcli[parquet]'") from exc
    return pyarrow


def _batched(records: Iterable[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    batch = []
    for record in records:
        batch.append(record)
        if len(batch) == BATCH_ROWS:
            yield batch
            batch = []
    if batch:
        yield batch


def _row(number: int, values: dict[str, Any]) -> Row:
    try:
        values = {name: _plain(value) for name, value in values.items()}
    except UnicodeDecodeError:
        return Row(number, fault=QueryError("the row holds bytes that are not UTF-8"))
    if sum(len(value) for value in values.values() if isinstance(value, str)) > MAX_LINE_BYTES:
        message = f"the row is longer than {MAX_LINE_BYTES:,} bytes"
        return Row(number, fault=QueryError(message, ErrorCode.LINE_TOO_LONG))
    return Row(number, values)


def _plain(value: Any) -> Any:
    """A value as JSON has it; pandas writes what is missing as NaN."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case datetime() | date() | time():
            return value.isoformat()
        case Decimal() | timedelta():
            return str(value)
        case bytes():
            return value.decode()
        case dict():
            return {str(name): _plain(item) for name, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
    return value
