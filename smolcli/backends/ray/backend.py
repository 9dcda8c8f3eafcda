"""The Ray backend: one local thread per worker of the cluster, and one queue for all."""

import logging
import threading
import time
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from smolcli.backends.base import (
    WAKE_INTERVAL_S,
    WINDOW_BATCHES,
    AnswerSource,
    Counters,
    Health,
    OnText,
    start_thread,
)
from smolcli.backends.ray.cluster import (
    ModelUpload,
    WorkerHandle,
    WorkerLost,
    WorkerPlan,
    connect,
    disconnect,
    last_line,
    plan_workers,
)
from smolcli.backends.ray.work_queue import ClusterQuery, WorkQueue
from smolcli.backends.ray.worker import NodeInfo
from smolcli.engine.native.library import VARIANT_VARIABLE
from smolcli.errors import BackendError, SmolError
from smolcli.settings import EngineSettings, RaySettings
from smolcli.types import Query, Result
from smolcli.weights.resolve import resolve
from smolcli.weights.store import ModelFiles

BATCHES_AHEAD = 2  # held by each worker
MAX_FAILED_STARTS = 5  # in a row, of one worker
START_TIMEOUT_S = 120.0
POLL_S = 0.02

logger = logging.getLogger(__name__)


def open_ray(settings: EngineSettings, cluster: RaySettings) -> "RayBackend":
    """Start workers on a Ray cluster; returns once the first one is ready.

    Args:
        settings: which model the workers run, and how.
        cluster: where to find the cluster, and how many workers to start.

    Raises:
        ModelError: the model cannot be found or used.
        UsageError: no node is large enough for a worker.
        BackendError: the cluster cannot be reached, or its workers do not start.
    """
    files = resolve(settings.model)
    connect(cluster, settings)
    try:
        backend = RayBackend(plan_workers(cluster, settings), files)
    except BaseException:
        disconnect()
        raise
    try:
        backend.await_first_worker()
    except BaseException:
        backend.close()
        raise
    return backend


