"""Times a backend, through the seam that every door uses."""

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby

from smolcli.backends.base import Backend
from smolcli.bench.work import long_prompt, reference, stories
from smolcli.errors import RunError
from smolcli.settings import BenchPlan
from smolcli.types import Query, Result


@dataclass(frozen=True, slots=True)
class Reading:
    """One timing; `work` is prompt, batch or questions, `size` how many tokens or answers."""

    system: str
    work: str
    size: int
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens of the prompt read, or tokens written by all answers, a second."""
        return self.tokens / self.seconds


Show = Callable[[Reading], None]


def time_backend(
    backend: Backend, plan: BenchPlan, turn: int, system: str, show: Show
) -> list[Reading]:
    """Time all of a plan.

    Args:
        backend: warm, and not at work for anybody else.
        plan: what to time.
        turn: a number that no earlier call had, so that no prompt is in a cache.
        system: what to call the backend.
        show: told of each reading.

    Raises:
        RunError: a question was not answered.
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
    """For each work the reading of median speed, in the order in which they came."""

    def kind(reading: Reading) -> tuple[str, str, int]:
        return (reading.system, reading.work, reading.size)

    ordered = list(readings)
    first = {kind(r): index for index, r in reversed(list(enumerate(ordered)))}
    groups = groupby(sorted(ordered, key=lambda r: first[kind(r)]), key=kind)
    return [_median(list(group)) for _, group in groups]


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
            raise RunError(f"a question of the benchmark failed: {result.error}")
    return results
