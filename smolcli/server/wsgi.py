"""Waitress around the application: listens at once, drains before it ends."""

import logging
import signal
import time
from collections.abc import Callable
from ipaddress import ip_address
from types import FrameType
from typing import Any

from waitress import wasyncore
from waitress.server import BaseWSGIServer, create_server

from smolcli.backends.base import Backend
from smolcli.errors import RunError
from smolcli.server.admission import Gate, most_requests
from smolcli.server.app import create_app
from smolcli.server.channel import Channel
from smolcli.server.holder import Holder
from smolcli.server.metrics import Metrics
from smolcli.server.service import Service
from smolcli.settings import EngineSettings, ServerSettings

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
        self._holder = Holder(lambda: open_backend(settings.engine), not settings.is_gateway)
        self._gate = Gate(settings.max_queue, max_requests)
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
