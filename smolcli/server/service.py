"""What the views share."""

import codecs
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from flask import Response, request

from smolcli.backends.base import Backend, Health
from smolcli.errors import BackendError
from smolcli.protocol.openai import model_name
from smolcli.protocol.query import load_json
from smolcli.server.access_log import current_trace
from smolcli.server.admission import AdmissionLimit, unavailable
from smolcli.server.errors import HttpCode, HttpError
from smolcli.server.in_flight import InFlightRequest
from smolcli.server.metrics import Metrics
from smolcli.settings import ServerSettings
from smolcli.types import Message, Query, Result, Sampling

logger = logging.getLogger(__name__)

WARM_UP = Query("warm-up", (Message("user", "Hello"),), Sampling(max_new_tokens=2))
WARM_UP_S = 120.0
CLOSE_S = 10.0


class BackendHolder:
    """Opens the backend on a thread of its own, while the server answers already.

    Args:
        open_backend: loads the model.
        warms_up: whether it is to answer once before it is offered to clients.
    """

    def __init__(self, open_backend: Callable[[], Backend], warms_up: bool = True) -> None:
        self._open_backend = open_backend
        self._warms_up = warms_up
        self._backend: Backend | None = None
        self._thread = threading.Thread(target=self._load, name="smol-load", daemon=True)
        self.error: Exception | None = None

    @property
    def is_ready(self) -> bool:
        """Whether there is a backend that can be asked now."""
        return self._backend is not None and self._backend.health().is_ready

    @property
    def backend(self) -> Backend:
        """What answers.

        Raises:
            HttpError: 503 while it is being loaded.
        """
        if self._backend is None:
            raise unavailable("the model is being loaded; ask again in a moment")
        return self._backend

    def health(self) -> Health | None:
        """How the backend is, None while there is none."""
        return self._backend.health() if self._backend else None

    def identity(self) -> dict[str, Any]:
        """What decides its answers, and how many queries keep it busy; nothing while unknown."""
        identity = self._backend.identity() if self._backend else {}
        return identity | {"window": self._backend.window} if self._backend and identity else {}

    def start(self) -> None:
        """Begin to load."""
        self._thread.start()

    def close(self) -> None:
        """Let go of the model; whoever still waits for an answer learns that it is gone."""
        self._thread.join(CLOSE_S)
        if self._backend:
            self._backend.close()

    def _load(self) -> None:
        started = time.perf_counter()
        try:
            backend = self._open_backend()
            self._backend = _warm(backend) if self._warms_up else backend
            if self._warms_up:
                logger.info("model loaded in %.1f s", time.perf_counter() - started)
        except Exception as exc:
            self.error = exc


def _warm(backend: Backend) -> Backend:
    """Let a backend answer once, so that the first client does not wait for what is done once."""
    try:
        warm = backend.submit(WARM_UP).result(WARM_UP_S)
        if warm.is_error:
            raise BackendError(f"the model cannot answer: {warm.error}")
    except BaseException:
        backend.close()
        raise
    return backend


STREAM_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # nginx buffers otherwise


@dataclass(frozen=True, slots=True)
class Service:
    """One server's settings and state, each part with its one owner."""

    settings: ServerSettings
    holder: BackendHolder
    gate: AdmissionLimit
    metrics: Metrics

    @property
    def model_name(self) -> str:
        """What clients call the model."""
        return model_name(self.holder.identity().get("model", self.settings.engine.model))

    def start(
        self, queries: Mapping[int, Query], *, is_interactive: bool, with_text: bool = False
    ) -> InFlightRequest:
        """Begin to answer the present request's queries; the caller closes the flight.

        Raises:
            HttpError: 503 where that is not possible now.
        """
        flight = InFlightRequest(
            queries,
            self.holder.backend,
            self.gate,
            self.settings.request_timeout_s,
            request.environ["waitress.client_disconnected"],
            self._observer(),
        )
        try:
            current_trace().ask(queries.values())
            flight.submit(is_interactive=is_interactive, with_text=with_text)
        except BaseException:
            flight.close()
            raise
        return flight

    def count(self, result: Result) -> None:
        """Count a query's outcome, for the present request and for all."""
        self._observer()(result)

    def _observer(self) -> Callable[[Result], None]:
        trace = current_trace()

        def observe(result: Result) -> None:
            trace.add(result)
            self.metrics.count_result(result)

        return observe


def read_json() -> object:
    """The value that the present request's body holds.

    Raises:
        HttpError: 415 where it is not meant to be JSON.
        QueryError: where it is not.
    """
    if request.mimetype != "application/json":
        raise HttpError(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            "the body must be JSON, sent with Content-Type: application/json",
            HttpCode.UNSUPPORTED_MEDIA_TYPE,
        )
    if (encoding := request.headers.get("Content-Encoding", "identity")) != "identity":
        raise HttpError(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            f"Content-Encoding {encoding!r} is not supported: send the body as it is",
            HttpCode.UNSUPPORTED_MEDIA_TYPE,
        )
    return load_json(request.get_data(cache=False).removeprefix(codecs.BOM_UTF8))


def json_response(value: Mapping[str, Any], status: int = HTTPStatus.OK) -> Response:
    """A response of one JSON object."""
    return Response(to_json(value) + "\n", status, mimetype="application/json")


def to_json(value: Mapping[str, Any]) -> str:
    """JSON on one line, other than ASCII as it is."""
    return json.dumps(value, ensure_ascii=False)
