"""Compressed files: detected by their first bytes on reading, by their suffix on writing."""

import bz2
import gzip
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

# What reading a damaged or truncated file raises, besides OSError.
DECOMPRESSION_ERRORS = (EOFError, zlib.error, lzma.LZMAError, zstd.ZstdError)


@dataclass(frozen=True, slots=True)
class Codec:
    """One compression format.

    Args:
        name: the format's name in messages.
        suffix: suffix of its file names.
        magic: the first bytes of its files.
        open: wraps a binary file in one that yields its decompressed bytes, across concatenated
            members.
        compress: compresses bytes to one complete member, deterministically. Concatenated members
            are a valid file, so each flush can write one member.
    """

    name: str
    suffix: str
    magic: bytes
    open: Callable[[Any], Any]
    compress: Callable[[bytes], bytes]


CODECS = (
    Codec("gzip", ".gz", b"\x1f\x8b", gzip.open, lambda data: gzip.compress(data, mtime=0)),
    Codec("Zstandard", ".zst", b"\x28\xb5\x2f\xfd", zstd.open, zstd.compress),
    Codec("bzip2", ".bz2", b"BZh", bz2.open, bz2.compress),
    Codec("xz", ".xz", b"\xfd7zXZ\x00", lzma.open, lzma.compress),
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
