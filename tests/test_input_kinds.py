"""Detection of compression, encoding, and JSON lines, JSON arrays or tables by content."""

import bz2
import gzip
import io
import json
import lzma
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import EchoBackend
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from smolcli.cli.main import app
from smolcli.data.compression import CODECS, Codec
from smolcli.data.json_values import json_values
from smolcli.data.jsonl import MAX_LINE_BYTES, read_lines
from smolcli.data.reader import read_rows
from smolcli.data.source import check_encoding
from smolcli.errors import InputError, UsageError
from smolcli.settings import RowSettings

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

QUERIES = [{"chat_id": name, "user_prompt": f"Grüße, {name}"} for name in "abc"]
LINES = "".join(json.dumps(query, ensure_ascii=False) + "\n" for query in QUERIES)
CSV = "id;review\n1;Nice, kettle\n2;Bad\n"


def rows(path: Path, settings: RowSettings | None = None) -> list[Any]:
    return [row.value for row in read_rows(path, settings or RowSettings())]


def write(path: Path, data: str | bytes) -> Path:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def check(data: bytes) -> "subprocess.CompletedProcess[bytes]":
    """`smol run - --check` on some bytes from a pipe."""
    command = [sys.executable, "-m", "smolcli", "run", "-", "--check"]
    return subprocess.run(command, input=data, capture_output=True)


# Compression.


@pytest.mark.parametrize("compress", [gzip.compress, zstd.compress, bz2.compress, lzma.compress])
@pytest.mark.parametrize("name", ["in.jsonl", "in.gz"])
def test_compression_is_recognized_by_content(
    tmp_path: Path, compress: Callable[[bytes], bytes], name: str
) -> None:
    data = compress(LINES[:20].encode()) + compress(LINES[20:].encode())
    assert rows(write(tmp_path / name, data)) == QUERIES


@pytest.mark.parametrize(
    "data",
    [
        zstd.compress(LINES.encode()),
        LINES.encode("utf-16"),
        json.dumps(QUERIES, indent=2).encode(),
        b"".join(b"chat_id,user_prompt\n" if n == 0 else b"%d,Hi\n" % n for n in range(4)),
    ],
)
def test_stdin_may_be_of_any_kind(data: bytes) -> None:
    done = check(data)
    assert (done.returncode, done.stderr.startswith(b"3 lines, 0")) == (0, True), done.stderr


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_truncated_compressed_input_is_an_error(tmp_path: Path, codec: Codec) -> None:
    data = codec.compress(LINES.encode() * 100)
    for cut in (data[:-9], data + data[:2]):
        with pytest.raises(InputError, match=f"cannot read .*: its {codec.name} data was cut off"):
            list(read_lines(write(tmp_path / "x", cut)))


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
@pytest.mark.parametrize("rest", [b"\n", LINES.encode()])
def test_other_data_after_compressed_data_is_an_error(
    tmp_path: Path, codec: Codec, rest: bytes
) -> None:
    """It used to be ignored after bzip2 and xz, along with anything behind xz's padding."""
    path = write(tmp_path / "x", codec.compress(LINES.encode()) + bytes(4) + rest)
    with pytest.raises(InputError, match=f"after line 3: it has other data after its {codec.name}"):
        list(read_lines(path))


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_compression_is_deterministic_and_members_concatenate(codec: Codec) -> None:
    assert codec.compress(b"a") == codec.compress(b"a")
    padding = bytes(4)
    packed = codec.compress(b"a") + padding + codec.compress(b"b") + padding
    with codec.open(io.BytesIO(packed)) as file:
        assert file.read() == b"ab"


def test_compressed_tables_are_recognized_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv.zst", zstd.compress(b"id,t\n1,x\n"))
    assert [row["user_prompt"] for row in rows(path, RowSettings("{t}"))] == ["x"]


# Encodings.


