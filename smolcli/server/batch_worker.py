"""Answers batches with the runner of `smol run`, on the server's own backend.

One thread runs one batch at a time, in order of creation. A second one validates new batches, and
ends those that are cancelled or have expired, so that neither waits for a long batch.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from http import HTTPStatus
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

from smolcli.atomic import replacing
from smolcli.backends.base import Backend, BackendWrapper, Counters, OnText
from smolcli.batch.runner import run_file
from smolcli.batch.statistics import RunStatistics, StatisticsCollector
from smolcli.data.jsonl import encode
from smolcli.data.reader import read_rows
from smolcli.data.rows import Row
from smolcli.errors import (
    BackendError,
    InputError,
    RunError,
    SettingsChanged,
    UsageError,
    error_reason,
)
from smolcli.protocol.json_text import parse_json
from smolcli.protocol.line_formats import OPENAI
from smolcli.server.batch_check import ROWS, FileCheck
from smolcli.server.batch_store import Batch, BatchError, BatchStore, Ending, new_id
from smolcli.server.errors import HttpCode, HttpError
from smolcli.server.service import Service
from smolcli.settings import RunSettings
from smolcli.types import ErrorCode, Query, Result

logger = logging.getLogger(__name__)

MAX_ERRORS = 100  # listed for a file
POLL_S = 0.5
MIN_RETRY_S, MAX_RETRY_S = 0.5, 30.0  # after the backend failed, or with other settings
SWEEP_INTERVAL_S = 60.0
JOIN_TIMEOUT_S = 10.0

OUTPUT, ERRORS = "output.jsonl", "errors.jsonl"
PARTIAL_OUTPUT, PARTIAL_ERRORS = "partial-output.jsonl", "partial-errors.jsonl"
EXPIRED_MESSAGE = "This request could not be executed before the completion window expired."


StopReason = Literal["cancelled", "expired", "shutdown"]


class SharedBackend(BackendWrapper):
    """The server's backend as that of one batch: closing it leaves the server's own open.

    Args:
        backend: the server's backend.
        observe: called with each result.
    """

    def __init__(self, backend: Backend, observe: Callable[[Result], None]) -> None:
        super().__init__(backend)
        self._observe = observe
        self._counters = backend.counters()
        self._open: set[Future[Result]] = set()
        self._lock = threading.Lock()
        self.stop_reason: StopReason | None = None

    def submit(
        self, query: Query, on_text: OnText | None = None, *, is_interactive: bool = False
    ) -> Future[Result]:
        """See `Backend`."""
        future = self._backend.submit(query, on_text, is_interactive=is_interactive)
        with self._lock:
            self._open.add(future)
        future.add_done_callback(self._finish)
        if self.stop_reason is not None:
            future.cancel()
        return future

    def stop(self, reason: StopReason) -> None:
        """Cancel every query, now and from now on, which ends the run."""
        with self._lock:
            self.stop_reason = self.stop_reason or reason
            unfinished = list(self._open)
        for future in unfinished:
            future.cancel()

    def counters(self) -> Counters:
        """The totals since the batch was started, including those of other clients."""
        return self._backend.counters() - self._counters

    def close(self) -> None:
        """See `Backend`; the server's backend stays open."""

    def _finish(self, future: Future[Result]) -> None:
        with self._lock:
            self._open.discard(future)
        if not future.cancelled() and future.exception() is None:
            self._observe(future.result())


class BatchProgress:
    """Keeps the statistics of a running batch at hand, and its results within the quota.

    Args:
        check_size: called after each result; raises HttpError if all of them are too large.
    """

    def __init__(self, check_size: Callable[[], None]) -> None:
        self._check_size = check_size
        self.statistics: StatisticsCollector | None = None

    def waiting(self, message: str) -> AbstractContextManager[None]:
        """See `RunProgress`."""
        return nullcontext()

    def start(self, total: int | None, statistics: StatisticsCollector) -> None:
        """See `RunProgress`."""
        self.statistics = statistics

    def update(self) -> None:
        """See `RunProgress`."""
        self._check_size()

    def stop(self) -> None:
        """See `RunProgress`."""

    def note(self, message: str) -> None:
        """See `RunProgress`."""
        logger.debug("%s", message)

    def summary(self, statistics: RunStatistics, output: Path) -> None:
        """See `RunProgress`."""


