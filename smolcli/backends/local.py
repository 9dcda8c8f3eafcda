"""The model in this process: one thread owns the engine, a few prepare queries for it."""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

from smolcli.backends.base import Counters, Health, OnText
from smolcli.backends.job import Job, failed, outcome, sentence
from smolcli.backends.several import gather, split
from smolcli.engine.engine import Engine
from smolcli.engine.sequence import Sequence
from smolcli.errors import BackendError, QueryError
from smolcli.text.detokenizer import AnswerText
from smolcli.text.grammar import Vocabulary
from smolcli.text.tokenizer import Chat
from smolcli.types import Query, Result

logger = logging.getLogger(__name__)

WINDOW_BATCHES = 3
STUCK_AFTER_S = 60.0  # no step takes as long


class LocalBackend:
    """Answers queries with an engine of its own; see `backends.Backend`.

    The engine is built on the thread that runs it: a thread that has computed once keeps OpenMP
    workers, and with two such threads the workers of both outnumber the cores and sleep between
    any two operations instead of waiting awake, which costs a third of the speed.

    Args:
        load_chat: gives the model's tokenizer and template.
        build_engine: gives the engine; called on its thread.
        identity: what decides the answers.
        max_concurrency: threads that tokenize.
    """

    def __init__(
        self,
        load_chat: Callable[[], Chat],
        build_engine: Callable[[], Engine],
        identity: Mapping[str, Any],
        max_concurrency: int,
    ) -> None:
        self._identity = dict(identity)
        self._inbox: SimpleQueue[tuple[Job, Sequence] | None] = SimpleQueue()
        self._jobs: dict[Sequence, Job] = {}
        self._lock = threading.Lock()
        self._gone: BackendError | None = None
        self._stepped_at = 0.0
        self._preparing = ThreadPoolExecutor(max_concurrency, "smol-prepare")
        built: Future[Engine] = Future()
        self._thread = threading.Thread(
            target=self._work, args=(build_engine, built), name="smol-engine", daemon=True
        )
        self._thread.start()
        try:
            self._chat = load_chat()
            config = built.result().model.config
            self._vocabulary = Vocabulary(
                self._chat.tokenizer_json, config.vocab_size, config.eos_ids
            )
        except BaseException:
            self.close()
            raise

    @property
    def window(self) -> int:
        """A few batches, so that no slot waits for its next query."""
        return WINDOW_BATCHES * self._engine.scheduler.max_batch_size

    def counters(self) -> Counters:
        """See `backends.Backend`."""
        engine = self._engine
        return Counters(engine.num_steps, engine.cache.prefixes.num_hit_tokens)

    def identity(self) -> dict[str, Any]:
        """Model, revision, source, dtype and versions."""
        return dict(self._identity)

    def submit(
        self, query: Query, on_text: OnText | None = None, *, is_urgent: bool = False
    ) -> Future[Result]:
        """See `backends.Backend`; of several answers, `on_text` gets the first."""
        if query.n > 1:
            first, *others = split(query)
            futures = [self.submit(other, is_urgent=is_urgent) for other in others]
            return gather([self.submit(first, on_text, is_urgent=is_urgent), *futures])
        job = Job(query, on_text, AnswerText(self._chat.decoder(), query.stop), is_urgent)
        try:
            self._preparing.submit(self._prepare, job)
        except RuntimeError:
            job.fail(BackendError("the model is shut down"))
        return job.future

    def health(self) -> Health:
        """See `backends.Backend`."""
        scheduler = self._engine.scheduler
        return Health(
            is_alive=self._gone is None,
            is_stuck=time.perf_counter() - self._stepped_at > STUCK_AFTER_S
            and self._engine.has_work,
            num_running=len(scheduler.running),
            num_waiting=scheduler.num_waiting + self._inbox.qsize(),
        )

    def close(self) -> None:
        """See `backends.Backend`."""
        self._leave(BackendError("the model is shut down"))
        self._preparing.shutdown()
        self._inbox.put(None)
        self._thread.join()

    def _prepare(self, job: Job) -> None:
        """Tokenize, on one of the pool's threads."""
        try:
            sequence = self._sequence(job)
        except BaseException as exc:  # a panic in Rust is no Exception, and somebody waits
            job.give(failed(job.query, exc))
            return
        with self._lock:
            if self._gone is None:
                self._inbox.put((job, sequence))
                return
        job.fail(self._gone)

    def _sequence(self, job: Job) -> Sequence:
        query = job.query
        if query.format is not None:
            job.constraint = self._vocabulary.constraint(query.format)
        if query.top_logprobs is not None:
            job.spell = self._vocabulary.speller()
        prompt_ids = self._chat.encode(query.messages)
        return Sequence(
            prompt_ids, query.sampling, job.is_urgent, job.constraint, query.top_logprobs
        )

    def _work(self, build_engine: Callable[[], Engine], built: Future[Engine]) -> None:
        """The engine thread: build the engine, then serve."""
        try:
            self._engine = build_engine()
        except BaseException as exc:
            built.set_exception(exc)
        else:
            built.set_result(self._engine)
            self._serve()

    def _serve(self) -> None:
        """Step until closed, or until the engine fails for good."""
        try:
            while self._gone is None:
                self._take_in()
                self._drop_cancelled()
                self._stepped_at = time.perf_counter()
                if self._engine.has_work:
                    for sequence in self._engine.step():
                        self._deliver(sequence)
        except BaseException as exc:  # a panic in Rust is no Exception
            reason = exc if isinstance(exc, BackendError) else BackendError(sentence(exc))
            logger.error("the model is gone: %s", reason)
            self._leave(reason)
        self._dismiss_all()

    def _leave(self, reason: BackendError) -> None:
        with self._lock:
            self._gone = self._gone or reason

    def _take_in(self) -> None:
        """Hand new queries to the engine; wait for one when there is nothing to do."""
        with suppress(Empty):
            while item := self._inbox.get(block=not self._engine.has_work):
                job, sequence = item
                self._stepped_at = time.perf_counter()  # before there is work: it was idle
                try:
                    self._engine.add(sequence)
                    self._jobs[sequence] = job
                except QueryError as exc:
                    job.give(failed(job.query, exc))

    def _drop_cancelled(self) -> None:
        for sequence in [s for s, job in self._jobs.items() if job.future.cancelled()]:
            self._engine.stop(sequence)
            del self._jobs[sequence]

    def _deliver(self, sequence: Sequence) -> None:
        """Pass on the newest token of a sequence, and its result when it is finished."""
        job = self._jobs[sequence]
        try:
            finished = sequence.error is not None or self._advance(job, sequence)
        except Exception as exc:
            sequence.error = exc
            finished = True
        if finished:
            self._engine.stop(sequence)
            del self._jobs[sequence]
            job.give(outcome(job, sequence))

    def _advance(self, job: Job, sequence: Sequence) -> bool:
        """Take the newest token into the answer's text; returns whether it was the last."""
        job.first_token_at = job.first_token_at or time.perf_counter()
        piece = job.text.push(sequence.token_ids[-1])
        finished = sequence.is_finished or job.text.is_stopped
        if finished:
            piece += job.text.finish()
        if piece and job.on_text:
            job.on_text(piece)
        return finished

    def _dismiss_all(self) -> None:
        """Nobody waits for ever: all that is left learns that the backend is gone."""
        assert self._gone is not None
        with suppress(Empty):
            while True:
                item = self._inbox.get_nowait()
                if item:
                    item[0].fail(self._gone)
        for job in self._jobs.values():
            job.fail(self._gone)
        for sequence in self._jobs:
            with suppress(Exception):  # a GPU that is gone cannot even free a row
                self._engine.stop(sequence)
        self._jobs.clear()
