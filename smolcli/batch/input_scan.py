"""Scans the input of a run before its first line is answered."""

import base64
import hashlib
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar, Self

from smolcli.data.inputs import Inputs, rows_of
from smolcli.data.jsonl import is_stream
from smolcli.data.rows import Row
from smolcli.data.sqlite import is_database
from smolcli.errors import InputError, RunError, error_reason
from smolcli.protocol.line_formats import LineFormat, detect_format, stated_format
from smolcli.protocol.many_files import ManyFilesFormat
from smolcli.settings import InputFile, RunSettings


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
            code = row.error and row.error.code
            content = repr((row.number, row.value, row.carried, code)).encode(errors="replace")
            packed += hashlib.blake2b(content, digest_size=cls.SIZE).digest()
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
    """Facts about the input; all but `modified` and `inputs` are None for a stream.

    Args:
        modified: last modification in seconds since the epoch; the current time for a stream.
        inputs: the files.
        sha256: digest of the file's bytes, compressed ones included; of several files, that of
            their digests.
        files: digest of each of several files, by name.
        rows: digests of the rows to answer, after `--limit`.
        format: the format of the lines.
        stamps: of each file, size in bytes and modification time in nanoseconds.
    """

    modified: int
    inputs: Inputs
    sha256: str | None = None
    files: dict[str, str] | None = None
    rows: RowDigests | None = None
    format: LineFormat | None = None
    stamps: tuple[tuple[int, int], ...] = ()

    @property
    def num_lines(self) -> int | None:
        """Number of rows to answer."""
        return None if self.rows is None else len(self.rows)

    def check_unchanged(self) -> None:
        """Check that the input did not change while the run was reading it.

        Raises:
            RunError: size or modification time of a file differ from those at the start.
        """
        for file, stamp in zip(self.inputs.files, self.stamps, strict=False):
            if not file.path.exists() or stamp == _stamp(file.path.stat()):
                continue
            if not (is_database(file.path) and self._has_same_rows()):
                raise RunError(
                    f"{file.name} changed while it was being read, so answers may be missing or "
                    "belong to other lines; run it again with --overwrite"
                )

    def _has_same_rows(self) -> bool:
        """Whether the rows are still the same, even if other tables of a database changed."""
        assert self.rows is not None
        return RowDigests.of(islice(self.inputs.read(), len(self.rows))) == self.rows


def _stamp(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def scan_input(settings: RunSettings) -> InputScan:
    """Read the input files once; a stream is left untouched.

    Raises:
        UsageError: an input lacks a column that the settings name.
        InputError: an input cannot be read.
    """
    inputs = Inputs.of(settings)
    if is_stream(settings.input):
        return InputScan(int(time.time()), inputs, format=stated_format(settings.rows))
    format = input_format(inputs, settings)
    scanned = {file.name: _digest(file) for file in inputs.files}
    rows = RowDigests.of(islice(inputs.read(), settings.limit))  # later, so that a change is seen
    sha256s = {name: sha256 for name, (sha256, _) in scanned.items()}
    joined = "".join(sha256s.values()).encode()
    return InputScan(
        modified=max(int(status.st_mtime) for _, status in scanned.values()),
        inputs=inputs,
        sha256=hashlib.sha256(joined).hexdigest() if inputs.is_several else joined.decode(),
        files=sha256s if inputs.is_several else None,
        rows=rows,
        format=format,
        stamps=tuple(_stamp(status) for _, status in scanned.values()),
    )


def input_format(inputs: Inputs, settings: RunSettings) -> LineFormat:
    """The stated format of the lines, or the one that is detected for each file.

    Raises:
        UsageError: an input lacks a column that the settings name.
        InputError: an input cannot be read.
    """
    formats = {file.name: _format(file, settings) for file in inputs.files}
    return ManyFilesFormat.of(formats) if inputs.is_several else formats[inputs.files[0].name]


def _format(file: InputFile, settings: RunSettings) -> LineFormat:
    values = (row.value for row in rows_of(file, settings.rows))
    return stated_format(settings.rows) or detect_format(values, settings.defaults)


def _digest(file: InputFile) -> tuple[str, os.stat_result]:
    try:
        with file.path.open("rb") as opened:
            status = os.stat(opened.fileno())
            return hashlib.file_digest(opened, "sha256").hexdigest(), status
    except OSError as exc:
        raise InputError(f"cannot read {file.name}: {error_reason(exc)}") from exc
