"""Prometheus metrics, named after vLLM's with a `smol_` prefix."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.registry import Collector

from smolcli.backends.base import Counters, Health
from smolcli.types import Result, Timings, Usage

# Finer than vLLM's, whose first bucket of 300 ms is longer than a short answer takes.
_SECONDS = (
    *(0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3),
    *(5, 7.5, 10, 15, 20, 30, 45, 60, 90, 120, 180, 300, 600),
)
_TOKEN_SECONDS = (
    *(0.002, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3),
    *(0.5, 0.75, 1, 2, 5),
)


class TokenCollector(Collector):
    """Reports the tokens that the backend has computed, whether or not a client received them.

    Args:
        counters: returns the totals of the backend.
    """

    def __init__(self, counters: Callable[[], Counters]) -> None:
        self._counters = counters

    def collect(self) -> Iterator[CounterMetricFamily]:
        counters = self._counters()
        yield CounterMetricFamily(
            "smol_prompt_tokens", "Prompt tokens processed.", value=counters.prompt_tokens
        )
        yield CounterMetricFamily(
            "smol_generation_tokens", "Tokens generated.", value=counters.generated_tokens
        )
        yield CounterMetricFamily(
            "smol_spec_decode_draft_tokens",
            "Tokens drafted by speculation.",
            value=counters.drafted_tokens,
        )
        yield CounterMetricFamily(
            "smol_spec_decode_accepted_tokens",
            "Drafted tokens that became part of an answer.",
            value=counters.accepted_tokens,
        )


@dataclass(frozen=True, slots=True)
class BatchTotals:
    """The state of /v1/batches.

    Args:
        unfinished: number of unfinished batches by status.
        num_requests: their requests that have no result yet.
        num_bytes: size of all files and results.
    """

    unfinished: Mapping[str, int] = field(default_factory=dict)
    num_requests: int = 0
    num_bytes: int = 0


class BatchCollector(Collector):
    """Reports the state of /v1/batches.

    Args:
        totals: returns the state.
    """

    def __init__(self, totals: Callable[[], BatchTotals]) -> None:
        self._totals = totals

    def collect(self) -> Iterator[GaugeMetricFamily]:
        totals = self._totals()
        by_status = GaugeMetricFamily(
            "smol_batches_unfinished", "Unfinished batches.", labels=["status"]
        )
        for status, number in totals.unfinished.items():
            by_status.add_metric([status], number)
        yield by_status
        yield GaugeMetricFamily(
            "smol_batch_requests_unfinished",
            "Requests of unfinished batches that have no result yet.",
            value=totals.num_requests,
        )
        yield GaugeMetricFamily(
            "smol_batch_storage_bytes", "Size of the files of batches.", value=totals.num_bytes
        )


class ModelCollector(Collector):
    """Reports the model that answers and what it computes in, once that is known.

    Args:
        identity: returns the identity of the backend.
    """

    LABELS = ("model", "revision", "dtype", "device", "kernel_variant")

    def __init__(self, identity: Callable[[], Mapping[str, Any]]) -> None:
        self._identity = identity

    def collect(self) -> Iterator[InfoMetricFamily]:
        found = self._identity()
        labels = {name: str(found[name]) for name in self.LABELS if found.get(name) is not None}
        if labels:
            yield InfoMetricFamily("smol_model", "The model and its dtype.", value=labels)


class Metrics:
    """The metrics of one server, in a registry of their own.

    Args:
        health: returns the health of the backend, None while it is loading.
        counters: returns the totals of the backend.
    """

    def __init__(
        self, health: Callable[[], Health | None], counters: Callable[[], Counters]
    ) -> None:
        self._health = health
        self._registry = CollectorRegistry()
        self._registry.register(TokenCollector(counters))
        self._successes = self._counter(
            "smol_request_success", "Queries answered", "finished_reason"
        )
        self._deduplicated = self._counter(
            "smol_request_deduplicated", "Queries that shared the answer of an equal one"
        )
        self._errors = self._counter("smol_request_errors", "Failed queries and requests", "code")
        self._first_token = self._histogram("smol_time_to_first_token", "Time to the first token")
        self._queue = self._histogram("smol_request_queue_time", "Time spent waiting for a slot")
        self._total = self._histogram("smol_e2e_request_latency", "Time to the complete answer")
        self._token = self._histogram(
            "smol_inter_token_latency", "Mean time between the tokens of an answer", _TOKEN_SECONDS
        )
        self._batches = self._counter("smol_batches", "Finished batches", "status")
        self._gauge("smol_requests_running", "Queries being generated", lambda h: h.num_running)
        self._gauge("smol_requests_waiting", "Queries waiting for a slot", lambda h: h.num_waiting)

    def count_error(self, code: str) -> None:
        """Count a rejected request or a failed query."""
        self._errors.labels(code).inc()

    def count_result(self, result: Result) -> None:
        """Count the outcome of a query, and its latencies if its answer was computed."""
        if result.error_code is not None:
            self.count_error(result.error_code)
        else:
            self._successes.labels(result.finish_reason or "unknown").inc()
        if result.is_deduplicated:
            self._deduplicated.inc()
        elif result.usage is not None and result.timings is not None:
            self._observe(result.usage, result.timings)

    def count_batch(self, status: str) -> None:
        """Count a batch that has reached its final status."""
        self._batches.labels(status).inc()

    def watch_batches(self, totals: Callable[[], BatchTotals]) -> None:
        """Report the state of /v1/batches, which `totals` returns."""
        self._registry.register(BatchCollector(totals))

    def watch_model(self, identity: Callable[[], Mapping[str, Any]]) -> None:
        """Report the model, whose identity `identity` returns."""
        self._registry.register(ModelCollector(identity))

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def _observe(self, usage: Usage, timings: Timings) -> None:
        self._queue.observe(timings.queue_s)
        self._first_token.observe(timings.first_token_s)
        self._total.observe(timings.total_s)
        if usage.completion_tokens > 1:
            decode_s = timings.total_s - timings.first_token_s
            self._token.observe(decode_s / (usage.completion_tokens - 1))

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, f"{text}.", labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
        return Histogram(
            f"{name}_seconds", f"{text}, in seconds.", buckets=buckets, registry=self._registry
        )

    def _gauge(self, name: str, text: str, value: Callable[[Health], int]) -> None:
        def current() -> float:
            health = self._health()
            return 0.0 if health is None else value(health)

        Gauge(name, f"{text}.", registry=self._registry).set_function(current)
