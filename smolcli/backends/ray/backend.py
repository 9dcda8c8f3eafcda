"""A Ray cluster behind the seam: a thread here for each worker there, and one queue for all."""

import logging
import threading
import time
from concurrent.futures import Future
from dataclasses import replace
from importlib.metadata import version
from typing import Any

from smolcli import __version__
from smolcli.backends.base import Counters, Health, OnText
from smolcli.backends.ray.cluster import Plan, connect, disconnect, make_plan, one_line
from smolcli.backends.ray.jobs import MAX_TRIES, WAKE_INTERVAL_S, Job, JobQueue
from smolcli.backends.ray.member import Member, Shipment, WorkerLost
from smolcli.backends.ray.worker import Facts
from smolcli.errors import BackendError, SmolError
from smolcli.settings import EngineSettings, RaySettings
from smolcli.types import Query, Result
from smolcli.weights.resolve import resolve
from smolcli.weights.store import ModelFiles

BATCHES_AHEAD = 2  # on each worker
WINDOW_BATCHES = 3  # for each worker; those not on one yet go to whichever is free first
START_TIMEOUT_S = 120.0
POLL_S = 0.02

log = logging.getLogger(__name__)


def open_ray(settings: EngineSettings, cluster: RaySettings) -> "RayBackend":
    """A backend that answers with workers on a Ray cluster, as soon as the first is there.

    Raises:
        ModelError: the model is not to be had or not usable.
        UsageError: the cluster has no machine for such a worker.
        BackendError: there is no cluster, or its workers do not start.
    """
    files = resolve(settings.model)
    connect(cluster, settings)
    try:
        backend = RayBackend(make_plan(cluster, settings), files)
    except BaseException:
        disconnect()
        raise
    try:
        backend.await_first()
    except BaseException:
        backend.close()
        raise
    return backend


class RayBackend:
    """Answers queries with the workers of a cluster; see `backends.Backend`.

    `on_text` gets each answer in one piece. A worker that dies is replaced, and its unfinished
    queries go back to the head of the queue.
    """

    def __init__(self, plan: Plan, files: ModelFiles) -> None:
        self._plan = plan
        self._settings = plan.settings
        self._shipment = Shipment(files)
        self._queue = JobQueue()
        self._identity: dict[str, Any] = {}
        self._ready: list[Member] = []
        self._none_since = time.monotonic()  # when the last worker was lost
        self._past = Counters()
        self._lock = threading.Lock()  # guards all of these but the queue
        self._threads = [
            threading.Thread(target=self._keep_worker, name=f"smol-ray-{number}", daemon=True)
            for number in range(plan.num_workers)
        ]
        self._num_kept = len(self._threads)
        for thread in self._threads:
            thread.start()

    def await_first(self) -> None:
        """Return when the first worker is ready; raises why there is none."""
        while not self._identity:
            self._queue.check()
            time.sleep(POLL_S)

    @property
    def window(self) -> int:
        """A few batches for each worker."""
        return WINDOW_BATCHES * self._settings.most_slots * self._plan.num_workers

    def counters(self) -> Counters:
        """What workers have done so far, as far as they told of it."""
        with self._lock:
            return sum((member.counters for member in self._ready), self._past)

    def identity(self) -> dict[str, Any]:
        """What the first worker says of itself; others are no different."""
        return dict(self._identity)

    def submit(
        self, query: Query, on_text: OnText | None = None, *, is_interactive: bool = False
    ) -> Future[Result]:
        """See `backends.Backend`."""
        job = Job(query, on_text, is_interactive)
        self._queue.put(job)
        return job.future

    def health(self) -> Health:
        """See `backends.Backend`."""
        queue = self._queue
        return Health(not queue.is_gone, False, queue.num_taken, queue.num_pending)

    def close(self) -> None:
        """See `backends.Backend`."""
        self._queue.end(BackendError("the workers are shut down"))
        for thread in self._threads:
            thread.join()
        disconnect()

    def _keep_worker(self) -> None:
        """One of the threads: have a worker and keep it busy; when it dies, have another."""
        num_failed_starts = 0
        reason = ""
        try:
            while num_failed_starts < MAX_TRIES:
                member = Member(self._plan, self._queue.check)
                try:
                    self._open(member)
                    num_failed_starts = 0
                    self._feed(member)
                except WorkerLost as exc:
                    reason = str(exc)
                    num_failed_starts += member not in self._ready
                    self._lose(member, reason)
                    time.sleep(WAKE_INTERVAL_S)
                finally:
                    member.kill()
            self._do_without(f"a worker did not start {MAX_TRIES} times: {reason}")
        except Exception as exc:
            self._queue.end(exc if isinstance(exc, SmolError) else BackendError(one_line(exc)))

    def _open(self, member: Member) -> None:
        """Start a worker: the first decides what dtype `auto` is, for all of them."""
        member.await_place(self._check_start)
        facts = member.facts(self._settings)
        refuse_other_versions(facts)
        with self._lock:
            if self._settings.dtype == "auto":
                self._settings = replace(self._settings, dtype=facts.dtype)
        identity = member.open(self._settings, self._shipment)
        with self._lock:
            self._identity = self._identity or identity
            refuse_other_kernels(facts.node, identity, self._identity)
            self._ready.append(member)
        self._queue.join(member.share)

    def _feed(self, member: Member) -> None:
        most = BATCHES_AHEAD * self._settings.most_slots
        while True:
            for job, result in member.exchange(self._queue.take(member.share, most)):
                job.give(result)

    def _check_start(self) -> None:
        """Raise when no worker has found a place for too long."""
        self._queue.check()
        if not self._ready and time.monotonic() - self._none_since > START_TIMEOUT_S:
            raise BackendError(
                f"the Ray cluster started no worker in {START_TIMEOUT_S:.0f} s; "
                f"has it {self._plan.num_cpus} CPUs free on a node?"
            )

    def _lose(self, member: Member, reason: str) -> None:
        log.warning("a Ray worker was lost with %d queries: %s", len(member.share.jobs), reason)
        with self._lock:
            if member in self._ready:
                self._ready.remove(member)
                self._none_since = time.monotonic()
            self._past += member.counters
        self._queue.put_back(member.share, reason)

    def _do_without(self, reason: str) -> None:
        """One worker fewer; without any, the backend is gone."""
        with self._lock:
            self._num_kept -= 1
            is_last = not self._num_kept
        if is_last:
            return self._queue.end(BackendError(reason))
        log.warning("%s; going on with %d", reason, self._num_kept)


def refuse_other_versions(facts: Facts) -> None:
    """Check that a worker computes with what this machine has; builds for a device may differ.

    Raises:
        BackendError: saying where what is other.
    """
    for name, ours in (("smol", __version__), ("torch", version("torch"))):
        theirs = facts.versions[name]
        if theirs.partition("+")[0] != ours.partition("+")[0]:
            raise BackendError(
                f"the Ray node {facts.node} has {name} {theirs}, and this machine {ours}; "
                "install the same versions on both"
            )


def refuse_other_kernels(node: str, identity: dict[str, Any], first: dict[str, Any]) -> None:
    """Check that a worker rounds as the first one does, so that it does not matter who answers.

    Raises:
        BackendError: saying where what is other.
    """
    ours, theirs = first["kernels"], identity["kernels"]
    if ours != theirs:
        raise BackendError(
            f"the Ray node {node} computes with {theirs} kernels, and another with {ours} ones; "
            "install a C compiler on all of them, or give --kernels torch"
        )
