"""/health, /ready, /metrics and /openapi.json: for those who run the server."""

from http import HTTPStatus

from flask import Blueprint, Response
from prometheus_client import CONTENT_TYPE_LATEST

from smolcli.backends.base import Health
from smolcli.server.admission import RETRY_AFTER_S
from smolcli.server.schemas import openapi
from smolcli.server.service import Service, json_response


def ops_views(service: Service) -> Blueprint:
    """The routes of this module."""
    views = Blueprint("ops", __name__)

    @views.get("/health")
    def health() -> Response:
        problem = _problem(service.holder.health())
        status = HTTPStatus.SERVICE_UNAVAILABLE if problem else HTTPStatus.OK
        return json_response({"status": problem or "ok"}, status)

    @views.get("/ready")
    def ready() -> Response:
        obstacle = _obstacle(service)
        if obstacle is None:
            return json_response({"status": "ready"})
        response = json_response({"status": obstacle}, HTTPStatus.SERVICE_UNAVAILABLE)
        response.headers["Retry-After"] = str(RETRY_AFTER_S)
        return response

    @views.get("/metrics")
    def metrics() -> Response:
        return Response(service.metrics.text(), content_type=CONTENT_TYPE_LATEST)

    @views.get("/openapi.json")
    def schema() -> Response:
        return json_response(openapi(bool(service.settings.api_keys), service.model_name))

    return views


def _problem(health: Health | None) -> str | None:
    """What only a restart can help; None where there is no backend yet."""
    if health is None:
        return None
    if not health.is_alive:
        return "dead"
    return "stuck" if health.is_stuck else None


def _obstacle(service: Service) -> str | None:
    """Why no work should be sent here now."""
    if service.gate.is_closed:
        return "draining"
    health = service.holder.health()
    if health is None:
        return "loading"
    if problem := _problem(health):
        return problem
    if not health.is_ready:
        return "no_upstream"
    return "full" if service.gate.is_full else None
