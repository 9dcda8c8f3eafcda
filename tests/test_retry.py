"""`--retry-errors`: failed lines are retried, and the output is replaced atomically."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes import DyingBackend, EchoBackend
from run_tools import answer, answer_until_killed, no_backend

from smolcli.batch.manifest import load_manifest, manifest_path
from smolcli.errors import BackendError, ResumeError, UsageError
from smolcli.settings import EngineSettings, QueryDefaults, RunSettings
from smolcli.types import ErrorCode, Query, Result, failure

NUM_LINES = 40
OWN = [{"chat_id": str(n), "user_prompt": f"question {n}"} for n in range(NUM_LINES)]
BATCH = [
    {
        "custom_id": str(n),
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "m", "messages": [{"role": "user", "content": f"question {n}"}]},
    }
    for n in range(NUM_LINES)
]
BAD = {9: "torn", 20: "{}"}  # invalid lines by index; retrying cannot help them


class Flaky(EchoBackend):
    """Fails every fourth query."""

    def answer(self, query: Query) -> Result:
        if int(query.chat_id) % 4 == 0:
            return failure(query, "out of luck", ErrorCode.INTERNAL)
        return super().answer(query)


class Counting(EchoBackend):
    """Answers every query and records its id."""

    def __init__(self, settings: EngineSettings | None = None) -> None:
        super().__init__(settings)
        self.seen: list[str] = []

    def answer(self, query: Query) -> Result:
        self.seen.append(query.chat_id)
        return super().answer(query)


@pytest.fixture(params=[OWN, BATCH], ids=["own", "batch"])
def job(request: pytest.FixtureRequest, tmp_path: Path) -> RunSettings:
    """A run of 40 lines in either format, two of them invalid."""
    lines = [BAD.get(n) or json.dumps(line) for n, line in enumerate(request.param)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    return RunSettings(tmp_path / "in.jsonl", tmp_path / "out.jsonl", seed=5)


@pytest.mark.parametrize("splits", [False, True])
def test_only_failed_lines_are_asked_again(job: RunSettings, splits: bool) -> None:
    whole = replace(job, output=job.output.with_name("whole.jsonl"))
    job = replace(job, errors=job.output.with_name("bad.jsonl") if splits else None)
    if splits:
        whole = replace(whole, errors=job.output.with_name("whole-bad.jsonl"))
    answer(whole)
    answer(job, Flaky)
    assert load_manifest(job.output).statistics is not None
    backend = Counting()
    statistics = answer(replace(job, retry_errors=True), lambda settings: backend)
    assert backend.seen == [str(n) for n in range(0, NUM_LINES, 4) if n not in BAD]
    assert job.output.read_bytes() == whole.output.read_bytes()
    if job.errors is not None:
        assert whole.errors is not None
        assert job.errors.read_bytes() == whole.errors.read_bytes()
    assert (statistics.num_answered, statistics.resumed_lines) == (NUM_LINES - 2, 29)
    written = load_manifest(job.output).statistics
    assert written is not None
    assert (written["num_answered"], written["num_lines"]) == (NUM_LINES - 2, NUM_LINES)


def test_line_that_fails_again_keeps_its_error(job: RunSettings) -> None:
    answer(job, Flaky)
    before = job.output.read_bytes()
    assert answer(replace(job, retry_errors=True), Flaky).failed["internal"] == 9
    assert job.output.read_bytes() == before


def test_retrying_only_invalid_lines_needs_no_model(
    job: RunSettings, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    answer(job)
    before = job.output.stat().st_mtime_ns
    statistics = answer(replace(job, retry_errors=True), no_backend)
    assert sum(statistics.failed.values()) == 2
    assert "every failed line is invalid input" in caplog.text
    assert job.output.stat().st_mtime_ns == before


def test_retry_needs_a_complete_run(job: RunSettings) -> None:
    with pytest.raises(UsageError, match="not complete"):
        answer(replace(job, retry_errors=True), no_backend)
    answer(replace(job, limit=10), Flaky)
    before = job.output.read_bytes()
    with pytest.raises(UsageError, match="not complete"):
        answer(replace(job, retry_errors=True), no_backend)
    assert job.output.read_bytes() == before
    answer(replace(job, limit=10, retry_errors=True))
    assert len(job.output.read_bytes().splitlines()) == 10


def test_retry_with_a_limit_leaves_later_lines_alone(job: RunSettings) -> None:
    """Failed lines beyond the limit used to be reported as a changed input."""
    answer(job, Flaky)
    backend = Counting()
    statistics = answer(replace(job, retry_errors=True, limit=10), lambda settings: backend)
    assert backend.seen == ["0", "4", "8"]
    assert statistics.num_lines == NUM_LINES
    assert statistics.failed["internal"] == 6
    answer(replace(job, retry_errors=True))
    whole = replace(job, output=job.output.with_name("whole.jsonl"))
    answer(whole)
    assert job.output.read_bytes() == whole.output.read_bytes()


def edit(job: RunSettings, changes: dict[int, str]) -> None:
    """Replace lines of the input, by index."""
    lines = job.input.read_text("utf-8").splitlines()
    lines = [changes.get(n, line) for n, line in enumerate(lines)]
    job.input.write_text("\n".join(lines) + "\n", "utf-8")


def test_retry_asks_changed_lines_again(job: RunSettings) -> None:
    """A corrected line could only be answered by starting over."""
    answer(job)
    run_id = load_manifest(job.output).run_id
    lines = job.input.read_text("utf-8").splitlines()
    edit(job, {9: lines[8].replace("8", "fixed"), 30: lines[30].replace("question", "request")})
    with pytest.raises(ResumeError, match="changed at line 10 "):
        answer(job, no_backend)
    backend = Counting()
    answer(replace(job, retry_errors=True), lambda settings: backend)
    assert backend.seen == ["fixed", "30"]
    records = [json.loads(line) for line in job.output.read_bytes().splitlines()]
    assert "request 30" in json.dumps(records[30])
    assert "error_code" not in records[9]
    assert load_manifest(job.output).run_id == run_id
    answer(job, no_backend)


def test_retry_after_a_fix_needs_a_limit_if_lines_were_appended(job: RunSettings) -> None:
    answer(replace(job, limit=20))
    lines = job.input.read_text("utf-8").splitlines()
    edit(job, {9: lines[8].replace("8", "fixed")})
    with pytest.raises(UsageError, match="line 10 changed; run with --retry-errors --limit 20"):
        answer(replace(job, retry_errors=True), no_backend)
    answer(replace(job, retry_errors=True, limit=20))
    answer(job)
    assert len(job.output.read_bytes().splitlines()) == NUM_LINES


def test_retry_rejects_inserted_lines(job: RunSettings) -> None:
    answer(job, Flaky)
    before = job.output.read_bytes()
    job.input.write_text("\n" + job.input.read_text("utf-8"), "utf-8")
    with pytest.raises(ResumeError, match="lines were inserted or removed"):
        answer(replace(job, retry_errors=True), no_backend)
    assert job.output.read_bytes() == before


def test_retry_with_other_settings_is_rejected(job: RunSettings) -> None:
    answer(job, Flaky)
    other = replace(job, defaults=QueryDefaults(system_prompt="x"), retry_errors=True)
    with pytest.raises(ResumeError, match="system_prompt was"):
        answer(other, no_backend)


@pytest.mark.parametrize(
    "change", [{"overwrite": True}, {"input": Path("-")}, {"output": Path("-")}]
)
def test_retry_needs_files_and_excludes_overwrite(job: RunSettings, change: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--retry-errors"):
        answer(replace(job, retry_errors=True, **change), no_backend)


def test_failed_or_interrupted_retry_changes_nothing(
    job: RunSettings, caplog: pytest.LogCaptureFixture
) -> None:
    class Interrupted(EchoBackend):
        def answer(self, query: Query) -> Result:
            if query.chat_id == "12":
                raise KeyboardInterrupt
            return super().answer(query)

    caplog.set_level("INFO")
    answer(job, Flaky)
    before = job.output.read_bytes(), manifest_path(job.output).read_bytes()
    names = {path.name for path in job.output.parent.iterdir()}
    retry = replace(job, retry_errors=True)
    with pytest.raises(BackendError):
        answer(retry, lambda settings: DyingBackend(num_answers=3))
    with pytest.raises(KeyboardInterrupt):
        answer(retry, Interrupted)
    assert (job.output.read_bytes(), manifest_path(job.output).read_bytes()) == before
    assert {path.name for path in job.output.parent.iterdir()} == names
    assert "is unchanged" in caplog.text


def test_killed_retry_leaves_the_old_or_the_new_output(job: RunSettings) -> None:
    """Either way, the next retry ends with the new one."""
    answer(job, Flaky)
    old, manifest = job.output.read_bytes(), manifest_path(job.output).read_bytes()
    answer(replace(job, retry_errors=True))
    new, source, seen = job.output.read_bytes(), random.Random(7), set()
    for _ in range(4):
        job.output.write_bytes(old)
        manifest_path(job.output).write_bytes(manifest)
        answer_until_killed(replace(job, retry_errors=True), source.uniform(0, 0.09), 0.005)
        seen.add(job.output.read_bytes())
        answer(replace(job, retry_errors=True))
        assert job.output.read_bytes() == new
        statistics = load_manifest(job.output).statistics
        assert statistics is not None
        assert statistics["num_answered"] == NUM_LINES - 2
    assert seen <= {old, new}
