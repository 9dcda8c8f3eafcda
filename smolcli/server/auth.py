"""Who may ask: API keys, and web pages of other origins."""

import hashlib
import hmac
from http import HTTPStatus

from flask import Flask, Response, request

from smolcli.server.errors import HttpCode, HttpError

# Probes carry no key, and a browser sends none for the page, which holds nothing secret.
_OPEN_PATHS = frozenset({"/health", "/ready", "/"})
_OPEN_FOLDER = "/page/"
_PREFLIGHT_AGE_S = 600


def require_key(app: Flask, keys: tuple[str, ...]) -> None:
    """Refuse requests without one of the keys; where there are none, let all pass."""
    digests = [_digest(key.encode()) for key in keys]

    @app.before_request
    def check() -> None:
        if not digests or request.path in _OPEN_PATHS or request.path.startswith(_OPEN_FOLDER):
            return
        scheme, _, sent = request.headers.get("Authorization", "").partition(" ")
        digest = _digest(sent.strip().encode("latin-1"))  # as WSGI decoded it
        matches = [hmac.compare_digest(digest, known) for known in digests]
        if scheme.lower() != "bearer" or not any(matches):
            raise HttpError(
                HTTPStatus.UNAUTHORIZED,
                "an API key is required: Authorization: Bearer KEY",
                HttpCode.UNAUTHORIZED,
                headers={"WWW-Authenticate": "Bearer"},
            )


def _digest(key: bytes) -> bytes:
    """Of one length for all keys, so that comparing tells nothing of theirs."""
    return hashlib.sha256(key).digest()


def allow_origins(app: Flask, origins: tuple[str, ...]) -> None:
    """Let pages of these origins, "*" for any, use the server from a browser."""
    if not origins:
        return

    @app.before_request
    def preflight() -> Response | None:
        is_preflight = "Access-Control-Request-Method" in request.headers
        if request.method != "OPTIONS" or not is_preflight or not _allowed(origins):
            return None
        response = Response(status=HTTPStatus.NO_CONTENT)
        response.headers["Access-Control-Allow-Methods"] = "GET, POST"
        wanted = request.headers.get("Access-Control-Request-Headers", "")
        response.headers["Access-Control-Allow-Headers"] = wanted
        response.headers["Access-Control-Max-Age"] = str(_PREFLIGHT_AGE_S)
        return response

    @app.after_request
    def allow(response: Response) -> Response:
        response.vary.add("Origin")
        if origin := _allowed(origins):
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Access-Control-Expose-Headers"] = "X-Request-Id, Retry-After"
        return response


def _allowed(origins: tuple[str, ...]) -> str | None:
    origin = request.headers.get("Origin")
    if "*" in origins:
        return "*"
    return origin if origin in origins else None
