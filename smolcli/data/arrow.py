"""Parquet and Arrow (Feather) files, through pyarrow, an optional dependency."""

import json
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Literal
from uuid import UUID

from smolcli.data.rows import Row, row_of_values
from smolcli.errors import InputError, QueryError, UsageError, error_reason
from smolcli.protocol.json_text import parse_json

ArrowKind = Literal["parquet", "arrow"]

ARROW_MAGIC = b"ARROW1"  # of the file format; a stream begins with its first message
BATCH_ROWS = 256

_NAMES: dict[ArrowKind, str] = {"parquet": "Parquet", "arrow": "Arrow"}
_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_DAY_S = 86_400


def read_arrow(
    path: Path, kind: ArrowKind, choose: Callable[[Sequence[str]], list[str]]
) -> Generator[Row]:
    """Yield the rows, numbered from 1, with their values as JSON values (see `arrow_to_json`).

    Args:
        path: the file: Parquet, or Arrow's file or stream format.
        kind: whether it is Parquet or Arrow.
        choose: selects the columns to read from the names of all of them.

    Raises:
        InputError: the file cannot be read.
        UsageError: pyarrow is not installed.
    """
    pyarrow = _pyarrow(path)
    read = _parquet_batches if kind == "parquet" else _arrow_batches
    number = 0
    try:
        path.open("rb").close()  # pyarrow's error for a missing file is its own
        for chosen, batch in read(path, pyarrow, choose):
            names = batch.schema.names
            columns = {name: arrow_to_json(batch.column(names.index(name))) for name in chosen}
            for index in range(len(batch)):
                number += 1
                yield row_of_values(number, {n: values[index] for n, values in columns.items()})
    except (pyarrow.ArrowException, ValueError, OSError) as exc:
        where = f" after row {number}" if number else ""
        raise InputError(f"cannot read {path}{where}: {_reason(exc, kind)}") from exc


def _parquet_batches(
    path: Path, pyarrow: Any, choose: Callable[[Sequence[str]], list[str]]
) -> Iterator[tuple[list[str], Any]]:
    """The chosen columns, and batches of rows."""
    with pyarrow.parquet.ParquetFile(path, coerce_int96_timestamp_unit="us") as file:
        chosen = choose(file.schema_arrow.names)
        for batch in file.iter_batches(BATCH_ROWS, columns=chosen):
            yield chosen, batch


def _arrow_batches(
    path: Path, pyarrow: Any, choose: Callable[[Sequence[str]], list[str]]
) -> Iterator[tuple[list[str], Any]]:
    """The chosen columns, and batches of rows."""
    with pyarrow.OSFile(str(path)) as file:
        is_stream = file.read(len(ARROW_MAGIC)) != ARROW_MAGIC
        file.seek(0)
        if is_stream:
            reader = pyarrow.ipc.open_stream(file)
            batches: Iterable[Any] = reader
        else:
            reader = pyarrow.ipc.open_file(file)
            batches = map(reader.get_batch, range(reader.num_record_batches))
        chosen = choose(reader.schema.names)
        for batch in batches:
            for at in range(0, len(batch), BATCH_ROWS):
                yield chosen, batch.slice(at, BATCH_ROWS)


def _reason(exc: Exception, kind: ArrowKind) -> str:
    if getattr(exc, "strerror", None):
        return error_reason(exc)
    if isinstance(exc, NotImplementedError):
        return f"it uses a feature of {_NAMES[kind]} that is not supported; write it again"
    return f"it is not a valid {_NAMES[kind]} file, or it is damaged"


def write_arrow(
    path: Path, kind: ArrowKind, records: Iterable[Mapping[str, Any]], types: Mapping[str, type]
) -> None:
    """Write records as the rows of a new file.

    Args:
        path: the file.
        kind: its format; Arrow's is the file format, which is also Feather's.
        records: one mapping from column to value for each row; missing values are null.
        types: the type of each column: str, int, float or bool.

    Raises:
        UsageError: pyarrow is not installed.
    """
    pyarrow = _pyarrow(path)
    names = {str: pyarrow.string(), int: pyarrow.int64(), float: pyarrow.float64()}
    names[bool] = pyarrow.bool_()
    schema = pyarrow.schema([(column, names[type_]) for column, type_ in types.items()])
    is_parquet = kind == "parquet"
    open_writer = pyarrow.parquet.ParquetWriter if is_parquet else pyarrow.ipc.new_file
    with open_writer(str(path), schema) as writer:
        for batch in _batched(records):
            writer.write_table(pyarrow.Table.from_pylist(batch, schema))


