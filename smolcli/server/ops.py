"""Routes for operators: /health, /ready, /metrics, /version and /openapi.json."""

from http import HTTPStatus

from flask import Blueprint, Response
from prometheus_client import CONTENT_TYPE_LATEST

from smolcli import __version__
from smolcli.backends.base import Health
from smolcli.server.openapi import openapi_document
from smolcli.server.service import Service, json_response


def ops_routes(service: Service) -> Blueprint:
    """The routes for operators."""
    routes = Blueprint("ops", __name__)

    @routes.get("/health")
    def health() -> Response:
        failure = _liveness_failure(service.loader.health())
        status = HTTPStatus.SERVICE_UNAVAILABLE if failure else HTTPStatus.OK
        return json_response({"status": failure or "ok"}, status)

    @routes.get("/ready")
    def ready() -> Response:
        reason = _unready_reason(service)
        if reason is None:
            return json_response({"status": "ready"})
        response = json_response({"status": reason}, HTTPStatus.SERVICE_UNAVAILABLE)
        response.headers["Retry-After"] = str(service.admission.retry_after_s)
        return response

    @routes.get("/metrics")
    def metrics() -> Response:
        return Response(service.metrics.text(), content_type=CONTENT_TYPE_LATEST)

    @routes.get("/version")
    def version() -> Response:
        return json_response({"version": __version__})

    @routes.get("/openapi.json")
    def openapi() -> Response:
        settings = service.settings
        names = () if settings.accepts_any_model else service.model_names
        return json_response(openapi_document(bool(settings.api_keys), names))

    return routes


def _liveness_failure(health: Health | None) -> str | None:
    """Why the process must be restarted, None if it need not be or is still loading."""
    if health is None:
        return None
    if not health.is_alive:
        return "dead"
    return "stuck" if health.is_stuck else None


def _unready_reason(service: Service) -> str | None:
    """Why the server should not receive traffic now, None if it should."""
    if service.admission.is_closed:
        return "draining"
    health = service.loader.health()
    if health is None:
        return "loading"
    if failure := _liveness_failure(health):
        return failure
    if not health.is_ready:
        return "no_upstream"
    return "full" if service.admission.is_full else None
