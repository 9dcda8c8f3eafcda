"""`run_file`: input files to output files, including interrupted and resumed runs."""

import gzip
import json
import os
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from fakes import DyingBackend, EchoBackend, SlowBackend
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from run_tools import answer, no_backend, results

from smolcli.backends.base import Backend
from smolcli.backends.local import open_local
from smolcli.batch.input_scan import scan_input
from smolcli.batch.manifest import Manifest, load_manifest, manifest_path
from smolcli.batch.output_lock import output_lock
from smolcli.batch.progress import LogProgress
from smolcli.batch.runner import default_output, run_file
from smolcli.data.jsonl import without_marks
from smolcli.errors import BackendError, InputError, ResumeError, RunError, UsageError
from smolcli.settings import EngineSettings, InputFile, QueryDefaults, RowSettings, RunSettings
from smolcli.types import ErrorCode, Query, Result, Sampling, failure

MIXED = b"""\xef\xbb\xbf{"chat_id": "a", "user_prompt": "one"}

{"chat_id": "b"}
nonsense
{"chat_id": "a", "user_prompt": "again"}
{"chat_id": "b", "user_prompt": "its id is taken, though the first was bad"}
{"chat_id": 7, "user_prompt": "seven", "metadata": {"row": 1}}
{"chat_id": "7", "user_prompt": "seven again", "metadata": {"row": 2}}
{"chat_id": "", "user_prompt": "x"}
{"chat_id": "", "user_prompt": "x"}
{"chat_id": "c", "user_prompt": "caf\xc3\xa9 \xe2\x80\xa8"}
[]
"""


@pytest.fixture
def job(tmp_path: Path) -> RunSettings:
    """A run over MIXED with a fixed seed."""
    (tmp_path / "in.jsonl").write_bytes(MIXED)
    return RunSettings(tmp_path / "in.jsonl", tmp_path / "out.jsonl", seed=5)


def test_each_input_line_gets_one_output_line(job: RunSettings) -> None:
    statistics = answer(job)
    got = [
        (r["line"], r["chat_id"], r.get("error_code"), r.get("field")) for r in results(job.output)
    ]
    assert got == [
        (1, "a", None, None),
        (3, "b", "missing_field", "user_prompt"),
        (4, None, "invalid_json", None),
        (5, "a", "duplicate_chat_id", "chat_id"),
        (6, "b", "duplicate_chat_id", "chat_id"),
        (7, "7", None, None),
        (8, "7", "duplicate_chat_id", "chat_id"),
        (9, "", "missing_field", "chat_id"),
        (10, "", "missing_field", "chat_id"),
        (11, "c", None, None),
        (12, None, "not_an_object", None),
    ]
    assert (statistics.num_lines, statistics.num_answered) == (11, 3)
    assert statistics.failed == {
        "duplicate_chat_id": 3,
        "invalid_json": 1,
        "missing_field": 3,
        "not_an_object": 1,
    }


@pytest.mark.parametrize("left", [b"", MIXED[:60], MIXED + b"{}\n"])
def test_run_is_not_completed_if_the_input_changed_meanwhile(job: RunSettings, left: bytes) -> None:
    """Results could be missing, or belong to lines other than those of the manifest's digest."""

    def change(settings: EngineSettings) -> Backend:
        job.input.write_bytes(left)
        return EchoBackend(settings)

    with pytest.raises(RunError, match=r"in.jsonl changed while it was being read"):
        answer(job, change)
    assert load_manifest(job.output).statistics is None
    answer(replace(job, overwrite=True))


def test_directory_is_rejected_as_input() -> None:
    for path in (Path(), Path("/")):
        with pytest.raises(UsageError, match="is a directory"):
            default_output(path)


def test_duplicate_id_is_an_error_that_keeps_its_metadata(job: RunSettings) -> None:
    answer(job)
    duplicate = results(job.output)[6]
    assert duplicate["error"] == "chat_id '7' was already used on an earlier line"
    assert duplicate["metadata"] == {"row": 2}


