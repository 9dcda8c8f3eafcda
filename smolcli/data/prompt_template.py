"""A prompt with the columns of a row in it."""

import difflib
import json
from collections.abc import Iterable, Mapping
from string import Formatter
from typing import Any

from smolcli.errors import QueryError, UsageError
from smolcli.types import ErrorCode


class Template:
    """`Translate {text}` for any row; `{{` and `}}` stand for braces.

    Raises:
        UsageError: where the text cannot be read so.
    """

    def __init__(self, text: str) -> None:
        try:
            parts = list(Formatter().parse(text))
        except ValueError as exc:
            raise UsageError(f"--prompt: {exc}; a brace itself is {{{{ or }}}}") from exc
        if any(name == "" or spec or conversion for _, name, spec, conversion in parts):
            raise UsageError("--prompt: braces hold the name of a column and nothing else")
        self._parts = [(literal, name) for literal, name, _, _ in parts]
        self.columns = list(dict.fromkeys(name for _, name in self._parts if name is not None))
        if not self.columns:
            raise UsageError("--prompt names no column: write {text} where column text is to stand")

    def render(self, values: Mapping[str, Any]) -> str:
        """The prompt of one row.

        Raises:
            QueryError: where a column is missing, or none of them holds anything.
        """
        texts = {name: _text(cell(values, name)) for name in self.columns}
        if not any(text.strip() for text in texts.values()):
            names = " and ".join(repr(name) for name in self.columns)
            raise QueryError(f"{names} must not be empty", ErrorCode.MISSING_FIELD, self.columns[0])
        return "".join(
            literal + (texts[name] if name is not None else "") for literal, name in self._parts
        )


def cell(values: Mapping[str, Any], column: str) -> Any:
    """What a row has in a column.

    Raises:
        QueryError: where it has no such column.
    """
    if column not in values:
        raise QueryError(no_column(column, values), ErrorCode.MISSING_FIELD, column)
    return values[column]


def no_column(column: str, columns: Iterable[str]) -> str:
    """That there is no such column, and which was meant perhaps."""
    names = [name for name in columns if name]
    near = difflib.get_close_matches(column, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names[:20])}"
    return f"there is no column {column!r}" + (f"; {hint}" if names else "")


def _text(value: object) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
