"""What there is to know of an input before its first line is answered."""

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
    """What is known of an input beforehand, how many rows it has included; little of a stream.

    `modified` is when it was last changed, in seconds since 1970, for a stream the present.
    """

    modified: int
    sha256: str | None = None
    num_lines: int | None = None
    format: LineFormat | None = None
    stamp: tuple[int, int] | None = None  # size, and when it was changed in nanoseconds

    def refuse_change(self, input: Path) -> None:
        """Refuse to call a run finished whose input is not what it was at the beginning.

        Raises:
            RunError: it was written to meanwhile.
        """
        if self.stamp is not None and input.exists() and self.stamp != _stamp(input.stat()):
            raise RunError(
                f"{input} was changed while it was read: answers may be missing or of other lines; "
                "run it again with --overwrite"
            )


def _stamp(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def scan_input(settings: RunSettings) -> InputScan:
    """Go through an input once, if that does not use it up.

    Raises:
        UsageError: where it has not the columns that are asked for.
        InputError: where it cannot be read.
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
