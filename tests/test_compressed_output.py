"""Compressed outputs: valid at any time, resumable, and equal for equal runs."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import DyingBackend, EchoBackend
from run_tools import answer, no_backend
from typer.testing import CliRunner

from smolcli.batch.manifest import manifest_path
from smolcli.cli.main import app
from smolcli.data.compression import CODECS, codec_of_name
from smolcli.errors import BackendError, ResumeError, UsageError
from smolcli.settings import RunSettings
from smolcli.types import ErrorCode, Query, Result, failure

NUM_LINES = 30
SUFFIXES = [codec.suffix for codec in CODECS]


@pytest.fixture(params=SUFFIXES)
def job(request: pytest.FixtureRequest, tmp_path: Path) -> RunSettings:
    """A run of 30 lines, three of them invalid, to a compressed output."""
    lines = [{"chat_id": str(n), "user_prompt": f"question {n}"} for n in range(NUM_LINES)]
    texts = ["{" if n % 10 == 3 else json.dumps(line) for n, line in enumerate(lines)]
    (tmp_path / "in.jsonl").write_text("\n".join(texts) + "\n", "utf-8")
    return RunSettings(tmp_path / "in.jsonl", tmp_path / f"out.jsonl{request.param}", seed=5)


def content(path: Path) -> bytes:
    codec = codec_of_name(path)
    assert codec is not None
    with path.open("rb") as packed, codec.open(packed) as file:
        data = file.read()
        assert isinstance(data, bytes)
        return data


def plain(job: RunSettings) -> bytes:
    """The bytes that an uncompressed output has."""
    job = replace(job, output=job.output.with_name("plain.jsonl"), errors=None)
    answer(job)
    return job.output.read_bytes()


def test_output_is_compressed_by_its_suffix(job: RunSettings) -> None:
    """The suffix was ignored, and `x.jsonl.gz` was plain text."""
    answer(job)
    assert content(job.output) == plain(job)
    before = job.output.stat().st_mtime_ns
    answer(job, no_backend)
    assert job.output.stat().st_mtime_ns == before


def test_interrupted_run_is_resumed_to_the_same_bytes(job: RunSettings) -> None:
    whole = replace(job, output=job.output.with_name(f"whole{job.output.suffix}"))
    answer(whole)
    for num_answers in (4, 9):
        with pytest.raises(BackendError):
            answer(job, lambda settings, n=num_answers: DyingBackend(num_answers=n))  # type: ignore[misc]
        assert plain(job).startswith(content(job.output))
    answer(job)
    assert job.output.read_bytes() == whole.output.read_bytes()


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.5, 0.9])
def test_torn_output_is_completed(job: RunSettings, fraction: float) -> None:
    answer(replace(job, limit=12))
    with pytest.raises(BackendError):
        answer(job, lambda settings: DyingBackend(num_answers=5))
    data = job.output.read_bytes()
    job.output.write_bytes(data[: int(len(data) * fraction)])
    answer(job)
    assert content(job.output) == plain(job)


def test_errors_and_retries_work_on_compressed_files(job: RunSettings) -> None:
    class Flaky(EchoBackend):
        def answer(self, query: Query) -> Result:
            if query.chat_id == "7":
                return failure(query, "out of luck", ErrorCode.INTERNAL)
            return super().answer(query)

    job = replace(job, errors=job.output.with_name(f"bad.jsonl{job.output.suffix}"))
    assert job.errors is not None
    answer(job, Flaky)
    assert content(job.errors).count(b"\n") == 4
    answer(job, no_backend)
    answer(replace(job, retry_errors=True))
    assert content(job.errors).count(b"\n") == 3
    assert content(job.output).count(b"\n") == NUM_LINES - 3


def test_blank_input_gives_a_valid_empty_file(job: RunSettings) -> None:
    job.input.write_bytes(b"\n")
    answer(job, no_backend)
    assert content(job.output) == b""


def test_plain_text_of_an_earlier_version_is_rejected(job: RunSettings) -> None:
    answer(job)
    data = plain(job)
    job.output.write_bytes(data)
    with pytest.raises(ResumeError, match=r"is not a .* file"):
        answer(job, no_backend)
    assert job.output.read_bytes() == data


def test_report_reads_a_compressed_output(job: RunSettings) -> None:
    answer(job)
    assert manifest_path(job.output).exists()
    assert CliRunner().invoke(app, ["report", str(job.output)]).exit_code == 0


@pytest.mark.skipif(sys.platform == "win32", reason="gzip")
def test_gunzip_reads_the_output(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"chat_id": "1", "user_prompt": "Hi"}\n')
    job = RunSettings(tmp_path / "in.jsonl", tmp_path / "out.jsonl.gz", seed=5)
    answer(job)
    done = subprocess.run(["gzip", "-dc", job.output], capture_output=True, check=True)
    assert json.loads(done.stdout)["chat_id"] == "1"


@pytest.mark.parametrize("name", ["out.zip", "out.jsonl.lz4", "out.XLSX", "out.jsonl.Z", "out.tgz"])
def test_names_of_formats_that_cannot_be_written_are_rejected(tmp_path: Path, name: str) -> None:
    """They used to become plain text under that name, like `out.jsonl.gz` once did."""
    (tmp_path / "in.jsonl").write_text('{"chat_id": "1", "user_prompt": "Hi"}\n')
    job = RunSettings(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    for refused in (replace(job, output=tmp_path / name), replace(job, errors=tmp_path / name)):
        with pytest.raises(UsageError, match=r"cannot write \.\w+ files; choose another --"):
            answer(refused, no_backend)
    with pytest.raises(UsageError, match="holds JSON Lines"):
        answer(replace(job, errors=tmp_path / "failed.csv"), no_backend)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
