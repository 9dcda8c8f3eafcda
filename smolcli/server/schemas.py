"""Response models, and the OpenAPI document built from them and the request models."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import models_json_schema

from smolcli import __version__
from smolcli.protocol.chat_completions import CompletionFields
from smolcli.protocol.fields import MAX_ANSWERS
from smolcli.protocol.query import QueryFields
from smolcli.protocol.responses import ResponsesFields
from smolcli.protocol.text_completions import TextCompletionFields
from smolcli.server.batch_store import BATCH_ID, FILE_ID, Purpose
from smolcli.server.batch_store import Status as BatchStatus
from smolcli.server.batches_api import MAX_BATCH_PAGE, MAX_FILE_PAGE, BatchFields
from smolcli.server.errors import HttpCode
from smolcli.types import ErrorCode, FinishReason

Json = dict[str, Any]


class Exact(BaseModel):
    """An object without additional properties."""

    model_config = ConfigDict(extra="forbid")


class Usage(Exact):
    """Token counts; `completion_tokens` includes the end token."""

    prompt_tokens: int
    completion_tokens: int


class TopLogprob(Exact):
    """A token and its log probability."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """A generated token, with the most likely alternatives."""

    top_logprobs: list[TopLogprob]


class TopPromptLogprob(TopLogprob):
    """A token, its id and its log probability."""

    token_id: int


class PromptLogprob(Exact):
    """A token of the prompt; `logprob` and `rank` are null for the first one."""

    token: str
    token_id: int
    logprob: float | None
    rank: int | None
    bytes: list[int] | None
    top_logprobs: list[TopPromptLogprob]


class CalledFunction(Exact):
    """A function and the arguments to call it with, as JSON text."""

    name: str
    arguments: str


class ToolCall(Exact):
    """A call of a function."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class Alternative(Exact):
    """One of several answers to a query."""

    response: str | None = Field(description="Null if the answer consists of calls.")
    tool_calls: list[ToolCall] = Field(
        default_factory=list, description="Present if the answer calls functions."
    )
    finish_reason: FinishReason | None = Field(
        description="Null if an upstream server does not report it."
    )
    logprobs: list[TokenLogprob] = Field(
        default_factory=list, description="Present if the query requests log probabilities."
    )


class Answer(Alternative):
    """The answer to a query."""

    chat_id: str
    prompt_logprobs: list[PromptLogprob] = Field(
        default_factory=list, description="Present if the query has `prompt_logprobs`."
    )
    alternatives: list[Alternative] = Field(
        default_factory=list, description="The remaining answers if `n` is greater than 1."
    )
    usage: Usage | None = Field(None, description="Absent if the upstream does not report it.")
    metadata: dict[str, Any] = Field(
        default_factory=dict, description="The query's `metadata`, if any."
    )


class Failure(Exact):
    """The error that takes the place of an answer."""

    chat_id: str | None = Field(description="Null if the query's `chat_id` cannot be read.")
    error: str = Field(description="A sentence for people.")
    error_code: ErrorCode
    field: str = Field("", description="The field that is wrong, if any.")
    response: str = Field("", description="The text of an answer that is incomplete JSON.")
    finish_reason: FinishReason | None = Field(None, description="Why that answer ended.")
    usage: Usage | None = Field(None, description="The tokens of that answer.")
    metadata: dict[str, Any] = Field(
        default_factory=dict, description="The query's `metadata`, if any."
    )


class IndexedAnswer(Answer):
    """An answer in an NDJSON stream, with the index of its query."""

    index: int


class IndexedFailure(Failure):
    """A failure in an NDJSON stream, with the index of its query."""

    index: int


class BatchRequest(Exact):
    """A batch of queries. Each is validated on its own, so an invalid one fails alone."""

    queries: Annotated[list[QueryFields | Any], Field(min_length=1)]


class BatchAnswer(Exact):
    """Results in the order of the queries.

    `partial_success` and `message` are present only if a query failed.
    """

    responses: list[Answer | Failure]
    partial_success: Literal[True] = True
    message: str = ""


class Error(Exact):
    """Why a request was rejected or could not be answered."""

    error: str = Field(description="A sentence for people.")
    error_code: ErrorCode | HttpCode
    field: str = Field("", description="The field that is wrong, if any.")
    response: str = Field("", description="The text of an answer that is incomplete JSON.")
    finish_reason: FinishReason | None = Field(None, description="Why that answer ended.")
    usage: Usage | None = Field(None, description="The tokens of that answer.")


