"""A Ray cluster: reached or started, and how many workers of what size it is to have."""

import logging
import os
import socket
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from smolcli.errors import BackendError, UsageError
from smolcli.settings import EngineSettings, RaySettings

# Ray prints what befalls its processes to stdout, which is data here, and reads this on import.
os.environ["RAY_DEDUP_LOGS"] = "1"
os.environ["RAY_DEDUP_LOGS_SKIP_REGEX"] = ".*"
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

try:
    import ray
except ImportError as exc:
    raise UsageError("--backend ray needs Ray: pip install 'smolcli[ray]'") from exc

KNOCK_TIMEOUT_S = 5.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Plan:
    """So many workers, each with a part of a node and these settings."""

    num_workers: int
    num_cpus: int
    num_gpus: float
    settings: EngineSettings

    def actor_options(self) -> dict[str, Any]:
        """What Ray is told of each; what dies is replaced by us, not restarted by Ray."""
        return {
            "num_cpus": self.num_cpus,
            "num_gpus": self.num_gpus,
            "scheduling_strategy": "SPREAD",
            "max_restarts": 0,
            "max_task_retries": 0,
        }


def connect(cluster: RaySettings, settings: EngineSettings) -> None:
    """Join the cluster at the address, or start one on this machine, quietly.

    Raises:
        BackendError: where there is none, or none of this version.
    """
    if cluster.address and ":" in cluster.address and "://" not in cluster.address:
        _knock(cluster.address)
    options: dict[str, Any] = {"address": cluster.address}
    if cluster.address is None:
        num_cpus = max(os.cpu_count() or 1, cluster.workers * max(settings.threads, 1))
        options = {"address": "local", "include_dashboard": False, "num_cpus": num_cpus}
    try:
        ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as exc:  # Ray raises whatever it likes here
        where = f"at {cluster.address} cannot be reached" if cluster.address else "does not start"
        raise BackendError(f"the Ray cluster {where}: {one_line(exc)}") from exc


def make_plan(cluster: RaySettings, settings: EngineSettings) -> Plan:
    """How many workers, and what each has; by default one for each GPU, or else for each node.

    Raises:
        UsageError: where no node of the cluster could have a worker like that.
    """
    num_gpus = cluster.gpus_per_worker or float(settings.device.startswith("cuda"))
    if num_gpus and settings.device == "cpu":
        settings = replace(settings, device="cuda")
    least_cpus = max(settings.threads, 1)
    nodes = [
        node["Resources"]
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"]
        and node["Resources"].get("CPU", 0) >= least_cpus
        and node["Resources"].get("GPU", 0) >= num_gpus
    ]
    if not nodes:
        gpus = f" and {num_gpus:g} GPUs" if num_gpus else ""
        raise UsageError(f"no node of the Ray cluster has {least_cpus} CPUs{gpus} for a worker")
    num_fitting = sum(int(node["GPU"] // num_gpus) for node in nodes) if num_gpus else len(nodes)
    num_workers = cluster.workers or num_fitting
    num_cpus = settings.threads or _cpus_each(nodes, num_workers)
    room = sum(int(node["CPU"] // num_cpus) for node in nodes)
    if num_workers > room:
        log.warning("the Ray cluster has room for %d of %d workers now", room, num_workers)
    return Plan(num_workers, num_cpus, num_gpus, replace(settings, threads=num_cpus))


def disconnect() -> None:
    """Leave the cluster; one that was started for this ends."""
    ray.shutdown()


def one_line(exc: BaseException) -> str:
    """What a foreign exception says, without what it says beside that."""
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    return lines[-1] if lines else type(exc).__name__


def _knock(address: str) -> None:
    """Ray itself would wait for minutes for somebody to listen there."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), KNOCK_TIMEOUT_S).close()
    except (OSError, ValueError) as exc:
        raise BackendError(f"no Ray cluster listens at {address}: {exc}") from exc


def _cpus_each(nodes: list[dict[str, float]], num_workers: int) -> int:
    """What fits on the smallest node, workers being spread evenly."""
    smallest = min(node["CPU"] for node in nodes)
    return max(1, int(smallest // ceil(num_workers / len(nodes))))
