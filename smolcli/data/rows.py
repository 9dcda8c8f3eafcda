"""Tables: rows of data in, rows of results out; the work between goes by JSON lines as ever."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from smolcli.errors import QueryError, UsageError

Format = Literal[".csv", ".tsv", ".parquet"]


@dataclass(frozen=True, slots=True)
class Row:
    """One row of an input: what it holds, what is wrong with it, and what goes into its result.

    Of a line that is no JSON, `value` is the bytes.
    """

    number: int
    value: object = None
    fault: QueryError | None = None
    carried: Mapping[str, Any] | None = None


def format_of(path: Path) -> Format | None:
    """What kind of table a file's name means; None: it is none."""
    match Path(path.name.lower().removesuffix(".gz")).suffix:
        case ".csv" | ".tsv" | ".parquet" as suffix:
            return suffix
    return None


def journal_path(output: Path) -> Path:
    """Where a run keeps its results: beside a table, otherwise in the output itself.

    Raises:
        UsageError: for a packed table.
    """
    if format_of(output) is None:
        return output
    if output.suffix.lower() == ".gz":
        raise UsageError(f"{output}: tables are not packed here; leave the .gz away")
    return output.with_name(f"{output.name}.jsonl")


def delimiter(path: Path) -> str:
    """What stands between two cells of a text table."""
    return "\t" if format_of(path) == ".tsv" else ","