class OpenAIErrorDetail(Exact):
    """The details of an error, as OpenAI's clients expect them."""

    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None
    code: ErrorCode | HttpCode | Literal["context_length_exceeded"]


class OpenAIError(Exact):
    """Why a request under /v1 was rejected or could not be answered."""

    error: OpenAIErrorDetail


class PromptTokensDetails(Exact):
    """Where the tokens of a prompt came from."""

    cached_tokens: int = Field(description="Tokens found in the prefix cache.")


class OpenAIUsage(Usage):
    """Token counts and their sum."""

    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = Field(
        None, description="Absent if an upstream server does not report it."
    )


class OpenAIMessage(Exact):
    """The assistant's message."""

    role: Literal["assistant"]
    content: str | None = Field(description="Null if the answer consists of calls.")
    tool_calls: list[ToolCall] = Field(
        default_factory=list, description="Present if the answer calls functions."
    )


class OpenAILogprobs(Exact):
    """The log probabilities of an answer's tokens."""

    content: list[TokenLogprob]


class OpenAIChoice(Exact):
    """One answer."""

    index: int
    message: OpenAIMessage
    logprobs: OpenAILogprobs | None
    finish_reason: FinishReason | None = Field(
        description="Null if an upstream server does not report it."
    )


class VllmLogprob(Exact):
    """A token of a prompt in vLLM's format."""

    logprob: float
    rank: int
    decoded_token: str


VllmPromptLogprobs = list[dict[str, VllmLogprob] | None]


class OpenAICompletion(Exact):
    """A chat completion. If `stream` is true, it is sent as server-sent events instead."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: Annotated[list[OpenAIChoice], Field(min_length=1, max_length=MAX_ANSWERS)]
    usage: OpenAIUsage | None = Field(description="Null if an upstream server does not report it.")
    prompt_logprobs: VllmPromptLogprobs = Field(
        default_factory=list, description="Present if the request has `prompt_logprobs`."
    )


class TextLogprobs(Exact):
    """The log probabilities of a text's tokens, as parallel lists.

    Those of the first token of a prompt are null.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(Exact):
    """One continuation of one prompt."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None = Field(
        description="Null if an upstream server does not report it."
    )
    prompt_logprobs: VllmPromptLogprobs = Field(
        default_factory=list, description="Present if the request has `prompt_logprobs`."
    )


class OpenAITextCompletion(Exact):
    """Text completions. If `stream` is true, they are sent as server-sent events instead."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: Annotated[list[TextChoice], Field(min_length=1)]
    usage: OpenAIUsage | None = Field(description="Null if an upstream server does not report it.")


class ResponseItem(BaseModel):
    """An item of a response's output: a message or a function call."""

    id: str
    type: Literal["message", "function_call"]
    status: Literal["completed", "incomplete"]


class ResponseUsage(BaseModel):
    """Token counts of a response."""

    input_tokens: int
    output_tokens: int
    total_tokens: int


class OpenAIResponse(BaseModel):
    """A response. If `stream` is true, its events are sent as server-sent events instead."""

    id: str
    object: Literal["response"]
    created_at: float
    status: Literal["completed", "incomplete"]
    model: str
    output: list[ResponseItem]
    usage: ResponseUsage | None = Field(description="Null if an upstream does not report it.")


class ModelIdentity(BaseModel):
    """What determines a model's answers, and the load that keeps its server busy."""

    revision: str | None = None
    source: str | None = None
    dtype: str | None = None
    system_prompt: str = Field("", description="The server's default system prompt, if any.")
    window: int = Field(0, description="How many concurrent queries keep the server busy.")


class OpenAIModel(Exact):
    """A model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    smol: ModelIdentity | None = Field(None, description="Present once the model is loaded.")


class OpenAIModels(Exact):
    """The names of the model that the server serves, each as a model."""

    object: Literal["list"]
    data: list[OpenAIModel]


class FileForm(Exact):
    """The form of an upload: requests as JSON lines."""

    purpose: Literal["batch"]
    file: Annotated[str, Field(min_length=1, json_schema_extra={"format": "binary"})]


class OpenAIFile(Exact):
    """A file of requests, answers or failed requests."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: Purpose
    status: Literal["processed"]
    status_details: None


