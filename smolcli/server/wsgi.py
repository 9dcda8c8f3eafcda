"""The Waitress server: listens, polls its connections, and shuts down gracefully on a signal."""

import copy
import gc
import logging
import signal
import sys
import time
from contextlib import suppress
from ipaddress import ip_address
from types import FrameType
from typing import Any

from waitress import wasyncore
from waitress.server import BaseWSGIServer, create_server

from smolcli.backends.base import OpenBackend
from smolcli.errors import RunError, counted, error_reason
from smolcli.server.admission import AdmissionLimit, request_limit, reserved
from smolcli.server.app import create_app
from smolcli.server.auth import ApiKeys
from smolcli.server.backend_loader import BackendLoader
from smolcli.server.batches_api import BatchApi
from smolcli.server.channel import Channel, Uploads
from smolcli.server.metrics import Metrics
from smolcli.server.service import Service
from smolcli.settings import ServerSettings

logger = logging.getLogger(__name__)

SPARE_THREADS = 16  # for rejected requests and for probes
SPARE_CONNECTIONS = 256  # for idle and slow clients
FILES_PER_CONNECTION = 2  # its socket, and a buffer on disk or a connection to an upstream server
SPARE_FILES = 64  # for logs, batches and all else
POLL_S = 0.2
PAUSE_PER_CONNECTION_S = 0.0002  # between polls, each of which visits every connection
MAX_PAUSE_S = 0.02
FLUSH_TIMEOUT_S = 1.0
FORM_OVERHEAD = 1 << 16  # bytes of an upload around the file


class Server:
    """A server that listens as soon as it is created.

    Args:
        settings: the server's settings.
        open_backend: opens the backend with the engine's settings.

    Raises:
        RunError: it cannot listen on the address.
    """

    def __init__(self, settings: ServerSettings, open_backend: OpenBackend) -> None:
        max_requests = request_limit(settings.engine.max_slots, settings.max_queue)
        self._loader = BackendLoader(
            lambda: open_backend(settings.engine), warms_up=not settings.is_gateway
        )
        self._admission = AdmissionLimit(settings.max_queue, max_requests)
        metrics = Metrics(self._loader.health, self._loader.counters)
        metrics.watch_model(self._loader.identity)
        service = Service(settings, self._loader, self._admission, metrics)
        self._batches = BatchApi(service)
        app = create_app(service, self._batches)
        self._drain_timeout_s = settings.drain_timeout_s
        self._sockets: dict[int, Any] = {}
        self._waitress = _listen(app, settings, max_requests, self._sockets)
        self._is_stopping = False
        self.url = _url(self._sockets)

    def run(self) -> None:
        """Serve until `stop` is called, then finish the requests in flight.

        Raises:
            SmolError: the model cannot be loaded.
        """
        logger.info("listening at %s", self.url)
        self._loader.start()
        self._batches.start()
        try:
            self._serve()
            self._drain()
        finally:
            self._batches.close()
            self._loader.close()
            self._poll_until_idle(time.monotonic() + FLUSH_TIMEOUT_S)
            self._waitress.task_dispatcher.shutdown()
            wasyncore.close_all(self._sockets)
        if self._loader.error:
            raise self._loader.error

    def stop(self) -> None:
        """Start shutting down. Safe to call from a signal handler, as it takes no lock."""
        self._is_stopping = True

    def _serve(self) -> None:
        is_ready = False
        while not self._is_stopping and self._loader.error is None:
            self._poll()
            if not is_ready and self._loader.is_ready:
                is_ready = True
                gc.freeze()  # a search of all that is loaded would stop every thread for 0.1 s
                logger.info("ready at %s", self.url)

    def _drain(self) -> None:
        self._admission.close()
        requests = counted(self._admission.num_requests, "request")
        logger.info("shutting down: %s in flight", requests)
        self._batches.stop()
        self._poll_until_idle(time.monotonic() + self._drain_timeout_s)
        if num_left := sum(channel.is_busy for channel in self._channels()):
            logger.warning("shutting down: %s did not finish in time", counted(num_left, "request"))

    def _poll_until_idle(self, deadline: float) -> None:
        while any(channel.is_busy for channel in self._channels()):
            if time.monotonic() >= deadline:
                return
            self._poll()

    def _poll(self) -> None:
        num_before = len(self._sockets)
        wasyncore.loop(timeout=POLL_S, use_poll=True, map=self._sockets, count=1)
        # Each poll accepts one connection. If it did, more may be waiting: poll again at once.
        if len(self._sockets) <= num_before:
            time.sleep(min(PAUSE_PER_CONNECTION_S * len(self._sockets), MAX_PAUSE_S))
        now = time.monotonic()
        for channel in self._channels():
            channel.close_if_overdue(now)

    def _channels(self) -> list[Channel]:
        return [item for item in self._sockets.values() if isinstance(item, Channel)]


