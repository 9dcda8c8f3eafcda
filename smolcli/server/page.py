"""The page at /: a few static files, and headers that keep it to itself."""

from http import HTTPStatus
from pathlib import Path

from flask import Blueprint, Response, send_from_directory

from smolcli.server.errors import HttpCode, HttpError

FOLDER = Path(__file__).parent / "static"
TYPES = {  # not the system's: Windows' registry can make scripts text/plain
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-cache",
}


def page_views() -> Blueprint:
    """The routes of this module."""
    views = Blueprint("page", __name__)

    @views.get("/")
    def index() -> Response:
        return _file("index.html")

    @views.get("/page/<name>")
    def file(name: str) -> Response:
        return _file(name)

    return views


def _file(name: str) -> Response:
    kind = TYPES.get(Path(name).suffix)
    if kind is None:
        raise HttpError(HTTPStatus.NOT_FOUND, "there is no such file", HttpCode.NOT_FOUND)
    response = send_from_directory(FOLDER, name, mimetype=kind)
    response.headers.update(HEADERS)
    return response
