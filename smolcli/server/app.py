"""The Flask application of one server."""

from flask import Flask, Response

from smolcli.server.access_log import trace_requests
from smolcli.server.auth import allow_origins, require_key
from smolcli.server.chat_api import chat_views
from smolcli.server.errors import handle_errors
from smolcli.server.openai_api import openai_views
from smolcli.server.ops import ops_views
from smolcli.server.page import page_views
from smolcli.server.service import Service


def create_app(service: Service) -> Flask:
    """Put the routes together with what holds for all of them."""
    app = Flask(__name__, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = service.settings.max_body_bytes
    app.config["PROVIDE_AUTOMATIC_OPTIONS"] = False
    app.url_map.merge_slashes = False  # its redirects are pages of HTML
    trace_requests(app, service.settings.log_prompts)
    handle_errors(app, service.metrics)
    allow_origins(app, service.settings.cors_origins)
    require_key(app, service.settings.api_keys)
    app.register_blueprint(chat_views(service))
    app.register_blueprint(openai_views(service))
    app.register_blueprint(ops_views(service))
    app.register_blueprint(page_views())
    app.after_request(_no_sniffing)
    return app


def _no_sniffing(response: Response) -> Response:
    response.headers["X-Content-Type-Options"] = "nosniff"
    return response
