"""The Flask application: the routes and what applies to all of them."""

import re
from collections.abc import Iterable
from functools import cached_property
from typing import Any

from flask import Flask, Response
from flask.typing import ResponseReturnValue

from smolcli.server.access_log import log_requests
from smolcli.server.auth import allow_origins, require_key
from smolcli.server.batches_api import BatchApi, batch_routes
from smolcli.server.chat_api import chat_routes
from smolcli.server.errors import handle_errors
from smolcli.server.openai_api import openai_routes
from smolcli.server.ops import ops_routes
from smolcli.server.page import page_routes
from smolcli.server.responses_api import responses_routes
from smolcli.server.service import Service
from smolcli.server.text_completions_api import text_completions_routes

OPENAI_PREFIX = "/v1"


class Application(Flask):
    """A Flask application that also handles exceptions that do not derive from `Exception`.

    A path may end with a slash or contain two in a row, and OpenAI's routes may lack their prefix:
    clients differ in what they append to a base URL. Everything below sees the canonical path.
    """

    def wsgi_app(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        environ["PATH_INFO"] = self._canonical(environ["PATH_INFO"])
        return super().wsgi_app(environ, start_response)

    def _canonical(self, path: str) -> str:
        path = re.sub("/{2,}", "/", path).rstrip("/") or "/"
        paths, starts = self._unprefixed
        return OPENAI_PREFIX + path if path in paths or path.startswith(starts) else path

    @cached_property
    def _unprefixed(self) -> tuple[frozenset[str], tuple[str, ...]]:
        """OpenAI's paths without their prefix, and how those with parameters start."""
        rules = [rule.rule for rule in self.url_map.iter_rules()]
        openai = [r.removeprefix(OPENAI_PREFIX) for r in rules if r.startswith(f"{OPENAI_PREFIX}/")]
        starts = tuple(rule.partition("<")[0] for rule in openai if "<" in rule)
        return frozenset(rule for rule in openai if "<" not in rule), starts

    def dispatch_request(self) -> ResponseReturnValue:
        try:
            return super().dispatch_request()
        except Exception:
            raise
        except BaseException as exc:  # such as a Rust panic; Flask would send no response
            raise RuntimeError(f"{type(exc).__name__} while handling a request") from exc


def create_app(service: Service, batches: BatchApi) -> Flask:
    """Create the application that serves `service`.

    Args:
        service: what all routes share.
        batches: what the routes for files and batches share.
    """
    app = Application(__name__, static_folder=None)
    app.config["PROVIDE_AUTOMATIC_OPTIONS"] = False
    app.url_map.merge_slashes = False  # Werkzeug would redirect with an HTML page
    log_requests(app, service.settings.log_prompts)
    handle_errors(app, service.metrics)
    allow_origins(app, service.settings.cors_origins)
    require_key(app, service.settings.api_keys)
    app.register_blueprint(chat_routes(service))
    app.register_blueprint(openai_routes(service))
    app.register_blueprint(text_completions_routes(service))
    app.register_blueprint(responses_routes(service))
    app.register_blueprint(batch_routes(batches))
    app.register_blueprint(ops_routes(service))
    app.register_blueprint(page_routes())
    app.after_request(_forbid_sniffing)
    return app


def _forbid_sniffing(response: Response) -> Response:
    response.headers["X-Content-Type-Options"] = "nosniff"
    return response
