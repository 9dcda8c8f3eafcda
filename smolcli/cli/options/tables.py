"""Options that map the rows of a table to queries."""

import csv
import functools
from dataclasses import dataclass
from typing import Annotated

from smolcli.cli.options import option, require_utf8
from smolcli.errors import UsageError
from smolcli.settings import RowSettings

_table = functools.partial(option, panel="Tables")


@dataclass(frozen=True, slots=True)
class TableOptions:
    """How rows of a table, or JSON lines of any shape, become queries."""

    prompt: Annotated[
        str | None,
        _table(
            "--prompt",
            metavar="TEMPLATE",
            help="Prompt for each row, with columns in braces: 'Translate to French: {text}'.",
        ),
    ] = None
    id_column: Annotated[
        str | None,
        _table(
            "--id-column",
            metavar="COLUMN",
            help="Column to use as chat_id. Default: chat_id if present, otherwise the row number.",
        ),
    ] = None
    fields: Annotated[
        str | None,
        _table(
            "--fields",
            metavar="COLUMNS",
            help="Comma-separated columns to copy into the results, under metadata.",
        ),
    ] = None

    def settings(self) -> RowSettings:
        """The row settings that these options stand for.

        Raises:
            UsageError: a column is named twice or is empty, or the prompt is not UTF-8.
        """
        require_utf8("--prompt", self.prompt)
        fields = tuple(next(csv.reader([self.fields]))) if self.fields else ()
        if "" in fields or len(set(fields)) < len(fields):
            raise UsageError(
                f"--fields must be distinct column names separated by commas, such as "
                f"title,year; got {self.fields!r}"
            )
        return RowSettings(self.prompt, self.id_column, fields)
