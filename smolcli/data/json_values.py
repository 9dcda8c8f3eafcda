"""The values of a JSON array, of objects that span several lines, or of a JSON text sequence."""

import re
from collections.abc import Iterator
from io import BufferedIOBase
from pathlib import Path

from smolcli.data.compression import read_some
from smolcli.data.jsonl import MAX_LINE_BYTES, Line, without_marks
from smolcli.data.source import READ_ERRORS
from smolcli.errors import InputError, error_reason
from smolcli.protocol.json_text import shorten

RECORD_SEPARATOR = b"\x1e"  # before each value of a JSON text sequence (RFC 7464)

_CHUNK_BYTES = 1 << 16
_OUTSIDE_STRINGS = re.compile(rb'["{}\[\],]')
_INSIDE_STRINGS = re.compile(rb'["\\\n]')
_BLANK = b" \t\r\n"


def json_values(file: BufferedIOBase, path: Path) -> Iterator[Line]:
    """Yield the text of each element of an array, or of each of several objects, numbered from 1.

    Values are split by counting brackets, so an invalid one does not affect the others. Objects may
    be separated by commas. A file that begins with a record separator is split at each of them.

    Args:
        file: the file to read.
        path: its path, for error messages.

    Raises:
        InputError: the file cannot be read, ends inside a value, or continues after its array.
    """
    splitter: _Splitter | _SequenceSplitter | None = None
    number = 0
    try:
        while chunk := read_some(file, _CHUNK_BYTES):
            if splitter is None:
                is_sequence = chunk.lstrip(_BLANK).startswith(RECORD_SEPARATOR)
                splitter = _SequenceSplitter() if is_sequence else _Splitter()
            for value in splitter.feed(chunk):
                number += 1
                yield Line(number, value)
        for value in splitter.finish() if splitter is not None else ():
            yield Line(number + 1, value)
    except (*READ_ERRORS, EOFError) as exc:
        where = f" after record {number}" if number else ""
        raise InputError(f"cannot read {path}{where}: {error_reason(exc)}") from exc


class _ValueBuffer:
    """The text of the value that is being read, up to MAX_LINE_BYTES of it."""

    def __init__(self) -> None:
        self._value = bytearray()
        self._is_too_long = False

    def _add(self, data: bytes) -> None:
        if len(self._value) + len(data) > MAX_LINE_BYTES:
            self._is_too_long = True
            data = b""
        self._value += data

    def _take(self) -> Iterator[bytes | None]:
        value = bytes(self._value).strip(_BLANK)
        if self._is_too_long:
            yield None
        elif value:
            yield value
        self._value.clear()
        self._is_too_long = False


class _SequenceSplitter(_ValueBuffer):
    """Splits a JSON text sequence at its record separators."""

    def feed(self, chunk: bytes) -> Iterator[bytes | None]:
        """Yield the values that end in a chunk; None for one longer than MAX_LINE_BYTES."""
        *ended, rest = chunk.split(RECORD_SEPARATOR)
        for part in ended:
            self._add(part)
            yield from self.finish()
        self._add(rest)

    def finish(self) -> Iterator[bytes | None]:
        """Yield the value before a separator or the end of the file, if any."""
        yield from self._take()


class _Splitter(_ValueBuffer):
    """Splits a stream of JSON text into its outermost values."""

    def __init__(self) -> None:
        super().__init__()
        self._base: int | None = None  # nesting depth of the values: 1 inside an array
        self._depth = 0
        self._is_in_string = False
        self._num_skipped = 0  # escaped bytes at the beginning of the next chunk
        self._is_closed = False  # whether the array has ended

    def feed(self, chunk: bytes) -> Iterator[bytes | None]:
        """Yield the values that end in a chunk; None for one longer than MAX_LINE_BYTES."""
        at, start = self._num_skipped, 0
        self._num_skipped = 0
        if self._base is None:
            lead = len(chunk) - len(chunk.lstrip(_BLANK))
            if lead == len(chunk):
                return
            self._base = int(chunk[lead : lead + 1] == b"[")
            at = start = lead + self._base
            self._depth = self._base
        while True:
            pattern = _INSIDE_STRINGS if self._is_in_string else _OUTSIDE_STRINGS
            if (match := pattern.search(chunk, at)) is None:
                break
            token, at = match[0], match.end()
            if token == b"\\":
                at += 1
                self._num_skipped = max(at - len(chunk), 0)
            elif token in b'"\n':  # a string ends with its line, so a broken one stays local
                self._is_in_string = not self._is_in_string
            elif self._is_closed:
                continue
            elif self._ends_value(token):
                includes = token != b"," and self._base == 0
                self._add(chunk[start : at if includes else match.start()])
                start = at
                yield from self._take()
                self._is_closed = self._depth < self._base
        self._add(chunk[start:])

    def finish(self) -> Iterator[bytes | None]:
        """Check that the last value is complete; there are no more.

        Raises:
            EOFError: it is not, or text follows the array.
        """
        yield from ()
        rest = without_marks(bytes(self._value).strip(_BLANK))
        if self._is_closed and (rest or self._is_too_long):
            shown = "" if self._is_too_long else f": {shorten(rest.decode(errors='replace'))!r}"
            raise EOFError(f"there is text after the closing bracket of the array{shown}")
        if self._depth or rest:
            raise EOFError("the file ends inside a JSON value")

    def _ends_value(self, token: bytes) -> bool:
        assert self._base is not None
        if token in b"{[":
            self._depth += 1
            return False
        if token in b"}]":
            self._depth = max(self._depth - 1, 0)
            return self._depth < self._base or self._depth == self._base == 0
        return self._depth == self._base
