"""Detects the kind of an input file from its name and its first lines."""

import csv
import io
import json
import re
from collections.abc import Collection, Iterator
from itertools import islice, tee
from pathlib import Path
from typing import Literal, get_args

from smolcli.data.compression import codec_of_bytes, without_codec_suffix
from smolcli.data.json_values import RECORD_SEPARATOR
from smolcli.errors import QueryError, UsageError
from smolcli.protocol.json_text import load_json, shorten
from smolcli.settings import InputFormat

TableKind = Literal["csv", "tsv", "parquet", "arrow", "sqlite"]
Kind = Literal["jsonl", "json", "text", TableKind]

SAMPLE_LINES = 64
SAMPLE_BYTES = 1 << 16
DELIMITERS = (",", ";", "\t", "|")
TEXT_COLUMN = "text"  # of a file with one prompt per line

_KINDS: tuple[Kind, ...] = get_args(Kind)
_TABLES: dict[str, TableKind] = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    **dict.fromkeys((".arrow", ".feather", ".ipc"), "arrow"),
    **dict.fromkeys((".db", ".sqlite", ".sqlite3"), "sqlite"),
}
# The first line of a CSV file that tells Excel the delimiter.
_STATED_DELIMITER = re.compile(rb"sep=([!#-~\t])\r?\n")
_BINARY: dict[bytes, Kind] = {
    b"PAR1": "parquet",
    b"ARROW1": "arrow",
    b"\xff\xff\xff\xff": "arrow",  # the first message of a stream
    b"SQLite format 3\0": "sqlite",
}
_TAR_MAGIC_AT = 257  # after the name and the attributes of the first file
_UNSUPPORTED = {
    b"PK\x03\x04": "a zip archive or an Excel workbook; extract it, or export it as CSV",
    b"\xd0\xcf\x11\xe0": "an Excel workbook; export it as CSV",
    b"%PDF": "a PDF document",
    b"FEA1": "a Feather file of version 1; write it again as version 2",
    b"Obj\x01": "an Avro file; convert it to Parquet or JSON lines",
    b"\x04\x22\x4d\x18": "compressed with LZ4; decompress it first",
    b"ORC": "an ORC file; convert it to Parquet",
    b"7z\xbc\xaf\x27\x1c": "a 7-Zip archive; extract it",
    b"Rar!": "a RAR archive; extract it",
}


def table_kind(path: Path) -> TableKind | None:
    """The kind of a table by its name, compressed or not; None if the name is not a table's."""
    return _TABLES.get(without_codec_suffix(path).suffix.lower())


def kind_of_name(path: Path, input_format: InputFormat) -> Kind | None:
    """The kind that the option or the file suffix states; None if the content must tell."""
    if input_format == "auto" and (kind := table_kind(path)) is not None:
        return kind
    return next((kind for kind in _KINDS if kind == input_format), None)


class Sample:
    """The first lines of a file, read only as far as the decision needs.

    Args:
        file: the file to read; `head` is what has been consumed.
    """

    def __init__(self, file: io.BufferedIOBase) -> None:
        self._file = file
        self._lines = self._read()
        self.head = b""
        self.is_whole = False

    def lines(self) -> Iterator[bytes]:
        """The lines that are not blank, from the first one, without white space around them."""
        self._lines, lines = tee(self._lines)
        return lines

    def _read(self) -> Iterator[bytes]:
        for _ in range(SAMPLE_LINES):
            line = self._file.readline(SAMPLE_BYTES - len(self.head))
            self.head += line
            if not line:
                self.is_whole = len(self.head) < SAMPLE_BYTES
                return
            if line.strip():
                yield line.strip()


def detect_kind(
    sample: Sample,
    path: Path,
    input_format: InputFormat,
    columns: Collection[str] = (),
) -> Kind:
    """Detect the kind of an input from its content.

    A line that begins with a brace, anywhere in the sample, means JSON lines; all other lines are
    then invalid lines.

    Args:
        sample: the beginning of the file.
        path: its name; a .txt file that is not JSON has one prompt per line.
        input_format: the value of `--input-format`.
        columns: columns that options name; if there are any, a .txt file may be a table.

    Raises:
        UsageError: the format is not supported.
    """
    first = next(sample.lines(), b"")
    for magic, kind in _BINARY.items():
        if sample.head.startswith(magic):
            return kind
    reject_unsupported(first, path)
    if _begins_json(first, sample):
        return "json"
    if input_format in ("smol", "openai", "bare"):
        return "jsonl"
    is_txt = without_codec_suffix(path).suffix.lower() == ".txt"
    if is_txt and not first.startswith(b"{") and b"\0" not in first:
        return _kind_of_text(sample, columns)
    has_object = any(line.startswith(b"{") for line in sample.lines())
    if has_object or all(map(_is_json, sample.lines())):
        return "jsonl"
    if _guess_delimiter(sample.head, sample.is_whole) is not None:
        return "csv"
    what = "it is a binary file" if b"\0" in sample.head else f"it begins with {_quoted(first)}"
    raise UsageError(
        f"{path} is not JSON lines, a JSON array or a table: {what}; specify --encoding or "
        "--input-format, such as text for one prompt per line"
    )