def require_pyarrow(path: Path) -> None:
    """Check that Parquet and Arrow files can be read and written.

    Raises:
        UsageError: pyarrow is not installed.
    """
    _pyarrow(path)


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.ipc
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


def arrow_to_json(array: Any) -> list[Any]:
    """The values of an Arrow array as JSON values.

    Null, booleans, integers, strings, lists and structs are what they are in JSON, and so are
    floats, except that NaN and infinities, which pandas writes for missing values, are null.
    Everything else is text: decimals in full, dates, times and timestamps in ISO 8601 with the
    digits of their unit, durations as `1 day, 2:03:04.5`, intervals as ISO 8601 durations, UUIDs,
    and bytes that are UTF-8. A map is an object with its keys as text.

    Args:
        array: an array of any Arrow type.

    Returns:
        A list as long as the array. A value that has no JSON form is a QueryError.
    """
    return next(convert(array) for is_of, convert in _conversions() if is_of(array.type))


def _conversions() -> Iterator[tuple[Callable[[Any], bool], Callable[[Any], list[Any]]]]:
    """Pairs of a predicate for Arrow types and a conversion; the first match applies."""
    import pyarrow
    from pyarrow import types

    yield (lambda kind: isinstance(kind, pyarrow.BaseExtensionType)), _extension_values
    yield types.is_dictionary, lambda array: arrow_to_json(array.dictionary_decode())
    yield (
        types.is_run_end_encoded,
        lambda array: arrow_to_json(pyarrow.compute.run_end_decode(array)),
    )
    for is_of in (types.is_null, types.is_boolean, types.is_integer):
        yield is_of, lambda array: list(array.to_pylist())
    yield types.is_float32, _float32_values
    yield types.is_floating, lambda array: [_finite(value) for value in array.to_pylist()]
    yield types.is_decimal, lambda array: _each(array, lambda scalar: str(scalar.as_py()))
    yield types.is_temporal, _temporal_values
    yield types.is_struct, _struct_values
    yield types.is_map, lambda array: _each(array, lambda scalar: _map_value(scalar.values))
    yield types.is_union, lambda array: _each(array, lambda scalar: _scalar_value(scalar.value))
    yield (
        types.is_nested,
        lambda array: _each(array, lambda scalar: _whole(arrow_to_json(scalar.values))),
    )
    yield (lambda kind: True), lambda array: _each(array, _text_value)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _float32_values(array: Any) -> list[float | None]:
    """Floats of 32 bits with only the digits that they have: 0.1, not 0.10000000149011612."""
    import pyarrow

    texts = array.cast(pyarrow.string()).to_pylist()
    return [None if text is None else _finite(float(text)) for text in texts]


def _each(array: Any, convert: Callable[[Any], Any]) -> list[Any]:
    return [convert(scalar) if scalar.is_valid else None for scalar in array]


def _whole(values: list[Any]) -> Any:
    """A list of values, or the error of one of them."""
    return next((value for value in values if isinstance(value, QueryError)), values)


def _scalar_value(scalar: Any) -> Any:
    import pyarrow

    return arrow_to_json(pyarrow.repeat(scalar, 1))[0] if scalar.is_valid else None


def _text_value(scalar: Any) -> Any:
    """A string or bytes as text."""
    try:
        buffer = getattr(scalar, "as_buffer", None)
        data = buffer() if buffer is not None else None
        return bytes(data).decode() if data is not None else str(scalar.as_py())
    except UnicodeDecodeError:
        return QueryError("the value is not UTF-8 text")


def _extension_values(array: Any) -> list[Any]:
    name, storage = array.type.extension_name, array.storage
    values = arrow_to_json(storage) if name != "arrow.uuid" else storage.to_pylist()
    if name == "arrow.uuid":
        return [None if value is None else str(UUID(bytes=value)) for value in values]
    if name == "arrow.bool8":
        return [None if value is None else bool(value) for value in values]
    if name == "arrow.json":
        return [_parsed(value) for value in values]
    return values


