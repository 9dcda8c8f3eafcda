"""Columns whose values are in the names of directories, as Hive, Spark, Polars and DuckDB write."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import PurePath
from urllib.parse import unquote

from smolcli.data.row_mapper import named_columns
from smolcli.data.rows import Row
from smolcli.settings import ALL_FIELDS, RowSettings

_MISSING = ("", "__HIVE_DEFAULT_PARTITION__")


def partition_columns(name: str, settings: RowSettings) -> dict[str, str | None]:
    """The columns that the directories of a file give it; a missing value is None.

    Args:
        name: path or URL of the file, such as `sales/year=2024/country=France/0.parquet`.
        settings: how rows become queries; without a template, only columns that it names count.
    """
    pairs = (folder.partition("=") for folder in PurePath(name).parts[:-1] if "=" in folder)
    texts = {unquote(column): unquote(value) for column, _, value in pairs if column}
    columns = {column: None if text in _MISSING else text for column, text in texts.items()}
    if not columns or settings.prompt is not None or settings.fields == ALL_FIELDS:
        return columns
    return {column: columns[column] for column in named_columns(settings) if column in columns}


def with_columns(row: Row, columns: Mapping[str, str | None]) -> Row:
    """A row with further columns; its own ones of these names are kept."""
    if not columns or not isinstance(row.value, dict):
        return row
    return replace(row, value={**columns, **row.value})