@dataclass(frozen=True, slots=True)
class RunningBatch:
    """The batch that is being answered."""

    id: str
    backend: SharedBackend
    progress: BatchProgress

    def with_counts(self, batch: Batch) -> Batch:
        """The record of this batch with the counts of this moment."""
        statistics = self.progress.statistics
        return batch if statistics is None else _counted(batch, statistics)


@dataclass(frozen=True, slots=True)
class Wait:
    """A batch's wait for another backend, other settings or the disk.

    Args:
        reason: what it waits for.
        duration_s: how long, in seconds; twice as long as its previous wait.
        until: when to try it again, as a time of `time.monotonic` in seconds.
        is_storage: whether its results or its record could not be stored.
    """

    reason: str
    duration_s: float
    until: float
    is_storage: bool = False


class BatchWorker:
    """Validates, answers and ends the batches of a store.

    Args:
        store: the store of the batches.
        service: the server's settings and shared state.
    """

    def __init__(self, store: BatchStore, service: Service) -> None:
        self._store = store
        self._service = service
        self._loader = service.loader
        self._metrics = service.metrics
        self._lock = threading.RLock()
        self._running: RunningBatch | None = None
        self._waits: dict[str, Wait] = {}  # the last one of each unfinished batch that had to wait
        self._stopping = threading.Event()
        self._wake_checker, self._wake_runner = threading.Event(), threading.Event()
        self._next_sweep_s = 0.0
        self._threads = [
            threading.Thread(target=self._check_all, name="smol-batch-check", daemon=True),
            threading.Thread(target=self._run_all, name="smol-batch-run", daemon=True),
        ]

    def start(self) -> None:
        """Start both threads, which continue unfinished batches."""
        for thread in self._threads:
            thread.start()

    def wake(self) -> None:
        """Look for new work now."""
        self._wake_checker.set()
        self._wake_runner.set()

    def stop(self) -> None:
        """Interrupt the running batch, which the next server on the folder continues.

        Takes no lock, so that it returns at once.
        """
        self._stopping.set()
        if (running := self._running) is not None:
            running.backend.stop("shutdown")
        self.wake()

    def close(self) -> None:
        """Wait for both threads to end after `stop`, and let another server use the store."""
        for thread in self._threads:
            thread.join(JOIN_TIMEOUT_S)
        if not any(thread.is_alive() for thread in self._threads):
            self._store.close()  # otherwise the end of the process does it

    def cancel(self, batch_id: str) -> Batch:
        """Cancel an unfinished batch; a finished one stays as it is."""

        def change(batch: Batch) -> Batch:
            can_cancel = batch.ending is None and batch.status in ("validating", "in_progress")
            return batch.with_status("cancelling") if can_cancel else batch

        with self._lock:
            batch = self._store.update(batch_id, change)
            self._waits.pop(batch_id, None)
            if batch.status == "cancelling":
                self._interrupt(batch_id, "cancelled")
        self.wake()
        return batch

    def current(self, batch: Batch) -> Batch:
        """A batch with the counts of this moment."""
        running = self._running
        return running.with_counts(batch) if running and running.id == batch.id else batch

    def waits_for(self, batch: Batch) -> str | None:
        """What a batch waits for, for people; None if it does not wait."""
        running = self._running
        if not batch.is_open or (running is not None and running.id == batch.id):
            return None
        if wait := self._waits.get(batch.id):
            return wait.reason
        if batch.status != "in_progress":
            return None
        if not self._loader.is_ready:
            return "the model"
        return None if running is None else f"batch {running.id}"

    def _interrupt(self, batch_id: str, reason: StopReason) -> bool:
        """Stop a batch if it is running; returns whether it is."""
        with self._lock:
            if self._running is None or self._running.id != batch_id:
                return False
            self._running.backend.stop(reason)
            return True

    # The thread that validates batches and ends them

    def _check_all(self) -> None:
        while not self._stopping.is_set():
            self._wake_checker.clear()
            for batch in self._store.batches():
                is_due = batch.is_open and not self._is_waiting_for_storage(batch)
                if is_due and not self._stopping.is_set():
                    self._guarded(batch, self._check)
            self._sweep()
            self._wake_checker.wait(POLL_S)

    def _check(self, batch: Batch) -> None:
        if batch.ending is not None:  # the server was killed while it published the results
            self._end(batch, batch.ending, batch.errors)
        elif batch.status == "cancelling":
            self._interrupt_or_end(batch, "cancelled")
        elif batch.expires_at <= time.time():
            self._interrupt_or_end(batch, "expired")
        elif batch.status == "validating" and self._loader.is_ready:  # its model's name is known
            self._validate(batch)

    def _interrupt_or_end(self, batch: Batch, reason: Literal["cancelled", "expired"]) -> None:
        with self._lock:
            if not self._interrupt(batch.id, reason):
                self._end(batch, reason)

    def _sweep(self) -> None:
        if (now := time.monotonic()) >= self._next_sweep_s:
            self._next_sweep_s = now + SWEEP_INTERVAL_S
            self._store.sweep()

    def _validate(self, batch: Batch) -> None:
        check = FileCheck(
            batch.endpoint, self._store.settings.max_requests, self._service.check_model
        )
        path = self._store.content_path(batch.input_file_id)
        try:
            errors = tuple(islice(check.errors(read_rows(path, ROWS)), MAX_ERRORS))
        except (InputError, UsageError) as exc:
            if _is_disk_error(exc):
                raise
            message = str(exc).replace(str(path), batch.input_file_id)
            errors = (BatchError(ErrorCode.INVALID_VALUE, message, param="input_file_id"),)
        self._waits.pop(batch.id, None)
        if errors:
            self._end(batch, "failed", errors)
            return

        def change(current: Batch) -> Batch:
            current = replace(current, num_requests=check.num_requests, model=check.model)
            is_current = current.status == "validating"
            return current.with_status("in_progress") if is_current else current

        self._report(self._store.update(batch.id, change))
        self._wake_runner.set()

    # The thread that answers batches

    def _run_all(self) -> None:
        while not self._stopping.is_set():
            self._wake_runner.clear()
            batch = self._next()
            if batch is None:
                self._wake_runner.wait(POLL_S)
            else:
                self._guarded(batch, self._run)

    def _next(self) -> Batch | None:
        """The first batch that can be run now."""
        if not self._loader.is_ready:
            return None
        for batch in self._store.batches():
            is_next = batch.status == "in_progress" and batch.ending is None
            if is_next and not self._is_waiting(batch):
                return batch
        return None

    def _run(self, batch: Batch) -> None:
        backend = SharedBackend(self._loader.backend, self._metrics.count_result)
        folder = self._store.results_folder(batch.id)
        progress = BatchProgress(lambda: self._count_results(batch, folder))
        with self._lock:
            current = self._store.batch(batch.id)
            if self._stopping.is_set() or current is None or current.status != "in_progress":
                return
            running = self._running = RunningBatch(batch.id, backend, progress)
        if self._stopping.is_set():  # `stop` may have come too early to see it
            backend.stop("shutdown")
        try:
            try:
                statistics = run_file(
                    self._run_settings(batch, folder), lambda _: backend, progress
                )
            finally:
                self._store.update(batch.id, running.with_counts)
        except SettingsChanged as exc:
            self._wait(batch, f"a server with its original settings ({exc.changes})")
        except BackendError as exc:
            self._stopped(batch, backend.stop_reason, exc)
        else:
            self._store.update(batch.id, lambda old: _counted(old, statistics))
            self._end(batch, "completed")
        finally:
            with self._lock:
                self._running = None
            self._wake_checker.set()

    def _run_settings(self, batch: Batch, folder: Path) -> RunSettings:
        settings = self._service.settings
        return RunSettings(
            input=self._store.content_path(batch.input_file_id),
            output=folder / OUTPUT,
            errors=folder / ERRORS,
            defaults=settings.defaults,
            engine=settings.engine,
            seed=self._store.settings.seed,
            rows=ROWS,
            model_name=batch.model,
        )

    def _stopped(self, batch: Batch, reason: StopReason | None, exc: BackendError) -> None:
        """Handle the end of a run that was interrupted, or whose backend failed."""
        if reason in ("cancelled", "expired"):
            self._end(batch, reason)
        elif not self._stopping.is_set():
            self._wait(batch, f"the model ({exc})")

    def _wait(self, batch: Batch, reason: str, *, is_storage: bool = False) -> None:
        """Try a batch again later, because it needs another backend, other settings or the disk."""
        last = self._waits.get(batch.id)
        duration_s = MIN_RETRY_S if last is None else min(2 * last.duration_s, MAX_RETRY_S)
        self._waits[batch.id] = Wait(
            reason, duration_s, time.monotonic() + duration_s, is_storage=is_storage
        )
        if last is None or last.reason != reason:
            logger.warning("batch %s waits for %s", batch.id, reason)

    def _wait_for_storage(self, batch: Batch, exc: Exception) -> None:
        logger.debug("batch %s: %s", batch.id, exc)
        reason = error_reason(exc.__cause__ or exc)
        self._wait(batch, f"the server's storage ({reason})", is_storage=True)

    def _is_waiting(self, batch: Batch) -> bool:
        wait = self._waits.get(batch.id)
        return wait is not None and time.monotonic() < wait.until

    def _is_waiting_for_storage(self, batch: Batch) -> bool:
        """Whether it is too early to try again to end a batch."""
        wait = self._waits.get(batch.id)
        return wait is not None and wait.is_storage and self._is_waiting(batch)

    def _count_results(self, batch: Batch, folder: Path) -> None:
        self._store.count_results(batch.id, (folder / OUTPUT).stat().st_size)

    # Both threads

    def _guarded(self, batch: Batch, work: Callable[[Batch], None]) -> None:
        """Do work for a batch; whatever goes wrong fails it, except for errors that may pass."""
        try:
            work(batch)
        except HttpError as exc:
            logger.error("batch %s: %s", batch.id, exc)
            self._fail(batch, BatchError(exc.code, str(exc)))
        except (RunError, UsageError, OSError) as exc:
            if self._may_pass(batch, exc):
                self._wait_for_storage(batch, exc)
                return
            logger.error("batch %s: %s", batch.id, exc)
            self._fail(batch, _client_error(exc))
        except BaseException as exc:  # including a Rust panic, which is not an Exception
            logger.error("batch %s: internal error", batch.id, exc_info=exc)
            self._fail(
                batch,
                BatchError(ErrorCode.INTERNAL, "internal error; see the server log for details"),
            )

    def _may_pass(self, batch: Batch, exc: Exception) -> bool:
        """Whether work for a batch may succeed later.

        Any error of the disk may pass, but an input that was deleted does not come back.
        """
        needs_input = isinstance(exc, InputError)
        is_lost = needs_input and self._store.is_deleted(batch.input_file_id)
        return _is_disk_error(exc) and not is_lost

    def _fail(self, batch: Batch, error: BatchError) -> None:
        """End a batch as failed, with the results that can still be published."""
        with self._lock:  # until its record is final, or the checker would begin to end it too
            try:
                self._end(batch, "failed", (error,))
            except Exception as exc:
                logger.error("batch %s: cannot publish its results: %s", batch.id, exc)
                self._end_without_results(batch, error)

    def _end_without_results(self, batch: Batch, error: BatchError) -> None:
        def failed(old: Batch) -> Batch:
            new = replace(
                old, ending="failed", errors=(error,), output_file_id=None, error_file_id=None
            )
            return new.with_status("failed")

        self._conclude(self._store.update(batch.id, failed))

    def _end(self, batch: Batch, ending: Ending, errors: tuple[BatchError, ...] = ()) -> None:
        """Publish the results of a batch and give it its final status.

        Every step can be repeated, so that a kill between any two of them loses nothing. If one
        fails because of the disk, the batch is ended later, and its results are kept until then.
        """

        def begin(old: Batch) -> Batch:
            is_cancelled = ending in ("completed", "failed") and old.status == "cancelling"
            new = replace(
                old,
                ending="cancelled" if is_cancelled else ending,
                errors=errors,
                output_file_id=old.output_file_id or new_id("file-"),
                error_file_id=old.error_file_id or new_id("file-"),
            )
            is_final = new.ending in ("completed", "expired") and old.status != "finalizing"
            return new.with_status("finalizing") if is_final else new

        with self._lock:
            current = self._store.batch(batch.id)
            if current is None or not current.is_open:
                return
            try:
                batch = self._store.update(batch.id, begin, must_store=True)
                self._publish(batch)
                batch = self._store.update(batch.id, self._finished, must_store=True)
            except (RunError, OSError) as exc:
                if not self._may_pass(batch, exc):
                    raise
                self._wait_for_storage(batch, exc)
                return
            self._conclude(batch)

    def _conclude(self, batch: Batch) -> None:
        """Drop what is kept only for an unfinished batch, and report that it has ended."""
        assert batch.ending is not None
        self._store.remove_results(batch.id)
        self._waits.pop(batch.id, None)
        self._metrics.count_batch(batch.ending)
        self._report(batch)

    def _publish(self, batch: Batch) -> None:
        assert batch.output_file_id is not None
        assert batch.error_file_id is not None
        folder = self._store.results_folder(batch.id)
        output, errors = folder / OUTPUT, folder / ERRORS
        if batch.ending != "completed" and (output.exists() or batch.ending == "expired"):
            self._split(batch, folder)
            output, errors = folder / PARTIAL_OUTPUT, folder / PARTIAL_ERRORS
        for path, file_id, name in (
            (output, batch.output_file_id, f"{batch.id}_output.jsonl"),
            (errors, batch.error_file_id, f"{batch.id}_error.jsonl"),
        ):
            if path.exists() and path.stat().st_size:
                self._store.publish(batch, path, file_id, name)

    def _finished(self, batch: Batch) -> Batch:
        assert batch.ending is not None
        output, errors = batch.output_file_id, batch.error_file_id
        return replace(
            batch,
            output_file_id=output if output and self._store.file(output) else None,
            error_file_id=errors if errors and self._store.file(errors) else None,
        ).with_status(batch.ending)

    def _split(self, batch: Batch, folder: Path) -> None:
        """Write the results so far as answers and errors; requests that expired are errors too.

        A damaged line is left out, so that the others can still be published.
        """
        num_answers = num_errors = 0
        ended: set[int] = set()  # numbers of the lines of requests
        with (
            replacing(folder / PARTIAL_OUTPUT) as answers,
            replacing(folder / PARTIAL_ERRORS) as errors,
        ):
            for data in chain(_complete_lines(folder / OUTPUT), _complete_lines(folder / ERRORS)):
                if (result := _line_and_status(data)) is None:
                    continue
                number, status = result
                ended.add(number)
                if status == HTTPStatus.OK:
                    answers.write(data)
                    num_answers += 1
                else:
                    errors.write(data)
                    num_errors += 1
            if batch.ending == "expired":
                for row in read_rows(self._store.content_path(batch.input_file_id), ROWS):
                    if row.number not in ended:
                        errors.write(encode(_expired_line(batch, row)))
        self._store.update(
            batch.id,
            lambda old: replace(old, num_completed=num_answers, num_failed=num_errors),
        )

    def _report(self, batch: Batch) -> None:
        fields = {
            "requests": batch.num_requests,
            "completed": batch.num_completed,
            "failed": batch.num_failed,
        }
        logger.info("batch %s %s", batch.id, batch.status, extra={"fields": fields})