def _parsed(value: Any) -> Any:
    try:
        return parse_json(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _struct_values(array: Any) -> list[Any]:
    names = [field.name for field in array.type]
    columns = [arrow_to_json(column) for column in array.flatten()]
    rows = []
    for index, is_valid in enumerate(array.is_valid().to_pylist()):
        members = [column[index] for column in columns]
        error = next((member for member in members if isinstance(member, QueryError)), None)
        value = error or dict(zip(names, members, strict=True))
        rows.append(value if is_valid else None)
    return rows


def _map_value(entries: Any) -> Any:
    keys, values = (arrow_to_json(column) for column in entries.flatten())
    if error := next((v for v in (*keys, *values) if isinstance(v, QueryError)), None):
        return error
    texts = [key if isinstance(key, str) else json.dumps(key, ensure_ascii=False) for key in keys]
    return dict(zip(texts, values, strict=True))


def _temporal_values(array: Any) -> list[Any]:
    import pyarrow
    from pyarrow import types

    kind = array.type
    if types.is_interval(kind):
        return _each(array, lambda scalar: _interval_text(*scalar.as_py()))
    is_small = kind.bit_width == 32
    numbers = array.cast(pyarrow.int32() if is_small else pyarrow.int64()).to_pylist()
    if types.is_date32(kind):
        convert: Callable[[int], str] = _date_text
    elif types.is_date64(kind):
        convert = _date64_text
    else:
        per_second = _PER_SECOND[kind.unit]
        zone = _zone(kind.tz) if types.is_timestamp(kind) else None

        def convert(number: int) -> str:
            seconds, fraction = divmod(number, per_second)
            nanoseconds = fraction * (10**9 // per_second)
            if types.is_timestamp(kind):
                return _timestamp_text(seconds, nanoseconds, zone)
            if types.is_time(kind):
                return _clock_text(seconds, nanoseconds)
            return _duration_text(seconds, nanoseconds)

    return [None if number is None else convert(number) for number in numbers]


def _zone(name: str | None) -> Any:
    import pyarrow

    try:
        return None if name is None else pyarrow.lib.string_to_tzinfo(name)
    except Exception:  # a zone that this machine does not know
        return UTC


def _timestamp_text(seconds: int, nanoseconds: int, zone: Any) -> str:
    offset = ""
    if zone is not None:
        try:
            moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds)
            shift = moment.astimezone(zone).utcoffset() or timedelta()
        except OverflowError:  # beyond the years that Python knows
            shift = timedelta()
        seconds += int(shift.total_seconds())
        offset = datetime(2000, 1, 1, tzinfo=timezone(shift)).isoformat()[19:]
    days, second = divmod(seconds, _DAY_S)
    return f"{_date_text(days)}T{_clock_text(second, nanoseconds)}{offset}"


def _date64_text(milliseconds: int) -> str:
    return _date_text(milliseconds // (_DAY_S * 1000))


def _date_text(days: int) -> str:
    """A day, counted from 1970, in ISO 8601; years beyond four digits have a sign.

    The inverse of Howard Hinnant's `days_from_civil`.
    """
    era, day_of_era = divmod(days + 719_468, 146_097)
    year_of_era = day_of_era - day_of_era // 1460 + day_of_era // 36_524 - day_of_era // 146_096
    year_of_era //= 365
    day_of_year = day_of_era - (365 * year_of_era + year_of_era // 4 - year_of_era // 100)
    month = (5 * day_of_year + 2) // 153
    day = day_of_year - (153 * month + 2) // 5 + 1
    month += 3 if month < 10 else -9
    year = year_of_era + era * 400 + (month <= 2)
    year_text = f"{year:04d}" if 0 <= year <= 9999 else f"{year:+05d}"
    return f"{year_text}-{month:02d}-{day:02d}"


def _clock_text(second: int, nanoseconds: int) -> str:
    return (
        f"{second // 3600:02d}:{second // 60 % 60:02d}:{second % 60:02d}"
        f"{_fraction_text(nanoseconds)}"
    )


def _duration_text(seconds: int, nanoseconds: int) -> str:
    days, second = divmod(seconds, _DAY_S)
    clock = f"{second // 3600}:{second // 60 % 60:02d}:{second % 60:02d}"
    plural = "" if abs(days) == 1 else "s"
    return (f"{days} day{plural}, " if days else "") + clock + _fraction_text(nanoseconds)


def _interval_text(months: int, days: int, nanoseconds: int) -> str:
    sign = "-" if nanoseconds < 0 else ""
    seconds, fraction = divmod(abs(nanoseconds), 10**9)
    return f"P{months}M{days}DT{sign}{seconds}{_fraction_text(fraction)}S"


def _fraction_text(nanoseconds: int) -> str:
    """The digits after the second: none, six, or nine."""
    if nanoseconds % 1000:
        return f".{nanoseconds:09d}"
    return f".{nanoseconds // 1000:06d}" if nanoseconds else ""