class OpenAIFiles(Exact):
    """One page of the files, newest first."""

    object: Literal["list"]
    data: list[OpenAIFile]
    first_id: str | None
    last_id: str | None
    has_more: bool


class OpenAIDeletedFile(Exact):
    """A file that was deleted."""

    id: str
    object: Literal["file"]
    deleted: Literal[True]


class OpenAIBatchError(Exact):
    """What is wrong with a batch as a whole, or with a line of its file."""

    code: str
    message: str
    param: str | None
    line: int | None


class OpenAIBatchErrors(Exact):
    """Why a batch failed."""

    object: Literal["list"]
    data: list[OpenAIBatchError]


class OpenAIRequestCounts(Exact):
    """The requests of a batch; `total` is 0 until they are counted."""

    total: int
    completed: int
    failed: int


class OpenAIBatch(Exact):
    """A batch."""

    id: str
    object: Literal["batch"]
    endpoint: str
    model: str | None
    errors: OpenAIBatchErrors | None
    input_file_id: str
    completion_window: str
    status: BatchStatus
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    expires_at: int
    in_progress_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: OpenAIRequestCounts
    usage: dict[str, Any] = Field(description="The tokens of all answers so far.")
    metadata: dict[str, str] | None
    waits_for: str | None = Field(description="Why a batch in progress is not running now.")


class OpenAIBatches(Exact):
    """One page of the batches, newest first."""

    object: Literal["list"]
    data: list[OpenAIBatch]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Version(Exact):
    """The version of the server."""

    version: str


class Status(Exact):
    """The state of the server."""

    status: Literal["ok", "ready", "loading", "draining", "full", "no_upstream", "dead", "stuck"]


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
    descriptions = _CLIENT_ERRORS | unauthorized | _SERVER_ERRORS
    errors = _responses(descriptions, Error)
    any_object: Json = {"application/json": {"schema": {"type": "object"}}}
    return {
        "/chat": {"post": _post("Answer one query", QueryFields, _json(Answer), errors)},
        "/chat/batched": {"post": _post_batch("Answer a batch of queries", errors)},
        "/generate_batch": {"post": _post_batch("Alias of /chat/batched", errors)},
        **_generation_paths(descriptions | _MODEL_NOT_FOUND),
        "/v1/models": {
            "get": _operation(
                "List the models", _json(OpenAIModels), _responses(unauthorized, OpenAIError)
            )
        },
        "/v1/models/{id}": {
            "get": _operation(
                "Get the model by name",
                _json(OpenAIModel),
                _responses(unauthorized | _MODEL_NOT_FOUND, OpenAIError),
            ),
            "parameters": [_path_parameter("id", models)],
        },
        **_file_paths(unauthorized),
        **_batch_paths(unauthorized),
        "/health": {"get": _probe("Liveness: 503 if the process must be restarted")},
        "/ready": {"get": _probe("Readiness: 503 if the server should not receive traffic")},
        "/metrics": {
            "get": _operation(
                "Prometheus metrics", _text("text/plain"), _responses(unauthorized, Error)
            )
        },
        "/version": {
            "get": _operation("smol's version", _json(Version), _responses(unauthorized, Error))
        },
        "/openapi.json": {
            "get": _operation("This document", any_object, _responses(unauthorized, Error))
        },
    }


def _generation_paths(descriptions: dict[str, str]) -> Json:
    errors = _responses(descriptions, OpenAIError)
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


_STORAGE_ERRORS = {"503": "The server is shutting down, or another one uses its folder."}
_QUOTA_EXCEEDED = "The file is too large, or the quota of the server is exceeded."
_STORAGE_FAILED = {"507": "The disk of the server is full or cannot be written."}


