"""The Waitress server: connections with deadlines, a graceful shutdown, JSON for bad HTTP."""

import json
import logging
import signal
import socket
import time
from collections.abc import Callable
from http import HTTPStatus
from ipaddress import ip_address
from types import FrameType
from typing import Any

from waitress import wasyncore
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser
from waitress.server import BaseWSGIServer, create_server
from waitress.task import ErrorTask

from smolcli.backends.base import Backend
from smolcli.errors import RunError
from smolcli.server.admission import AdmissionLimit, request_limit
from smolcli.server.app import create_app
from smolcli.server.errors import HttpError, code_of, error_body
from smolcli.server.metrics import Metrics
from smolcli.server.service import BackendLoader, Service
from smolcli.settings import EngineSettings, ServerSettings

logger = logging.getLogger(__name__)

IDLE_TIMEOUT_S = 120.0  # between two requests of a connection
RECEIVE_TIMEOUT_S = 60.0  # from the first byte of a request to its last
SEND_TIMEOUT_S = 300.0  # for the client to read a complete response
SPARE_THREADS = 16  # for rejected requests and for probes
SPARE_CONNECTIONS = 256  # for idle and slow clients
POLL_S = 0.2
PAUSE_PER_CONNECTION_S = 0.0002  # between polls, each of which visits every connection
MAX_PAUSE_S = 0.02
FLUSH_TIMEOUT_S = 1.0


class JsonErrorTask(ErrorTask):
    """Reports a malformed request, which never reaches the application, as JSON."""

    def execute(self) -> None:
        fault = self.request.error  # type: ignore[attr-defined]  # missing from the stubs
        error = HttpError(fault.code, str(fault.body), code_of(fault.code))
        body = (json.dumps(error_body(error, is_openai=False)) + "\n").encode()
        self.status = f"{fault.code} {HTTPStatus(fault.code).phrase}"
        self.response_headers = [("Content-Type", "application/json")]
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)


class Parser(HTTPRequestParser):
    """Gives malformed requests a path, which Waitress logs when an error task fails."""

    path = ""


class Channel(HTTPChannel):
    """A connection that is closed if its client is idle or slow for too long."""

    parser_class = Parser
    error_task_class = JsonErrorTask
    _receiving_since = 0.0  # when the first byte of the current request arrived

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._serving_until = time.monotonic()  # the last time a request was being served

    def received(self, data: bytes) -> bool:
        if self.request is None:
            self._receiving_since = time.monotonic()
        return super().received(data)

    def service(self) -> None:
        self._serving_until = time.monotonic()
        super().service()

    def check_client_disconnected(self) -> bool:  # type: ignore[override]  # wrong in the stubs
        """Whether the client has disconnected.

        Waitress stops reading once the client has pipelined another request, and would not
        notice; so this looks at the socket itself.
        """
        return not self.connected or (len(self.requests) > 1 and self._is_socket_closed())

    def _is_socket_closed(self) -> bool:
        if self.socket is None:
            return True
        try:
            return not self.socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True

    @property
    def is_busy(self) -> bool:
        """Whether a request is being served or its response is not fully sent."""
        return bool(self.requests or self.total_outbufs_len)

    def close_if_overdue(self, now: float) -> None:
        """Close the connection if the client has exceeded a timeout.

        Empty lines between requests do not count as activity.

        Args:
            now: the current time of `time.monotonic`, in seconds.
        """
        if self.requests:  # these have a timeout of their own
            self._serving_until = now
        elif self._is_overdue(now):
            self.will_close = True

    def _is_overdue(self, now: float) -> bool:
        if self.total_outbufs_len:
            return now - self._serving_until > SEND_TIMEOUT_S
        if self.request is None:
            return now - self._serving_until > IDLE_TIMEOUT_S
        return now - max(self._receiving_since, self._serving_until) > RECEIVE_TIMEOUT_S


class Server:
    """A server that listens as soon as it is created.

    Args:
        settings: the server's settings.
        open_backend: opens the backend with the engine's settings.

    Raises:
        RunError: it cannot listen on the address.
    """

    def __init__(
        self, settings: ServerSettings, open_backend: Callable[[EngineSettings], Backend]
    ) -> None:
        max_requests = request_limit(settings.engine.most_slots, settings.max_queue)
        self._loader = BackendLoader(
            lambda: open_backend(settings.engine), warms_up=not settings.is_gateway
        )
        self._admission = AdmissionLimit(settings.max_queue, max_requests)
        metrics = Metrics(self._loader.health)
        app = create_app(Service(settings, self._loader, self._admission, metrics))
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
        try:
            self._serve()
            self._drain()
        finally:
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
                logger.info("ready at %s", self.url)

    def _drain(self) -> None:
        self._admission.close()
        logger.info("shutting down: %d requests in flight", self._admission.num_requests)
        self._poll_until_idle(time.monotonic() + self._drain_timeout_s)
        if num_left := sum(channel.is_busy for channel in self._channels()):
            logger.warning("shutting down: %d requests did not finish in time", num_left)

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


def serve(settings: ServerSettings, open_backend: Callable[[EngineSettings], Backend]) -> None:
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
    """Create the listening Waitress server.

    Waitress's own limits lie above smol's, whose error responses are better.
    """
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    try:
        server = create_server(
            app,
            map=sockets,
            listen=f"{host}:{settings.port}",
            threads=max_requests + SPARE_THREADS,
            connection_limit=max_requests + SPARE_CONNECTIONS,
            channel_request_lookahead=1,  # required to notice that a client has disconnected
            max_request_body_size=4 * settings.max_body_bytes,
            outbuf_high_watermark=1 << 30,  # never block a thread on a slow reader
            clear_untrusted_proxy_headers=True,
            ident="smol",
        )
    except (OSError, ValueError) as exc:
        reason = getattr(exc, "strerror", None) or exc
        raise RunError(
            f"cannot listen on {host}:{settings.port}: {reason}; choose another --host or --port"
        ) from exc
    for item in list(sockets.values()):
        if isinstance(item, BaseWSGIServer):
            item.channel_class = Channel
    return server


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _url(sockets: dict[int, Any]) -> str:
    server = next(item for item in sockets.values() if isinstance(item, BaseWSGIServer))
    host, port = server.getsockname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