@pytest.mark.parametrize(
    "encoding",
    ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"],
)
def test_unicode_encodings_are_detected(tmp_path: Path, encoding: str) -> None:
    """PowerShell and Excel write UTF-16; each line used to be an error of its own."""
    data = LINES.replace("\n", "\r\n").encode(encoding)
    assert rows(write(tmp_path / "x", data)) == QUERIES
    assert rows(write(tmp_path / "x.gz", gzip.compress(data))) == QUERIES


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "utf-16", "shift-jis", "utf-8"])
def test_other_encodings_are_read_on_request(tmp_path: Path, encoding: str) -> None:
    text = LINES if encoding != "shift-jis" else LINES.replace("Grüße", "こんにちは")
    path = write(tmp_path / "x.jsonl", text.encode(encoding))
    found = rows(path, RowSettings(encoding=encoding))
    assert found == [json.loads(line) for line in text.splitlines()]


def test_invalid_bytes_are_the_fault_of_their_line(tmp_path: Path) -> None:
    text = LINES.encode("utf-16-le").replace("b".encode("utf-16-le"), b"\x00\xd8", 1)
    errors = [row.error for row in read_rows(write(tmp_path / "x", text), RowSettings())]
    assert [error is None for error in errors] == [True, False, True]
    assert "not UTF-8" in str(errors[1])


@pytest.mark.parametrize("encoding", ["klingon", "base64", "undefined", "idna", "punycode", "a\0"])
def test_unknown_encoding_is_wrong_usage(encoding: str) -> None:
    """`undefined` and names with a null character used to end in a traceback."""
    with pytest.raises(UsageError, match="unknown text encoding"):
        check_encoding(encoding)


# JSON arrays and objects on several lines.


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("end", ["", "\n", "\n\n"])
def test_json_array_is_read(tmp_path: Path, indent: int | None, end: str) -> None:
    path = write(tmp_path / "x.json", json.dumps(QUERIES, indent=indent) + end)
    assert rows(path) == QUERIES
    assert [row.number for row in read_rows(path, RowSettings())] == [1, 2, 3]
    assert [row.number for row in read_rows(path, RowSettings(), after=2)] == [3]


def test_objects_on_several_lines_are_read(tmp_path: Path) -> None:
    text = "\n".join(json.dumps(query, indent=2) for query in QUERIES)
    assert rows(write(tmp_path / "x.jsonl", text)) == QUERIES


def test_invalid_element_harms_no_other(tmp_path: Path) -> None:
    long = json.dumps({"chat_id": "l", "user_prompt": "x" * MAX_LINE_BYTES})
    text = f'[\n{{"chat_id": "a"}},\n{{"chat_id" "b"}},\nnull, {long}, {{"n": NaN}},\n{{"c": 1}}\n]'
    found = list(read_rows(write(tmp_path / "x", text), RowSettings()))
    codes = [str(row.error.code) if row.error else None for row in found]
    assert codes == [None, "invalid_json", None, "line_too_long", "invalid_json", None]


def test_array_that_is_cut_off_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "x", json.dumps(QUERIES)[:-20])
    with pytest.raises(InputError, match="after record 2: the file ends inside a JSON value"):
        list(read_rows(path, RowSettings()))


def test_objects_may_be_separated_by_commas(tmp_path: Path) -> None:
    for text in (
        ",\n".join(LINES.splitlines()),
        LINES.replace("\n", ", "),
        LINES.replace("\n", ""),
    ):
        assert rows(write(tmp_path / "x", text)) == QUERIES


@pytest.mark.parametrize("indent", [None, 2])
def test_json_text_sequences_are_read(tmp_path: Path, indent: int | None) -> None:
    """A value that was cut off ends at the next record separator (RFC 7464)."""
    texts = [json.dumps(query, indent=indent) for query in QUERIES]
    text = f"\x1e{texts[0]}\n\x1e{texts[1][:20]}\n\x1e{texts[2]}\n"
    found = list(read_rows(write(tmp_path / "x", text), RowSettings()))
    assert [row.error is None for row in found] == [True, False, True]
    assert [row.value for row in found[::2]] == QUERIES[::2]


