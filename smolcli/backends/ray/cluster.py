"""The driver's access to a Ray cluster: connecting, planning workers, and calling them."""

import logging
import os
import socket
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

from smolcli.backends.base import WAKE_INTERVAL_S, Counters
from smolcli.backends.ray.work_queue import ClusterQuery, WorkerLoad
from smolcli.backends.ray.worker import NodeInfo, Reply, Task, Worker
from smolcli.errors import BackendError, SmolError, UsageError
from smolcli.settings import EngineSettings, RaySettings
from smolcli.types import Result
from smolcli.weights.store import GGUF_FILE, ModelFiles

# Keep Ray from printing events to stdout, which is data here. It reads these on import.
os.environ["RAY_DEDUP_LOGS"] = "1"
os.environ["RAY_DEDUP_LOGS_SKIP_REGEX"] = ".*"
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

try:
    import ray
    from ray.exceptions import RayError, RayTaskError
except ImportError as exc:
    raise UsageError("--backend ray needs Ray: pip install 'smolcli[ray]'") from exc

CONNECT_TIMEOUT_S = 5.0
MODEL_FILES = ("*.json", "*.jinja", "*.safetensors", GGUF_FILE)

logger = logging.getLogger(__name__)


class WorkerLost(Exception):
    """A worker is gone, with every query that it held."""


@dataclass(frozen=True, slots=True)
class WorkerPlan:
    """How many workers to start, the resources of each, and their settings."""

    num_workers: int
    num_cpus: int
    num_gpus: float
    settings: EngineSettings

    def actor_options(self) -> dict[str, Any]:
        """Options for Ray, which must not restart a dead worker: the backend replaces it."""
        return {
            "num_cpus": self.num_cpus,
            "num_gpus": self.num_gpus,
            "scheduling_strategy": "SPREAD",
            "max_restarts": 0,
            "max_task_retries": 0,
        }


def connect(cluster: RaySettings, settings: EngineSettings) -> None:
    """Join the cluster at the given address, or start one on this machine.

    Args:
        cluster: how to reach the cluster.
        settings: the workers' settings, which determine the size of a local cluster.

    Raises:
        BackendError: the cluster cannot be reached or started, or runs another version of Ray.
    """
    if cluster.address and ":" in cluster.address and "://" not in cluster.address:
        _check_listening(cluster.address)
    options: dict[str, Any] = {"address": cluster.address}
    if cluster.address is None:
        num_cpus = max(os.cpu_count() or 1, cluster.workers * max(settings.threads, 1))
        options = {"address": "local", "include_dashboard": False, "num_cpus": num_cpus}
    try:
        ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as exc:  # Ray raises errors of many types here
        where = f"at {cluster.address} cannot be reached" if cluster.address else "did not start"
        raise BackendError(f"the Ray cluster {where}: {last_line(exc)}") from exc


def disconnect() -> None:
    """Leave the cluster; a cluster that `connect` started stops."""
    ray.shutdown()


