"""Checks of the options and paths of a run, before it reads or writes anything."""

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from smolcli.batch.manifest import manifest_path
from smolcli.data.compression import FOREIGN_SUFFIXES
from smolcli.data.detection import table_kind
from smolcli.data.inputs import Inputs
from smolcli.data.jsonl import is_stream
from smolcli.data.sqlite import reads_table
from smolcli.data.table_writer import check_table
from smolcli.errors import UsageError, error_reason
from smolcli.settings import RunSettings


def check_options(settings: RunSettings) -> None:
    """Reject options that contradict each other.

    Raises:
        UsageError: they do.
    """
    if is_stream(settings.input) or is_stream(settings.output):
        for option, value in (
            ("--errors", settings.errors),
            ("--retry-errors", settings.retry_errors),
        ):
            if value:
                raise UsageError(f"{option} needs files, not stdin or stdout")
    if settings.errors is not None and is_stream(settings.errors):
        raise UsageError(f"--errors {settings.errors} must be a regular file")
    if settings.retry_errors and settings.overwrite:
        raise UsageError("--retry-errors and --overwrite cannot be combined")


def check_paths(settings: RunSettings) -> None:
    """Reject paths that cannot be written, or that would overwrite the input or each other.

    Raises:
        UsageError: an output, its manifest or the file for errors is such a path.
    """
    output, errors, table = settings.output, settings.errors, settings.table
    if not output.name:
        raise UsageError(f"cannot write {output}: it is a directory")
    if errors is not None and table_kind(errors) is not None:
        raise UsageError(f"--errors {errors} holds JSON Lines; choose a name such as failed.jsonl")
    written = [(path, "--output") for path in (table, output, manifest_path(output)) if path]
    if errors is not None:
        written.append((errors, "--errors"))
    for path, option in written:
        try:
            is_own_table = path == table and table_kind(path) == "sqlite"
            inputs = () if is_own_table else [file.path for file in Inputs.of(settings).files]
            _check_path(path, option, inputs)
        except OSError as exc:
            raise UsageError(f"cannot write {path}: {error_reason(exc)}") from exc
    if errors is not None and any(_is_same(errors, path) for path, _ in written[:-1]):
        raise UsageError(f"{errors} is the output or its manifest; choose another --errors")
    if table is not None:
        _check_table_name(settings, table)
        fields = settings.rows.fields
        check_table(table, settings.table_name, output, fields, settings.overwrite)


def _check_table_name(settings: RunSettings, table: Path) -> None:
    """Reject an output that would replace a table that is read."""
    name, rows = settings.table_name, settings.rows
    is_input = any(_is_same(table, file.path) for file in Inputs.of(settings).files)
    if is_input and reads_table(table, rows.query, rows.table, name):
        raise UsageError(f"this run reads the table {name!r}; choose another --output-table")


def _is_same(path: Path, other: Path) -> bool:
    """Whether two paths name one file, also through links."""
    if path.exists() and other.exists():
        return path.samefile(other)
    return os.path.realpath(path) == os.path.realpath(other)


def _check_path(path: Path, option: str, inputs: Iterable[Path]) -> None:
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(
            f"cannot write {path}: it is a directory, or its parent directory does not exist"
        )
    if path.suffix.lower() in FOREIGN_SUFFIXES:
        raise UsageError(f"cannot write {path.suffix} files; choose another {option}")
    if path.exists() and any(os.path.exists(each) and path.samefile(each) for each in inputs):
        raise UsageError(f"{path} is the input; choose another {option}")
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise UsageError(f"cannot write {path}: it is a symbolic link to itself")
    with suppress(FileNotFoundError):
        target.with_name(f".{target.name}.lock").stat()  # OSError if a name next to it is too long
