"""Standard streams that are closed or full, and arguments that are not UTF-8."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from smolcli.cli.main import app

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs sh and /dev/full")

GOOD = '{"chat_id": "1", "user_prompt": "Hi there"}\n'


def shell(
    redirection: str, *args: str, folder: Path, tiny_folder: Path
) -> subprocess.CompletedProcess[str]:
    """`smol` as a shell starts it, with a small model."""
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {redirection}', "sh", sys.executable, "-m", "smolcli", *args],
        capture_output=True,
        stdin=subprocess.DEVNULL,
        cwd=folder,
        env=os.environ | {"SMOL_MODEL": str(tiny_folder), "SMOL_MAX_NEW_TOKENS": "2"},
        text=True,
    )


@pytest.mark.parametrize(
    ("redirection", "args", "exit_code", "said"),
    [
        (">&-", ["ask", "Hi"], 1, "smol: cannot write to stdout: not writable\n"),
        (">/dev/full", ["ask", "Hi"], 1, "smol: cannot write to stdout: No space left on device\n"),
        (
            ">/dev/full",
            ["run", "bad.jsonl", "--check"],
            1,
            "smol: cannot write to stdout: No space",
        ),
        (">/dev/full", ["--help"], 1, "smol: cannot write to stdout: No space left"),
        (">/dev/full", ["run", "--help"], 1, "smol: cannot write to stdout: No space left"),
        (">/dev/full", ["--version"], 1, "smol: cannot write to stdout: No space left"),
        (">&-", ["run", "good.jsonl", "-o", "-", "-q"], 1, "smol: cannot write to stdout: Bad"),
        (">&-", ["run", "good.jsonl", "-o", "out.jsonl", "-q"], 0, ""),
        ("<&-", ["ask"], 2, "smol: the question is empty; "),
        ("<&-", ["chat"], 0, ""),
    ],
)
def test_closed_or_full_streams_cause_no_traceback(
    redirection: str,
    args: list[str],
    exit_code: int,
    said: str,
    tmp_path: Path,
    tiny_folder: Path,
) -> None:
    """Cron jobs and full disks used to end in a traceback: 'NoneType' has no attribute 'isatty'."""
    (tmp_path / "good.jsonl").write_text(GOOD)
    (tmp_path / "bad.jsonl").write_text("{}\n")
    done = shell(redirection, *args, folder=tmp_path, tiny_folder=tiny_folder)
    assert (done.returncode, done.stderr[: len(said) or None]) == (exit_code, said)


@pytest.mark.skipif(not Path("/dev/stdin").exists(), reason="/dev/stdin")
def test_the_paths_of_redirected_streams_are_streams(tmp_path: Path, tiny_folder: Path) -> None:
    """Results went to /dev/stdin.results.jsonl, and an existing output was refused or truncated."""
    (tmp_path / "good.jsonl").write_text(GOOD)
    (tmp_path / "out.jsonl").write_text("before\n")
    redirection = "<good.jsonl >>out.jsonl"
    for args in (("/dev/stdin",), ("/dev/stdin", "-o", "/dev/stdout"), ("-", "-o", "/dev/fd/1")):
        done = shell(redirection, "run", *args, folder=tmp_path, tiny_folder=tiny_folder)
        assert (done.returncode, "stdout" in done.stderr) == (0, False)
    before, *results = (tmp_path / "out.jsonl").read_text().splitlines()
    assert (before, len(results), len(set(results))) == ("before", 3, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good.jsonl", "out.jsonl"]


def test_errors_name_stdin(tmp_path: Path, tiny_folder: Path) -> None:
    (tmp_path / "table.csv").write_text("a - b,c\n1,2\n")
    for args, said in (
        (["--prompt", "{d}"], "smol: stdin: no column named 'd'; the columns are a - b, c\n"),
        (["--input-format", "parquet"], "smol: stdin: Parquet cannot be read from a pipe"),
    ):
        done = shell("<table.csv", "run", "-", *args, folder=tmp_path, tiny_folder=tiny_folder)
        assert done.stderr.startswith(said)


def test_run_works_without_stderr(tmp_path: Path, tiny_folder: Path) -> None:
    """With stderr closed, a run used to exit with 1 before it started, without a message."""
    (tmp_path / "good.jsonl").write_text(GOOD)
    done = shell("2>&-", "run", "good.jsonl", folder=tmp_path, tiny_folder=tiny_folder)
    assert done.returncode == 0
    assert (tmp_path / "good.results.jsonl").read_text().startswith('{"chat_id":"1","response":')


def test_file_names_may_be_any_bytes(tmp_path: Path, tiny_folder: Path) -> None:
    """A non-UTF-8 name in the manifest or the report used to end in a UnicodeEncodeError."""
    name = "caf\udce9"
    (tmp_path / f"{name}.jsonl").write_text(GOOD)
    args = ["run", f"{name}.jsonl", "--errors", f"{name}.err", "-q"]
    for _ in range(2):
        done = shell("", *args, folder=tmp_path, tiny_folder=tiny_folder)
        assert (done.returncode, done.stderr) == (0, "")
    results = ["report", f"{name}.results.jsonl"]
    done = shell("> name", *results, folder=tmp_path, tiny_folder=tiny_folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "name").read_bytes() == b"caf\xe9.results.report.html\n"


@pytest.mark.parametrize(
    ("args", "what"),
    [
        (["ask", "caf\udce9"], "the question"),
        (["ask", "Hi", "--system", "caf\udce9"], "--system"),
        (["run", "good.jsonl", "--system", "caf\udce9"], "--system"),
        (["run", "good.jsonl", "--prompt", "caf\udce9 {chat_id}"], "--prompt"),
    ],
)
def test_non_utf8_argument_is_wrong_usage(
    args: list[str], what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a Latin-1 terminal, such an argument used to be an internal error on every line."""
    (tmp_path / "good.jsonl").write_text(GOOD)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, args)
    assert (done.exit_code, done.stderr) == (2, f"smol: {what} is not UTF-8\n")
    assert not list(tmp_path.glob("*results*"))
