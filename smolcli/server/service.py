"""What all routes share: settings, backend, admission limit, metrics and JSON bodies."""

import codecs
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from http import HTTPStatus
from typing import Any

from flask import Response, request

from smolcli.backends.base import Backend, Counters, Health
from smolcli.errors import BackendError, ModelError, QueryError, SmolError
from smolcli.protocol.json_text import load_json, shorten
from smolcli.protocol.openai import model_name
from smolcli.server.access_log import current_record
from smolcli.server.admission import AdmissionLimit, unavailable
from smolcli.server.errors import HttpCode, HttpError
from smolcli.server.in_flight import InFlightRequest
from smolcli.server.metrics import Metrics
from smolcli.settings import ServerSettings
from smolcli.types import ErrorCode, Message, Query, Result, Sampling

logger = logging.getLogger(__name__)

SEND_HEADERS = "smol.send_headers"  # WSGI key of a function that sends the headers at once
STREAM_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # do not buffer in nginx
WARM_UP = Query("warm-up", (Message("user", "Hello"),), Sampling(max_new_tokens=2))
WARM_UP_TIMEOUT_S = 120.0
CLOSE_TIMEOUT_S = 10.0


class BackendLoader:
    """Opens the backend on its own thread, while the server already accepts connections.

    Args:
        open_backend: opens the backend.
        warms_up: whether the backend must answer a query before clients may use it.
    """

    def __init__(self, open_backend: Callable[[], Backend], warms_up: bool) -> None:
        self._open_backend = open_backend
        self._warms_up = warms_up
        self._backend: Backend | None = None
        self._warm_up_counters = Counters()
        self._thread = threading.Thread(target=self._load, name="smol-load", daemon=True)
        self.error: SmolError | None = None

    @property
    def is_ready(self) -> bool:
        """Whether the backend is loaded and can answer now."""
        return self._backend is not None and self._backend.health().is_ready

    @property
    def backend(self) -> Backend:
        """The loaded backend.

        Raises:
            HttpError: 503 while it is loading.
        """
        if self._backend is None:
            raise unavailable("the model is loading; retry later")
        return self._backend

    def health(self) -> Health | None:
        """The health of the backend, None while it is loading."""
        return self._backend.health() if self._backend else None

    def counters(self) -> Counters:
        """The backend's totals, without its warm-up query."""
        return self._backend.counters() - self._warm_up_counters if self._backend else Counters()

    def identity(self) -> dict[str, Any]:
        """The backend's identity and window, empty while they are unknown."""
        identity = self._backend.identity() if self._backend else {}
        return identity | {"window": self._backend.window} if self._backend and identity else {}

    def start(self) -> None:
        """Start loading."""
        self._thread.start()

    def close(self) -> None:
        """Close the backend; queries that are still running fail with `backend_error`."""
        self._thread.join(CLOSE_TIMEOUT_S)
        if self._backend:
            self._backend.close()

    def _load(self) -> None:
        started = time.perf_counter()
        try:
            backend = self._open_backend()
            if self._warms_up:
                _warm_up(backend)
                self._warm_up_counters = backend.counters()
                logger.info("model loaded in %.1f s", time.perf_counter() - started)
            self._backend = backend
        except SmolError as exc:
            self.error = exc
        except BaseException as exc:  # including a Rust panic, which is not an Exception
            logger.error("cannot load the model", exc_info=exc)
            self.error = ModelError(
                "cannot load the model because of an internal error; see the log for details"
            )


def _warm_up(backend: Backend) -> None:
    """Answer a query, so that the first client does not pay for one-time initialization."""
    try:
        result = backend.submit(WARM_UP).result(WARM_UP_TIMEOUT_S)
        if result.field == "messages":  # the model's chat template rejects them, or it has none
            text = replace(WARM_UP, messages=(), raw_prompt="Hello")
            result = backend.submit(text).result(WARM_UP_TIMEOUT_S)
        if result.is_error:
            raise BackendError(f"the model failed its warm-up query: {result.error}")
    except BaseException:
        backend.close()
        raise


@dataclass(frozen=True, slots=True)
class Service:
    """One server's settings and shared state."""

    settings: ServerSettings
    loader: BackendLoader
    admission: AdmissionLimit
    metrics: Metrics

    @property
    def model_names(self) -> tuple[str, ...]:
        """The names that clients use for the model, the preferred one first."""
        own = self.loader.identity().get("model", self.settings.engine.model)
        return self.settings.model_names or (_name_of(own),)

    def check_model(self, name: str) -> None:
        """Check that the model is served under a name.

        Raises:
            HttpError: 404 if it is not.
        """
        names = self.model_names
        if name in names or self.settings.accepts_any_model:
            return
        served = ", ".join(map(repr, names))
        raise HttpError(
            HTTPStatus.NOT_FOUND,
            f"model {shorten(name)!r} not found; this server serves {served}",
            HttpCode.MODEL_NOT_FOUND,
            "model",
        )

    def start(
        self, queries: Mapping[int, Query], *, is_interactive: bool, with_text: bool = False
    ) -> InFlightRequest:
        """Submit the queries of the current request; the caller must close the result.

        Args:
            queries: the queries by their index in the request.
            is_interactive: whether they have interactive rather than batch priority.
            with_text: whether to yield text as it is generated.

        Raises:
            HttpError: 503 if the queue is full, or the model is loading.
        """
        request_id = current_record().request_id
        in_flight = InFlightRequest(
            {index: replace(query, request_id=request_id) for index, query in queries.items()},
            self.loader.backend,
            self.admission,
            self.settings.request_timeout_s,
            request.environ["waitress.client_disconnected"],
            self._observer(),
            is_interactive=is_interactive,
        )
        try:
            current_record().add_prompts(queries.values())
            in_flight.submit(with_text=with_text)
        except BaseException:
            in_flight.close()
            raise
        return in_flight

    def count(self, result: Result) -> None:
        """Count a result in the current request's access record and in the metrics."""
        self._observer()(result)

    def _observer(self) -> Callable[[Result], None]:
        record = current_record()

        def observe(result: Result) -> None:
            record.add_result(result)
            self.metrics.count_result(result)

        return observe


@cache
def _name_of(model: str) -> str:
    """See `model_name`. It looks at the file system, which requests need not repeat."""
    return model_name(model)


def read_json() -> object:
    """Parse the body of the current request.

    Raises:
        HttpError: 415 if the body is not declared as JSON.
        QueryError: the body is not valid JSON.
    """
    if not request.is_json:  # application/json, or a type that ends in +json
        raise HttpError(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            "the body must be JSON, sent with Content-Type: application/json",
            HttpCode.UNSUPPORTED_MEDIA_TYPE,
        )
    if (encoding := request.headers.get("Content-Encoding", "identity")) != "identity":
        raise HttpError(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            f"Content-Encoding {encoding!r} is not supported; send the body uncompressed",
            HttpCode.UNSUPPORTED_MEDIA_TYPE,
        )
    body = request.get_data(cache=False).removeprefix(codecs.BOM_UTF8)
    if not body.strip():
        raise QueryError("invalid JSON: the request body is empty", ErrorCode.INVALID_JSON)
    return load_json(body)


def json_response(value: Mapping[str, Any], status: int = HTTPStatus.OK) -> Response:
    """A response with one JSON object as its body."""
    return Response(to_json(value) + "\n", status, mimetype="application/json")


def to_json(value: Mapping[str, Any]) -> str:
    """Serialize to one line of JSON, without escaping non-ASCII characters."""
    return json.dumps(value, ensure_ascii=False)