def plan_workers(cluster: RaySettings, settings: EngineSettings) -> WorkerPlan:
    """Decide how many workers to start, and with which resources.

    The default is one worker for each GPU if GPUs are used, otherwise one for each node.

    Raises:
        UsageError: no node of the cluster is large enough for such a worker.
    """
    num_gpus = cluster.gpus_per_worker or float(settings.device.startswith("cuda"))
    if num_gpus and settings.device == "cpu":
        settings = replace(settings, device="cuda")
    min_cpus = max(settings.threads, 1)
    nodes = [
        node["Resources"]
        for node in ray.nodes()
        if node["Alive"]
        and node["Resources"].get("CPU", 0) >= min_cpus
        and node["Resources"].get("GPU", 0) >= num_gpus
    ]
    if not nodes:
        gpus = f" and {num_gpus:g} GPUs" if num_gpus else ""
        raise UsageError(f"no node of the Ray cluster has {min_cpus} CPUs{gpus} for a worker")
    num_fitting = sum(int(node["GPU"] // num_gpus) for node in nodes) if num_gpus else len(nodes)
    num_workers = cluster.workers or num_fitting
    num_cpus = settings.threads or _cpus_per_worker(nodes, num_workers)
    capacity = sum(int(node["CPU"] // num_cpus) for node in nodes)
    if num_workers > capacity:
        logger.warning("the Ray cluster has room for %d of %d workers now", capacity, num_workers)
    return WorkerPlan(num_workers, num_cpus, num_gpus, replace(settings, threads=num_cpus))


def last_line(exc: BaseException) -> str:
    """The last line of a foreign exception's text, which names the cause."""
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    return lines[-1] if lines else type(exc).__name__


def _check_listening(address: str) -> None:
    """Fail fast if nothing listens at an address, where Ray would wait for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError) as exc:
        raise BackendError(f"no Ray cluster listens at {address}: {exc}") from exc


def _cpus_per_worker(nodes: list[dict[str, float]], num_workers: int) -> int:
    """CPUs for each worker on the smallest node, if workers are spread evenly."""
    smallest = min(node["CPU"] for node in nodes)
    return max(1, int(smallest // ceil(num_workers / len(nodes))))


class ModelUpload:
    """A model's files in Ray's object store, from which each node that lacks them gets a copy."""

    def __init__(self, files: ModelFiles) -> None:
        self.files = files
        self._lock = threading.Lock()
        self._contents: dict[str, ray.ObjectRef[bytes]] = {}

    def contents(self) -> dict[str, "ray.ObjectRef[bytes]"]:
        """The files by name, uploaded on the first call."""
        with self._lock:
            if not self._contents:
                logger.warning("sending the model to nodes that do not have it")
                self._contents = {path.name: ray.put(path.read_bytes()) for path in self._paths()}
            return self._contents

    def _paths(self) -> list[Path]:
        folder = self.files.folder
        return [path for pattern in MODEL_FILES for path in sorted(folder.glob(pattern))]


class WorkerHandle:
    """The driver's handle on one worker; used by one thread only.

    Args:
        plan: the worker's resources.
        check: called repeatedly while a reply is awaited; stops waiting by raising.
    """

    def __init__(self, plan: WorkerPlan, check: Callable[[], None]) -> None:
        self.load = WorkerLoad()
        self.counters = Counters()
        self._check = check
        self._actor: Any = ray.remote(Worker).options(**plan.actor_options()).remote()

    def await_start(self, check: Callable[[], None]) -> None:
        """Wait until the cluster has placed the worker on a node, or `check` raises."""
        self._call("__ray_ready__", check=check)

    def info(self, settings: EngineSettings) -> NodeInfo:
        """See `Worker.info`."""
        info = self._call("info", settings)
        assert isinstance(info, NodeInfo)
        return info

    def open(self, settings: EngineSettings, upload: ModelUpload) -> dict[str, Any]:
        """Load the model on the worker, sending it if necessary; returns its identity."""
        identity = self._call("open", settings, upload.files)
        if identity is None:
            contents = upload.contents()
            identity = self._call("open", settings, upload.files, [*contents], *contents.values())
        assert isinstance(identity, dict)
        return identity

    def exchange(self, queries: Iterable[ClusterQuery]) -> list[tuple[ClusterQuery, Result]]:
        """Send the worker more queries; returns what it has finished, after a moment at most."""
        held = self.load.queries
        tasks = [Task(self.load.add(each), each.query, each.is_interactive) for each in queries]
        cancelled = [number for number, query in held.items() if query.future.cancelled()]
        reply = self._call("exchange", tasks, cancelled)
        assert isinstance(reply, Reply)
        self.counters = reply.counters
        for number in cancelled:
            del held[number]
        return [(held.pop(n), result) for n, result in reply.results if n in held]

    def kill(self) -> None:
        """End the worker's process if it is still running."""
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
            raise WorkerLost(last_line(exc)) from exc
        except RayError as exc:
            raise WorkerLost(last_line(exc)) from exc
