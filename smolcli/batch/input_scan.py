"""What a run learns about its input before it answers the first line."""

import hashlib
import os
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from smolcli.data.jsonl import is_stream
from smolcli.data.reader import read_rows, row_numbers
from smolcli.errors import InputError, RunError
from smolcli.protocol.line_formats import LineFormat, detect_format
from smolcli.settings import RunSettings


@dataclass(frozen=True, slots=True)
class InputScan:
    """Facts about an input file; all but `modified` are None for a stream.

    Args:
        modified: last modification in seconds since the epoch; the current time for a stream.
        sha256: digest of the file's bytes, compressed ones included.
        num_lines: number of rows to answer, after `--limit`.
        format: the format of the lines.
        stamp: size in bytes and modification time in nanoseconds.
    """

    modified: int
    sha256: str | None = None
    num_lines: int | None = None
    format: LineFormat | None = None
    stamp: tuple[int, int] | None = None

    def check_unchanged(self, input: Path) -> None:
        """Check that nobody wrote to the input while the run was reading it.

        Raises:
            RunError: size or modification time differ from those at the start.
        """
        if self.stamp is not None and input.exists() and self.stamp != _stamp(input.stat()):
            raise RunError(
                f"{input} changed while it was being read, so answers may be missing or belong "
                "to other lines; run it again with --overwrite"
            )


def _stamp(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def scan_input(settings: RunSettings) -> InputScan:
    """Read an input file once; a stream is left untouched.

    Raises:
        UsageError: the input lacks a column that the settings name.
        InputError: the input cannot be read.
    """
    if is_stream(settings.input):
        return InputScan(int(time.time()))
    values = (row.value for row in read_rows(settings.input, settings.rows))
    format = detect_format(values, settings.defaults)
    numbers = islice(row_numbers(settings.input, settings.rows), settings.limit)
    num_lines = sum(1 for _ in numbers)
    try:
        with settings.input.open("rb") as file:
            status = os.stat(file.fileno())
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as exc:
        raise InputError(f"cannot read {settings.input}: {exc.strerror or exc}") from exc
    return InputScan(
        modified=int(status.st_mtime),
        sha256=sha256,
        num_lines=num_lines,
        format=format,
        stamp=_stamp(status),
    )
