"""`smol report`: the contents of the page, and that it is self-contained."""

import json
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from fakes import DyingBackend, EchoBackend, echo
from hypothesis import given
from hypothesis import strategies as st
from run_tools import smol_without
from typer.testing import CliRunner

from smolcli.batch.manifest import load_manifest
from smolcli.batch.progress import LogProgress
from smolcli.batch.runner import run_file
from smolcli.batch.statistics import Throughput
from smolcli.cli.main import app
from smolcli.errors import BackendError, InputError
from smolcli.html_report.charts import charts_of
from smolcli.html_report.facts import gather
from smolcli.html_report.page import render
from smolcli.settings import RowSettings, RunSettings
from smolcli.types import Query, Result, Timings

NASTY = "<script>alert('$x^2$')</script>"


class Timed(EchoBackend):
    """Latency grows with the length of the prompt."""

    def answer(self, query: Query) -> Result:
        result = echo(query)
        assert result.usage is not None
        return replace(result, timings=Timings(0.1, 0.2, 0.2 + result.usage.completion_tokens))


@pytest.fixture
def job(tmp_path: Path) -> RunSettings:
    """Twenty valid lines and five invalid ones."""
    lines: list[dict[str, Any]] = [
        {"chat_id": f"{NASTY}{n}", "user_prompt": "word " * n} for n in range(1, 21)
    ]
    lines += [{"chat_id": f"bad{n}", NASTY: n} for n in range(4)] + [{"chat_id": "empty"}]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return RunSettings(path, tmp_path / "out.jsonl", seed=1, with_timings=True)


def run(job: RunSettings) -> Path:
    run_file(job, lambda settings: Timed(settings), LogProgress())
    return job.output


def smol(*args: object) -> Any:
    return CliRunner().invoke(app, [str(arg) for arg in args])


# statistics


def test_every_line_is_counted(job: RunSettings) -> None:
    facts = gather(run(job))
    assert (facts.num_lines, facts.num_answered) == (25, 20)
    assert facts.errors == {"unknown_field": 4, "missing_field": 1}
    assert [example.line for example in facts.examples["unknown_field"]] == [21, 22, 23]
    assert facts.finish_reasons == {"stop": 20}
    assert facts.completion_tokens == dict.fromkeys(range(1, 21), 1)
    assert [slow.line for slow in sorted(facts.slowest, reverse=True)] == [*range(20, 10, -1)]


def test_incomplete_run_has_a_report(job: RunSettings) -> None:
    with pytest.raises(BackendError):
        run_file(job, lambda settings: DyingBackend(num_answers=3), LogProgress())
    job.output.write_bytes(job.output.read_bytes() + b'{"chat_id": "tor')
    facts = gather(job.output)
    assert facts.num_lines == 3
    assert "This run is not complete" in render(facts)


