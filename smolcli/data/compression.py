"""Compressed files: detected by their first bytes on reading, by their suffix on writing."""

import bz2
import gzip
import io
import lzma
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_CHUNK_BYTES = 1 << 16
_DATA_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError, zstd.ZstdError)


class DecompressionError(Exception):
    """A compressed file is damaged, was cut off, or continues with something else."""


@dataclass(frozen=True, slots=True)
class Codec:
    """One compression format.

    Args:
        name: the format's name in messages.
        suffix: suffix of its file names.
        magic: the first bytes of its files.
        compress: compresses bytes to one complete member, deterministically. Concatenated members
            are a valid file, so each flush can write one member.
        decompressor: creates a decompressor of one member, like those of `bz2`.
    """

    name: str
    suffix: str
    magic: bytes
    compress: Callable[[bytes], bytes]
    decompressor: Callable[[], Any]

    def open(self, file: Any) -> io.BufferedReader:
        """Wrap a binary file in one that yields its decompressed bytes.

        Members may be concatenated, with zero bytes after each, as gzip and xz allow. Reading
        raises DecompressionError where the file is not valid: nothing else is skipped.
        """
        return io.BufferedReader(_Decompressed(file, self), _CHUNK_BYTES)


class _Decompressed(io.RawIOBase):
    def __init__(self, file: Any, codec: Codec) -> None:
        self._file = file
        self._codec = codec
        self._member = codec.decompressor()
        self._head = codec.magic  # the first bytes of the member

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = b""
        while not data:
            chunk = b""
            if self._member.eof:
                if not (chunk := self._next_member()):
                    return 0
                self._member, self._head = self._codec.decompressor(), chunk[:LONGEST_MAGIC]
            elif self._member.needs_input and not (chunk := read_some(self._file, _CHUNK_BYTES)):
                raise self._error("was cut off")
            try:
                data = self._member.decompress(chunk, len(buffer))
            except _DATA_ERRORS as exc:
                raise self._error("is damaged") from exc
        buffer[: len(data)] = data
        return len(data)

    def _next_member(self) -> bytes:
        """The first bytes after a member and its padding; empty at the end of the file."""
        data: bytes = self._member.unused_data.lstrip(b"\0")
        while len(data) < LONGEST_MAGIC and (chunk := read_some(self._file, _CHUNK_BYTES)):
            data = (data + chunk).lstrip(b"\0")
        return data

    def _error(self, fault: str) -> DecompressionError:
        magic = self._codec.magic[: len(self._head)]
        if not self._head.startswith(magic):
            return DecompressionError(f"it has other data after its {self._codec.name} data")
        return DecompressionError(f"its {self._codec.name} data {fault}")


class _GzipMember:
    """Decompresses one gzip member, with the interface of `bz2.BZ2Decompressor`."""

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)  # checks length and checksum
        self.needs_input = True

    @property
    def eof(self) -> bool:
        """Whether the member has ended."""
        return self._zlib.eof

    @property
    def unused_data(self) -> bytes:
        """The data after the member."""
        return self._zlib.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        """Up to `max_length` more bytes of the content."""
        content = self._zlib.decompress(self._zlib.unconsumed_tail + data, max_length)
        self.needs_input = len(content) < max_length
        return content


def read_some(file: Any, num_bytes: int) -> bytes:
    """Up to `num_bytes`, without waiting for all of them; empty at the end of the file."""
    read = getattr(file, "read1", file.read)
    data: bytes = read(num_bytes)
    return data


CODECS = (
    Codec("gzip", ".gz", b"\x1f\x8b", lambda data: gzip.compress(data, mtime=0), _GzipMember),
    Codec("Zstandard", ".zst", b"\x28\xb5\x2f\xfd", zstd.compress, zstd.ZstdDecompressor),
    Codec("bzip2", ".bz2", b"BZh", bz2.compress, bz2.BZ2Decompressor),
    Codec("xz", ".xz", b"\xfd7zXZ\x00", lzma.compress, lzma.LZMADecompressor),
)
# Names of files that are neither text nor compressed in one of these formats.
FOREIGN_SUFFIXES = (
    *(".7z", ".br", ".lz", ".lz4", ".lzma", ".rar", ".sz", ".z", ".zip"),
    *(".tar", ".tbz2", ".tgz", ".txz"),
    *(".avro", ".ods", ".orc", ".xls", ".xlsx"),
)
LONGEST_MAGIC = max(len(codec.magic) for codec in CODECS)


def codec_of_bytes(head: bytes) -> Codec | None:
    """The codec of a file that begins with `head`; None if it is not compressed."""
    return next((codec for codec in CODECS if head.startswith(codec.magic)), None)


def codec_of_name(path: Path) -> Codec | None:
    """The codec that a file's suffix stands for, if any."""
    return next((codec for codec in CODECS if path.suffix.lower() == codec.suffix), None)


def without_codec_suffix(path: Path) -> Path:
    """The path without a compression suffix: `x.csv` for `x.csv.gz`."""
    return path if codec_of_name(path) is None else path.with_suffix("")