def test_gzip_crlf_and_out_of_order_backends_give_the_same_output(
    job: RunSettings, tmp_path: Path
) -> None:
    answer(job)
    packed = tmp_path / "in2.jsonl.gz"
    packed.write_bytes(gzip.compress(MIXED.replace(b"\n", b"\r\n")))
    other = replace(job, input=packed, output=tmp_path / "out2.jsonl")
    answer(other, lambda settings: SlowBackend())
    assert other.output.read_bytes() == job.output.read_bytes()


def test_run_leaves_only_output_and_manifest(job: RunSettings) -> None:
    answer(job)
    names = {path.name for path in job.output.parent.iterdir()}
    assert names == {"in.jsonl", "out.jsonl", "out.jsonl.manifest.json"}


def test_manifest_records_settings_and_statistics(job: RunSettings) -> None:
    statistics = answer(job)
    manifest = load_manifest(job.output)
    assert manifest.seed == 5
    assert manifest.generation["max_new_tokens"] == 256
    assert manifest.backend is not None
    assert manifest.backend["dtype"] == "float32"
    assert manifest.statistics is not None
    assert manifest.statistics["num_lines"] == 11
    assert manifest.statistics["completion_tokens"] == statistics.completion_tokens > 0
    assert manifest.statistics["tokens_per_second"] > 0
    assert manifest.statistics["model_calls"] == 3
    assert manifest.statistics["latency_p50_s"] == pytest.approx(0.02, rel=0.02)


def test_manifest_is_written_before_the_first_result(job: RunSettings) -> None:
    seen: list[Manifest] = []

    class Looking(EchoBackend):
        def answer(self, query: Query) -> Result:
            seen.append(load_manifest(job.output))
            return super().answer(query)

    answer(job, Looking)
    assert seen[0].statistics is None
    assert seen[0].input_sha256 == load_manifest(job.output).input_sha256


@pytest.mark.parametrize(
    "change",
    [{"rows": 5}, {"rows": "!!"}, {"generation": None}, {"errors": 5}, {"seed": []}, {"new": 1}],
)
def test_damaged_manifest_is_rejected(job: RunSettings, change: dict[str, Any]) -> None:
    """Values of other types used to end in a traceback."""
    answer(job)
    path = manifest_path(job.output)
    path.write_text(json.dumps(json.loads(path.read_bytes()) | change))
    with pytest.raises(ResumeError, match="its manifest out"):
        answer(job, no_backend)


def test_resume_reuses_the_random_seed(job: RunSettings) -> None:
    job = replace(job, seed=None)
    answer(replace(job, limit=3))
    seed = load_manifest(job.output).seed
    answer(job)
    assert load_manifest(job.output).seed == seed
    answer(replace(job, overwrite=True, seed=seed, output=job.output.with_name("new.jsonl")))
    assert job.output.with_name("new.jsonl").read_bytes() == job.output.read_bytes()


