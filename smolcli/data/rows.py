"""One row of an input, and where the results of a table go."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from smolcli.data.compression import codec_of_name
from smolcli.data.detection import table_kind
from smolcli.data.jsonl import MAX_LINE_BYTES
from smolcli.errors import QueryError, UsageError
from smolcli.settings import RESULTS_TABLE
from smolcli.types import ErrorCode


@dataclass(frozen=True, slots=True)
class LongestField:
    """The longest field of a templated prompt, which is cut if the prompt is too long.

    Args:
        text: of the field.
        render: the prompt with another text in its place.
    """

    text: str
    render: Callable[[str], str]


@dataclass(frozen=True, slots=True)
class Row:
    """One row of an input.

    Args:
        number: its line number, or its position from 1 where rows have no lines.
        value: its content as a JSON value; the raw bytes of a line that is not valid JSON.
        error: what is wrong with it, if anything.
        carried: values to copy to the metadata of its result.
        longest: field of its prompt, if that is rendered from a template.
    """

    number: int
    value: object = None
    error: QueryError | None = None
    carried: Mapping[str, Any] | None = None
    longest: LongestField | None = None


def row_of_values(number: int, values: dict[str, Any]) -> Row:
    """A row of a table.

    Args:
        number: of the row.
        values: the JSON value of each column; a QueryError is the error of the row.
    """
    for name, value in values.items():
        if isinstance(value, QueryError):
            return Row(number, error=QueryError(f"{name!r}: {value}", value.code, name))
    if sum(len(value) for value in values.values() if isinstance(value, str)) > MAX_LINE_BYTES:
        message = f"the row is longer than {MAX_LINE_BYTES:,} bytes"
        return Row(number, error=QueryError(message, ErrorCode.LINE_TOO_LONG))
    return Row(number, values)


def journal_path(output: Path, table_name: str = RESULTS_TABLE) -> Path:
    """Where a run writes its results: next to a table, otherwise to the output itself.

    Args:
        output: of the run.
        table_name: of the table, if `output` is a database.

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