@pytest.mark.parametrize("data", [b"nonsense", b"[]", b'{"chat_id": "1", "user_prompt": "Hi"}'])
def test_file_without_results_is_an_error(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(data + b"\n")
    with pytest.raises(InputError, match=r"line 1 of .* is not a result"):
        gather(path)


def test_table_is_reported_from_its_journal(job: RunSettings, tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    journal = tmp_path / "t.csv.jsonl"
    run(replace(job, output=journal, table=table, rows=RowSettings(None, "chat_id")))
    assert gather(table) == gather(journal)
    journal.unlink()
    with pytest.raises(InputError, match=r"t\.csv\.jsonl"):
        gather(table)


OPENAI = [
    {
        "id": "batch_req_67",
        "custom_id": "a",
        "response": {
            "status_code": 200,
            "request_id": "r",
            "body": {
                "choices": [{"message": {"role": "assistant", "content": "Hi"}}],
                "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
            },
        },
        "error": None,
    },
    {
        "custom_id": "b",
        "response": {"status_code": 429, "body": {"error": {"message": "slow", "type": "limit"}}},
    },
    {"custom_id": "c", "response": None, "error": {"code": "batch_expired", "message": "late"}},
    {"custom_id": "d", "response": {"body": {"choices": [{"message": {"content": None}}]}}},
]


def test_openai_results_have_a_report(tmp_path: Path) -> None:
    """Only smol's own results, with token counts, used to be supported."""
    path = tmp_path / "batch_output.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in OPENAI))
    facts = gather(path)
    assert (facts.num_lines, facts.num_answered, facts.num_skipped) == (4, 2, 0)
    assert facts.errors == {"limit": 1, "batch_expired": 1}
    assert (facts.prompt_tokens, facts.completion_tokens) == ({3: 1}, {2: 1})
    assert facts.finish_reasons == {"not reported": 2}
    render(facts)


def test_results_without_usage_have_a_report(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"chat_id": "1", "response": "Hi", "finish_reason": "stop"}\n')
    facts = gather(path)
    assert facts.num_answered == 1
    assert [chart.title for chart in charts_of(facts)] == ["Outcomes"]


def test_skipped_lines_are_named(job: RunSettings) -> None:
    """An invalid last line used to be dropped silently."""
    lines = run(job).read_bytes().splitlines(keepends=True)
    job.output.write_bytes(b"".join([*lines[:2], b"[1]\n", *lines[2:], b'{"chat_id": "tor']))
    done = smol("report", job.output)
    assert done.exit_code == 0
    said = "skipped line 3 of out.jsonl, line 27 of out.jsonl: not a result"
    assert done.stderr == f"smol: {said}\n"
    assert said in (job.output.parent / "out.report.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("timings", "is_answer"),
    [
        ("null", True),
        ('{"queue_s": 0, "first_token_s": 1, "total_s": 2}', True),
        ('{"queue_s": 0}', False),
        ('{"queue_s": 0, "first_token_s": 0, "total_s": NaN}', False),
        ('{"queue_s": "a", "first_token_s": "b", "total_s": "c"}', False),
    ],
)
def test_line_is_counted_or_skipped(tmp_path: Path, timings: str, is_answer: bool) -> None:
    """A line with odd timings used to be counted as an answer and as skipped."""
    line = f'{{"chat_id": "1", "response": "x", "finish_reason": "stop", "timings": {timings}}}\n'
    path = tmp_path / "x.jsonl"
    path.write_text('{"chat_id": "0", "response": "x", "finish_reason": "stop"}\n' + line)
    facts = gather(path)
    assert (facts.num_answered, facts.num_skipped) == (1 + is_answer, 1 - is_answer)


def test_failed_lines_in_the_errors_file_are_counted(job: RunSettings) -> None:
    run(replace(job, errors=job.output.with_name("bad.jsonl")))
    facts = gather(job.output)
    assert (facts.num_answered, facts.errors.total()) == (20, 5)


# throughput over time


@given(st.lists(st.tuples(st.integers(0, 500), st.floats(0, 20), st.floats(0, 300))))
def test_throughput_is_bounded_and_loses_no_tokens(answers: list[tuple[int, float, float]]) -> None:
    throughput, end_s = Throughput(), 0.0
    for num_tokens, later_s, duration_s in answers:
        end_s += later_s
        throughput.add(num_tokens, end_s, duration_s)
    record = throughput.record()
    if record is None:
        assert not answers
        return
    assert len(record["tokens"]) <= Throughput.MAX_INTERVALS
    assert len(record["tokens"]) * record["interval_s"] >= end_s
    assert sum(record["tokens"]) == pytest.approx(sum(n for n, _, _ in answers), abs=6.1)


def test_tokens_are_spread_over_the_decoding_time() -> None:
    throughput = Throughput()
    throughput.add(40, end_s=4.0, duration_s=4.0)
    throughput.add(10, end_s=4.5, duration_s=0.0)
    assert throughput.record() == {"interval_s": 1.0, "tokens": [10.0, 10.0, 10.0, 10.0, 10.0]}


def test_manifest_records_throughput(job: RunSettings) -> None:
    report = load_manifest(run(job)).statistics
    assert report is not None
    assert sum(report["pace"]["tokens"]) == pytest.approx(report["completion_tokens"])


# the page


class Elements(HTMLParser):
    """Every element with its attributes, and the elements left open."""

    VOID = ("meta", "br")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_well_formed_and_self_contained(job: RunSettings) -> None:
    page = render(gather(run(job)))
    elements = Elements(page)
    assert elements.open == []
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in elements.seen}
    for _, attributes in elements.seen:
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")
    assert "@import" not in page
    assert "url(http" not in page
    assert NASTY not in page
    assert page == render(gather(job.output))


def test_page_shows_statistics_settings_and_charts(job: RunSettings) -> None:
    page = render(gather(run(job)))
    for said in ("unknown_field", "line 21", "median 10, p95 19", "20.20 s", "tokens/s"):
        assert said in page
    for setting in ("max new tokens", "float32", "torch", "HuggingFaceTB/SmolLM2-135M-Instruct"):
        assert setting in page
    assert [chart.title for chart in charts_of(gather(job.output))] == [
        "Outcomes",
        "Length of prompts",
        "Length of answers",
        "Throughput",
        "Latency",
    ]


def test_page_explains_missing_timings_and_manifest(job: RunSettings) -> None:
    run(replace(job, with_timings=False))
    assert "smol run --timings" in render(gather(job.output))
    job.output.with_name("out.jsonl.manifest.json").unlink()
    assert "have no manifest" in render(gather(job.output))


@pytest.mark.parametrize("lines", [[], [{"chat_id": "1"}], [{"chat_id": "1", "user_prompt": "x"}]])
def test_smallest_runs_have_a_page(job: RunSettings, lines: list[Any]) -> None:
    job.input.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert f"<dd>{len(lines)}</dd>" in render(gather(run(job)))


# the command


def test_command_writes_page_and_png(job: RunSettings, tmp_path: Path) -> None:
    done = smol("report", run(job), "--png", tmp_path / "x.png")
    assert (done.exit_code, done.stdout) == (0, f"{tmp_path / 'out.report.html'}\n")
    assert (tmp_path / "out.report.html").read_text("utf-8").startswith("<!doctype html>")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_command_writes_the_page_to_stdout(
    job: RunSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`-o -` used to create a file of that name."""
    output = run(job)
    monkeypatch.chdir(output.parent)
    done = CliRunner().invoke(app, ["report", str(output), "-o", "-"])
    assert (done.exit_code, done.stdout.rstrip()[-7:]) == (0, "</html>")
    assert CliRunner().invoke(app, ["report", str(output), "--png", "-"]).exit_code == 2
    assert not Path("-").exists()


def test_command_never_replaces_the_results(job: RunSettings) -> None:
    before = run(job).read_bytes()
    for option in ("-o", "--png"):
        done = smol("report", job.output, option, job.output)
        assert done.exit_code == 2
    assert smol("report", "-").exit_code == 2
    assert smol("report", job.input.with_name("missing.jsonl")).exit_code == 1
    assert smol("report", job.output, "-o", job.input / "x.html").exit_code == 1
    assert job.output.read_bytes() == before


@pytest.mark.parametrize("option", ["-o", "--png"])
def test_command_replaces_only_its_own_files(job: RunSettings, option: str) -> None:
    """SMOL_OUTPUT or a config file may name the output of `smol run`, or any file at all."""
    target = job.output.with_name("mine")
    target.write_bytes(b'{"chat_id": "1"}\n')
    done = smol("report", run(job), option, target)
    assert done.exit_code == 2
    assert "was not written by smol report" in done.stderr
    assert target.read_bytes() == b'{"chat_id": "1"}\n'
    target.write_bytes(b"")
    for _ in range(2):
        assert smol("report", job.output, option, target).exit_code == 0


@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")
@pytest.mark.parametrize("option", ["-o", "--png"])
def test_full_disk_is_reported(job: RunSettings, option: str) -> None:
    """ENOSPC errors carry no file name, so the message once said `cannot write None`."""
    done = smol("report", run(job), option, "/dev/full")
    assert done.exit_code == 1
    assert done.stderr.startswith("smol: cannot write /dev/full: No space left on device; free ")


def test_missing_matplotlib_names_the_extra(job: RunSettings) -> None:
    done = smol_without("matplotlib", "report", run(job))
    assert done.returncode == 2
    assert b"pip install 'smolcli[report]'" in done.stderr
