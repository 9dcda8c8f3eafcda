"""The bytes of an input as UTF-8 text, whatever its compression and encoding."""

import codecs
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from smolcli.data.compression import (
    CODECS,
    LONGEST_MAGIC,
    DecompressionError,
    codec_of_bytes,
    read_some,
)
from smolcli.errors import InputError, UsageError, cannot_read, error_reason

READ_ERRORS = (OSError, DecompressionError, UnicodeError)

_CHUNK_BYTES = 1 << 16
_BYTE_ORDER_MARKS = (  # UTF-32's little-endian mark begins with UTF-16's
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_WIDE = ("utf-16", "utf-32")


class Prefixed(io.RawIOBase):
    """A stream that yields bytes already read from a file, then the rest of the file."""

    def __init__(self, head: bytes, file: Any) -> None:
        self._head = memoryview(head)
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._head[: len(buffer)] or read_some(self._file, len(buffer))
        self._head = self._head[len(data) :]
        buffer[: len(data)] = data
        return len(data)


class _Transcoded(io.RawIOBase):
    """A stream of text in some encoding, as UTF-8.

    Bytes that are invalid in the encoding become invalid UTF-8, so that only their own line
    fails.
    """

    def __init__(self, file: Any, encoding: str) -> None:
        self._file = file
        is_wide = codecs.lookup(encoding).name.startswith(_WIDE)
        self._errors = "surrogatepass" if is_wide else "surrogateescape"
        self._decoder = codecs.getincrementaldecoder(encoding)(self._errors)
        self._data = memoryview(b"")
        self._is_done = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._data and not self._is_done:
            chunk = read_some(self._file, _CHUNK_BYTES)
            self._is_done = not chunk
            text = self._decoder.decode(chunk, final=self._is_done)
            self._data = memoryview(text.encode("utf-8", self._errors))
        data = self._data[: len(buffer)]
        self._data = self._data[len(data) :]
        buffer[: len(data)] = data
        return len(data)


@contextmanager
def open_source(path: Path, encoding: str | None = None) -> Iterator[io.BufferedIOBase]:
    """Open a file, or stdin for `-`, as UTF-8 text without a byte order mark.

    Compression is recognized by the first bytes, and so are UTF-16 and UTF-32.

    Args:
        path: the file.
        encoding: name of its encoding; None means UTF-8 unless the first bytes say otherwise.

    Raises:
        InputError: the file cannot be opened.
        UsageError: the encoding does not exist.
    """
    if encoding is not None:
        check_encoding(encoding)
    is_stdin = str(path) == "-"
    try:
        file = open(0 if is_stdin else path, "rb", closefd=not is_stdin)  # noqa: SIM115
    except OSError as exc:
        raise cannot_read(path, exc) from exc
    with file:
        try:
            text = _decoded(_decompressed(file), encoding)
        except READ_ERRORS as exc:
            raise InputError(f"cannot read {path}: {error_reason(exc)}") from exc
        yield text


def check_encoding(encoding: str) -> None:
    """Check that text can be decoded from an encoding.

    Raises:
        UsageError: it does not exist, or is not an encoding of text.
    """
    try:
        "".encode(encoding)
        codecs.getincrementaldecoder(encoding)("surrogateescape").decode(b"", final=True)
    except (LookupError, ValueError) as exc:  # the latter for idna, undefined and odd names
        raise UsageError(f"--encoding: unknown text encoding {encoding!r}") from exc


def _decompressed(file: Any) -> io.BufferedIOBase:
    def may_be_compressed(head: bytes) -> bool:
        return any(codec.magic.startswith(head[: len(codec.magic)]) for codec in CODECS)

    head = _take(file, LONGEST_MAGIC, may_be_compressed)
    whole = io.BufferedReader(Prefixed(head, file), _CHUNK_BYTES)
    codec = codec_of_bytes(head)
    return whole if codec is None else codec.open(whole)


def _decoded(file: Any, encoding: str | None) -> io.BufferedIOBase:
    def may_be_encoded(head: bytes) -> bool:
        marks = (mark for mark, _ in _BYTE_ORDER_MARKS)
        return len(head) < 2 or 0 in head[:2] or any(m.startswith(head[: len(m)]) for m in marks)

    head = _take(file, 4, may_be_encoded)
    mark, marked = next(((m, e) for m, e in _BYTE_ORDER_MARKS if head.startswith(m)), (b"", None))
    if encoding is None or codecs.lookup(encoding).name in ("utf-8", "utf-8-sig"):
        encoding, head = marked or _unmarked(head), head.removeprefix(mark)
    whole = io.BufferedReader(Prefixed(head, file), _CHUNK_BYTES)
    if encoding == "utf-8":
        return whole
    return io.BufferedReader(_Transcoded(whole, encoding), _CHUNK_BYTES)


def _unmarked(head: bytes) -> str:
    """The encoding of text without a byte order mark, whose first character is ASCII."""
    match [byte == 0 for byte in head[:4]]:
        case [False, True, True, True]:
            return "utf-32-le"
        case [True, True, True, False]:
            return "utf-32-be"
        case [False, True, *_]:
            return "utf-16-le"
        case [True, False, *_]:
            return "utf-16-be"
    return "utf-8"


def _take(file: Any, num_bytes: int, is_undecided: Callable[[bytes], bool]) -> bytes:
    """The first bytes of a file, as few as the decision needs, because a pipe may block."""
    head = b""
    while len(head) < num_bytes and is_undecided(head):
        data = read_some(file, num_bytes - len(head))
        if not data:
            break
        head += data
    return head
