"""The chat page: static files, served with headers that isolate them."""

from http import HTTPStatus
from pathlib import Path

from flask import Blueprint, Response, send_from_directory

from smolcli.server.errors import HttpCode, HttpError

FOLDER = Path(__file__).parent / "static"
# Not taken from the system: the Windows registry may declare scripts as text/plain.
CONTENT_TYPES = {
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


def page_routes() -> Blueprint:
    """The routes of the chat page: / and the files under /page/."""
    routes = Blueprint("page", __name__)

    @routes.get("/")
    def index() -> Response:
        return _static_file("index.html")

    @routes.get("/page/<name>")
    def static_file(name: str) -> Response:
        return _static_file(name)

    return routes


def _static_file(name: str) -> Response:
    content_type = CONTENT_TYPES.get(Path(name).suffix)
    if content_type is None:
        raise HttpError(HTTPStatus.NOT_FOUND, f"no file named {name!r}", HttpCode.NOT_FOUND)
    response = send_from_directory(FOLDER, name, mimetype=content_type)
    response.headers.update(HEADERS)
    return response
