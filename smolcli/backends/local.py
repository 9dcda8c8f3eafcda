"""The local backend: the engine's thread, its inbox, and the queries in flight."""

import logging
import platform
import threading
import time
from collections import abc
from collections.abc import Callable, Mapping
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from queue import Empty, SimpleQueue
from typing import Any, Literal

import torch

import smolcli
from smolcli.backends.base import Counters, Health, OnText, complete_future
from smolcli.engine.autoconfig import ResolvedConfig, resolve_config, resolve_dtype
from smolcli.engine.engine import Engine
from smolcli.engine.sequence import Sequence
from smolcli.errors import BackendError, QueryError
from smolcli.protocol.query import derived_seed
from smolcli.settings import EngineSettings
from smolcli.text.detokenizer import Detokenizer, cut_off, logprob_entries
from smolcli.text.grammar import GrammarCompiler, GrammarMatcher
from smolcli.text.tokenizer import ChatTokenizer
from smolcli.types import ErrorCode, FinishReason, Query, Result, Timings, Usage, failure
from smolcli.weights.loader import load_config, load_model
from smolcli.weights.resolve import ModelFiles, resolve

logger = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class Job:
    """One query on its way through the backend."""

    query: Query
    on_text: OnText | None
    text: Detokenizer
    is_interactive: bool
    constraint: GrammarMatcher | None = None
    spell: Callable[[int], bytes] | None = None  # where likelihoods are asked for
    future: Future[Result] = field(default_factory=Future)
    submitted_at: float = field(default_factory=time.perf_counter)
    first_token_at: float = 0.0

    def give(self, result: Result) -> None:
        """Complete the future, unless somebody cancelled it."""
        complete_future(self.future, result)

    def fail(self, error: BackendError) -> None:
        """Tell that the backend is gone."""
        complete_future(self.future, error)


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
        logprobs=logprob_entries(sequence.logprobs, job.spell) if job.spell else None,
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


def split(query: Query) -> list[Query]:
    """A query for each answer that is wanted; the first is what the query alone would be."""
    seed = query.sampling.seed
    seeds = [seed, *(derived_seed(seed, str(index)) for index in range(1, query.n))]
    return [replace(query, n=1, sampling=replace(query.sampling, seed=s)) for s in seeds]


def gather(futures: abc.Sequence[Future[Result]]) -> Future[Result]:
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


def _complete(whole: Future[Result], futures: abc.Sequence[Future[Result]]) -> None:
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
        load_chat: Callable[[], ChatTokenizer],
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
            self._vocabulary = GrammarCompiler(
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
        return Counters(engine.num_steps, engine.kv_cache.prefix_cache.num_hit_tokens)

    def identity(self) -> dict[str, Any]:
        """Model, revision, source, dtype and versions."""
        return dict(self._identity)

    def submit(
        self, query: Query, on_text: OnText | None = None, *, is_interactive: bool = False
    ) -> Future[Result]:
        """See `backends.Backend`; of several answers, `on_text` gets the first."""
        if query.n > 1:
            first, *others = split(query)
            futures = [self.submit(other, is_interactive=is_interactive) for other in others]
            return gather([self.submit(first, on_text, is_interactive=is_interactive), *futures])
        job = Job(query, on_text, Detokenizer(self._chat.decoder(), query.stop), is_interactive)
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
            prompt_ids, query.sampling, job.is_interactive, job.constraint, query.top_logprobs
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


def open_local(settings: EngineSettings, files: ModelFiles | None = None) -> LocalBackend:
    """A backend that answers with the model in this process.

    Args:
        settings: which model, and how.
        files: the model, where the caller has found it already.

    Raises:
        ModelError: the model is not to be had or not usable.
        UsageError: the device or dtype is not available here.
    """
    files = files or resolve(settings.model)
    config = resolve_config(settings, load_config(files.folder))

    def build_engine() -> Engine:
        torch.set_num_threads(config.threads)
        return Engine(
            load_model(files.folder, config.dtype, config.device, config.kernels),
            config.max_batch_size,
            kv_cache_bytes=config.kv_cache_bytes,
            prefix_cache_bytes=settings.prefix_cache_mb << 20,
        )

    return LocalBackend(
        lambda: ChatTokenizer.load(files.folder),
        build_engine,
        _identity(files, config),
        settings.max_concurrency,
    )


def dtype_here(settings: EngineSettings) -> Literal["float32", "bfloat16"]:
    """The dtype that the settings come to on this machine.

    Raises:
        UsageError: the device is not available here.
    """
    return "float32" if resolve_dtype(settings) is torch.float32 else "bfloat16"


def _identity(files: ModelFiles, config: ResolvedConfig) -> dict[str, Any]:
    return {
        "model": files.model,
        "revision": files.revision,
        "source": files.source,
        "dtype": str(config.dtype).removeprefix("torch."),
        "device": str(config.device),
        "kernels": "native" if config.kernels else "torch",
        "threads": config.threads,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """What this process computes with."""
    return {
        "smol": smolcli.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
