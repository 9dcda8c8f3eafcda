"""Files that other processes see whole or not at all."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedIOBase
from pathlib import Path

from smolcli.errors import cannot_write


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file under a temporary name and rename it; the last of concurrent writers wins.

    Raises:
        OSError: the directory is missing or not writable.
    """
    partial = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[BufferedIOBase]:
    """Like `replacing_path`, with the new file open for writing."""
    with replacing_path(path) as unfinished, unfinished.open("wb") as file:
        yield file


@contextmanager
def replacing_path(path: Path) -> Iterator[Path]:
    """Yield where to write a file that replaces `path` atomically and durably at the block's end.

    There must be one writer at a time. An exception leaves the previous file in place.

    Raises:
        RunError: the file cannot be written.
    """
    path = Path(os.path.realpath(path))  # a symbolic link stays one
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        try:
            yield unfinished
            with unfinished.open("rb+") as file:
                os.fsync(file.fileno())
            unfinished.replace(path)
            sync_folder(path.parent)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as exc:
        raise cannot_write(path, exc) from exc


def sync_folder(folder: Path) -> None:
    """Make a rename durable. Windows cannot open folders, and does this by itself.

    Raises:
        OSError: the folder cannot be synced.
    """
    if os.name == "posix":
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