def _begins_json(first: bytes, sample: Sample) -> bool:
    """Whether a first line begins JSON that is not one value per line."""
    if first == b"{" or first.startswith(RECORD_SEPARATOR):
        return True
    if first.startswith(b"{"):
        has_old_ends = b"\r" in first and b"\n" not in sample.head
        return has_old_ends or _has_several_objects(first)
    return first.startswith(b"[") and _is_array(first, sample)


def _kind_of_text(sample: Sample, columns: Collection[str]) -> Kind:
    """The kind of a .txt file whose first line is not JSON.

    Lines with equally many commas are a table if options name its columns. `text` may also be the
    column of a prompt per line, unless the first row has that name.
    """
    if any(line.startswith(b"{") and _is_json(line) for line in sample.lines()):
        return "jsonl"
    delimiter = _guess_delimiter(sample.head, sample.is_whole) if columns else None
    if delimiter is None:
        return "text"
    if set(columns) == {TEXT_COLUMN}:
        head = io.StringIO(sample.head.decode(errors="replace"), newline="")
        header = next(row for row in csv.reader(head, delimiter=delimiter) if row)
        return "csv" if TEXT_COLUMN in header else "text"
    return "csv"


def reject_unsupported(head: bytes, path: Path) -> None:
    """Reject a file whose first bytes identify an unsupported format.

    Raises:
        UsageError: naming the format.
    """
    for magic, what in _UNSUPPORTED.items():
        if head.startswith(magic):
            raise UsageError(f"{path} is {what}")
    if codec_of_bytes(head) is not None:
        raise UsageError(f"{path} is compressed twice; decompress it once")
    if head[_TAR_MAGIC_AT:].startswith(b"ustar") and b"\0" in head[:_TAR_MAGIC_AT]:
        raise UsageError(f"{path} is a tar archive; extract it")


def guess_delimiter(sample: Sample) -> str:
    """The delimiter of a CSV file: a comma, unless another one fits the first rows better."""
    for _ in sample.lines():
        pass
    found = _guess_delimiter(sample.head, sample.is_whole)
    if found is None:  # one column only, or most rows do not fit the header
        header = sample.head.partition(b"\n")[0].decode(errors="replace")
        counts = {delimiter: header.count(delimiter) for delimiter in DELIMITERS}
        found = max(DELIMITERS, key=lambda each: (each == "," and counts[each] > 0, counts[each]))
    return found


def _guess_delimiter(head: bytes, is_whole: bool) -> str | None:
    """The delimiter that splits most rows of a sample into as many cells as the header.

    It need not fit every row: an invalid one does not decide.
    """
    if stated := _STATED_DELIMITER.match(head):
        return stated[1].decode()
    shares = {delimiter: _share_that_fits(head, is_whole, delimiter) for delimiter in DELIMITERS}
    best = max(DELIMITERS, key=lambda each: shares[each])
    return best if shares[best] > 0.5 else None


def _share_that_fits(head: bytes, is_whole: bool, delimiter: str) -> float:
    """The share of rows with as many cells as the header; 0 if that is a single cell."""
    text = io.StringIO(head.decode(errors="replace"), newline="")
    try:
        header, *rows = [row for row in csv.reader(text, delimiter=delimiter) if row] or [[]]
    except csv.Error:
        return 0.0
    if not is_whole and rows:
        rows.pop()  # it may be cut off
    if len(header) < 2 or not rows:
        return 0.0
    return sum(len(row) == len(header) for row in rows) / len(rows)


def _is_array(first: bytes, sample: Sample) -> bool:
    """Whether a first line that begins with a bracket starts an array with elements of any kind.

    Otherwise it is an invalid line, such as a log line or an array in place of an object.
    """
    if _is_json(first):
        return next(islice(sample.lines(), 1, None), None) is None
    rest = first[1:].lstrip()
    return not rest or rest.startswith((b"{", b"]"))


def _has_several_objects(line: bytes) -> bool:
    """Whether a line that begins with a brace is an object before a comma or another object."""
    text = line.decode(errors="replace")
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return False
    return text[end:].lstrip().startswith((",", "{"))


def _is_json(line: bytes) -> bool:
    try:
        load_json(line)
    except QueryError:
        return False
    return True


def _quoted(line: bytes) -> str:
    return repr(shorten(line.decode(errors="replace"))) if line else "an empty line"
