"""Statistics of a run: lines, tokens, throughput over time and latencies."""

import math
import time
from collections import Counter
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from smolcli.backends.base import Counters
from smolcli.types import Result

CUT_KEY = "characters_cut"  # in the metadata of a query whose prompt was truncated

_NO_COUNTERS = Counters()


class LatencyHistogram:
    """Latencies in logarithmic bins 2 % wide, so that memory does not grow with their number."""

    _LOG_BASE = math.log(1.02)

    def __init__(self) -> None:
        self._bins: Counter[int] = Counter()

    def add(self, seconds: float) -> None:
        """Count one latency."""
        self._bins[round(math.log(max(seconds, 1e-6)) / self._LOG_BASE)] += 1

    def quantile(self, fraction: float) -> float | None:
        """The quantile at `fraction`, within 1 %; None if nothing was counted."""
        rank, num_seen = math.ceil(self._bins.total() * fraction), 0
        for bin_, count in sorted(self._bins.items()):
            num_seen += count
            if num_seen >= rank:
                return round(math.exp(bin_ * self._LOG_BASE), 6)
        return None


class Throughput:
    """Completion tokens per interval; the interval doubles whenever there are too many."""

    MAX_INTERVALS = 120

    def __init__(self) -> None:
        self._interval_s = 1.0
        self._tokens: list[float] = []

    def add(self, num_tokens: int, end_s: float, duration_s: float) -> None:
        """Count the tokens of one answer, spread evenly over the time it took to decode.

        Args:
            num_tokens: number of tokens.
            end_s: when it was finished, in seconds since the session began.
            duration_s: how long decoding took, in seconds.
        """
        begin_s = max(0.0, end_s - max(duration_s, 1e-3))
        end_s = max(end_s, begin_s + 1e-3)
        while end_s >= self.MAX_INTERVALS * self._interval_s:
            self._halve()
        last = int(end_s / self._interval_s)
        self._tokens += [0.0] * (last + 1 - len(self._tokens))
        for at in range(int(begin_s / self._interval_s), last + 1):
            from_s = max(begin_s, at * self._interval_s)
            to_s = min(end_s, (at + 1) * self._interval_s)
            self._tokens[at] += num_tokens * (to_s - from_s) / (end_s - begin_s)

    def record(self) -> dict[str, Any] | None:
        """The intervals in JSON types; None if there are none."""
        if not self._tokens:
            return None
        return {"interval_s": self._interval_s, "tokens": [round(n, 1) for n in self._tokens]}

    def _halve(self) -> None:
        self._interval_s *= 2
        pairs = zip_longest(self._tokens[::2], self._tokens[1::2], fillvalue=0.0)
        self._tokens = [first + second for first, second in pairs]


@dataclass(frozen=True, slots=True)
class RunStatistics:
    """Totals of an output; times and rates are those of its last session.

    Args:
        num_lines: number of results.
        num_answered: results that are not errors.
        failed: number of errors by code.
        prompt_tokens: tokens of all prompts.
        completion_tokens: tokens of all answers, end tokens included.
        resumed_lines: results from earlier sessions.
        seconds: duration of the session.
        tokens_per_second: completion tokens per second; None if nothing was answered in it.
        model_calls: forward passes or, with remote servers, HTTP requests.
        cached_tokens: prompt tokens found in the prefix cache.
        shared_queries: deduplicated queries, which received the answer of an equal one.
        latency_p50_s: median time from submitting a query to its result, in seconds.
        latency_p95_s: 95th percentile of that time.
        pace: `interval_s`, and the completion `tokens` of each interval.
        truncated_prompts: number of prompts that were truncated.
        drafted_tokens: tokens that speculation computed before they were sampled.
        accepted_tokens: drafted tokens that became part of an answer.
    """

    num_lines: int
    num_answered: int
    failed: dict[str, int]
    prompt_tokens: int
    completion_tokens: int
    resumed_lines: int
    seconds: float
    tokens_per_second: float | None
    model_calls: int
    cached_tokens: int
    shared_queries: int
    latency_p50_s: float | None
    latency_p95_s: float | None
    pace: dict[str, Any] | None = None
    truncated_prompts: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    def rows(self) -> list[tuple[str, str]]:
        """Names and values to show in a table."""
        rows = [("answered", f"{self.num_answered:,}")]
        rows += [(f"failed: {code}", f"{count:,}") for code, count in sorted(self.failed.items())]
        if self.resumed_lines:
            rows.append(("from an earlier session", f"{self.resumed_lines:,}"))
        if self.shared_queries:
            rows.append(("deduplicated", f"{self.shared_queries:,}"))
        if self.truncated_prompts:
            rows.append(("truncated prompts", f"{self.truncated_prompts:,}"))
        cached = f", {self.cached_tokens:,} of them cached" if self.cached_tokens else ""
        rows.append(("prompt tokens", f"{self.prompt_tokens:,}{cached}"))
        drafted = f", {self.accepted_tokens:,} of them drafted" if self.accepted_tokens else ""
        rows.append(("completion tokens", f"{self.completion_tokens:,}{drafted}"))
        if self.tokens_per_second is not None:
            rows.append(("seconds", f"{self.seconds:,.1f}"))
            rows.append(("tokens per second", f"{self.tokens_per_second:,.1f}"))
            rows.append(("model calls", f"{self.model_calls:,}"))
        if self.latency_p50_s is not None:
            rows.append(
                ("latency p50 / p95", f"{self.latency_p50_s:.2f} s / {self.latency_p95_s:.2f} s")
            )
        return rows


