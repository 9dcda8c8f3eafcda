"""One query on its way through the local backend, and what comes of it."""

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from smolcli.backends.base import OnText, settle
from smolcli.engine.sequence import Sequence
from smolcli.errors import BackendError, QueryError
from smolcli.text.detokenizer import AnswerText, cut_off, logprob_entries
from smolcli.text.grammar import TokenConstraint
from smolcli.types import ErrorCode, FinishReason, Query, Result, Timings, Usage, failure

logger = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class Job:
    """One query on its way through the backend."""

    query: Query
    on_text: OnText | None
    text: AnswerText
    is_urgent: bool
    constraint: TokenConstraint | None = None
    spell: Callable[[int], bytes] | None = None  # where likelihoods are asked for
    future: Future[Result] = field(default_factory=Future)
    submitted_at: float = field(default_factory=time.perf_counter)
    first_token_at: float = 0.0

    def give(self, result: Result) -> None:
        """Complete the future, unless somebody cancelled it."""
        settle(self.future, result)

    def fail(self, error: BackendError) -> None:
        """Tell that the backend is gone."""
        settle(self.future, error)


def outcome(job: Job, sequence: Sequence) -> Result:
    """What a sequence that has ended comes to."""
    if sequence.error is not None:
        return failed(job.query, sequence.error)
    if job.constraint is not None and not job.constraint.is_complete:
        fault = job.constraint.fault
        return failed(job.query, fault) if fault else cut_off(job.query, sequence.num_output)
    now = time.perf_counter()
    assert sequence.admitted_at is not None
    return Result(
        chat_id=job.query.chat_id,
        response=job.text.text,
        finish_reason=FinishReason.STOP if job.text.is_stopped else sequence.finish_reason,
        logprobs=logprob_entries(sequence.scores, job.spell) if job.spell else None,
        usage=Usage(len(sequence.prompt_ids), sequence.num_output),
        metadata=job.query.metadata,
        line=job.query.line,
        timings=Timings(
            queue_s=sequence.admitted_at - job.submitted_at,
            first_token_s=job.first_token_at - job.submitted_at,
            total_s=now - job.submitted_at,
        ),
    )


def failed(query: Query, exc: BaseException) -> Result:
    """The result of a query that something went wrong with."""
    if isinstance(exc, QueryError):
        return failure(query, str(exc), exc.code, exc.field)
    is_wanted = logger.isEnabledFor(logging.DEBUG)
    logger.error(
        "query %.100r: %s", query.chat_id, sentence(exc), exc_info=exc if is_wanted else None
    )
    return failure(query, sentence(exc), ErrorCode.INTERNAL)


def sentence(exc: BaseException) -> str:
    """A foreign exception on one line."""
    first = (str(exc).splitlines() or [""])[0]
    return f"internal error: {type(exc).__name__}: {first}"
