"""The local backend: one thread that owns the engine, its inbox, and the queries in progress."""

import logging
import platform
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from queue import Empty, SimpleQueue
from typing import Any

import smolcli
from smolcli.backends.alternatives import combined_future
from smolcli.backends.base import (
    WINDOW_BATCHES,
    AnswerSource,
    Counters,
    Health,
    OnText,
    PendingQuery,
    failed_result,
    incomplete_json,
    internal_error,
    start_thread,
)
from smolcli.engine.autoconfig import ResolvedConfig
from smolcli.engine.engine import Engine
from smolcli.engine.sequence import Sequence
from smolcli.engine.speculation import Speculation
from smolcli.errors import BackendError, QueryError
from smolcli.protocol.prompt import split_answers
from smolcli.protocol.tools import with_call_ids
from smolcli.settings import EngineSettings
from smolcli.text.detokenizer import Detokenizer
from smolcli.text.grammar import GrammarCompiler, GrammarMatcher, GrammarSpec
from smolcli.text.logprobs import logprob_entries, prompt_logprob_entries
from smolcli.text.tokenizer import ChatTokenizer
from smolcli.text.tool_calls import MARKER, CallReader
from smolcli.types import (
    FinishReason,
    Query,
    Result,
    TextPiece,
    Timings,
    ToolCallDelta,
    ToolMode,
    Usage,
)
from smolcli.weights.loader import load_config, load_model, resolve_model_config
from smolcli.weights.resolve import resolve
from smolcli.weights.store import ModelFiles
from smolcli.weights.stored_prefix import StoredPrefix

MAX_TOKENIZING_THREADS = 128  # more do not help, and a process may fail to start them
RECEIVE_S = 0.0002  # enough for another thread to take the GIL and send its data
RECEIVE_ALONE_S = 0.002  # enough even if the caches of an idle server are cold
STUCK_AFTER_S = 60.0  # far longer than any step takes

logger = logging.getLogger(__name__)


def open_local(
    settings: EngineSettings, files: ModelFiles | None = None, *, starts_fast: bool = False
) -> "LocalBackend":
    """Load a model and open a backend that runs it in this process.

    Args:
        settings: which model to run, and how.
        files: the model's files, if the caller has already resolved them.
        starts_fast: whether to tokenize the first queries with a part of the vocabulary, which
            starts sooner and makes a later query wait for the rest.

    Raises:
        ModelError: the model cannot be found or used.
        UsageError: the device or dtype is not available on this machine, or the chat template of
            the settings is invalid.
        BackendError: a thread cannot be started.
    """
    logger.debug("looking for %s", settings.model)
    files = files or resolve(settings.model)
    logger.debug("loading %s", files.model)
    config = resolve_model_config(settings, files.folder)
    if config.kernels is None and config.device == "cpu":
        logger.warning("falling back to torch, which is slower: %s", config.unsupported_reason)

    stored = None
    if config.kernels is not None and config.prefix_cache_bytes > 0:
        stored = StoredPrefix(files, load_config(files.folder), config.kernels)

    def build_engine() -> Engine:
        model = load_model(
            files.folder,
            config.dtype,
            config.device,
            config.kernels,
            config.threads,
            files=files,
            formats=config.formats,
        )
        return Engine(
            model,
            config.max_batch_size,
            kv_cache_bytes=config.kv_cache_bytes,
            prefix_cache_bytes=config.prefix_cache_bytes,
            speculation=Speculation() if config.speculates else None,
        )

    return LocalBackend(
        lambda: ChatTokenizer.load(files.folder, settings.chat_template, starts_fast=starts_fast),
        build_engine,
        _identity(files, config, settings),
        settings.max_concurrency,
        stored,
    )


