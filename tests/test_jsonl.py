"""Reading lines from every kind of file, and writing results durably."""

import gzip
import json
import os
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest

from smolcli.data.jsonl import MAX_LINE_BYTES, Line, ResultWriter, is_stream, read_lines
from smolcli.errors import InputError, RunError
from smolcli.types import ErrorCode, FinishReason, Result, Timings, Usage

HI = Result("1", "Hi", FinishReason.STOP, usage=Usage(3, 2), line=1, timings=Timings(0.1, 0.2, 0.3))


def lines_of(path: Path, data: bytes) -> list[Line]:
    path.write_bytes(data)
    return list(read_lines(path))


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_lines_are_the_same_with_any_end_mark_and_compression(
    tmp_path: Path, end: bytes, bom: bytes, pack: object
) -> None:
    data = bom + end.join([b"a", b"", b" \t", b"b b", b"c"])  # no end after the last
    assert callable(pack)
    lines = lines_of(tmp_path / "x", pack(data))
    assert lines == [Line(1, b"a"), Line(4, b"b b"), Line(5, b"c")]


@pytest.mark.parametrize("data", [b"", b"\n\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\r\n\xef\xbb\xbf"])
def test_empty_file_has_no_lines(tmp_path: Path, data: bytes) -> None:
    assert lines_of(tmp_path / "x", data) == []


def test_byte_order_marks_of_joined_files_are_dropped(tmp_path: Path) -> None:
    """A line of nothing else used to be an error of its own."""
    bom = b"\xef\xbb\xbf"
    assert lines_of(tmp_path / "x", bom + bom + b"a\n" + bom + b"\r\n" + bom + b"b" + bom) == [
        Line(1, b"a"),
        Line(3, b"b" + bom),
    ]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b""])
def test_line_length_limit_is_exact(tmp_path: Path, end: bytes) -> None:
    longest = b"x" * MAX_LINE_BYTES
    assert lines_of(tmp_path / "x", longest + end) == [Line(1, longest)]
    assert lines_of(tmp_path / "x", longest + b"x" + end) == [Line(1, None)]
    assert lines_of(tmp_path / "x", 3 * longest + b"\nb" + end) == [Line(1, None), Line(2, b"b")]


def test_huge_line_is_never_held_in_memory(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "x", "wb") as file:
        for _ in range(40):
            file.write(b"x" * MAX_LINE_BYTES)
    tracemalloc.start()
    try:
        assert list(read_lines(tmp_path / "x")) == [Line(1, None)]
        assert tracemalloc.get_traced_memory()[1] < 8 * MAX_LINE_BYTES
    finally:
        tracemalloc.stop()


def test_unreadable_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*missing: No such file"):
        list(read_lines(tmp_path / "missing"))
    with pytest.raises(InputError, match="Is a directory"):
        list(read_lines(tmp_path))


def test_damaged_gzip_reports_how_far_it_was_read(tmp_path: Path) -> None:
    packed = gzip.compress(b"".join(b"%d\n" % number for number in range(100_000)))
    cut, flipped = tmp_path / "cut.gz", tmp_path / "flipped.gz"
    cut.write_bytes(packed[:-100])
    flipped.write_bytes(packed[:5000] + b"\xff" * 200 + packed[5200:])
    for path in (cut, flipped):
        lines = read_lines(path)
        with pytest.raises(InputError, match=r"after line \d+: ") as caught:
            list(lines)
        assert caught.value.__cause__ is not None


def test_stdin_may_be_compressed() -> None:
    script = (
        "from pathlib import Path; from smolcli.data.jsonl import read_lines;"
        "import sys; sys.stderr.write(str([l.number for l in read_lines(Path('-'))]))"
    )
    for data in (b"a\n\nb", gzip.compress(b"a\n\nb")):
        done = subprocess.run([sys.executable, "-c", script], input=data, capture_output=True)
        assert done.stderr == b"[1, 3]"


def test_stdin_and_devices_are_streams(tmp_path: Path) -> None:
    assert is_stream(Path("-"))
    assert is_stream(Path(os.devnull))
    assert not is_stream(tmp_path)
    assert not is_stream(tmp_path / "missing")


def test_result_is_written_immediately(tmp_path: Path) -> None:
    path = tmp_path / "out"
    writer = ResultWriter(path)
    writer.write(HI.record())
    assert path.read_bytes() == (
        b'{"chat_id":"1","response":"Hi","finish_reason":"stop",'
        b'"usage":{"prompt_tokens":3,"completion_tokens":2},"line":1}\n'
    )
    writer.close()


def test_output_is_utf8_and_lone_surrogates_are_replaced(tmp_path: Path) -> None:
    writer = ResultWriter(tmp_path / "out")
    bad = Result("é", error="\ud800", error_code=ErrorCode.INTERNAL, timings=HI.timings)
    for result in (bad, HI):
        writer.write(result.record(with_timings=True))
    writer.close()
    first, second = (tmp_path / "out").read_text("utf-8").splitlines()
    assert first == '{"chat_id":"é","error":"?","error_code":"internal",' + (
        '"timings":{"queue_s":0.1,"first_token_s":0.2,"total_s":0.3}}'
    )
    assert json.loads(second)["response"] == "Hi"


def test_rest_of_an_existing_file_is_truncated(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"whole\ntorn")
    writer = ResultWriter(path, num_bytes=6)
    writer.write(Result("2", error="x", error_code=ErrorCode.INTERNAL).record())
    writer.close()
    assert path.read_bytes() == b'whole\n{"chat_id":"2","error":"x","error_code":"internal"}\n'


def test_results_are_synced_during_a_pause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that synced only between writes would leave the last lines unsynced in a lull."""
    synced: list[float] = []
    monkeypatch.setattr("os.fsync", lambda fd: synced.append(time.monotonic()))
    writer = ResultWriter(tmp_path / "out")
    synced.clear()
    writer.write(HI.record())
    deadline = time.monotonic() + 60  # on a busy machine
    while not synced and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(synced) == 1
    writer.close()
    assert len(synced) == 1  # there was nothing new


def test_failed_sync_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = ResultWriter(tmp_path / "out")

    def fail(fd: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("os.fsync", fail)
    writer.write(HI.record())
    with pytest.raises(RunError, match=r"cannot write .*out: Input/output error"):
        writer.close()
    with pytest.raises(RunError, match=r"cannot write .*out: Input/output error"):
        ResultWriter(tmp_path / "out")  # an unclosed file would be a warning, which fails the test


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a full device")
def test_full_disk_is_reported() -> None:
    writer = ResultWriter(Path("/dev/full"))
    with pytest.raises(
        RunError, match="cannot write /dev/full: No space left on device; free some"
    ):
        writer.write(HI.record())
    writer.close()
