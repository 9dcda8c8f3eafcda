"""Files of one JSON value a line: the reader of queries and the writer of results."""

import gzip
import json
import os
import stat
import threading
import zlib
from codecs import BOM_UTF8
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import Any, NoReturn

from smolcli.errors import InputError, RunError

MAX_LINE_BYTES = 1 << 20
SYNC_INTERVAL_S = 1.0

_GZIP_MAGIC = b"\x1f\x8b"
_LONGEST_READ = MAX_LINE_BYTES + len(b"\r\n")
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a file; `data` is None where it is longer than MAX_LINE_BYTES."""

    number: int
    data: bytes | None


def is_stream(path: Path) -> bool:
    """Whether `path` can be gone through only once: `-`, a pipe, a device."""
    if str(path) == "-":
        return True
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def read_lines(path: Path) -> Iterator[Line]:
    """Yield the lines that are not blank of a plain or gzipped file, or of stdin (`-`).

    Raises:
        InputError: where the file cannot be read, or not to its end.
    """
    for line in physical_lines(path):
        if line.data is None or line.data.strip():
            yield line


def physical_lines(path: Path) -> Iterator[Line]:
    """Yield every line, blank ones too; see `read_lines`."""
    number = 0
    try:
        with _open(path) as file:
            for number, data in enumerate(_split(file), start=1):
                if number == 1 and data is not None:
                    data = data.removeprefix(BOM_UTF8)
                yield Line(number, data)
    except (OSError, EOFError, zlib.error) as exc:
        where = f" beyond line {number}" if number else ""
        raise InputError(f"cannot read {path}{where}: {_reason(exc)}") from exc


@contextmanager
def _open(path: Path) -> Iterator[BufferedIOBase]:
    source = 0 if str(path) == "-" else path
    with open(source, "rb", closefd=source != 0) as file:
        if file.peek(2)[:2] == _GZIP_MAGIC:
            with gzip.open(file) as unpacked:
                yield unpacked
        else:
            yield file


def _split(file: BufferedIOBase) -> Iterator[bytes | None]:
    """Every line without its end; None for one too long, of which no more than that is held."""
    while data := file.readline(_LONGEST_READ):
        if len(data) == _LONGEST_READ and not data.endswith(b"\n"):
            while (rest := file.readline(_LONGEST_READ)) and not rest.endswith(b"\n"):
                pass
        data = data.rstrip(b"\r\n")
        yield data if len(data) <= MAX_LINE_BYTES else None


def _reason(exc: Exception) -> str:
    return getattr(exc, "strerror", None) or str(exc)


def encode(record: dict[str, Any]) -> bytes:
    """A record as a line; a lone surrogate is no reason to stop."""
    return _ENCODER.encode(record).encode(errors="replace") + b"\n"


@contextmanager
def replacing(path: Path) -> Iterator[BufferedIOBase]:
    """A file to write that takes the place of `path` when it is whole, in one step that survives
    a power cut; an exception leaves what was there.

    Raises:
        RunError: where it cannot be written.
    """
    path = Path(os.path.realpath(path))  # a symbolic link stays one
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        try:
            with unfinished.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
            _sync_folder(path.parent)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as exc:
        raise RunError(f"cannot write {path}: {_reason(exc)}") from exc


def _sync_folder(folder: Path) -> None:
    """Make a rename last; where folders cannot be opened (Windows) the system sees to it."""
    if os.name == "posix":
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


class ResultWriter:
    """Appends records of results, each in one unbuffered write; a thread syncs them to the disk.

    Whenever the process dies, the file is a prefix of the final one, torn at worst inside its
    last line; when the machine dies, it is so as of a second ago.

    Args:
        path: the file, or `-` for stdout.
        num_bytes: how much of the file to keep; the rest is cut off.
    """

    def __init__(self, path: Path, num_bytes: int = 0) -> None:
        self._path = path
        self._can_sync = not is_stream(path)
        self._is_dirty = False
        self._sync_fault: OSError | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._keep_synced, name="smol-fsync", daemon=True)
        target = 1 if str(path) == "-" else path
        mode = "wb" if target == 1 else "ab"
        try:
            self._file = open(target, mode, buffering=0, closefd=target != 1)  # noqa: SIM115
            if self._can_sync:
                self._file.truncate(num_bytes)
                os.fsync(self._file.fileno())
                self._thread.start()
        except OSError as exc:
            self._fail(exc)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record.

        Raises:
            RunError: where the disk is full, or the file cannot be written for another reason.
            BrokenPipeError: where whoever read stdout has gone.
        """
        data = encode(record)
        try:
            while data:
                data = data[self._file.write(data) :]
            self._is_dirty = True
            if self._sync_fault is not None:
                raise self._sync_fault
        except OSError as exc:
            self._fail(exc)

    def close(self) -> None:
        """Sync what is written, and let go of the file."""
        self._stopping.set()
        with self._file:
            if self._can_sync:
                self._thread.join()
                try:
                    self._sync()
                except OSError as exc:
                    self._fail(exc)

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
            self._is_dirty = False  # first, so that a write during the sync counts for the next
            os.fsync(self._file.fileno())

    def _fail(self, exc: OSError) -> NoReturn:
        if isinstance(exc, BrokenPipeError):
            raise exc
        raise RunError(f"cannot write {self._path}: {_reason(exc)}") from exc
