"""Several answers to one query: asked one by one, given as one result."""

from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import replace

from smolcli.protocol.query import derived_seed
from smolcli.types import Query, Result, Timings, Usage


def split(query: Query) -> list[Query]:
    """A query for each answer that is wanted; the first is what the query alone would be."""
    seed = query.sampling.seed
    seeds = [seed, *(derived_seed(seed, str(index)) for index in range(1, query.n))]
    return [replace(query, n=1, sampling=replace(query.sampling, seed=s)) for s in seeds]


def gather(futures: Sequence[Future[Result]]) -> Future[Result]:
    """The future of all answers together; cancelling it cancels those that are unfinished."""
    whole: Future[Result] = Future()

    def cancel_rest(_: Future[Result]) -> None:
        for future in futures:
            future.cancel()

    def finish(_: Future[Result]) -> None:
        if all(future.done() for future in futures):
            with suppress(InvalidStateError):  # cancelled, or finished by another thread
                _complete(whole, futures)

    whole.add_done_callback(cancel_rest)
    for future in futures:
        future.add_done_callback(finish)
    return whole


def _complete(whole: Future[Result], futures: Sequence[Future[Result]]) -> None:
    if any(future.cancelled() for future in futures):
        whole.cancel()
    elif fault := next((e for future in futures if (e := future.exception())), None):
        whole.set_exception(fault)
    else:
        whole.set_result(_together([future.result() for future in futures]))


def _together(results: list[Result]) -> Result:
    """One result of several; where one failed there is none."""
    if failed := next((result for result in results if result.is_error), None):
        return failed
    first, *others = results
    return replace(
        first, alternatives=tuple(others), usage=_usage(results), timings=_timings(results)
    )


def _usage(results: list[Result]) -> Usage | None:
    """The prompt counts once."""
    usages = [result.usage for result in results if result.usage is not None]
    if len(usages) < len(results):
        return None
    return Usage(usages[0].prompt_tokens, sum(usage.completion_tokens for usage in usages))


def _timings(results: list[Result]) -> Timings | None:
    timings = [result.timings for result in results if result.timings is not None]
    if not timings:
        return None
    return Timings(
        queue_s=min(t.queue_s for t in timings),
        first_token_s=min(t.first_token_s for t in timings),
        total_s=max(t.total_s for t in timings),
    )