def _identity(
    files: ModelFiles, config: ResolvedConfig, settings: EngineSettings
) -> dict[str, Any]:
    digest = settings.chat_template_digest
    own = {} if digest is None else {"chat_template": digest}
    return own | {
        "model": files.model,
        "revision": files.revision,
        "source": files.source,
        "dtype": config.dtype,
        "device": config.device,
        "kernels": "native" if config.kernels else "torch",
        "kernel_variant": config.kernels.name if config.kernels else None,
        "threads": config.threads,
    }


@cache
def versions() -> dict[str, str]:
    """Versions of the software that determines the answers, without importing any of it."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        torch = version("torch")
    except PackageNotFoundError:  # the native kernels do not need it
        torch = "none"
    return {
        "smol": smolcli.__version__,
        "torch": torch,
        "python": platform.python_version(),
    }


@dataclass(eq=False, kw_only=True)
class LocalQuery(PendingQuery):
    """A query in progress in this process."""

    detokenizer: Detokenizer
    grammar: GrammarMatcher | None = None  # if the answer's form is constrained
    calls: CallReader | None = None  # if the answer may call functions
    token_bytes: Callable[[int], bytes] | None = None  # if log probabilities are requested
    echoed: str = ""  # what the answer starts with
    first_token_at: float = 0.0
    num_shown: int = 0  # log probabilities that have been passed on

    def pass_on(self, text: str, sequence: Sequence, calls: list[ToolCallDelta]) -> None:
        """Pass on a piece of the answer, with the log probabilities of new tokens.

        Args:
            text: the piece.
            sequence: holds the log probabilities of all tokens so far.
            calls: pieces of function calls.
        """
        if self.on_text is None:
            return
        logprobs = None
        if self.token_bytes is not None and self.query.top_logprobs is not None:
            new = sequence.logprobs[self.num_shown :]
            self.num_shown += len(new)
            logprobs = logprob_entries(new, self.token_bytes)
        self.on_text(TextPiece(text, logprobs, calls) if logprobs or calls else text)


class LocalBackend:
    """Answers queries with an engine in this process; see `Backend`.

    The engine is built on the thread that runs it, because torch gives each thread a stream and
    workers of its own; meanwhile the tokenizer loads on the caller's thread.

    Args:
        load_tokenizer: loads the model's tokenizer and chat template.
        build_engine: builds the engine; called on the engine thread.
        identity: what determines the answers.
        max_concurrency: number of threads that tokenize, up to `MAX_TOKENIZING_THREADS`.
        stored_prefix: fills the prefix cache at startup, and is saved for the next process.
    """

    def __init__(
        self,
        load_tokenizer: Callable[[], ChatTokenizer],
        build_engine: Callable[[], Engine],
        identity: Mapping[str, Any],
        max_concurrency: int,
        stored_prefix: StoredPrefix | None = None,
    ) -> None:
        self._stored_prefix = stored_prefix
        self._identity = dict(identity)
        self._inbox: SimpleQueue[tuple[LocalQuery, Sequence] | None] = SimpleQueue()
        self._queries: dict[Sequence, LocalQuery] = {}
        self._lock = threading.Lock()
        self._gone: BackendError | None = None
        self._is_closed = False
        self._stepped_at = 0.0
        self._has_new_stream = False
        self._num_prompt_tokens = self._num_generated_tokens = 0
        self._submitted: SimpleQueue[LocalQuery | None] = SimpleQueue()
        self._tokenizing: list[threading.Thread] = []
        built: Future[Engine] = Future()
        self._thread = start_thread(lambda: self._run(build_engine, built), "smol-engine")
        try:
            # Now, so that `submit` never starts a thread.
            for _ in range(min(max_concurrency, MAX_TOKENIZING_THREADS)):
                self._tokenizing.append(start_thread(self._tokenize_all, "smol-tokenize"))
            self._tokenizer = load_tokenizer()
            config = built.result().model.config
            self._grammars = GrammarCompiler(
                self._tokenizer.tokenizer_json, config.vocab_size, config.eos_ids
            )
        except BaseException:
            self.close()
            raise

    @property
    def window(self) -> int:
        """A few full batches, so that no slot waits for its next query."""
        return WINDOW_BATCHES * self._engine.scheduler.max_batch_size

    def counters(self) -> Counters:
        """See `Backend`."""
        engine, speculation = self._engine, self._engine.speculation
        return Counters(
            engine.num_steps,
            engine.kv_cache.prefix_cache.num_hit_tokens,
            prompt_tokens=self._num_prompt_tokens,
            generated_tokens=self._num_generated_tokens,
            drafted_tokens=speculation.num_drafted if speculation else 0,
            accepted_tokens=speculation.num_accepted if speculation else 0,
        )

    def identity(self) -> dict[str, Any]:
        """See `Backend`."""
        return self._identity | {"versions": versions()}

    def answer_source(self) -> AnswerSource:
        """See `Backend`: the model never changes."""
        return AnswerSource("", is_verified=True)

    def submit(
        self, query: Query, on_text: OnText | None = None, *, is_interactive: bool = False
    ) -> Future[Result]:
        """See `Backend`; of several answers, `on_text` receives the first."""
        if query.n > 1:
            first, *others = split_answers(query)
            futures = [self.submit(first, on_text, is_interactive=is_interactive)]
            futures += [self.submit(each, is_interactive=is_interactive) for each in others]
            return combined_future(query, futures)
        marker = MARKER if query.tools else ""
        detokenizer = Detokenizer(
            self._tokenizer.decoder(),
            query.stop,
            marker,
            include_stop=query.include_stop,
            keeps_space=query.keeps_space,
        )
        calls = CallReader() if marker else None
        pending = LocalQuery(query, on_text, is_interactive, detokenizer=detokenizer, calls=calls)
        self._submitted.put(pending)
        if self._is_closed:
            self._fail_submitted()
        return pending.future

    def health(self) -> Health:
        """See `Backend`."""
        scheduler = self._engine.scheduler
        return Health(
            is_alive=self._gone is None,
            is_stuck=time.perf_counter() - self._stepped_at > STUCK_AFTER_S
            and self._engine.has_work,
            num_running=len(scheduler.running),
            num_waiting=scheduler.num_waiting + self._inbox.qsize(),
        )

    def close(self) -> None:
        """See `Backend`."""
        self._give_up(BackendError("the model is shut down"))
        for _ in self._tokenizing:
            self._submitted.put(None)
        for thread in self._tokenizing:
            thread.join()
        self._is_closed = True  # no thread tokenizes any more
        self._fail_submitted()
        self._inbox.put(None)
        self._thread.join()
        self._store_prefix()

    def _store_prefix(self) -> None:
        """Store the KV cache of the prefix that most prompts share, unless it was stored before."""
        stored, self._stored_prefix = self._stored_prefix, None
        if stored is not None and not stored.is_restored and self._num_prompt_tokens:
            with suppress(QueryError):  # the template may want more than a user message
                ids = self._tokenizer.shared_prefix()
                stored.save(self._engine.kv_cache.prefix_cache, ids)

    def _fail_submitted(self) -> None:
        assert self._gone is not None
        with suppress(Empty):
            while True:
                if pending := self._submitted.get_nowait():
                    pending.fail(self._gone)

    def _tokenize_all(self) -> None:
        """One of the tokenizing threads."""
        while pending := self._submitted.get():
            self._tokenize(pending)

    def _tokenize(self, pending: LocalQuery) -> None:
        """Turn a query into a sequence for the engine."""
        if not pending.is_open:
            return
        try:
            sequence = self._sequence(pending)
        except BaseException as exc:  # including a Rust panic, which is not an Exception
            pending.complete(failed_result(pending.query, exc))
            return
        with self._lock:
            if self._gone is None:
                self._inbox.put((pending, sequence))
                return
        pending.fail(self._gone)

    def _sequence(self, pending: LocalQuery) -> Sequence:
        query = pending.query
        spec = GrammarSpec(query.format, query.tools, self._tokenizer.call_syntax)
        if not spec.is_free:
            pending.grammar = self._grammars.matcher(spec)
        if query.top_logprobs is not None or query.prompt_logprobs is not None:
            pending.token_bytes = self._grammars.token_bytes()
        if query.echo and query.raw_prompt is not None:
            pending.echoed = self._tokenizer.raw_text(query.raw_prompt)
        return Sequence(
            self._tokenizer.encode_query(query, self._engine.prompt_limit(query.sampling)),
            query.sampling,
            pending.is_interactive,
            pending.grammar,
            query.top_logprobs,
            query.prompt_logprobs,
            bad_words=self._tokenizer.word_ids(query.bad_words),
        )

    def _run(self, build_engine: Callable[[], Engine], built: Future[Engine]) -> None:
        """The engine thread: build the engine, then step it until closed."""
        try:
            self._engine = build_engine()
            if self._stored_prefix is not None:
                self._stored_prefix.restore(self._engine.kv_cache.prefix_cache)
        except BaseException as exc:
            built.set_exception(exc)
        else:
            built.set_result(self._engine)
            self._step_until_closed()

    def _step_until_closed(self) -> None:
        try:
            while self._gone is None:
                self._admit()
                self._drop_cancelled()
                self._stepped_at = time.perf_counter()
                if self._engine.has_work:
                    for sequence in self._engine.step():
                        self._deliver(sequence)
                    self._let_receivers_run()
        except BaseException as exc:  # a Rust panic is not an Exception
            reason = exc if isinstance(exc, BackendError) else BackendError(internal_error(exc))
            logger.error("the engine stopped: %s", reason)
            self._give_up(reason)
        self._fail_all()

    def _let_receivers_run(self) -> None:
        """After the first token of a stream, let its receiver send it before the next step.

        The receiver would otherwise wait for the GIL until the step begins, and then compete with
        the threads that compute it. Other queries must not wait long for this.
        """
        if self._has_new_stream:
            self._has_new_stream = False
            is_alone = len(self._queries) <= 1
            time.sleep(RECEIVE_ALONE_S if is_alone else RECEIVE_S)

    def _give_up(self, reason: BackendError) -> None:
        with self._lock:
            self._gone = self._gone or reason

    def _admit(self) -> None:
        """Hand new queries to the engine; block until one arrives if the engine is idle."""
        with suppress(Empty):
            while item := self._inbox.get(block=not self._engine.has_work):
                pending, sequence = item
                self._stepped_at = time.perf_counter()  # idle until now, not stuck
                try:
                    self._engine.add(sequence)
                    self._queries[sequence] = pending
                except Exception as exc:
                    pending.complete(failed_result(pending.query, exc))

    def _drop_cancelled(self) -> None:
        for sequence in [s for s, query in self._queries.items() if query.future.cancelled()]:
            self._engine.stop(sequence)
            del self._queries[sequence]

    def _deliver(self, sequence: Sequence) -> None:
        """Pass on a sequence's newest token, and its result if it has finished."""
        pending = self._queries[sequence]
        try:
            is_finished = sequence.error is not None or self._advance(pending, sequence)
        except Exception as exc:
            sequence.error = exc
            is_finished = True
        if is_finished:
            self._engine.stop(sequence)
            del self._queries[sequence]
            pending.complete(_result(pending, sequence))

    def _advance(self, pending: LocalQuery, sequence: Sequence) -> bool:
        """Append the newest token, if any, to the answer's text; returns whether it has ended."""
        text = ""
        if not pending.first_token_at:
            pending.first_token_at = time.perf_counter()
            self._num_prompt_tokens += len(sequence.prompt_ids)
            text = pending.echoed
            self._has_new_stream |= pending.is_interactive and pending.on_text is not None
        if sequence.is_decoding:
            self._num_generated_tokens += 1
            text += self._push(pending, sequence)
        is_finished = sequence.is_finished or pending.detokenizer.is_stopped
        if is_finished:
            text += pending.detokenizer.finish()
        calls: list[ToolCallDelta] = []
        if pending.calls is not None:
            calls = pending.calls.push(pending.detokenizer.take_rest())
        if text or calls:
            pending.pass_on(text, sequence, calls)
        return is_finished

    def _push(self, pending: LocalQuery, sequence: Sequence) -> str:
        """The text that a new token makes final; that of a stop token is left out."""
        query, token_id = pending.query, sequence.token_ids[-1]
        if token_id in query.sampling.stop_token_ids and not query.include_stop:
            return ""
        may_stop = sequence.num_output > query.sampling.min_tokens
        return pending.detokenizer.push(token_id, may_stop)

    def _fail_all(self) -> None:
        """Fail all remaining queries, so that no caller waits forever."""
        assert self._gone is not None
        with suppress(Empty):
            while True:
                if item := self._inbox.get_nowait():
                    item[0].fail(self._gone)
        for pending in self._queries.values():
            pending.fail(self._gone)
        for sequence in self._queries:
            with suppress(Exception):  # a lost GPU cannot even free memory
                self._engine.stop(sequence)
        self._queries.clear()


