"""Input and output at URLs: downloaded first, uploaded last; the journal stays local."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import DyingBackend, EchoBackend
from fsspec.implementations.memory import MemoryFileSystem
from typer.testing import CliRunner, Result

from smolcli.batch.manifest import load_manifest
from smolcli.cli.main import app

LINES = b"".join(b'{"chat_id": "%d", "user_prompt": "Hi %d"}\n' % (n, n) for n in range(20))
OUTPUT = "memory://bucket/deep/out.jsonl"


@pytest.fixture(autouse=True)
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A remote file system with an input file; the working folder is empty."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    files = MemoryFileSystem()
    files.pipe_file("/bucket/in.jsonl", LINES)
    yield files
    files.rm("/bucket", recursive=True)


def smol_run(*args: str, backend: Any = EchoBackend) -> Result:
    return CliRunner().invoke(app, ["run", *args, "--seed", "1"], obj=backend)


def plain_output(tmp_path: Path) -> bytes:
    """The output of a run on a local copy of the same file."""
    source = tmp_path / "in.jsonl"
    source.write_bytes(LINES)
    assert smol_run(str(source)).exit_code == 0
    return (tmp_path / "in.results.jsonl").read_bytes()


def test_results_of_a_remote_input_are_written_locally(tmp_path: Path) -> None:
    assert smol_run("memory://bucket/in.jsonl").exit_code == 0
    output = tmp_path / "work" / "in.results.jsonl"
    assert output.read_bytes() == plain_output(tmp_path)
    again = smol_run("memory://bucket/in.jsonl")
    assert (again.exit_code, "is complete" in again.stderr) == (0, True)
    assert load_manifest(output).input == "memory://bucket/in.jsonl"


def test_several_remote_inputs_name_their_urls(bucket: Any, tmp_path: Path) -> None:
    bucket.pipe_file("/bucket/b.csv", b"chat_id,user_prompt\nx,Hi\n")
    pattern, url = "memory://bucket/*.jsonl", "memory://bucket/b.csv"
    assert smol_run(url, pattern, "-o", "out.jsonl", "--limit", "3").exit_code == 0
    records = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert [(record["file"].replace("///", "//"), record["line"]) for record in records] == [
        (url, 2),
        ("memory://bucket/in.jsonl", 1),
        ("memory://bucket/in.jsonl", 2),
    ]
    none = smol_run("memory://bucket/*.tsv", "-o", "out.jsonl")
    assert (none.exit_code, "no file matches" in none.stderr) == (2, True)


def test_passwords_in_urls_are_not_stored_in_outputs(bucket: Any) -> None:
    """The manifest, and with several inputs each result, had the URL of the input."""
    bucket.pipe_file("/me:secret@bucket/a.jsonl", LINES)
    bucket.pipe_file("/me:secret@bucket/b.jsonl", LINES.replace(b'_id": "', b'_id": "b'))
    url = "memory://me:secret@bucket"
    try:
        done = smol_run(f"{url}/a.jsonl", f"{url}/b.jsonl", "-o", f"{url}/out.jsonl")
        assert done.exit_code == 0
        assert "copied to memory://***@bucket/out.jsonl" in done.stderr
        assert bucket.isfile("/me:secret@bucket/out.jsonl")
    finally:
        bucket.rm("/me:secret@bucket", recursive=True)
    files = sorted(path.name for path in Path().iterdir())
    assert files == ["out.jsonl", "out.jsonl.manifest.json"]
    for text in (done.output, *(Path(name).read_text() for name in files)):
        assert "secret" not in text


def test_hub_that_cannot_be_reached_is_a_clear_error() -> None:
    code = "from smolcli.cli.main import app; app()"
    command = [sys.executable, "-c", code, "run", "hf://datasets/user/name/x.jsonl"]
    folder = str(Path(__file__).parent.parent)
    env = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "PYTHONPATH": folder}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 1
    assert "the Hugging Face Hub cannot be reached" in done.stderr
    assert done.stderr.count("\n") == 1


def test_remote_output_is_uploaded_when_complete(bucket: Any, tmp_path: Path) -> None:
    ran = smol_run("memory://bucket/in.jsonl", "-o", OUTPUT)
    assert (ran.exit_code, f"copied to {OUTPUT}" in ran.stderr) == (0, True)
    assert bucket.cat_file("/bucket/deep/out.jsonl") == plain_output(tmp_path)
    assert smol_run("memory://bucket/in.jsonl", "-o", OUTPUT).exit_code == 0


def test_table_is_uploaded(bucket: Any) -> None:
    bucket.pipe_file("/bucket/rows.csv", b"name\nAnn\nBob\n")
    args = ("memory://bucket/rows.csv", "-o", "memory://bucket/out.csv", "--prompt", "Hi {name}")
    assert smol_run(*args).exit_code == 0
    assert bucket.cat_file("/bucket/out.csv").count(b"\n") == 3


def test_interrupted_run_uploads_nothing_and_resumes(bucket: Any, tmp_path: Path) -> None:
    args = ("memory://bucket/in.jsonl", "-o", OUTPUT)
    cut = smol_run(*args, backend=lambda _: DyingBackend(9))
    assert cut.exit_code == 1
    assert not bucket.exists("/bucket/deep/out.jsonl")
    num_before = Path("out.jsonl").read_bytes().count(b"\n")
    assert smol_run(*args).exit_code == 0
    assert 0 < num_before < 20
    assert bucket.cat_file("/bucket/deep/out.jsonl") == plain_output(tmp_path)


def test_existing_remote_file_is_not_overwritten(bucket: Any) -> None:
    bucket.pipe_file("/bucket/deep/out.jsonl", b"dear\n")
    refused = smol_run("memory://bucket/in.jsonl", "-o", OUTPUT)
    assert (refused.exit_code, "--overwrite" in refused.stderr) == (2, True)
    assert bucket.cat_file("/bucket/deep/out.jsonl") == b"dear\n"
    bucket.pipe_file("/bucket/in.jsonl", LINES + b"{}\n")
    changed = smol_run("memory://bucket/in.jsonl", "-o", OUTPUT, "--overwrite")
    assert changed.exit_code == 3
    assert bucket.cat_file("/bucket/deep/out.jsonl").count(b"\n") == 21


def test_changed_remote_input_is_rejected_on_resume(bucket: Any) -> None:
    assert smol_run("memory://bucket/in.jsonl").exit_code == 0
    bucket.pipe_file("/bucket/in.jsonl", LINES.replace(b"Hi 3", b"Ho 3"))
    refused = smol_run("memory://bucket/in.jsonl")
    assert (refused.exit_code, "changed at line 4" in refused.stderr) == (2, True)


def test_file_url_is_a_local_path(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(LINES)
    assert smol_run(source.as_uri(), "-o", (tmp_path / "o.jsonl").as_uri()).exit_code == 0
    assert load_manifest(tmp_path / "o.jsonl").statistics is not None


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["memory://bucket/none.jsonl"], 1, "cannot read memory://bucket/none.jsonl"),
        (["memory://bucket/"], 2, "does not name a file"),
        (["nowhere://bucket/in.jsonl"], 2, "cannot use nowhere://bucket/in.jsonl"),
        (["memory://bucket/in.jsonl", "-o", "nowhere://b/o.jsonl"], 2, "cannot use nowhere://b"),
        (["memory://bucket/in.csv", "--prompt", "{c}"], 2, "memory://bucket/in.csv: no column"),
        (["memory://bucket/in.bin"], 2, "memory://bucket/in.bin is not JSON"),
    ],
)
def test_invalid_url_is_rejected(bucket: Any, args: list[str], code: int, said: str) -> None:
    bucket.pipe_file("/bucket/in.csv", b"a,b\n1,2\n")
    bucket.pipe_file("/bucket/in.bin", b"\0\1")
    refused = smol_run(*args)
    assert (refused.exit_code, said in refused.stderr) == (code, True), refused.stderr


def test_web_addresses_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    monkeypatch.delitem(sys.modules, "fsspec.implementations.http", raising=False)
    refused = smol_run("https://127.0.0.1:9/in.jsonl")
    assert refused.exit_code == 2
    assert "https://127.0.0.1:9/in.jsonl: this needs aiohttp: pip install aiohttp" in (
        refused.stderr
    )


def test_check_reads_remote_input(bucket: Any) -> None:
    bucket.pipe_file("/bucket/in.jsonl", LINES + b"{}\n")
    checked = smol_run("memory://bucket/in.jsonl", "--check")
    assert (checked.exit_code, checked.stdout.startswith("line 21: ")) == (3, True)


def test_local_paths_do_not_import_fsspec() -> None:
    code = (
        "import sys, json; from smolcli.data.remote_files import is_remote, local_path\n"
        "local_path('in.jsonl'), is_remote('in.jsonl')\n"
        "print(json.dumps('fsspec' in sys.modules))"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=root)
    assert json.loads(done.stdout) is False
