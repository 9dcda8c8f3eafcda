"""What every command shares: exit codes, the log, and who answers."""

import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from smolcli.cli.options.engine import ClusterOptions
from smolcli.errors import UsageError
from smolcli.settings import EngineSettings, RemoteSettings

if TYPE_CHECKING:
    from smolcli.backends.base import Backend

FAILED, USAGE, SOME_FAILED, INTERRUPTED = 1, 2, 3, 130  # exit codes


def log_to_stderr(is_quiet: bool = False) -> None:
    """Let through what smol says of its progress, and otherwise only what is wrong."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    for name in ("smolcli.batch", "smolcli.weights", "smolcli.backends"):
        logging.getLogger(name).setLevel(logging.ERROR if is_quiet else logging.INFO)


def backend_opener(
    remote: RemoteSettings | None, cluster: ClusterOptions | None = None
) -> "Callable[[EngineSettings], Backend]":
    """What opens the backend that the options mean.

    Raises:
        UsageError: they mean more than one.
    """
    is_ray = cluster is not None and cluster.backend == "ray"
    if remote is not None and is_ray:
        raise UsageError("--via and --backend ray exclude each other")
    if remote is not None:
        return partial(_open_remote, remote)
    return partial(_open_ray, cluster) if cluster is not None and is_ray else open_local


def open_local(settings: EngineSettings) -> "Backend":
    """A backend with the model in this process; see `backends.open`."""
    from smolcli.backends.local import open_local

    return open_local(settings)


def _open_remote(remote: RemoteSettings, settings: EngineSettings) -> "Backend":
    from smolcli.backends.remote.backend import open_remote

    return open_remote(remote)


def _open_ray(cluster: ClusterOptions, settings: EngineSettings) -> "Backend":
    from smolcli.backends.ray.backend import open_ray

    return open_ray(settings, cluster.ray_settings())