def _counted(batch: Batch, statistics: RunStatistics | StatisticsCollector) -> Batch:
    """The record of a batch with the counts of its results, complete or so far."""
    return replace(
        batch,
        num_completed=statistics.num_answered,
        num_failed=statistics.num_lines - statistics.num_answered,
        prompt_tokens=statistics.prompt_tokens,
        completion_tokens=statistics.completion_tokens,
    )


def _is_disk_error(exc: Exception) -> bool:
    """Whether the disk failed, rather than that it holds something unexpected."""
    cause = exc.__cause__ or exc
    return isinstance(cause, OSError) and cause.errno is not None


def _client_error(exc: Exception) -> BatchError:
    """What a client may know about a failure that does not pass, without the server's paths."""
    if _is_disk_error(exc):
        return BatchError(HttpCode.NOT_FOUND, "the input file was deleted", param="input_file_id")
    message = "the results of an earlier session are damaged; create the batch again"
    return BatchError(HttpCode.STORAGE_FAILED, message)


def _complete_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, without a torn one; none if it does not exist."""
    if path.exists():
        with path.open("rb") as file:
            yield from (data for data in file if data.endswith(b"\n"))


def _line_and_status(data: bytes) -> tuple[int, int] | None:
    """The number of a result's request, and its HTTP status; None for a damaged result."""
    try:
        value = parse_json(data)
        number = int(str(value["id"]).rpartition("_")[2])
        status = value["response"]["status_code"]
    except (ValueError, LookupError, TypeError):
        return None
    return (number, status) if isinstance(status, int) else None


def _expired_line(batch: Batch, row: Row) -> dict[str, Any]:
    return {
        "id": f"batch_req_{batch.id.removeprefix('batch_')}_{row.number}",
        "custom_id": OPENAI.id_of(row.value, row.number),
        "response": None,
        "error": {"code": "batch_expired", "message": EXPIRED_MESSAGE},
    }
