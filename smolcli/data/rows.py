"""One row of an input."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from smolcli.data.jsonl import MAX_LINE_BYTES
from smolcli.errors import QueryError
from smolcli.types import ErrorCode


@dataclass(frozen=True, slots=True)
class LongestField:
    """The longest field of a templated prompt, which is cut if the prompt is too long.

    Args:
        text: the field's text.
        render: returns the prompt with another text in its place.
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
        number: the row's number.
        values: the JSON value of each column; a QueryError is the error of the row.
    """
    for name, value in values.items():
        if isinstance(value, QueryError):
            return Row(number, error=QueryError(f"{name!r}: {value}", value.code, name))
    if sum(len(value) for value in values.values() if isinstance(value, str)) > MAX_LINE_BYTES:
        message = f"the row is longer than {MAX_LINE_BYTES:,} bytes"
        return Row(number, error=QueryError(message, ErrorCode.LINE_TOO_LONG))
    return Row(number, values)
