"""What all routes share: one server's settings and state, and JSON bodies."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from http import HTTPStatus
from typing import Any

from flask import Response, request

from smolcli.errors import QueryError
from smolcli.protocol.json_text import load_json, shorten
from smolcli.protocol.openai import model_name
from smolcli.server.access_log import current_record
from smolcli.server.admission import AdmissionLimit
from smolcli.server.backend_loader import BackendLoader
from smolcli.server.errors import HttpCode, HttpError
from smolcli.server.in_flight import InFlightRequest
from smolcli.server.metrics import Metrics
from smolcli.settings import ServerSettings
from smolcli.types import ErrorCode, Query, Result

SEND_HEADERS = "smol.send_headers"  # WSGI key of a function that sends the headers at once
STREAM_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # do not buffer in nginx


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


_name_of = cache(model_name)  # it looks at the file system, which requests need not repeat


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
    encoding = request.headers.get("Content-Encoding", "identity")
    if encoding.strip().lower() not in ("", "identity"):
        raise HttpError(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            f"Content-Encoding {encoding!r} is not supported; send the body uncompressed",
            HttpCode.UNSUPPORTED_MEDIA_TYPE,
        )
    body = request.get_data(cache=False)
    if not body.strip():
        raise QueryError("invalid JSON: the request body is empty", ErrorCode.INVALID_JSON)
    return load_json(body)


def json_response(value: Mapping[str, Any], status: int = HTTPStatus.OK) -> Response:
    """A response with one JSON object as its body."""
    return Response(to_json(value) + "\n", status, mimetype="application/json")


def to_json(value: Mapping[str, Any]) -> str:
    """Serialize to one line of JSON, without escaping non-ASCII characters."""
    return json.dumps(value, ensure_ascii=False)
