"""The OpenAPI document, built from the models of requests and responses."""

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from smolcli import __version__
from smolcli.protocol.chat_completions import CompletionFields
from smolcli.protocol.query import QueryFields
from smolcli.protocol.responses import ResponsesFields
from smolcli.protocol.text_completions import TextCompletionFields
from smolcli.server.batch_store import BATCH_ID, FILE_ID
from smolcli.server.batches_api import MAX_BATCH_PAGE, MAX_FILE_PAGE, BatchFields
from smolcli.server.schemas import (
    Answer,
    BatchAnswer,
    BatchRequest,
    Error,
    Failure,
    FileForm,
    IndexedAnswer,
    IndexedFailure,
    OpenAIBatch,
    OpenAIBatches,
    OpenAICompletion,
    OpenAIDeletedFile,
    OpenAIError,
    OpenAIFile,
    OpenAIFiles,
    OpenAIModel,
    OpenAIModels,
    OpenAIResponse,
    OpenAITextCompletion,
    Status,
    Version,
)

Json = dict[str, Any]

_MODELS: tuple[type[BaseModel], ...] = (
    QueryFields,
    CompletionFields,
    BatchRequest,
    Answer,
    Failure,
    IndexedAnswer,
    IndexedFailure,
    BatchAnswer,
    Error,
    OpenAIError,
    OpenAICompletion,
    TextCompletionFields,
    OpenAITextCompletion,
    ResponsesFields,
    OpenAIResponse,
    OpenAIModel,
    OpenAIModels,
    FileForm,
    OpenAIFile,
    OpenAIFiles,
    OpenAIDeletedFile,
    BatchFields,
    OpenAIBatch,
    OpenAIBatches,
    Status,
    Version,
)
_LICENSE = {"name": "Apache-2.0", "identifier": "Apache-2.0"}
_CLIENT_ERRORS = {
    "400": "The request is invalid.",
    "413": "The body is too large, or the batch has too many queries.",
    "415": "The Content-Type is not application/json.",
}
_SERVER_ERRORS = {
    "500": "Internal error.",
    "503": "The queue is full, the model is loading or has failed, or the server is shutting down.",
    "504": "The request timed out.",
}
_UNAUTHORIZED = {"401": "The API key is missing or wrong."}
_MODEL_NOT_FOUND = {"404": "The server serves another model."}
_STORAGE_ERRORS = {"503": "The server is shutting down, or another one uses its batch directory."}
_STORAGE_FAILED = {"507": "The server's disk is full or not writable."}
_QUOTA_EXCEEDED = "The file is too large, or the quota of the server is exceeded."