def test_output_truncated_at_any_byte_is_completed_identically(
    job: RunSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For many lengths, and all around the ends of lines, resuming restores the same bytes."""
    monkeypatch.setattr("os.fsync", lambda fd: None)  # hundreds of runs
    job.input.write_bytes(b"".join(MIXED.splitlines(keepends=True)[:5]))
    answer(job)
    whole = job.output.read_bytes()
    ends = [i for i, byte in enumerate(whole) if byte == ord("\n")]
    around = {end + step for end in ends for step in range(-3, 4)}
    for num_bytes in sorted({*range(0, len(whole), 7), *around} & {*range(len(whole))}):
        job.output.write_bytes(whole[:num_bytes])
        statistics = answer(job)
        assert job.output.read_bytes() == whole
        assert statistics.num_lines == 4
        assert statistics.resumed_lines == whole[:num_bytes].count(b"\n")


def test_resume_answers_only_the_remaining_lines(job: RunSettings) -> None:
    answer(replace(job, limit=6))
    before = job.output.read_bytes()
    backends: list[EchoBackend] = []

    def opened(settings: EngineSettings) -> Backend:
        backends.append(EchoBackend(settings))
        return backends[-1]

    statistics = answer(job, opened)
    assert job.output.read_bytes().startswith(before)
    assert backends[0].model_calls == 1  # of the three good lines
    assert backends[0].is_closed
    assert statistics.resumed_lines == 6


def test_complete_output_is_left_untouched(job: RunSettings) -> None:
    first = answer(job)
    before = job.output.stat().st_mtime_ns
    manifest = manifest_path(job.output).read_bytes()
    statistics = answer(job, no_backend)
    assert job.output.stat().st_mtime_ns == before
    assert manifest_path(job.output).read_bytes() == manifest
    assert (statistics.num_answered, statistics.failed) == (first.num_answered, first.failed)


def test_run_killed_after_the_last_line_completes_without_a_model(job: RunSettings) -> None:
    answer(job)
    path = manifest_path(job.output)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"report": None}))
    answer(job, no_backend)
    manifest = load_manifest(job.output)
    assert manifest.statistics is not None
    assert manifest.statistics["num_lines"] == 11


def test_smaller_limit_keeps_existing_results(job: RunSettings) -> None:
    answer(job)
    before = job.output.read_bytes()
    answer(replace(job, limit=2), no_backend)
    assert job.output.read_bytes() == before


def test_resume_accepts_another_name_of_the_same_model(job: RunSettings) -> None:
    class Same(EchoBackend):
        def identity(self) -> dict[str, Any]:
            return super().identity() | {"model": "the same", "versions": {"torch": "1"}}

    answer(replace(job, limit=3), Same)
    answer(replace(job, engine=EngineSettings("other/name", max_batch_size=3, threads=2)), Same)
    assert len(results(job.output)) == 11


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 6}, "seed was 5, is 6"),
        ({"with_timings": True}, "timings was false, is true"),
        ({"engine": EngineSettings("other")}, 'model was "Hugging.*", is "other"'),
        (
            {"defaults": QueryDefaults(Sampling(temperature=0.5, top_k=2))},
            "temperature was 0.0, is 0.5; top_k was 0, is 2",
        ),
        (
            {"defaults": QueryDefaults(system_prompt="Be brief.", extra_fields="keep")},
            'extra_fields was "error", is "keep"; system_prompt was null, is "Be brief."',
        ),
    ],
)
def test_resume_with_other_settings_names_each_difference(
    job: RunSettings, change: dict[str, Any], said: str
) -> None:
    for limit in (3, None):  # incomplete, complete
        answer(replace(job, limit=limit))
        before = job.output.read_bytes()
        with pytest.raises(ResumeError, match=said) as caught:
            answer(replace(job, **change))
        assert "--overwrite" in str(caught.value)
        assert job.output.read_bytes() == before
    answer(replace(job, **change, overwrite=True))


class GrowingPath(type(Path())):  # type: ignore[misc]  # the platform's class of paths
    """A file to which another process appends a line just before its bytes are digested."""

    def open(self, *args: Any, **options: Any) -> Any:
        with Path(self).open("ab") as file:
            file.write(b'{"chat_id": "late", "user_prompt": "Hi"}\n')
        return super().open(*args, **options)


def test_a_line_appended_during_the_scan_is_part_of_it(job: RunSettings) -> None:
    """Its row was missing, although the digest and the size that are compared later had it."""
    num_lines = scan_input(job).num_lines
    assert num_lines is not None
    growing = InputFile("growing.jsonl", GrowingPath(job.input))
    assert scan_input(replace(job, files=(growing,))).num_lines == num_lines + 1


def test_long_settings_are_shown_where_they_differ(job: RunSettings) -> None:
    """Both were cut after the same 60 characters."""
    rules = "Answer in one sentence. " * 5
    old, new = (
        replace(job, defaults=QueryDefaults(system_prompt=f"{rules}{end}"))
        for end in ("Be brief.", "Be polite.")
    )
    answer(old)
    with pytest.raises(ResumeError, match=r'was \.\.\..*brief\.", is \.\.\..*polite\."'):
        answer(new)


def test_appended_lines_are_answered_and_the_rest_is_kept(job: RunSettings) -> None:
    """The digest of the whole input decided before, so a growing file could not be resumed."""
    lines = MIXED.splitlines(keepends=True)
    whole = replace(job, output=job.output.with_name("whole.jsonl"))
    answer(whole)
    for num_lines in (3, 6, 6, len(lines)):
        job.input.write_bytes(b"".join(lines[:num_lines]))
        answer(job)
        assert whole.output.read_bytes().startswith(job.output.read_bytes())
    assert job.output.read_bytes() == whole.output.read_bytes()
    assert len(results(job.output)) == 11


def test_blank_lines_and_compression_do_not_change_an_input(job: RunSettings) -> None:
    answer(job)
    before = job.output.read_bytes()
    job.input.write_bytes(gzip.compress(MIXED + b"\n\n"))
    answer(job, no_backend)
    assert job.output.read_bytes() == before


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (MIXED.replace(b'"one"', b'"two"'), "changed at line 1 "),
        (MIXED.replace(b"nonsense", b"garbage"), "changed at line 4 "),
        (MIXED.replace(b'{"row": 2}', b'{"row": 3}'), "changed at line 8 "),
        (b"\n" + MIXED[3:], "changed at line 1 since .* lines were inserted"),
        (MIXED[:-4], "it ends after 10 of 11 lines since .* written; restore it, or choose"),
    ],
)
def test_resume_names_the_changed_line(job: RunSettings, changed: bytes, said: str) -> None:
    answer(job)
    before = job.output.read_bytes()
    job.input.write_bytes(changed)
    with pytest.raises(ResumeError, match=said):
        answer(job, no_backend)
    assert job.output.read_bytes() == before


def test_unanswered_lines_may_change(job: RunSettings) -> None:
    answer(replace(job, limit=3))
    job.input.write_bytes(MIXED.replace(b"seven", b"eight"))
    answer(job)
    assert "eight" in results(job.output)[5]["response"]


def test_smaller_limit_does_not_hide_a_later_change(job: RunSettings) -> None:
    answer(job)
    job.input.write_bytes(MIXED.replace(b'"seven"', b'"eight"'))
    answer(replace(job, limit=2), no_backend)
    with pytest.raises(ResumeError, match="changed at line 7 "):
        answer(job, no_backend)


OLD_MANIFEST = ("run_id", "rows")  # what the manifests of 0.1.0 lack


@pytest.mark.parametrize("limit", [3, None])
def test_run_of_0_1_0_can_be_resumed(job: RunSettings, limit: int | None) -> None:
    answer(replace(job, output=job.output.with_name("whole.jsonl")))
    answer(replace(job, limit=limit))
    path = manifest_path(job.output)
    values = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in values.items() if k not in OLD_MANIFEST}))
    job.input.write_bytes(MIXED + b"\n")
    with pytest.raises(ResumeError, match=r"in.jsonl changed since"):
        answer(job, no_backend)
    job.input.write_bytes(MIXED)
    answer(job)
    assert job.output.read_bytes() == job.output.with_name("whole.jsonl").read_bytes()


def test_resume_with_another_kernel_variant_is_rejected(job: RunSettings) -> None:
    """Variants add in vectors of other widths, so that their answers may differ."""

    class Variant(EchoBackend):
        name: str | None = None

        def identity(self) -> dict[str, Any]:
            return super().identity() | ({"kernel_variant": self.name} if self.name else {})

    class V3(Variant):
        name = "x86-64-v3-float32"

    class V4(Variant):
        name = "x86-64-v4-float32"

    answer(replace(job, limit=3), Variant)  # as 0.1.0 did
    answer(replace(job, limit=5), V3)
    with pytest.raises(ResumeError, match='kernel_variant was "x86-64-v3-float32"'):
        answer(job, V4)


def test_local_backend_tells_its_kernel_variant(tiny_folder: Path) -> None:
    engine = EngineSettings(str(tiny_folder), max_batch_size=1, kv_cache_mb=16)
    with closing(open_local(engine)) as backend:
        identity = backend.identity()
    assert (identity["kernel_variant"] is None) == (identity["kernels"] == "torch")


def test_backend_values_are_not_confused_with_settings(job: RunSettings) -> None:
    """One flat dictionary let a server's system prompt hide the difference of `--system`."""

    class Server(EchoBackend):
        def identity(self) -> dict[str, Any]:
            return super().identity() | {"system_prompt": "the server's own"}

    answer(replace(job, limit=3), Server)
    other = replace(job, defaults=QueryDefaults(system_prompt="Be brief."))
    with pytest.raises(ResumeError, match=r"system_prompt was null, is .Be brief"):
        answer(other, Server)


def test_overwrite_starts_over(job: RunSettings) -> None:
    answer(job)
    whole = job.output.read_bytes()
    job.output.write_bytes(b"something else")
    answer(replace(job, overwrite=True))
    assert job.output.read_bytes() == whole


def test_overwrite_keeps_the_old_output_if_the_model_cannot_be_loaded(job: RunSettings) -> None:
    answer(job)
    before = job.output.read_bytes()

    def broken(settings: EngineSettings) -> Backend:
        raise BackendError("no memory")

    with pytest.raises(BackendError):
        answer(replace(job, overwrite=True), broken)
    assert job.output.read_bytes() == before


@pytest.mark.parametrize(
    "content", [b"mine\n", b"no end of line", b'{"chat_id":"1","line":1}\n', b"\x00" * 50 + b"\n"]
)
def test_foreign_output_file_is_rejected_and_kept(job: RunSettings, content: bytes) -> None:
    job.output.write_bytes(content)
    with pytest.raises(ResumeError, match="--overwrite"):
        answer(job, no_backend)
    assert job.output.read_bytes() == content


@pytest.mark.parametrize(
    "line",
    [
        b"mine",
        b"[]",
        b'{"line":3}',
        b'{"chat_id":1,"line":3,"response":"x"}',
        b'{"chat_id":"x","line":1,"response":"x"}',
        b'{"chat_id":"x","line":3,"error_code":"strange"}',
        b"\x00\x00",
    ],
)
def test_resume_rejects_an_output_line_that_is_not_a_result(job: RunSettings, line: bytes) -> None:
    answer(replace(job, limit=1))
    job.output.write_bytes(job.output.read_bytes() + line + b"\n")
    with pytest.raises(ResumeError, match=r"line 2 of .* is not a result"):
        answer(job)


def test_run_ended_by_a_dead_backend_can_be_resumed(job: RunSettings) -> None:
    whole = job.output.with_name("whole.jsonl")
    answer(replace(job, output=whole))
    with pytest.raises(BackendError, match="the engine died"):
        answer(job, lambda settings: DyingBackend(num_answers=1))
    assert whole.read_bytes().startswith(job.output.read_bytes())
    assert len(results(job.output)) == 5
    answer(job)
    assert job.output.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("code", ["backend_error", "overloaded", "timeout", "cancelled"])
def test_backend_faults_are_never_written_as_results(job: RunSettings, code: str) -> None:
    class Busy(EchoBackend):
        def answer(self, query: Query) -> Result:
            if query.chat_id == "a":
                return super().answer(query)
            return failure(query, "not now", ErrorCode(code))

    with pytest.raises(BackendError, match="line 7 was not answered: not now"):
        answer(job, Busy)
    assert len(results(job.output)) == 5


def test_internal_error_of_a_query_becomes_its_result(job: RunSettings) -> None:
    class Picky(EchoBackend):
        def answer(self, query: Query) -> Result:
            return failure(query, "cannot", ErrorCode.INTERNAL)

    assert answer(job, Picky).failed["internal"] == 3


def test_interrupted_run_explains_how_to_resume(
    job: RunSettings, caplog: pytest.LogCaptureFixture
) -> None:
    class Interrupted(EchoBackend):
        def answer(self, query: Query) -> Result:
            if query.chat_id == "7":
                raise KeyboardInterrupt
            return super().answer(query)

    caplog.set_level("INFO")
    with pytest.raises(KeyboardInterrupt):
        answer(job, Interrupted)
    assert "has 5 results; " in caplog.text
    assert "run the same command to resume" in caplog.text
    answer(job)
    assert len(results(job.output)) == 11


def test_blank_input_completes_without_a_model(job: RunSettings) -> None:
    job.input.write_bytes(b"\n \n")
    assert answer(job, no_backend).num_lines == 0
    assert job.output.read_bytes() == b""
    assert load_manifest(job.output).statistics is not None


def test_missing_or_damaged_input_creates_no_files(job: RunSettings) -> None:
    job.input.write_bytes(gzip.compress(MIXED)[:-9])
    for settings_ in (job, replace(job, input=job.input.with_name("missing"))):
        with pytest.raises(InputError):
            answer(settings_, no_backend)
    assert {path.name for path in job.output.parent.iterdir()} == {"in.jsonl"}


def test_output_must_not_be_the_input(job: RunSettings) -> None:
    link = job.input.with_name("link.jsonl")
    link.symlink_to(job.input)
    manifest = manifest_path(job.output)
    manifest.write_bytes(MIXED)
    for source, output in ((job.input, job.input), (job.input, link), (manifest, job.output)):
        with pytest.raises(UsageError, match="is the input"):
            answer(replace(job, input=source, output=output, overwrite=True), no_backend)
    assert job.input.read_bytes() == manifest.read_bytes() == MIXED


def test_output_must_be_a_file_in_an_existing_directory(job: RunSettings, tmp_path: Path) -> None:
    """The root directory, which has no name, used to end in a traceback."""
    with pytest.raises(UsageError, match="cannot write /: it is a directory"):
        answer(replace(job, output=Path("/")))
    for output in (tmp_path, tmp_path / "no" / "out.jsonl"):
        with pytest.raises(UsageError, match=r"cannot write .*: it is a directory, or its parent"):
            answer(replace(job, output=output), no_backend)


def test_second_run_on_an_output_is_rejected(job: RunSettings) -> None:
    """The lock belongs to another process, and is released when that process is killed."""
    script = (
        "import sys; from pathlib import Path; from smolcli.batch.output_lock import output_lock\n"
        "with output_lock(Path(sys.argv[1])): print(flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(job.output)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(UsageError, match="another run is writing"):
            answer(job, no_backend)
        other.kill()
    answer(job)
    with output_lock(job.output), pytest.raises(UsageError):
        answer(job)


@pytest.mark.skipif(sys.platform == "win32", reason="symbolic links")
def test_second_run_through_another_name_of_the_output_is_rejected(job: RunSettings) -> None:
    job.output.touch()
    link, hard_link = (job.output.with_name(name) for name in ("link.jsonl", "hard.jsonl"))
    link.symlink_to(job.output)
    hard_link.hardlink_to(job.output)
    with output_lock(job.output):
        for name in (link, hard_link):
            with pytest.raises(UsageError, match="another run is writing"):
                answer(replace(job, output=name), no_backend)


@pytest.mark.skipif(sys.platform == "win32", reason="symbolic links")
@pytest.mark.parametrize("retry", [False, True])
def test_symbolic_link_as_output_stays_one(job: RunSettings, tmp_path: Path, retry: bool) -> None:
    """Replacing the output at the end of the run replaced the link by a file."""
    (tmp_path / "elsewhere").mkdir()
    for name in ("out.jsonl", "bad.jsonl"):
        (tmp_path / name).symlink_to(tmp_path / "elsewhere" / name)
    job = replace(job, errors=tmp_path / "bad.jsonl")
    answer(job)
    if retry:
        job.input.write_bytes(MIXED.replace(b"nonsense", b'{"chat_id": "n", "user_prompt": "n"}'))
        answer(replace(job, retry_errors=True))
    assert (tmp_path / "out.jsonl").is_symlink()
    assert (tmp_path / "bad.jsonl").is_symlink()
    assert len(results(tmp_path / "elsewhere" / "out.jsonl")) == 3 + retry


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX file names")
@pytest.mark.parametrize("name", ["x" * 252, "y" * 300, "loop"])
def test_impossible_output_names_are_usage_errors(job: RunSettings, name: str) -> None:
    """They ended in a traceback; the longest name next to the output counts."""
    job.output.with_name("loop").symlink_to("loop")
    path = job.output.with_name(name)
    changed = (replace(job, output=path), replace(job, errors=path))
    for impossible in (*changed, replace(job, table=path, output=path)):
        with pytest.raises(UsageError, match="cannot write"):
            answer(impossible, no_backend)
    with pytest.raises(InputError):
        answer(replace(job, input=path), no_backend)


@pytest.mark.skipif(sys.platform != "linux", reason="file names of any bytes")
def test_file_names_need_not_be_utf8(job: RunSettings) -> None:
    job.input.rename(source := job.input.with_name(os.fsdecode(b"caf\xe9.jsonl")))
    job = replace(job, input=source, output=default_output(source))
    answer(job)
    answer(job, no_backend)
    assert load_manifest(job.output).input == str(source)


@pytest.mark.parametrize(
    ("input", "output"),
    [
        ("a/queries.jsonl", "a/queries.results.jsonl"),
        ("queries.jsonl.gz", "queries.results.jsonl"),
        ("queries", "queries.results.jsonl"),
        ("a.b.txt", "a.b.results.jsonl"),
        ("-", "-"),
        (os.devnull, "-"),
    ],
)
def test_default_output_is_next_to_the_input(input: str, output: str) -> None:
    assert default_output(Path(input)) == Path(output)


GARBAGE = st.one_of(
    st.binary(max_size=200),
    st.text().map(str.encode),
    st.sampled_from(
        [
            b'{"chat_id": "1", "user_prompt": "x", "temperature": NaN}',
            b'{"chat_id": "1", "chat_id": "2"}',
            b'{"chat_id": "\\ud800", "user_prompt": "x"}',
            b'{"chat_id": "1", "user_prompt": "\\udc00"}',
            b"[" * 100_000,
            b'{"metadata":' * 50_000,
            b'{"chat_id": ' + b"9" * 10_000 + b"}",
            b'{"chat_id": 1e400}',
            b'{"chat_id": 1E5, "user_prompt": "x"}',
            b'{"chat_id": "1", "user_prompt": "x", "max_new_tokens": 99999999999999999999999}',
            b'{"chat_id": {}, "messages": [{"role": [], "content": {}}]}',
            b"\xef\xbb\xbf{}",
            b"\xff\xfe{\x00}\x00",
        ]
    ),
    st.fixed_dictionaries(
        {},
        optional={
            name: st.none() | st.text() | st.integers() | st.floats() | st.lists(st.text())
            for name in ("chat_id", "user_prompt", "messages", "stop", "seed", "metadata", "x")
        },
    ).map(lambda value: json.dumps(value).encode()),
).map(lambda line: line.replace(b"\n", b" ").replace(b"\r", b" "))


@settings(
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(GARBAGE, max_size=12), st.sampled_from(["error", "ignore", "keep"]))
def test_garbage_lines_never_end_a_run(job: RunSettings, lines: list[bytes], extra: Any) -> None:
    """Each line gets one valid JSON result, and a resume can read all of them back."""
    # Compressed files and UTF-16 are recognized by their first bytes.
    assume(not lines or not lines[0].startswith((b"\x1f\x8b", b"\xff\xfe", b"\xfe\xff")))
    job.input.write_bytes(b"\n".join(lines))
    rows = RowSettings(input_format="smol", encoding="utf-8")  # as detection may refuse it
    job = replace(job, defaults=QueryDefaults(extra_fields=extra), rows=rows)
    answer(replace(job, overwrite=True))
    numbers = [n for n, line in enumerate(lines, 1) if without_marks(line).strip()]
    written = job.output.read_bytes().split(b"\n")
    assert written.pop() == b""
    records = [json.loads(line.decode(), parse_constant=pytest.fail) for line in written]
    assert [record["line"] for record in records] == numbers
    for record in records:
        assert ("response" in record) != ("error" in record)
    answer(job, no_backend)


@pytest.mark.slow
def test_memory_is_bounded_on_a_large_file(tmp_path: Path) -> None:
    """20,000 lines take less than 6 MB; benchmarks.pipeline measures their throughput."""
    source = tmp_path / "in.jsonl"
    with source.open("w") as file:
        for number in range(20_000):
            file.write(f'{{"chat_id": "{number}", "user_prompt": "What is {number}?"}}\n')
    process = psutil.Process()
    num_bytes = [process.memory_info().rss]

    class Measuring(LogProgress):
        def stop(self) -> None:  # the run still holds everything
            num_bytes.append(process.memory_info().rss)

    statistics = run_file(RunSettings(source, tmp_path / "out.jsonl"), EchoBackend, Measuring())
    assert statistics.num_answered == 20_000
    assert num_bytes[1] - num_bytes[0] < 6e6
