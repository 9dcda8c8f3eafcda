"""HTTP errors: one set of codes, always JSON, in OpenAI's shape under /v1."""

import json
import logging
from collections.abc import Mapping
from enum import StrEnum
from http import HTTPStatus
from typing import Any

from flask import Flask, Response, request
from werkzeug.exceptions import HTTPException

from smolcli.errors import QueryError
from smolcli.protocol.json_text import shorten
from smolcli.protocol.openai import error_object
from smolcli.server.access_log import current_record
from smolcli.server.metrics import Metrics
from smolcli.types import ErrorCode, Result

logger = logging.getLogger(__name__)

CLIENT_DISCONNECTED = 499  # nginx's status for it; only the access log ever shows it
REJECTION = "smol.rejection"  # WSGI key of the HttpError of a request that Waitress rejected
INTERNAL_ERROR = "internal error; see the server log for details"
MIN_RETRY_AFTER_S = 2


_EMBEDDINGS = (
    "smol does not provide embeddings: its model is not trained for retrieval; "
    "use a server with an embedding model"
)
_ABSENT = {"/v1/embeddings": _EMBEDDINGS, "/embeddings": _EMBEDDINGS}


class HttpCode(StrEnum):
    """Error codes of requests that are rejected before their queries are parsed."""

    BAD_REQUEST = "bad_request"
    UNAUTHORIZED = "unauthorized"
    NOT_FOUND = "not_found"
    MODEL_NOT_FOUND = "model_not_found"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    TOO_LARGE = "too_large"
    UNSUPPORTED_MEDIA_TYPE = "unsupported_media_type"
    NOT_IMPLEMENTED = "not_implemented"
    QUOTA_EXCEEDED = "quota_exceeded"
    STORAGE_FAILED = "storage_failed"


_CODES = {
    HTTPStatus.NOT_FOUND: HttpCode.NOT_FOUND,
    HTTPStatus.METHOD_NOT_ALLOWED: HttpCode.METHOD_NOT_ALLOWED,
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: HttpCode.TOO_LARGE,
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE: HttpCode.UNSUPPORTED_MEDIA_TYPE,
    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE: HttpCode.TOO_LARGE,
    HTTPStatus.NOT_IMPLEMENTED: HttpCode.NOT_IMPLEMENTED,
}


class HttpError(Exception):
    """A request is rejected or cannot be answered.

    Args:
        status: HTTP status of the response.
        message: what is wrong, in a sentence.
        code: the error code for programs.
        field: the field that is wrong, if any.
        headers: additional response headers.
        members: further members of the body in smol's own shape.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: ErrorCode | HttpCode,
        field: str | None = None,
        headers: Mapping[str, str] | None = None,
        members: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.field = field
        self.headers = dict(headers or {})
        self.members = dict(members or {})


def code_of(status: int) -> HttpCode:
    """The error code for an HTTP status that Werkzeug or Waitress chose."""
    return _CODES.get(HTTPStatus(status), HttpCode.BAD_REQUEST)


def body_too_large(limit_bytes: int) -> str:
    """The message for a request body above the limit."""
    return f"the request body is larger than the limit of {limit_bytes:,} bytes"


def error_body(error: HttpError, is_openai: bool) -> dict[str, Any]:
    """The JSON body of an error response.

    Args:
        error: the error to report.
        is_openai: whether to use OpenAI's shape rather than smol's own.
    """
    if is_openai:
        return {"error": error_object(error.status, str(error), error.code, error.field)}
    body = {"error": str(error), "error_code": error.code}
    return body | ({} if error.field is None else {"field": error.field}) | error.members


def result_error(result: Result) -> HttpError:
    """The HTTP error that reports a failed query."""
    assert result.error is not None
    assert result.error_code is not None
    code = result.error_code
    members = result.partial
    if members and result.usage is not None:
        members["usage"] = result.usage.record()
    headers = retry_after(MIN_RETRY_AFTER_S) if code is ErrorCode.OVERLOADED else None
    return HttpError(code.status, result.error, code, result.field, headers, members)


def retry_after(seconds: int) -> dict[str, str]:
    """The header that says when to retry."""
    return {"Retry-After": str(seconds)}


def error_response(error: HttpError) -> Response:
    """The response of the current request that reports `error`."""
    current_record().error_code = error.code
    body = error_body(error, request.path.startswith("/v1/"))
    text = json.dumps(body, ensure_ascii=False) + "\n"
    return Response(text, error.status, error.headers, mimetype="application/json")


def handle_errors(app: Flask, metrics: Metrics) -> None:
    """Turn every exception, and every rejection by Waitress, into an error response; count it."""

    @app.before_request
    def reject() -> None:
        rejection: HttpError | None = request.environ.get(REJECTION)
        if rejection is not None:
            raise rejection

    @app.errorhandler(Exception)
    def respond(exc: Exception) -> Response:
        error = _translate(exc)
        if error.status != CLIENT_DISCONNECTED:  # its queries are counted as cancelled instead
            metrics.count_error(error.code)
        return error_response(error)


def _translate(exc: Exception) -> HttpError:
    if isinstance(exc, HttpError):
        return exc
    if isinstance(exc, QueryError):
        return HttpError(HTTPStatus.BAD_REQUEST, str(exc), exc.code, exc.field)
    if isinstance(exc, HTTPException) and exc.code is not None:
        return _translate_werkzeug(exc, exc.code)
    logger.error("request %s failed", current_record().request_id, exc_info=exc)
    return HttpError(HTTPStatus.INTERNAL_SERVER_ERROR, INTERNAL_ERROR, ErrorCode.INTERNAL)


def _translate_werkzeug(exc: HTTPException, status: int) -> HttpError:
    messages = {
        HTTPStatus.NOT_FOUND: _ABSENT.get(request.path, f"no route for {shorten(request.path)}"),
        HTTPStatus.METHOD_NOT_ALLOWED: f"{request.method} is not allowed for {request.path}",
    }
    allowed: list[str] = getattr(exc, "valid_methods", None) or []
    headers = {"Allow": ", ".join(sorted(allowed))} if allowed else {}
    message = messages.get(HTTPStatus(status), exc.description or exc.name)
    return HttpError(status, message, code_of(status), headers=headers)
