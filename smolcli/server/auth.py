"""Access control: API keys and cross-origin requests."""

import hashlib
import hmac
from http import HTTPStatus

from flask import Flask, Response, request

from smolcli.server.errors import HttpCode, HttpError

# Probes, and browsers that open the page, send no key; these paths reveal nothing secret.
_OPEN_PATHS = frozenset({"/health", "/ready", "/"})
_OPEN_FOLDER = "/page/"
_PREFLIGHT_AGE_S = 600


class ApiKeys:
    """The API keys that the server accepts; without any, it accepts every request."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    def accepts(self, authorization: str) -> bool:
        """Whether the value of an Authorization header, empty if there is none, is valid."""
        scheme, _, sent = authorization.partition(" ")
        digest = _digest(sent.strip().encode("latin-1"))  # WSGI decodes headers as Latin-1
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return not self._digests or (scheme.lower() == "bearer" and any(matches))


def missing_key() -> HttpError:
    """The error for a request without a valid API key."""
    return HttpError(
        HTTPStatus.UNAUTHORIZED,
        "missing or wrong API key; send the header Authorization: Bearer KEY",
        HttpCode.UNAUTHORIZED,
        headers={"WWW-Authenticate": "Bearer"},
    )


def require_key(app: Flask, keys: tuple[str, ...]) -> None:
    """Reject requests without a valid API key; accept all requests if there are no keys."""
    accepted = ApiKeys(keys)

    @app.before_request
    def check() -> None:
        if request.path in _OPEN_PATHS or request.path.startswith(_OPEN_FOLDER):
            return
        if not accepted.accepts(request.headers.get("Authorization", "")):
            raise missing_key()


def _digest(key: bytes) -> bytes:
    """Hash a key to a fixed length, so that comparing keys does not leak their length."""
    return hashlib.sha256(key).digest()


def allow_origins(app: Flask, origins: tuple[str, ...]) -> None:
    """Allow cross-origin requests (CORS) from these origins; "*" allows any origin."""
    if not origins:
        return

    @app.before_request
    def preflight() -> Response | None:
        is_preflight = "Access-Control-Request-Method" in request.headers
        if request.method != "OPTIONS" or not is_preflight or not _allowed_origin(origins):
            return None
        response = Response(status=HTTPStatus.NO_CONTENT)
        response.headers["Access-Control-Allow-Methods"] = "GET, POST, DELETE"
        requested = request.headers.get("Access-Control-Request-Headers", "")
        response.headers["Access-Control-Allow-Headers"] = requested
        response.headers["Access-Control-Max-Age"] = str(_PREFLIGHT_AGE_S)
        return response

    @app.after_request
    def allow(response: Response) -> Response:
        response.vary.add("Origin")
        if origin := _allowed_origin(origins):
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Access-Control-Expose-Headers"] = "X-Request-Id, Retry-After"
        return response


def _allowed_origin(origins: tuple[str, ...]) -> str | None:
    """The value of Access-Control-Allow-Origin for the current request, if it is allowed."""
    origin = request.headers.get("Origin")
    if "*" in origins:
        return "*"
    return origin if origin in origins else None
