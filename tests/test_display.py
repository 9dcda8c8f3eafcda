"""Progress and statistics of a run."""

import io
import logging
import re
from pathlib import Path

import pytest
from rich.console import Console

from smolcli.backends.base import Counters
from smolcli.batch.progress import READING, BarProgress, LogProgress, new_bar
from smolcli.batch.statistics import LatencyHistogram, StatisticsCollector
from smolcli.batch.status_line import waiting
from smolcli.types import ErrorCode, FinishReason, Result, Timings, Usage

GOOD = Result("1", "x", FinishReason.STOP, usage=Usage(10, 100), timings=Timings(0, 0, 0.5))
BAD = Result("2", error="x", error_code=ErrorCode.INVALID_JSON)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Controls time.monotonic()."""
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def test_throughput_counts_this_session_only(clock: list[float]) -> None:
    """Counting resumed lines would show an absurd rate at first."""
    statistics = StatisticsCollector()
    for _ in range(1000):
        statistics.add(GOOD)
    statistics.begin()
    clock[0] += 10
    statistics.add(GOOD)
    assert statistics.tokens_per_second == 10
    snapshot = statistics.snapshot(Counters(model_calls=7, drafted_tokens=5, accepted_tokens=4))
    assert ("completion tokens", f"{snapshot.completion_tokens:,}, 4 of them drafted") in (
        snapshot.rows()
    )
    assert (snapshot.num_lines, snapshot.resumed_lines) == (1001, 1000)
    assert (snapshot.seconds, snapshot.model_calls) == (10, 7)


def test_progress_is_logged_every_ten_seconds(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    shown, statistics = LogProgress(), StatisticsCollector()
    statistics.begin()
    shown.start(2500, statistics)
    for result in (GOOD, BAD, GOOD, GOOD):
        clock[0] += 6
        statistics.add(result)
        shown.update()
    shown.stop()
    assert caplog.messages == [
        "2 of 2,500 lines, 1 failed, 8.3 tokens/s",
        "4 of 2,500 lines, 1 failed, 12.5 tokens/s",
    ]


def test_summary_counts_outcomes_and_tokens(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    statistics = StatisticsCollector()
    statistics.begin()
    statistics.add(GOOD)
    statistics.add(BAD)
    LogProgress().summary(statistics.snapshot(Counters(model_calls=3)), Path("out.jsonl"))
    names = [message.split("  ")[0] for message in caplog.messages]
    assert names == [
        "answered",
        "failed: invalid_json",
        "prompt tokens",
        "completion tokens",
        "seconds",
        "tokens per second",
        "model calls",
        "latency p50 / p95",
        "output",
    ]


def test_bar_shows_done_and_failed_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    statistics = StatisticsCollector()
    statistics.add(GOOD)
    statistics.begin()
    bar = BarProgress()
    bar.start(4, statistics)
    for result in (BAD, GOOD):
        statistics.add(result)
        bar.update()
    bar.stop()
    bar.note("[one] sentence")
    bar.summary(statistics.snapshot(), Path("out.jsonl"))
    captured = capsys.readouterr()
    assert captured.out == ""
    before, _, after = captured.err.partition("2/4")
    assert "reading prompts" in before
    assert "reading prompts" not in after, "there are results"
    assert "3/4" in captured.err
    assert "1 failed" in captured.err
    assert re.search(
        r"elapsed\W+0:00:00 left\W+-:--:--", re.sub(r"\x1b\[[0-9;]*m", "", captured.err)
    )
    assert "[one] sentence" in captured.err
    assert "out.jsonl" in captured.err


@pytest.mark.parametrize("width", [160, 80, 76, 75, 60, 59, 52, 51, 40])
@pytest.mark.parametrize("text", [READING, "1,234 tokens/s"])
def test_progress_fits_the_terminal(width: int, text: str) -> None:
    """80 columns used to cut off the number of lines, and 40 left nothing to read."""
    console = Console(width=width, force_terminal=True, color_system=None, file=io.StringIO())
    bar = new_bar(console)
    bar.add_task(text, total=120_000, completed=12_345, failed=12)
    with console.capture() as capture:
        console.print(bar.get_renderable())
    shown = capture.get()
    assert f"12345/120000 12 failed {text}" in shown
    assert "…" not in shown
    assert ("left -:--:--" in shown) == (width >= 52)


def test_percentiles_are_within_one_percent() -> None:
    histogram = LatencyHistogram()
    assert histogram.quantile(0.5) is None
    for thousandths in range(1, 10_001):
        histogram.add(thousandths / 1000)
    assert histogram.quantile(0.50) == pytest.approx(5, rel=0.01)
    assert histogram.quantile(0.95) == pytest.approx(9.5, rel=0.01)
    histogram.add(0.0)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_status_line_shows_the_steps_of_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run used to show nothing, or a bar at zero, while its model was downloaded and loaded."""
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    logger = logging.getLogger("smolcli.backends.local")
    with waiting("starting [the] backend"):
        logging.getLogger("smolcli.weights.hub").info("downloading a model")
        logger.debug("loading a model")
        logger.warning("watch out")
    assert not logger.isEnabledFor(logging.DEBUG)
    shown = terminal.getvalue()
    for message in ("starting [the] backend", "downloading a model", "loading a model", "watch"):
        assert message in shown


def test_no_status_line_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with waiting("starting"):
        logging.getLogger("smolcli.backends.local").debug("loading a model")
    assert capsys.readouterr() == ("", "")