class RayBackend:
    """Answers queries with the workers of a cluster; see `Backend`.

    `on_text` receives each answer in one piece. A worker that dies is replaced, and its
    unfinished queries go back to the head of the queue.

    Args:
        plan: which workers to start.
        files: the model, which is sent to nodes that do not have it.
    """

    def __init__(self, plan: WorkerPlan, files: ModelFiles) -> None:
        self._plan = plan
        self._settings = plan.settings
        self._upload = ModelUpload(files)
        self._queue = WorkQueue()
        self._identity: dict[str, Any] = {}
        self._ready: list[WorkerHandle] = []
        self._none_since = time.monotonic()  # when the last worker was lost
        self._lost_counters = Counters()  # totals of workers that are gone
        self._lock = threading.Lock()  # guards all of these but the queue
        self._num_kept = plan.num_workers
        self._threads: list[threading.Thread] = []
        try:
            for number in range(plan.num_workers):
                self._threads.append(start_thread(self._keep_worker, f"smol-ray-{number}"))
        except BackendError:
            self.close()
            raise

    def await_first_worker(self) -> None:
        """Wait until a worker is ready.

        Raises:
            SmolError: no worker can be started.
        """
        while not self._identity:
            self._queue.check()
            time.sleep(POLL_S)

    @property
    def window(self) -> int:
        """A few batches for each worker; queries that none holds go to the first free one."""
        return WINDOW_BATCHES * self._settings.max_slots * self._plan.num_workers

    def counters(self) -> Counters:
        """Totals of all workers, as of their last replies."""
        with self._lock:
            return sum((worker.counters for worker in self._ready), self._lost_counters)

    def identity(self) -> dict[str, Any]:
        """What the first worker reports; the others are checked to be the same."""
        return dict(self._identity)

    def answer_source(self) -> AnswerSource:
        """See `Backend`: the model never changes."""
        return AnswerSource("", is_verified=True)

    def submit(
        self, query: Query, on_text: OnText | None = None, *, is_interactive: bool = False
    ) -> Future[Result]:
        """See `Backend`."""
        pending = ClusterQuery(query, on_text, is_interactive)
        self._queue.put(pending)
        return pending.future

    def health(self) -> Health:
        """See `Backend`."""
        queue = self._queue
        return Health(
            is_alive=not queue.is_closed,
            is_stuck=False,
            num_running=queue.num_held,
            num_waiting=queue.num_waiting,
        )

    def close(self) -> None:
        """See `Backend`."""
        self._queue.close(BackendError("the workers are shut down"))
        for thread in self._threads:
            thread.join()
        disconnect()

    def _keep_worker(self) -> None:
        """One of the threads: start a worker and keep it busy; replace it when it dies."""
        num_failed_starts = 0
        reason = ""
        try:
            while num_failed_starts < MAX_FAILED_STARTS:
                worker = WorkerHandle(self._plan, self._queue.check)
                try:
                    self._open(worker)
                    num_failed_starts = 0
                    self._feed(worker)
                except WorkerLost as exc:
                    reason = str(exc)
                    num_failed_starts += worker not in self._ready
                    self._forget(worker, reason)
                    time.sleep(WAKE_INTERVAL_S)
                finally:
                    worker.kill()
            self._give_up_worker(f"a worker failed to start {MAX_FAILED_STARTS} times: {reason}")
        except Exception as exc:
            self._queue.close(exc if isinstance(exc, SmolError) else BackendError(last_line(exc)))

    def _open(self, worker: WorkerHandle) -> None:
        """Start a worker. The first one decides what dtype `auto` means for all of them."""
        worker.await_start(self._check_start)
        info = worker.info(self._settings)
        check_versions(info)
        with self._lock:
            if self._settings.dtype == "auto":
                self._settings = replace(self._settings, dtype=info.dtype)
        identity = worker.open(self._settings, self._upload)
        with self._lock:
            self._identity = self._identity or identity
            check_kernels(info.node, identity, self._identity)
            self._ready.append(worker)
        self._queue.join(worker.load)

    def _feed(self, worker: WorkerHandle) -> None:
        max_held = BATCHES_AHEAD * self._settings.max_slots
        while True:
            for query, result in worker.exchange(self._queue.take(worker.load, max_held)):
                query.complete(result)

    def _check_start(self) -> None:
        """Raise if the queue is closed, or no worker has started for too long."""
        self._queue.check()
        if not self._ready and time.monotonic() - self._none_since > START_TIMEOUT_S:
            raise BackendError(
                f"the Ray cluster started no worker within {START_TIMEOUT_S:.0f} s; "
                f"check that a node has {self._plan.num_cpus} CPUs free"
            )

    def _forget(self, worker: WorkerHandle, reason: str) -> None:
        num_queries = len(worker.load.queries)
        logger.warning("lost a Ray worker that held %d queries: %s", num_queries, reason)
        with self._lock:
            if worker in self._ready:
                self._ready.remove(worker)
                self._none_since = time.monotonic()
            self._lost_counters += worker.counters
        self._queue.put_back(worker.load, reason)

    def _give_up_worker(self, reason: str) -> None:
        """Give up on one worker; close the queue if it was the last one."""
        with self._lock:
            self._num_kept -= 1
            is_last = not self._num_kept
        if is_last:
            return self._queue.close(BackendError(reason))
        logger.warning("%s; continuing with %d workers", reason, self._num_kept)


def check_versions(info: NodeInfo) -> None:
    """Check that a node has the same versions as this machine; local versions (+cpu) may differ.

    Raises:
        BackendError: it does not.
    """
    from smolcli.backends.local import versions  # late: loads the engine

    for name in ("smol", "torch"):
        ours, theirs = versions()[name], info.versions[name]
        if theirs.partition("+")[0] != ours.partition("+")[0]:
            raise BackendError(
                f"the Ray node {info.node} has {name} {theirs}, and this machine {ours}; "
                "install the same version on both"
            )


def check_kernels(node: str, identity: dict[str, Any], first: dict[str, Any]) -> None:
    """Check that a worker rounds like the first one, so that all give the same answers.

    Args:
        node: name of the worker's node.
        identity: what the worker reports.
        first: what the first worker reports.

    Raises:
        BackendError: it does not.
    """
    ours, theirs = (each["kernel_variant"] or each["kernels"] for each in (first, identity))
    if ours != theirs:
        raise BackendError(
            f"the Ray node {node} computes with {theirs} kernels and another with {ours} ones, "
            f"which round differently; use nodes of one kind, or set {VARIANT_VARIABLE} on all"
        )
