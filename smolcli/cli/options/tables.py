"""How the rows of a table become queries."""

import csv
import functools
from dataclasses import dataclass
from typing import Annotated

from smolcli.cli.options import option, refuse_no_text
from smolcli.errors import UsageError
from smolcli.settings import RowSettings

_table = functools.partial(option, panel="Tables")


@dataclass(frozen=True, slots=True)
class TableOptions:
    """How the rows of a table, or JSON lines of any shape, become queries."""

    prompt: Annotated[
        str | None,
        _table("--prompt", help="What to ask of each row: 'Translate to French: {text}'."),
    ] = None
    id_column: Annotated[
        str | None,
        _table("--id-column", help="The chat_id. Default: chat_id, or else the row's number."),
    ] = None
    fields: Annotated[
        str | None,
        _table("--fields", help="Columns that go into the result, under metadata: a,b."),
    ] = None

    def settings(self) -> RowSettings:
        """These options as settings.

        Raises:
            UsageError: where a field is named twice, or not at all, or the prompt is no text.
        """
        refuse_no_text("--prompt", self.prompt)
        fields = tuple(next(csv.reader([self.fields]))) if self.fields else ()
        if "" in fields or len(set(fields)) < len(fields):
            raise UsageError("--fields takes names of columns, each once: --fields title,year")
        return RowSettings(self.prompt, self.id_column, fields)
