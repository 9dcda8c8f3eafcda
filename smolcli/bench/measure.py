"""Measures a backend through its public interface."""

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from smolcli.backends.base import Backend
from smolcli.bench.workload import long_prompt, reference, stories
from smolcli.errors import RunError
from smolcli.settings import BenchPlan
from smolcli.types import Query, Result


@dataclass(frozen=True, slots=True)
class Reading:
    """One measurement.

    Args:
        system: what was measured.
        work: prompt, batch or questions.
        size: words of the prompt, or number of answers.
        tokens: processed or generated.
        seconds: wall-clock time.
    """

    system: str
    work: str
    size: int
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Prompt tokens processed, or tokens generated in all answers, per second."""
        return self.tokens / self.seconds


Show = Callable[[Reading], None]


def time_backend(
    backend: Backend, plan: BenchPlan, turn: int, system: str, show: Show
) -> list[Reading]:
    """Measure everything in a plan.

    Args:
        backend: warmed up and otherwise idle.
        plan: what to measure.
        turn: differs in every call, so that no prompt is in the prefix cache.
        system: name of the backend in the measurements.
        show: called with each measurement.

    Raises:
        RunError: a query failed.
    """
    readings = []

    def keep(work: str, size: int, tokens: int, seconds: float) -> None:
        readings.append(reading := Reading(system, work, size, tokens, seconds))
        show(reading)

    for length in plan.prompts:
        cached = backend.counters().cached_tokens
        began = time.perf_counter()
        (result,) = _answers(backend, [long_prompt(length, turn)])
        seconds = time.perf_counter() - began
        tokens = result.usage.prompt_tokens if result.usage else 0
        keep("prompt", length, tokens - (backend.counters().cached_tokens - cached), seconds)
    for size in plan.sizes:
        keep("batch", size, *_time_answers(backend, stories(size)))
    if plan.num_questions:
        queries = reference(plan.num_questions)
        keep("questions", len(queries), *_time_answers(backend, queries))
    return readings


def medians(readings: Iterable[Reading]) -> list[Reading]:
    """For each kind of work the measurement with the median rate, in order of first occurrence."""

    groups: dict[tuple[str, str, int], list[Reading]] = {}
    for reading in readings:
        groups.setdefault((reading.system, reading.work, reading.size), []).append(reading)
    return [_median(group) for group in groups.values()]


def _median(readings: list[Reading]) -> Reading:
    middle = statistics.median_low(r.tokens_per_second for r in readings)
    return next(r for r in readings if r.tokens_per_second == middle)


def _time_answers(backend: Backend, queries: list[Query]) -> tuple[int, float]:
    began = time.perf_counter()
    results = _answers(backend, queries)
    seconds = time.perf_counter() - began
    return sum(r.usage.completion_tokens for r in results if r.usage), seconds


def _answers(backend: Backend, queries: list[Query]) -> list[Result]:
    results = [future.result() for future in [backend.submit(query) for query in queries]]
    for result in results:
        if result.is_error:
            raise RunError(f"a benchmark query failed: {result.error}")
    return results