@pytest.mark.parametrize("rest", ["oops", ', {"chat_id": "d"}', "]", '[{"chat_id": "d"}]'])
def test_text_after_an_array_is_an_error(tmp_path: Path, rest: str) -> None:
    path = write(tmp_path / "x", json.dumps(QUERIES, indent=1) + rest)
    with pytest.raises(InputError, match="text after the closing bracket of the array"):
        list(read_rows(path, RowSettings()))


TEXT = st.text(st.characters(codec="utf-8"), max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=10,
)
OBJECTS = st.lists(st.dictionaries(TEXT, VALUES, max_size=3), max_size=5)


class Trickle(io.BytesIO):
    """Returns a few bytes at a time, as a pipe may."""

    def __init__(self, data: bytes, size: int) -> None:
        super().__init__(data)
        self.size = size

    def read1(self, size: int | None = -1) -> bytes:
        return super().read1(self.size)


@given(OBJECTS, st.sampled_from([None, 0, 2]), st.booleans(), st.integers(1, 9))
def test_any_array_is_split_into_its_elements(
    objects: list[Any], indent: int | None, is_array: bool, size: int
) -> None:
    whole = json.dumps(objects, indent=indent, ensure_ascii=False)
    text = whole if is_array else "\n".join(json.dumps(each, indent=indent) for each in objects)
    found = json_values(Trickle(text.encode(), size), Path("x"))
    assert [json.loads(line.data or b"") for line in found] == objects


# Kinds of files.


@pytest.mark.parametrize(
    "first", ["oops, a log line", "[INFO] starting", "[]", '["a"]', "null", "3"]
)
def test_invalid_first_line_does_not_decide_what_a_file_is(tmp_path: Path, first: str) -> None:
    for queries in (QUERIES, QUERIES[:1]):
        lines = [first, *map(json.dumps, queries), "another log line"]
        found = list(read_rows(write(tmp_path / "x", "\n".join(lines)), RowSettings()))
        assert [row.value for row in found[1:-1]] == queries


def test_table_is_recognized_without_its_suffix(tmp_path: Path) -> None:
    found = rows(write(tmp_path / "x", CSV), RowSettings("{review}"))
    assert [row["user_prompt"] for row in found] == ["Nice, kettle", "Bad"]


@pytest.mark.parametrize("bad", ["short", "too;many;cells", '"not closed;'])
def test_invalid_row_does_not_decide_what_a_file_is(tmp_path: Path, bad: str) -> None:
    """One row with a wrong number of cells used to keep a table on stdin from being recognized."""
    path = write(tmp_path / "x", f"{CSV}{bad}\n4;Good\n")
    found = list(read_rows(path, RowSettings("{review}")))
    assert [row.error is None for row in found] == [True, True, False, True]


@pytest.mark.parametrize("elements", [[], ["a", 1], [None, *QUERIES], [["id", "text"], [1, "a"]]])
@pytest.mark.parametrize("indent", [None, 2])
def test_array_of_anything_is_read(tmp_path: Path, elements: list[Any], indent: int | None) -> None:
    """An element that is not an object is an error of its row, not of the file."""
    assert rows(write(tmp_path / "x", json.dumps(elements, indent=indent))) == elements


@pytest.mark.parametrize("name", ["x", "x.csv"])
def test_lines_may_end_in_carriage_returns(tmp_path: Path, name: str) -> None:
    """Excel's "CSV (Macintosh)" used to be rejected for a carriage return outside quotes."""
    found = rows(write(tmp_path / name, CSV.replace("\n", "\r")), RowSettings("{review}"))
    assert [(row["chat_id"], row["user_prompt"]) for row in found] == [
        ("2", "Nice, kettle"),
        ("3", "Bad"),
    ]
    assert rows(write(tmp_path / "y", LINES.replace("\n", "\r"))) == QUERIES


