"""The Flask application: the routes and what applies to all of them."""

from flask import Flask, Response
from flask.typing import ResponseReturnValue

from smolcli.server.access_log import log_requests
from smolcli.server.auth import allow_origins, require_key
from smolcli.server.chat_api import chat_routes
from smolcli.server.errors import handle_errors
from smolcli.server.openai_api import openai_routes
from smolcli.server.ops import ops_routes
from smolcli.server.page import page_routes
from smolcli.server.service import Service


class Application(Flask):
    """A Flask application that also handles exceptions that do not derive from `Exception`."""

    def dispatch_request(self) -> ResponseReturnValue:
        try:
            return super().dispatch_request()
        except Exception:
            raise
        except BaseException as exc:  # such as a Rust panic; Flask would send no response
            raise RuntimeError(f"{type(exc).__name__} while handling a request") from exc


def create_app(service: Service) -> Flask:
    """Create the application that serves `service`."""
    app = Application(__name__, static_folder=None)
    app.config["PROVIDE_AUTOMATIC_OPTIONS"] = False
    app.url_map.merge_slashes = False  # Werkzeug would redirect with an HTML page
    log_requests(app, service.settings.log_prompts)
    handle_errors(app, service.metrics)
    allow_origins(app, service.settings.cors_origins)
    require_key(app, service.settings.api_keys)
    app.register_blueprint(chat_routes(service))
    app.register_blueprint(openai_routes(service))
    app.register_blueprint(ops_routes(service))
    app.register_blueprint(page_routes())
    app.after_request(_forbid_sniffing)
    return app


def _forbid_sniffing(response: Response) -> Response:
    response.headers["X-Content-Type-Options"] = "nosniff"
    return response
