"""/openapi.json, made from the models that parse requests and describe answers."""

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from smolcli import __version__
from smolcli.protocol.openai import CompletionFields
from smolcli.protocol.query import QueryFields
from smolcli.server import answers

Json = dict[str, Any]

_MODELS: tuple[type[BaseModel], ...] = (
    QueryFields,
    CompletionFields,
    answers.BatchRequest,
    answers.Answer,
    answers.Failure,
    answers.IndexedAnswer,
    answers.IndexedFailure,
    answers.BatchAnswer,
    answers.Error,
    answers.OpenAIError,
    answers.OpenAICompletion,
    answers.OpenAIModel,
    answers.OpenAIModels,
    answers.Status,
)
_LICENSE = {"name": "Apache-2.0", "identifier": "Apache-2.0"}
_REFUSALS = {
    "400": "The request is not as it should be.",
    "413": "The body is too large, or the batch holds too many queries.",
    "415": "The body is not sent as application/json.",
}
_TROUBLES = {
    "500": "A fault of the server.",
    "503": "The queue is full, the model is being loaded or is gone, or the server is stopping.",
    "504": "There was no answer in time.",
}


def openapi(is_guarded: bool, model: str) -> Json:
    """The document that describes the server.

    Args:
        is_guarded: whether an API key is needed.
        model: the name of the one that there is.
    """
    modes = [(kind, "validation") for kind in _MODELS]
    _, schemas = models_json_schema(modes, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    components: Json = {"schemas": schemas["$defs"]}
    ways = [{"required": ["user_prompt"]}, {"required": ["messages"]}]  # to ask
    components["schemas"]["QueryFields"]["anyOf"] = ways
    components["schemas"]["CompletionFields"]["properties"]["model"]["enum"] = [model]
    document: Json = {
        "openapi": "3.1.0",
        "info": {"title": "smol", "version": __version__, "license": _LICENSE},
        "paths": _paths(is_guarded, model),
        "components": components,
    }
    if is_guarded:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document


def _paths(is_guarded: bool, model: str) -> Json:
    error = _json(answers.Error)
    openai = _json(answers.OpenAIError)
    key: Json = {"401": "The API key is missing or wrong."} if is_guarded else {}
    asked = _answers(_REFUSALS | key | _TROUBLES, error)
    completed = _answers(_REFUSALS | key | _TROUBLES | {"404": "Another model."}, openai)
    return {
        "/chat": {"post": _post("Answer one query", QueryFields, _json(answers.Answer), asked)},
        "/chat/batched": {"post": _batch("Answer many queries", asked)},
        "/generate_batch": {"post": _batch("The same as /chat/batched", asked)},
        "/v1/chat/completions": {
            "post": _post(
                "Answer as OpenAI's API does",
                CompletionFields,
                _json(answers.OpenAICompletion) | {"text/event-stream": {}},
                completed,
            )
        },
        "/v1/models": _get("The model", answers.OpenAIModels, _answers(key, openai)),
        "/v1/models/{id}": _get(
            "The model by its name",
            answers.OpenAIModel,
            _answers(key | {"404": "Another model."}, openai),
        )
        | {"parameters": [_path_parameter("id", model)]},
        "/health": _probe("Whether it works; 503: only a restart helps"),
        "/ready": _probe("Whether it takes work now"),
        "/metrics": {"get": _described("Figures for Prometheus", _text("text/plain"), key, error)},
        "/openapi.json": {
            "get": _described(
                "This document", {"application/json": {"schema": {"type": "object"}}}, key, error
            )
        },
    }


def _post(summary: str, body: type[BaseModel], answer: Json, errors: Json) -> Json:
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": _json(body)},
        "responses": {"200": {"description": "The answer.", "content": answer}} | errors,
    }


def _batch(summary: str, errors: Json) -> Json:
    """A line of a stream has no place in OpenAPI 3.1, so it is told in words."""
    text = "On Accept: application/x-ndjson a line each, IndexedAnswer or IndexedFailure."
    content = _json(answers.BatchAnswer) | _text("application/x-ndjson")
    return _post(summary, answers.BatchRequest, content, errors) | {"description": text}


def _get(summary: str, answer: type[BaseModel], errors: Json) -> Json:
    responses = {"200": {"description": "It.", "content": _json(answer)}} | errors
    return {"get": {"summary": summary, "responses": responses}}


def _described(summary: str, content: Json, key: Json, error: Json) -> Json:
    responses = {"200": {"description": "It.", "content": content}} | _answers(key, error)
    return {"summary": summary, "responses": responses}


def _probe(summary: str) -> Json:
    content = _json(answers.Status)
    responses = {
        status: {"description": text, "content": content}
        for status, text in {"200": "Yes.", "503": "No."}.items()
    }
    return {"get": {"summary": summary, "responses": responses, "security": []}}


def _answers(texts: dict[str, str], content: Json) -> Json:
    return {status: {"description": text, "content": content} for status, text in texts.items()}


def _json(model: type[BaseModel]) -> Json:
    return {"application/json": {"schema": _ref(model)}}


def _text(kind: str) -> Json:
    return {kind: {"schema": {"type": "string"}}}


def _ref(model: type[BaseModel]) -> Json:
    return {"$ref": f"#/components/schemas/{model.__name__}"}


def _path_parameter(name: str, value: str) -> Json:
    schema = {"type": "string", "enum": [value]}
    return {"name": name, "in": "path", "required": True, "schema": schema}
