"""Queries that ask for several answers (`n` > 1): one generation per answer, one result."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace

from smolcli.backends.base import complete_future
from smolcli.protocol.tools import with_call_ids
from smolcli.types import Query, Result, Timings, Usage


def combined_future(query: Query, futures: Sequence[Future[Result]]) -> Future[Result]:
    """The result of a query whose answers are generated separately, or the first error.

    Cancelling it cancels all generations.

    Args:
        query: asks for several answers.
        futures: the results of `split_answers(query)`.
    """
    combined: Future[Result] = Future()

    def cancel_all(_: Future[Result]) -> None:
        for future in futures:
            future.cancel()

    def finish(_: Future[Result]) -> None:
        if not all(future.done() for future in futures):
            return
        if any(future.cancelled() for future in futures):
            combined.cancel()
        else:
            error = next((e for future in futures if (e := future.exception())), None)
            results = [] if error else [future.result() for future in futures]
            complete_future(combined, error or with_call_ids(merged(results), query))

    combined.add_done_callback(cancel_all)
    for future in futures:
        future.add_done_callback(finish)
    return combined


def merged(results: list[Result]) -> Result:
    """The result with all answers, in the order of `split_answers`, or the first error."""
    if failed := next((result for result in results if result.is_error), None):
        return failed
    first, *others = results
    return replace(
        first, alternatives=tuple(others), usage=_usage(results), timings=_timings(results)
    )


def _usage(results: list[Result]) -> Usage | None:
    """Tokens of all answers; the prompt they share counts once."""
    usages = [result.usage for result in results if result.usage is not None]
    if len(usages) < len(results):
        return None
    return replace(usages[0], completion_tokens=sum(usage.completion_tokens for usage in usages))


def _timings(results: list[Result]) -> Timings | None:
    timings = [result.timings for result in results if result.timings is not None]
    if not timings:
        return None
    return Timings(
        queue_s=min(t.queue_s for t in timings),
        first_token_s=min(t.first_token_s for t in timings),
        total_s=max(t.total_s for t in timings),
    )