def _file_paths(unauthorized: dict[str, str]) -> Json:
    shared = unauthorized | _STORAGE_ERRORS
    one = _responses(shared | {"404": "There is no such file."}, OpenAIError)
    created = shared | _STORAGE_FAILED | {
        "400": "The form is invalid.",
        "413": _QUOTA_EXCEEDED,
        "415": "The body is not multipart/form-data.",
    }  # fmt: skip
    content = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
    file_id = [_path_parameter("file_id", pattern=FILE_ID)]
    form = {"multipart/form-data": {"schema": {"$ref": "#/components/schemas/FileForm"}}}
    post = _post(
        "Upload a file of requests", FileForm, _json(OpenAIFile), _responses(created, OpenAIError)
    )
    post["requestBody"]["content"] = form
    return {
        "/v1/files": {
            "post": post,
            "get": _operation(
                "List the files",
                _json(OpenAIFiles),
                _responses(shared | {"400": "A parameter is invalid."}, OpenAIError),
            )
            | {"parameters": _page_parameters(MAX_FILE_PAGE)},
        },
        "/v1/files/{file_id}": {
            "get": _operation("Get a file's name, size and purpose", _json(OpenAIFile), one),
            "delete": _operation(
                "Delete a file",
                _json(OpenAIDeletedFile),
                one
                | _responses(
                    {"400": "An unfinished batch needs it."} | _STORAGE_FAILED, OpenAIError
                ),
            ),
            "parameters": file_id,
        },
        "/v1/files/{file_id}/content": {
            "get": _operation(
                "Get a file's content", content, one | _responses(_STORAGE_FAILED, OpenAIError)
            ),
            "parameters": file_id,
        },
    }


def _batch_paths(unauthorized: dict[str, str]) -> Json:
    shared = unauthorized | _STORAGE_ERRORS
    one = _responses(shared | {"404": "There is no such batch."}, OpenAIError)
    created = _CLIENT_ERRORS | shared | _STORAGE_FAILED | {
        "404": "There is no such file.",
        "429": "There are too many unfinished batches.",
    }  # fmt: skip
    batch_id = [_path_parameter("batch_id", pattern=BATCH_ID)]
    return {
        "/v1/batches": {
            "post": _post(
                "Create a batch", BatchFields, _json(OpenAIBatch), _responses(created, OpenAIError)
            ),
            "get": _operation(
                "List the batches",
                _json(OpenAIBatches),
                _responses(shared | {"400": "A parameter is invalid."}, OpenAIError),
            )
            | {"parameters": _page_parameters(MAX_BATCH_PAGE)},
        },
        "/v1/batches/{batch_id}": {
            "get": _operation("Get a batch", _json(OpenAIBatch), one),
            "parameters": batch_id,
        },
        "/v1/batches/{batch_id}/cancel": {
            "post": _operation(
                "Cancel a batch",
                _json(OpenAIBatch),
                one | _responses({"400": "The batch has ended."}, OpenAIError),
            ),
            "parameters": batch_id,
        },
    }


def _page_parameters(limit: int) -> list[Json]:
    size = {"type": "integer", "minimum": 1, "maximum": limit}
    return [{"name": "limit", "in": "query", "schema": size}]


def _post(summary: str, body: type[BaseModel], content: Json, errors: Json) -> Json:
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": _json(body)},
        "responses": {"200": {"description": "Answered.", "content": content}} | errors,
    }


def _post_batch(summary: str, errors: Json) -> Json:
    """A batch operation; OpenAPI 3.1 cannot describe the lines of its stream, so text does."""
    description = (
        "With `Accept: application/x-ndjson`, each result is sent as it finishes: "
        "one IndexedAnswer or IndexedFailure per line."
    )
    content = _json(BatchAnswer) | _text("application/x-ndjson")
    return _post(summary, BatchRequest, content, errors) | {"description": description}


def _operation(summary: str, content: Json, errors: Json) -> Json:
    """An operation without a body, whatever its method."""
    responses = {"200": {"description": "Success.", "content": content}} | errors
    return {"summary": summary, "responses": responses}


def _probe(summary: str) -> Json:
    responses = _responses({"200": "Yes.", "503": "No."}, Status)
    return {"summary": summary, "responses": responses, "security": []}


def _responses(descriptions: dict[str, str], model: type[BaseModel]) -> Json:
    return {
        status: {"description": description, "content": _json(model)}
        for status, description in descriptions.items()
    }


def _json(model: type[BaseModel]) -> Json:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}}


def _text(media_type: str) -> Json:
    return {media_type: {"schema": {"type": "string"}}}


def _path_parameter(name: str, values: Sequence[str] = (), pattern: str | None = None) -> Json:
    schema: Json = {"type": "string"}
    if values:
        schema["enum"] = list(values)
    if pattern is not None:
        schema["pattern"] = pattern
    return {"name": name, "in": "path", "required": True, "schema": schema}
