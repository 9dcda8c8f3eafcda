"""What a run tells of itself while it goes on."""

from pathlib import Path

import pytest

from smolcli.backends.base import Counters
from smolcli.batch.progress import BarProgress, LogProgress
from smolcli.batch.statistics import LatencyHistogram, StatisticsCollector
from smolcli.types import ErrorCode, FinishReason, Result, Timings, Usage

GOOD = Result("1", "x", FinishReason.STOP, usage=Usage(10, 100), timings=Timings(0, 0, 0.5))
BAD = Result("2", error="x", error_code=ErrorCode.INVALID_JSON)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time of time.monotonic()."""
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def test_the_rate_after_a_resume_is_this_sessions(clock: list[float]) -> None:
    """A bar that counted what was there before would show an absurd speed at first."""
    tally = StatisticsCollector()
    for _ in range(1000):
        tally.add(GOOD)
    tally.begin()
    clock[0] += 10
    tally.add(GOOD)
    assert tally.tokens_per_second == 10
    report = tally.report(Counters(model_calls=7))
    assert (report.num_lines, report.resumed_lines) == (1001, 1000)
    assert (report.seconds, report.model_calls) == (10, 7)


def test_a_line_in_the_log_every_ten_seconds(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    shown, tally = LogProgress(), StatisticsCollector()
    tally.begin()
    shown.start(2500, tally)
    for result in (GOOD, BAD, GOOD, GOOD):
        clock[0] += 6
        tally.add(result)
        shown.update()
    shown.stop()
    assert caplog.messages == [
        "2 of 2,500 lines, 1 failed, 8.3 tokens/s",
        "4 of 2,500 lines, 1 failed, 12.5 tokens/s",
    ]


def test_the_summary_has_all_there_is_to_say(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    tally = StatisticsCollector()
    tally.begin()
    tally.add(GOOD)
    tally.add(BAD)
    LogProgress().summary(tally.report(Counters(model_calls=3)), Path("out.jsonl"))
    names = [message.split("  ")[0] for message in caplog.messages]
    assert names == [
        "answered",
        "failed: invalid_json",
        "tokens read",
        "tokens written",
        "seconds",
        "tokens per second",
        "model calls",
        "latency p50 / p95",
        "output",
    ]


def test_the_bar_shows_what_is_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    tally = StatisticsCollector()
    tally.add(GOOD)
    tally.begin()
    bar = BarProgress()
    bar.start(4, tally)
    for result in (BAD, GOOD):
        tally.add(result)
        bar.update()
    bar.stop()
    bar.note("[one] sentence")
    bar.summary(tally.report(), Path("out.jsonl"))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "3/4" in captured.err
    assert "1 failed" in captured.err
    assert "[one] sentence" in captured.err
    assert "out.jsonl" in captured.err


def test_percentiles_are_within_one_percent() -> None:
    histogram = LatencyHistogram()
    assert histogram.quantile(0.5) is None
    for thousandths in range(1, 10_001):
        histogram.add(thousandths / 1000)
    assert histogram.quantile(0.50) == pytest.approx(5, rel=0.01)
    assert histogram.quantile(0.95) == pytest.approx(9.5, rel=0.01)
    histogram.add(0.0)