def openapi_document(requires_key: bool, models: Sequence[str]) -> Json:
    """The content of /openapi.json.

    Args:
        requires_key: whether clients must send an API key.
        models: the names of the model that the server serves; empty if it accepts any name.
    """
    modes = [(schema, "validation") for schema in _MODELS]
    _, schemas = models_json_schema(modes, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    components: Json = {"schemas": schemas["$defs"]}
    if models:
        for name in ("CompletionFields", "TextCompletionFields", "ResponsesFields"):
            components["schemas"][name]["properties"]["model"]["enum"] = list(models)
    document: Json = {
        "openapi": "3.1.0",
        "info": {"title": "smol", "version": __version__, "license": _LICENSE},
        "paths": _paths(_UNAUTHORIZED if requires_key else {}, models),
        "components": components,
    }
    if requires_key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document


def _paths(unauthorized: dict[str, str], models: Sequence[str]) -> Json:
    errors = _CLIENT_ERRORS | unauthorized | _SERVER_ERRORS
    return {
        "/chat": {"post": _post("Answer one query", QueryFields, _json(Answer), errors, Error)},
        "/chat/batched": {"post": _post_batch("Answer a batch of queries", errors)},
        "/generate_batch": {"post": _post_batch("Alias of /chat/batched", errors)},
        **_generation_paths(errors | _MODEL_NOT_FOUND),
        **_model_paths(unauthorized, models),
        **_file_paths(unauthorized | _STORAGE_ERRORS),
        **_batch_paths(unauthorized | _STORAGE_ERRORS),
        **_service_paths(unauthorized),
    }


def _generation_paths(errors: dict[str, str]) -> Json:
    kinds: list[tuple[str, str, type[BaseModel], type[BaseModel]]] = [
        ("chat/completions", "Create a chat completion", CompletionFields, OpenAICompletion),
        ("completions", "Create text completions", TextCompletionFields, OpenAITextCompletion),
        ("responses", "Create a response", ResponsesFields, OpenAIResponse),
    ]
    return {
        f"/v1/{path}": {
            "post": _post(summary, fields, _json(answer) | {"text/event-stream": {}}, errors)
        }
        for path, summary, fields, answer in kinds
    }


def _model_paths(unauthorized: dict[str, str], models: Sequence[str]) -> Json:
    one = unauthorized | _MODEL_NOT_FOUND
    return {
        "/v1/models": {"get": _operation("List the models", _json(OpenAIModels), unauthorized)},
        "/v1/models/{id}": {
            "get": _operation("Get the model by name", _json(OpenAIModel), one),
            "parameters": [_path_parameter("id", models)],
        },
    }


def _file_paths(errors: dict[str, str]) -> Json:
    one = errors | {"404": "The file does not exist."}
    created = {
        **errors,
        **_STORAGE_FAILED,
        "400": "The form is invalid.",
        "413": _QUOTA_EXCEEDED,
        "415": "The body is not multipart/form-data.",
    }
    deleted = one | {"400": "An unfinished batch uses the file."} | _STORAGE_FAILED
    content = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
    file_id = [_path_parameter("file_id", pattern=FILE_ID)]
    post = _post("Upload a file of requests", FileForm, _json(OpenAIFile), created)
    post["requestBody"]["content"] = _content("multipart/form-data", FileForm)
    return {
        "/v1/files": {
            "post": post,
            "get": _list("List the files", OpenAIFiles, errors, MAX_FILE_PAGE),
        },
        "/v1/files/{file_id}": {
            "get": _operation("Get a file's name, size and purpose", _json(OpenAIFile), one),
            "delete": _operation("Delete a file", _json(OpenAIDeletedFile), deleted),
            "parameters": file_id,
        },
        "/v1/files/{file_id}/content": {
            "get": _operation("Get a file's content", content, one | _STORAGE_FAILED),
            "parameters": file_id,
        },
    }


def _batch_paths(errors: dict[str, str]) -> Json:
    one = errors | {"404": "The batch does not exist."}
    created = {
        **_CLIENT_ERRORS,
        **errors,
        **_STORAGE_FAILED,
        "404": "The file does not exist.",
        "429": "There are too many unfinished batches.",
    }
    canceled = one | {"400": "The batch has ended."}
    batch_id = [_path_parameter("batch_id", pattern=BATCH_ID)]
    return {
        "/v1/batches": {
            "post": _post("Create a batch", BatchFields, _json(OpenAIBatch), created),
            "get": _list("List the batches", OpenAIBatches, errors, MAX_BATCH_PAGE),
        },
        "/v1/batches/{batch_id}": {
            "get": _operation("Get a batch", _json(OpenAIBatch), one),
            "parameters": batch_id,
        },
        "/v1/batches/{batch_id}/cancel": {
            "post": _operation("Cancel a batch", _json(OpenAIBatch), canceled),
            "parameters": batch_id,
        },
    }


def _service_paths(unauthorized: dict[str, str]) -> Json:
    contents = {
        "/metrics": ("Prometheus metrics", _text("text/plain")),
        "/version": ("smol's version", _json(Version)),
        "/openapi.json": ("This document", {"application/json": {"schema": {"type": "object"}}}),
    }
    return {
        "/health": {"get": _probe("Liveness: 503 if the process must be restarted")},
        "/ready": {"get": _probe("Readiness: 503 if the server should not receive traffic")},
    } | {
        path: {"get": _operation(summary, content, unauthorized, Error)}
        for path, (summary, content) in contents.items()
    }


def _operation(
    summary: str, content: Json, errors: dict[str, str], error: type[BaseModel] = OpenAIError
) -> Json:
    """An operation without a body.

    Args:
        summary: what it does.
        content: the content of its response, by media type.
        errors: what may go wrong, by status.
        error: the model of an error's body.
    """
    success = {"200": {"description": "Success.", "content": content}}
    return {"summary": summary, "responses": success | _responses(errors, error)}


def _list(summary: str, page: type[BaseModel], errors: dict[str, str], limit: int) -> Json:
    operation = _operation(summary, _json(page), errors | {"400": "A parameter is invalid."})
    size = {"type": "integer", "minimum": 1, "maximum": limit}
    return operation | {"parameters": [{"name": "limit", "in": "query", "schema": size}]}


def _post(
    summary: str,
    body: type[BaseModel],
    content: Json,
    errors: dict[str, str],
    error: type[BaseModel] = OpenAIError,
) -> Json:
    """An operation with a JSON body; see `_operation`."""
    request = {"requestBody": {"required": True, "content": _json(body)}}
    return _operation(summary, content, errors, error) | request


def _post_batch(summary: str, errors: dict[str, str]) -> Json:
    """A batch operation; OpenAPI 3.1 cannot describe the lines of its stream, so text does."""
    description = (
        "With `Accept: application/x-ndjson`, each result is sent as it finishes: "
        "one IndexedAnswer or IndexedFailure per line."
    )
    content = _json(BatchAnswer) | _text("application/x-ndjson")
    return _post(summary, BatchRequest, content, errors, Error) | {"description": description}


def _probe(summary: str) -> Json:
    responses = _responses({"200": "Yes.", "503": "No."}, Status)
    return {"summary": summary, "responses": responses, "security": []}


def _responses(descriptions: dict[str, str], model: type[BaseModel]) -> Json:
    return {
        status: {"description": description, "content": _json(model)}
        for status, description in descriptions.items()
    }


def _json(model: type[BaseModel]) -> Json:
    return _content("application/json", model)


def _content(media_type: str, model: type[BaseModel]) -> Json:
    return {media_type: {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}}


def _text(media_type: str) -> Json:
    return {media_type: {"schema": {"type": "string"}}}


def _path_parameter(name: str, values: Sequence[str] = (), pattern: str | None = None) -> Json:
    schema: Json = {"type": "string"}
    if values:
        schema["enum"] = list(values)
    if pattern is not None:
        schema["pattern"] = pattern
    return {"name": name, "in": "path", "required": True, "schema": schema}