def _result(pending: LocalQuery, sequence: Sequence) -> Result:
    """The result of a sequence that has ended."""
    query, grammar, token_bytes = pending.query, pending.grammar, pending.token_bytes
    if sequence.error is not None:
        return failed_result(query, sequence.error)
    if grammar is not None and grammar.error:
        return failed_result(query, grammar.error)
    now = time.perf_counter()
    assert sequence.admitted_at is not None
    logprobs = prompt_logprobs = None
    if token_bytes is not None and query.top_logprobs is not None:
        logprobs = logprob_entries(sequence.logprobs, token_bytes)
    if token_bytes is not None and query.prompt_logprobs is not None:
        scores = sequence.prompt_logprobs
        prompt_logprobs = prompt_logprob_entries(sequence.prompt_ids, scores, token_bytes)
    text = pending.echoed + pending.detokenizer.text
    calls = pending.calls.calls if pending.calls is not None else ()
    finish_reason = FinishReason.STOP if pending.detokenizer.is_stopped else sequence.finish_reason
    is_whole = grammar is None or not sequence.is_decoding or _is_complete(pending, grammar)
    result = Result(
        chat_id=query.chat_id,
        response=None if calls and not text else text,
        tool_calls=calls,
        finish_reason=FinishReason.TOOL_CALLS if calls and is_whole else finish_reason,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        echo=query.echo if query.raw_prompt is not None else None,
        usage=Usage(len(sequence.prompt_ids), sequence.num_output, sequence.num_reused),
        metadata=query.metadata,
        line=query.line,
        timings=Timings(
            queue_s=sequence.admitted_at - pending.submitted_at,
            first_token_s=pending.first_token_at - pending.submitted_at,
            total_s=now - pending.submitted_at,
        ),
    )
    result = with_call_ids(result, query)
    is_usable = is_whole or query.accepts_partial
    return result if is_usable else incomplete_json(result, sequence.num_output)


def _is_complete(pending: LocalQuery, grammar: GrammarMatcher) -> bool:
    """Whether an answer matches its grammar to the end, or is free text, which may end anywhere.

    Text is free if it has no format, and the answer could have called functions but did not.
    """
    query, detokenizer = pending.query, pending.detokenizer
    may_be_text = query.tools is not None and query.tools.mode is ToolMode.AUTO
    if may_be_text and query.format is None and not detokenizer.found_marker:
        return True
    is_cut = detokenizer.is_stopped and not query.include_stop
    return grammar.is_complete and not is_cut
