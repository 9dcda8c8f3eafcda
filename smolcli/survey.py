"""What there is to know of an input before its first line is answered."""

import hashlib
import os
import time
from dataclasses import dataclass
from itertools import islice

from smolcli.errors import InputError
from smolcli.jsonl import is_stream
from smolcli.line_formats import is_batch
from smolcli.settings import RunSettings
from smolcli.tables.rows import read_rows, row_numbers


@dataclass(frozen=True, slots=True)
class Survey:
    """What is known of an input beforehand, how many rows it has included; little of a stream.

    `modified` is when it was last changed, in seconds since 1970, for a stream the present.
    """

    modified: int
    sha256: str | None = None
    num_lines: int | None = None
    is_batch: bool | None = None


def survey(settings: RunSettings) -> Survey:
    """Go through an input once, if that does not use it up.

    Raises:
        UsageError: where it has not the columns that are asked for.
        InputError: where it cannot be read.
    """
    if is_stream(settings.input):
        return Survey(int(time.time()))
    first = next(read_rows(settings.input, settings.rows), None)
    numbers = islice(row_numbers(settings.input, settings.rows), settings.limit)
    num_lines = sum(1 for _ in numbers)
    try:
        with settings.input.open("rb") as file:
            modified = int(os.stat(file.fileno()).st_mtime)
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as exc:
        raise InputError(f"cannot read {settings.input}: {exc.strerror or exc}") from exc
    return Survey(modified, sha256, num_lines, first is not None and is_batch(first.value))
