"""The near side of one Ray worker: its handle, and what it has to do."""

import logging
import threading
from collections.abc import Callable, Iterable
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from smolcli.backends.base import Counters
from smolcli.backends.ray.cluster import Plan, one_line
from smolcli.backends.ray.jobs import WAKE_INTERVAL_S, Job, Share
from smolcli.backends.ray.model_files import pack
from smolcli.backends.ray.worker import Facts, Reply, Task, Worker
from smolcli.errors import BackendError, SmolError
from smolcli.settings import EngineSettings
from smolcli.types import Result
from smolcli.weights.store import ModelFiles

log = logging.getLogger(__name__)


class WorkerLost(Exception):
    """A worker is gone, with all that it had to do."""


class Shipment:
    """A model's files in the cluster's memory, from where each node fetches them once."""

    def __init__(self, files: ModelFiles) -> None:
        self.files = files
        self._lock = threading.Lock()
        self._contents: dict[str, ray.ObjectRef[bytes]] = {}

    def contents(self) -> dict[str, "ray.ObjectRef[bytes]"]:
        """Put there when the first node lacks them."""
        with self._lock:
            if not self._contents:
                log.warning("sending the model to nodes that do not have it")
                paths = pack(self.files)
                self._contents = {path.name: ray.put(path.read_bytes()) for path in paths}
            return self._contents


class Member:
    """One worker of a cluster; one thread alone uses it.

    Args:
        plan: what the worker is to have.
        check: called again and again while a reply is awaited; what it raises ends the waiting.
    """

    def __init__(self, plan: Plan, check: Callable[[], None]) -> None:
        self.share = Share()
        self.counters = Counters()
        self._check = check
        self._actor: Any = ray.remote(Worker).options(**plan.actor_options()).remote()

    def await_place(self, check: Callable[[], None]) -> None:
        """Wait until the cluster has found it a place, for as long as `check` does not raise."""
        self._call("__ray_ready__", check=check)

    def facts(self, settings: EngineSettings) -> Facts:
        """See `ray_worker.Worker`."""
        facts = self._call("facts", settings)
        assert isinstance(facts, Facts)
        return facts

    def open(self, settings: EngineSettings, shipment: Shipment) -> dict[str, Any]:
        """Have it load the model, which it is sent if need be; returns its identity."""
        identity = self._call("open", settings, shipment.files)
        if identity is None:
            contents = shipment.contents()
            identity = self._call("open", settings, shipment.files, [*contents], *contents.values())
        assert isinstance(identity, dict)
        return identity

    def exchange(self, jobs: Iterable[Job]) -> list[tuple[Job, Result]]:
        """Give it more to do; returns what it has finished, after a moment at most."""
        mine = self.share.jobs
        tasks = [Task(self.share.add(job), job.query, job.is_interactive) for job in jobs]
        cancelled = [number for number, job in mine.items() if job.future.cancelled()]
        reply = self._call("exchange", tasks, cancelled)
        assert isinstance(reply, Reply)
        self.counters = reply.counters
        for number in cancelled:
            del mine[number]
        return [(mine.pop(n), result) for n, result in reply.results if n in mine]

    def kill(self) -> None:
        """End its process, if it lives."""
        ray.kill(self._actor)

    def _call(self, method: str, *args: Any, check: Callable[[], None] | None = None) -> object:
        try:
            reply = getattr(self._actor, method).remote(*args)
            while not ray.wait([reply], timeout=WAKE_INTERVAL_S)[0]:
                (check or self._check)()
            return ray.get(reply)
        except RayTaskError as exc:
            if isinstance(exc.cause, SmolError) and not isinstance(exc.cause, BackendError):
                raise exc.cause from exc
            raise WorkerLost(one_line(exc)) from exc
        except RayError as exc:
            raise WorkerLost(one_line(exc)) from exc
