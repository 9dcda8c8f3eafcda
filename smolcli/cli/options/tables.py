"""Options that map the rows of a table to queries."""

import csv
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from smolcli.cli.options import option, read_text, require_utf8
from smolcli.data.source import check_encoding
from smolcli.errors import UsageError
from smolcli.settings import InputFormat, RowSettings

_table = functools.partial(option, panel="Tables")


@dataclass(frozen=True, slots=True)
class TableOptions:
    """How rows of a table, or JSON lines of any shape, become queries."""

    prompt: Annotated[
        str | None,
        _table(
            "--prompt",
            metavar="TEMPLATE",
            help="Prompt for each row, with columns in braces: 'Translate to French: {text}'. "
            "{a.b} is a member of a nested column.",
        ),
    ] = None
    prompt_file: Annotated[
        Path | None,
        _table("--prompt-file", metavar="FILE", help="Read the template from a file, in UTF-8."),
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
            help="Comma-separated columns to copy to the results. '*': all. In JSON Lines output "
            "they are under metadata.",
        ),
    ] = None
    truncate_prompt: Annotated[
        bool,
        _table(
            "--truncate-prompt",
            help="If a prompt leaves no room for its answer, cut the middle of its longest column "
            "or message.",
        ),
    ] = False
    table: Annotated[
        str | None,
        _table("--table", metavar="NAME", help="Table of an SQLite database to read."),
    ] = None
    query: Annotated[
        str | None,
        _table(
            "--query",
            metavar="SQL",
            help="SELECT statement for the rows of an SQLite database. End it with ORDER BY: a run "
            "resumes by the order of its rows.",
        ),
    ] = None
    input_format: Annotated[
        InputFormat,
        _table(
            "--input-format",
            metavar="FORMAT",
            help="Format of INPUT. auto: detect it from the name and the content. smol, openai and "
            "bare (messages or prompts without ids) are formats of JSON Lines; text is one prompt "
            "per line.",
        ),
    ] = "auto"
    encoding: Annotated[
        str | None,
        _table(
            "--encoding",
            metavar="NAME",
            help="Text encoding of INPUT, such as cp1252. Default: UTF-8, UTF-16 or UTF-32, "
            "whichever is detected.",
        ),
    ] = None
    delimiter: Annotated[
        str | None,
        _table(
            "--delimiter",
            metavar="CHAR",
            help="Delimiter of a CSV file: a character, or tab. Detected by default.",
        ),
    ] = None

    def settings(self) -> RowSettings:
        """The row settings that these options stand for.

        Raises:
            UsageError: a column is named twice or is empty, or the prompt is not UTF-8.
        """
        if self.table is not None and self.query is not None:
            raise UsageError("--table and --query cannot be combined")
        fields = tuple(next(csv.reader([self.fields]))) if self.fields else ()
        if "" in fields or len(set(fields)) < len(fields):
            raise UsageError(
                f"--fields must be distinct column names separated by commas, such as "
                f"title,year; got {self.fields!r}"
            )
        if self.encoding is not None:
            check_encoding(self.encoding)
        return RowSettings(
            prompt=self._template(),
            id_column=self.id_column,
            fields=fields,
            input_format=self.input_format,
            encoding=self.encoding,
            delimiter=_delimiter(self.delimiter),
            truncate_prompt=self.truncate_prompt,
            query=self.query,
            table=self.table,
        )

    def _template(self) -> str | None:
        if self.prompt_file is None:
            require_utf8("--prompt", self.prompt)
            return self.prompt
        if self.prompt is not None:
            raise UsageError("--prompt and --prompt-file cannot be combined")
        return read_text("--prompt-file", self.prompt_file)


def _delimiter(text: str | None) -> str | None:
    r"""A delimiter as one character; `\t` and `tab` are a tab."""
    text = {"\\t": "\t", "tab": "\t"}.get(text or "", text)
    if text is not None and (len(text) != 1 or text in '"\r\n'):
        raise UsageError(f"--delimiter must be one character, such as ; or tab, not {text!r}")
    return text
