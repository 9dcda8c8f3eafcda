"""What the views share."""

import codecs
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from flask import Response, request

from smolcli.protocol.openai import model_name
from smolcli.protocol.query import load_json
from smolcli.server.access_log import current_trace
from smolcli.server.admission import Gate
from smolcli.server.errors import HttpCode, HttpError
from smolcli.server.holder import Holder
from smolcli.server.in_flight import Flight
from smolcli.server.metrics import Metrics
from smolcli.settings import ServerSettings
from smolcli.types import Query, Result

STREAM_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # nginx buffers otherwise


@dataclass(frozen=True, slots=True)
class Service:
    """One server's settings and state, each part with its one owner."""

    settings: ServerSettings
    holder: Holder
    gate: Gate
    metrics: Metrics

    @property
    def model_name(self) -> str:
        """What clients call the model."""
        return model_name(self.holder.identity().get("model", self.settings.engine.model))

    def start(
        self, queries: Mapping[int, Query], *, is_urgent: bool, with_text: bool = False
    ) -> Flight:
        """Begin to answer the present request's queries; the caller closes the flight.

        Raises:
            HttpError: 503 where that is not possible now.
        """
        flight = Flight(
            queries,
            self.holder.backend,
            self.gate,
            self.settings.request_timeout_s,
            request.environ["waitress.client_disconnected"],
            self._observer(),
        )
        try:
            current_trace().ask(queries.values())
            flight.submit(is_urgent=is_urgent, with_text=with_text)
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
