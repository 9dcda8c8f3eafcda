"""Files of one JSON value per line: the lines of an input, and the writer of results."""

import codecs
import json
import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import Any, NoReturn

from smolcli.atomic import replacing
from smolcli.data.compression import Codec, codec_of_name
from smolcli.data.source import READ_ERRORS, open_source
from smolcli.errors import InputError, cannot_write, error_reason

MAX_LINE_BYTES = 1 << 20
SYNC_INTERVAL_S = 1.0
MEMBER_BYTES = 1 << 20  # of lines that are compressed together

_LONGEST_READ = MAX_LINE_BYTES + len(b"\r\n")
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a file; `data` is None if it is longer than MAX_LINE_BYTES."""

    number: int
    data: bytes | None


def is_stream(path: Path) -> bool:
    """Whether `path` can be read only once: `-`, a pipe or a device."""
    if str(path) == "-":
        return True
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def read_lines(path: Path) -> Iterator[Line]:
    """Yield the lines of a file, or of stdin for `-`, that are not blank.

    Raises:
        InputError: the file cannot be read to its end.
    """
    with open_source(path) as file:
        yield from nonblank_lines(file, path)


def nonblank_lines(file: BufferedIOBase, path: Path) -> Iterator[Line]:
    """Yield the lines of an open file that are not blank, without ends and byte order marks.

    Args:
        file: the file to read.
        path: its path, for error messages.

    Raises:
        InputError: the file cannot be read to its end.
    """
    for line in physical_lines(file, path):
        if line.data is None:
            yield line
        elif (data := without_marks(line.data)).strip():
            yield Line(line.number, data.rstrip(b"\r\n"))


def physical_lines(file: BufferedIOBase, path: Path) -> Iterator[Line]:
    """Yield every line of an open file with its end; see `nonblank_lines`.

    Raises:
        InputError: the file cannot be read to its end.
    """
    number = 0
    try:
        for number, data in enumerate(_split(file), start=1):
            yield Line(number, data)
    except READ_ERRORS as exc:
        where = f" after line {number}" if number else ""
        raise InputError(f"cannot read {path}{where}: {error_reason(exc)}") from exc


def _split(file: BufferedIOBase) -> Iterator[bytes | None]:
    """Every line; None for one that is too long, which is never held in memory."""
    while data := file.readline(_LONGEST_READ):
        if len(data) == _LONGEST_READ and not data.endswith(b"\n"):
            while (rest := file.readline(_LONGEST_READ)) and not rest.endswith(b"\n"):
                pass
        yield data if len(data.rstrip(b"\r\n")) <= MAX_LINE_BYTES else None


def without_marks(text: bytes) -> bytes:
    """UTF-8 text without byte order marks at its start; joined files have some in the middle."""
    start = 0
    while text.startswith(codecs.BOM_UTF8, start):
        start += len(codecs.BOM_UTF8)
    return text[start:]


def encode(record: dict[str, Any]) -> bytes:
    """A record as one line of JSON; lone surrogates are replaced."""
    return _ENCODER.encode(record).encode(errors="replace") + b"\n"


class _Compressor:
    """Collects lines into compressed members of MEMBER_BYTES; see `Codec.compress`.

    Args:
        codec: the compression; None writes the lines as they are.
        write: receives each member.
    """

    def __init__(self, codec: Codec | None, write: Callable[[bytes], object]) -> None:
        self._codec = codec
        self._write = write
        self._lines = bytearray()

    def write(self, data: bytes) -> None:
        """Take one line."""
        if self._codec is None:
            self._write(data)
            return
        self._lines += data
        if len(self._lines) >= MEMBER_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write the collected lines as one member."""
        if self._codec is not None and self._lines:
            member = self._codec.compress(bytes(self._lines))
            self._lines.clear()
            self._write(member)


@contextmanager
def replacing_lines(path: Path) -> Iterator[_Compressor]:
    """Like `replacing`, for lines; they are compressed if the name of `path` says so.

    Equal lines give equal bytes.
    """
    codec = codec_of_name(path)
    with replacing(path) as file:
        lines = _Compressor(codec, file.write)
        yield lines
        lines.flush()
        if codec is not None and file.tell() == 0:
            file.write(codec.compress(b""))  # an empty file is not a valid compressed one


class ResultWriter:
    """Appends result records, each with one unbuffered write; a thread syncs them to the disk.

    If the process is killed, the file is a prefix of the final one, torn at worst inside its last
    line. If the machine loses power, the last SYNC_INTERVAL_S seconds may be missing.

    If the name of the file says that it is compressed, records are collected and written as one
    compressed member at least every SYNC_INTERVAL_S seconds; a kill may lose the last member.

    Args:
        path: the file, or `-` for stdout.
        num_bytes: how much of the existing file to keep; the rest is truncated.

    Raises:
        RunError: the file cannot be opened.
    """

    def __init__(self, path: Path, num_bytes: int = 0) -> None:
        self._path = path
        self._can_sync = not is_stream(path)
        self._is_dirty = False
        self._lock = threading.Lock()  # guards the compressor
        self._lines = _Compressor(codec_of_name(path), self._append)
        self._sync_fault: OSError | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._keep_synced, name="smol-fsync", daemon=True)
        target = 1 if str(path) == "-" else path
        mode = "wb" if target == 1 else "ab"
        with ExitStack() as stack:
            try:
                file = open(target, mode, buffering=0, closefd=target != 1)  # noqa: SIM115
                self._file = stack.enter_context(file)
                if self._can_sync:
                    self._file.truncate(num_bytes)
                    os.fsync(self._file.fileno())
                    self._thread.start()
            except OSError as exc:
                self._fail(exc)
            stack.pop_all()

    def write(self, record: dict[str, Any]) -> None:
        """Append one record.

        Raises:
            RunError: the file cannot be written, for example because the disk is full.
            BrokenPipeError: the reader of stdout is gone.
        """
        try:
            with self._lock:
                self._lines.write(encode(record))
            self._is_dirty = True
            if self._sync_fault is not None:
                raise self._sync_fault
        except OSError as exc:
            self._fail(exc)

    def close(self) -> None:
        """Sync what is written, and close the file.

        Raises:
            RunError: an earlier sync failed, or this one does.
        """
        self._stopping.set()
        with self._file:
            try:
                if self._can_sync:
                    self._thread.join()
                    self._sync()
                else:
                    self._lines.flush()
            except OSError as exc:
                self._fail(exc)

    def _append(self, data: bytes) -> None:
        while data:
            data = data[self._file.write(data) :]

    def _keep_synced(self) -> None:
        while not self._stopping.wait(SYNC_INTERVAL_S):
            try:
                self._sync()
            except OSError as exc:
                self._sync_fault = exc
                return

    def _sync(self) -> None:
        if self._sync_fault is not None:
            raise self._sync_fault
        if self._is_dirty:
            self._is_dirty = False  # before the sync: a write during it needs the next one
            with self._lock:
                self._lines.flush()
            os.fsync(self._file.fileno())

    def _fail(self, exc: OSError) -> NoReturn:
        if isinstance(exc, BrokenPipeError):
            raise exc
        name = "to stdout" if str(self._path) == "-" else self._path
        raise cannot_write(name, exc) from exc
