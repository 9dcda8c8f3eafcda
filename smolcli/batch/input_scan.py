"""Scans the input of a run before its first line is answered."""

import base64
import hashlib
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import ClassVar, Self

from smolcli.data.jsonl import is_stream
from smolcli.data.reader import read_rows
from smolcli.data.rows import Row
from smolcli.errors import InputError, RunError, error_reason
from smolcli.protocol.line_formats import LineFormat, detect_format, stated_format
from smolcli.settings import RunSettings


@dataclass(frozen=True, slots=True)
class RowDigests:
    """A 24-bit digest of each row of an input, packed into bytes.

    A later run compares them to find changed rows; one change in 16 million goes unnoticed.
    """

    packed: bytes = b""

    SIZE: ClassVar[int] = 3

    @classmethod
    def of(cls, rows: Iterable[Row]) -> Self:
        """Digest the number, content and carried values of each row."""
        packed = bytearray()
        for row in rows:
            code = row.fault and row.fault.code
            content = repr((row.number, row.value, row.carried, code))
            packed += hashlib.blake2b(content.encode(errors="replace"), digest_size=3).digest()
        return cls(bytes(packed))

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Parse the result of `text`.

        Raises:
            ValueError: it is not one.
        """
        return cls(base64.b64decode(text, validate=True))

    @property
    def text(self) -> str:
        """The digests in base64, four characters each."""
        return base64.b64encode(self.packed).decode()

    def __len__(self) -> int:
        return len(self.packed) // self.SIZE

    def __getitem__(self, index: int) -> bytes:
        return self.packed[index * self.SIZE : (index + 1) * self.SIZE]

    def extended(self, other: "RowDigests") -> "RowDigests":
        """These digests, followed by those of `other` beyond their end."""
        return RowDigests(self.packed + other.packed[len(self.packed) :])


@dataclass(frozen=True, slots=True)
class InputScan:
    """Facts about an input file; all but `modified` are None for a stream.

    Args:
        modified: last modification in seconds since the epoch; the current time for a stream.
        sha256: digest of the file's bytes, compressed ones included.
        rows: digests of the rows to answer, after `--limit`.
        format: the format of the lines.
        stamp: size in bytes and modification time in nanoseconds.
    """

    modified: int
    sha256: str | None = None
    rows: RowDigests | None = None
    format: LineFormat | None = None
    stamp: tuple[int, int] | None = None

    @property
    def num_lines(self) -> int | None:
        """Number of rows to answer."""
        return None if self.rows is None else len(self.rows)

    def check_unchanged(self, input: Path) -> None:
        """Check that the input did not change while the run was reading it.

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
        return InputScan(int(time.time()), format=stated_format(settings.rows))
    values = (row.value for row in read_rows(settings.input, settings.rows))
    format = stated_format(settings.rows) or detect_format(values, settings.defaults)
    rows = islice(read_rows(settings.input, settings.rows), settings.limit)
    digests = RowDigests.of(rows)
    try:
        with settings.input.open("rb") as file:
            status = os.stat(file.fileno())
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as exc:
        raise InputError(f"cannot read {settings.input}: {error_reason(exc)}") from exc
    return InputScan(
        modified=int(status.st_mtime),
        sha256=sha256,
        rows=digests,
        format=format,
        stamp=_stamp(status),
    )