class StatisticsCollector:
    """Adds up the results of an output; `begin` starts the current session."""

    def __init__(self) -> None:
        self.num_answered = 0
        self.failed: Counter[str] = Counter()
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.num_truncated = 0
        self._latencies = LatencyHistogram()
        self._throughput = Throughput()
        self._begun_at: float | None = None
        self._resumed_lines = 0
        self._resumed_tokens = 0

    @property
    def num_lines(self) -> int:
        """Number of results."""
        return self.num_answered + self.num_failed

    @property
    def num_failed(self) -> int:
        """Number of error results."""
        return self.failed.total()

    @property
    def seconds(self) -> float:
        """Duration of this session so far."""
        return 0.0 if self._begun_at is None else time.monotonic() - self._begun_at

    @property
    def tokens_per_second(self) -> float | None:
        """Completion tokens per second in this session; None before it begins."""
        seconds = self.seconds
        return (self.completion_tokens - self._resumed_tokens) / seconds if seconds else None

    def begin(self) -> None:
        """Start the clock; results counted so far are from earlier sessions."""
        self._begun_at = time.monotonic()
        self._resumed_lines = self.num_lines
        self._resumed_tokens = self.completion_tokens

    def add(self, result: Result) -> None:
        """Count one result."""
        if result.error_code is None:
            self.num_answered += 1
        else:
            self.failed[str(result.error_code)] += 1
        self.num_truncated += CUT_KEY in (result.metadata or ())
        if result.usage is not None:
            self.prompt_tokens += result.usage.prompt_tokens
            self.completion_tokens += result.usage.completion_tokens
            if self._begun_at is not None:
                self._throughput.add(
                    result.usage.completion_tokens, self.seconds, _decode_s(result)
                )
        if result.timings is not None:
            self._latencies.add(result.timings.total_s)

    def snapshot(self, counters: Counters = _NO_COUNTERS) -> RunStatistics:
        """The current numbers, together with the backend's own counters."""
        rate = self.tokens_per_second
        return RunStatistics(
            num_lines=self.num_lines,
            num_answered=self.num_answered,
            failed=dict(sorted(self.failed.items())),
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            resumed_lines=self._resumed_lines,
            seconds=round(self.seconds, 3),
            tokens_per_second=None if rate is None else round(rate, 3),
            model_calls=counters.model_calls,
            cached_tokens=counters.cached_tokens,
            shared_queries=counters.shared_queries,
            latency_p50_s=self._latencies.quantile(0.50),
            latency_p95_s=self._latencies.quantile(0.95),
            pace=self._throughput.record(),
            truncated_prompts=self.num_truncated,
            drafted_tokens=counters.drafted_tokens,
            accepted_tokens=counters.accepted_tokens,
        )


def _decode_s(result: Result) -> float:
    """Time between the first and the last token of an answer; 0 if unknown."""
    return result.timings.total_s - result.timings.first_token_s if result.timings else 0.0