@pytest.mark.parametrize("name", ["x", "x.csv"])
@pytest.mark.parametrize("delimiter", [";", ":", "\t"])
def test_first_line_may_state_the_delimiter(tmp_path: Path, name: str, delimiter: str) -> None:
    """Excel's `sep=;` used to be read as the header."""
    text = f"sep={delimiter}\r\n{CSV.replace(';', delimiter)}"
    found = rows(write(tmp_path / name, text), RowSettings("{review}", "id"))
    assert [row["user_prompt"] for row in found] == ["Nice, kettle", "Bad"]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"PK\x03\x04....", "a zip archive or an Excel workbook"),
        (b"%PDF-1.7\n\n", "a PDF document"),
        (b"a.jsonl".ljust(257, b"\0") + b"ustar\x0000", "a tar archive; extract it"),
        (b"\x04\x22\x4d\x18....", "compressed with LZ4"),
        (
            gzip.compress(gzip.compress(b"{}", mtime=0), mtime=0),
            "compressed twice; decompress it once",
        ),
        (b"\x7fELF\2\1\1\0\0\0", "a binary file"),
        (b"Once upon a time\nthere was a line.\n", "begins with 'Once upon a time'"),
        (b"<html>\n<body>\n", "begins with '<html>'"),
    ],
)
def test_input_of_no_known_kind_is_one_error(tmp_path: Path, data: bytes, said: str) -> None:
    """Every line used to be an error of its own, with exit code 3."""
    with pytest.raises(UsageError, match=said):
        rows(write(tmp_path / "x.jsonl", data))
    if data.startswith(b"PK"):
        with pytest.raises(UsageError, match=said):
            rows(write(tmp_path / "x.csv", data), RowSettings("{a}"))
    done = CliRunner().invoke(app, ["run", str(tmp_path / "x.jsonl"), "--check"])
    assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (2, "", 1)


@pytest.mark.parametrize("name", ["x.parquet.gz", "x.arrow", "x.db.zst"])
def test_compressed_binary_file_is_explained(tmp_path: Path, name: str) -> None:
    """It was said to be damaged."""
    path = write(tmp_path / name, CODECS[0].compress(b"PAR1"))
    with pytest.raises(UsageError, match="is compressed with gzip; decompress it first"):
        rows(path, RowSettings("{a}"))


@pytest.mark.parametrize(
    ("input_format", "data"),
    [
        ("csv", "review\nNice\nBad\n"),
        ("csv", '{a},review\n{"1"},Nice\n2,Bad\n'),
        ("tsv", "id\treview\n1\tNice\n2\tBad\n"),
        ("jsonl", '{"review": "Nice"}\n{"review": "Bad"}\n'),
        ("json", '[{"review": "Nice"}, {"review": "Bad"}]'),
    ],
)
def test_input_format_can_be_stated(tmp_path: Path, input_format: Any, data: str) -> None:
    path = write(tmp_path / "x.txt", data)
    found = rows(path, RowSettings("{review}", input_format=input_format))
    assert [row["user_prompt"] for row in found] == ["Nice", "Bad"]


def test_line_format_can_be_stated(tmp_path: Path) -> None:
    """Every line is parsed in the stated format, and fails."""
    path = write(tmp_path / "in.jsonl", LINES)
    args = ["run", str(path), "--input-format", "openai", "-o", str(tmp_path / "out.jsonl")]
    done = CliRunner().invoke(app, args, obj=EchoBackend)
    assert done.exit_code == 3
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [record["response"]["status_code"] for record in records] == [400, 400, 400]


# Delimiters.


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_delimiter_of_a_csv_file_is_detected(tmp_path: Path, delimiter: str) -> None:
    text = f'id{delimiter}review\n1{delimiter}"a{delimiter}b, c;\nd"\n2{delimiter}Bad\n'
    found = rows(write(tmp_path / "x.csv", text), RowSettings("{review}"))
    assert [row["user_prompt"] for row in found] == [f"a{delimiter}b, c;\nd", "Bad"]


def test_delimiter_can_be_stated(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", "id:review\n1:Nice, kettle\n")
    assert rows(path, RowSettings("{review}", delimiter=":"))[0]["user_prompt"] == "Nice, kettle"
    for text, code in (("tab", 2), ("", 2), ("ab", 2), ('"', 2), (":", 0)):
        done = CliRunner().invoke(
            app, ["run", str(path), "--check", "--prompt", "{review}", "--delimiter", text]
        )
        assert done.exit_code == code, text
