"""Waitress around the application: listens at once, drains before it ends."""

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
from smolcli.server.admission import AdmissionLimit, most_requests
from smolcli.server.app import create_app
from smolcli.server.errors import HttpError, code_of, error_body
from smolcli.server.metrics import Metrics
from smolcli.server.service import BackendHolder, Service
from smolcli.settings import EngineSettings, ServerSettings

IDLE_S = 120.0  # between two requests
RECEIVE_S = 60.0  # from the first byte of a request to its last
SEND_S = 300.0  # for an answer that is complete to be taken


class JsonErrorTask(ErrorTask):
    """Waitress' own refusals, of what is not HTTP, in our shape."""

    def execute(self) -> None:
        fault = self.request.error  # type: ignore[attr-defined]  # the stubs have it wrong
        error = HttpError(fault.code, str(fault.body), code_of(fault.code))
        body = (json.dumps(error_body(error, is_openai=False)) + "\n").encode()
        self.status = f"{fault.code} {HTTPStatus(fault.code).phrase}"
        self.response_headers = [("Content-Type", "application/json")]
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)


class Parser(HTTPRequestParser):
    """Has a path even where there was none, for Waitress logs it."""

    path = ""


class Channel(HTTPChannel):
    """A connection that cannot be held for ever by a client that is slow, or says nothing."""

    parser_class = Parser
    error_task_class = JsonErrorTask
    _begun_at = 0.0  # when the present request's first byte came

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._free_at = time.monotonic()  # when no request was being served for the last time

    def received(self, data: bytes) -> bool:
        if self.request is None:
            self._begun_at = time.monotonic()
        return super().received(data)

    def service(self) -> None:
        self._free_at = time.monotonic()
        super().service()

    def check_client_disconnected(self) -> bool:  # type: ignore[override]  # the stubs have it wrong
        """Whether the client is gone, seen also where a next request of it waits already.

        Waitress reads nothing on then, and would not notice.
        """
        return not self.connected or (len(self.requests) > 1 and self._has_hung_up())

    def _has_hung_up(self) -> bool:
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
        """Whether a request is being served, or its answer is not sent to its end."""
        return bool(self.requests or self.total_outbufs_len)

    def drop_if_slow(self, now: float) -> None:
        """Close it where the client has kept it waiting for too long; empty lines do not count."""
        if self.requests:  # which have a deadline of their own
            self._free_at = now
        elif self._is_overdue(now):
            self.will_close = True

    def _is_overdue(self, now: float) -> bool:
        if self.total_outbufs_len:
            return now - self._free_at > SEND_S
        if self.request is None:
            return now - self._free_at > IDLE_S
        return now - max(self._begun_at, self._free_at) > RECEIVE_S


logger = logging.getLogger(__name__)

SPARE_THREADS = 16  # for those who are refused, and for /health
SPARE_CONNECTIONS = 256  # idle ones, and slow ones
TICK_S = 0.2
GAP_S = 0.0002  # between turns, for each connection: a turn looks at all of them
MOST_GAP_S = 0.02
FLUSH_S = 1.0


class Server:
    """One listening server; `run` is its life.

    Args:
        settings: of the server.
        open_backend: loads the model.

    Raises:
        RunError: where it cannot listen.
    """

    def __init__(
        self, settings: ServerSettings, open_backend: Callable[[EngineSettings], Backend]
    ) -> None:
        max_requests = most_requests(settings.engine.most_slots, settings.max_queue)
        self._holder = BackendHolder(lambda: open_backend(settings.engine), not settings.is_gateway)
        self._gate = AdmissionLimit(settings.max_queue, max_requests)
        metrics = Metrics(self._holder.health)
        app = create_app(Service(settings, self._holder, self._gate, metrics))
        self._drain_timeout_s = settings.drain_timeout_s
        self._map: dict[int, Any] = {}
        self._waitress = _listen(app, settings, max_requests, self._map)
        self._is_stopping = False
        self.url = _url(self._map)

    def run(self) -> None:
        """Serve until told to stop, and until what runs then is finished.

        Raises:
            SmolError: where the model cannot be loaded.
        """
        logger.info("listening at %s", self.url)
        self._holder.start()
        try:
            self._serve()
            self._drain()
        finally:
            self._holder.close()
            self._turn_until(time.monotonic() + FLUSH_S)
            self._waitress.task_dispatcher.shutdown()
            wasyncore.close_all(self._map)
        if self._holder.error:
            raise self._holder.error

    def stop(self) -> None:
        """Begin to end; for signal handlers, so it takes no lock."""
        self._is_stopping = True

    def _serve(self) -> None:
        is_ready = False
        while not self._is_stopping and self._holder.error is None:
            self._turn()
            if not is_ready and self._holder.is_ready:
                is_ready = True
                logger.info("ready at %s", self.url)

    def _drain(self) -> None:
        self._gate.close()
        logger.info("stopping: %d requests to finish", self._gate.num_requests)
        self._turn_until(time.monotonic() + self._drain_timeout_s)
        if num_left := sum(channel.is_busy for channel in self._channels()):
            logger.warning("stopping: %d requests had no time to finish", num_left)

    def _turn_until(self, deadline: float) -> None:
        """Serve until nothing is under way."""
        while any(channel.is_busy for channel in self._channels()):
            if time.monotonic() >= deadline:
                return
            self._turn()

    def _turn(self) -> None:
        num_before = len(self._map)
        wasyncore.loop(timeout=TICK_S, use_poll=True, map=self._map, count=1)
        if len(self._map) <= num_before:  # else there may be more who knock: one is let in a turn
            time.sleep(min(GAP_S * len(self._map), MOST_GAP_S))
        now = time.monotonic()
        for channel in self._channels():
            channel.drop_if_slow(now)

    def _channels(self) -> list[Channel]:
        return [item for item in self._map.values() if isinstance(item, Channel)]


def serve(settings: ServerSettings, open_backend: Callable[[EngineSettings], Backend]) -> None:
    """Serve until SIGTERM or Ctrl-C; a second one ends the process at once.

    Raises:
        SmolError: where it cannot listen, or the model cannot be loaded.
    """
    server = Server(settings, open_backend)
    if not settings.api_keys and not _is_loopback(settings.host):
        logger.warning("anybody who reaches %s can ask: there is no --api-key", server.url)

    def stop(number: int, frame: FrameType | None) -> None:
        server.stop()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    server.run()


def _listen(app: Any, settings: ServerSettings, max_requests: int, sockets: dict[int, Any]) -> Any:
    """Waitress, listening, with its limits beyond our own, which answer better."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    try:
        server = create_server(
            app,
            map=sockets,
            listen=f"{host}:{settings.port}",
            threads=max_requests + SPARE_THREADS,
            connection_limit=max_requests + SPARE_CONNECTIONS,
            channel_request_lookahead=1,  # else nobody notices that a client goes away
            max_request_body_size=4 * settings.max_body_bytes,
            outbuf_high_watermark=1 << 30,  # no thread waits for a slow reader
            clear_untrusted_proxy_headers=True,
            ident="smol",
        )
    except (OSError, ValueError) as exc:
        reason = getattr(exc, "strerror", None) or exc
        raise RunError(
            f"cannot listen on {host}:{settings.port}: {reason}; give another --host or --port"
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