def serve(settings: ServerSettings, open_backend: OpenBackend) -> None:
    """Serve until SIGTERM or Ctrl-C. A second signal ends the process immediately.

    Args:
        settings: the server's settings.
        open_backend: opens the backend with the engine's settings.

    Raises:
        SmolError: it cannot listen on the address, or the model cannot be loaded.
    """
    server = Server(settings, open_backend)
    if not settings.api_keys and not _is_loopback(settings.host):
        logger.warning("%s is open to anyone who can reach it; set --api-key", server.url)

    def stop(number: int, frame: FrameType | None) -> None:
        server.stop()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    server.run()


def _listen(app: Any, settings: ServerSettings, max_requests: int, sockets: dict[int, Any]) -> Any:
    """Create the listening Waitress server."""
    host = _unbracketed(settings.host)
    host = f"[{host}]" if ":" in host else host
    max_requests += reserved(max_requests)
    try:
        server = create_server(
            app,
            map=sockets,
            listen=f"{host}:{settings.port}",
            threads=max_requests + SPARE_THREADS,
            connection_limit=connection_limit(max_requests + SPARE_CONNECTIONS),
            recv_bytes=1 << 16,  # a poll reads one piece of each connection
            channel_request_lookahead=1,  # required to notice that a client has disconnected
            max_request_body_size=settings.max_body_bytes + 1,  # the first size that is rejected
            outbuf_high_watermark=1 << 30,  # never block a thread on a slow reader
            clear_untrusted_proxy_headers=True,
            ident="smol",
        )
    except (OSError, ValueError) as exc:
        # Waitress raises a ValueError for a host that cannot be resolved.
        reason = error_reason(exc) if isinstance(exc, OSError) else "unknown host"
        raise RunError(
            f"cannot listen on {host}:{settings.port}: {reason}; choose another --host or --port"
        ) from exc
    for item in list(sockets.values()):
        if isinstance(item, BaseWSGIServer):
            item.channel_class = Channel
            adjustments: Any = item.adj
            adjustments.uploads = _uploads(settings, adjustments)
    return server


def connection_limit(num_connections: int) -> int:
    """How many of these connections the limit on open files allows, which is raised if possible."""
    num_files = FILES_PER_CONNECTION * num_connections + SPARE_FILES
    num_allowed = _raise_file_limit(num_files)
    if num_allowed >= num_files:
        return num_connections
    limit = max((num_allowed - SPARE_FILES) // FILES_PER_CONNECTION, 1)
    logger.warning(
        "only %s at a time, because the system allows %d open files; for %d, raise that limit "
        "(ulimit -n, LimitNOFILE) to %d",
        counted(limit, "connection"),
        num_allowed,
        num_connections,
        num_files,
    )
    return limit


def _raise_file_limit(num_files: int) -> int:
    """Raise the limit on open files to `num_files`, or as far as possible; return the result."""
    if sys.platform == "win32":
        return num_files
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= num_files:
        return num_files
    raised = num_files if hard == resource.RLIM_INFINITY else min(num_files, hard)
    with suppress(OSError, ValueError):  # macOS has a limit below an infinite one
        resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def _uploads(settings: ServerSettings, adjustments: Any) -> Uploads | None:
    """What clients may upload; None if the server takes no files."""
    if settings.batches is None:
        return None
    adjustments = copy.copy(adjustments)
    adjustments.max_request_body_size = settings.batches.max_file_bytes + FORM_OVERHEAD + 1
    return Uploads(adjustments, ApiKeys(settings.api_keys).accepts)


def _unbracketed(host: str) -> str:
    """An IPv6 address without the brackets that it has in a URL."""
    return host.removeprefix("[").removesuffix("]")


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(_unbracketed(host)).is_loopback
    except ValueError:
        return host == "localhost"


def _url(sockets: dict[int, Any]) -> str:
    server = next(item for item in sockets.values() if isinstance(item, BaseWSGIServer))
    host, port = server.getsockname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
