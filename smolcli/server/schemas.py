"""Models of the server's responses, and of two request bodies that no parser describes."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from smolcli.protocol.fields import MAX_ANSWERS
from smolcli.protocol.query import QueryFields
from smolcli.server.batch_store import Purpose
from smolcli.server.batch_store import Status as BatchStatus
from smolcli.server.errors import HttpCode
from smolcli.types import ErrorCode, FinishReason


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


class ErrorFields(Exact):
    """What an error says, and the answer that it rejects as incomplete JSON, if it does."""

    error: str = Field(description="What is wrong, in a sentence.")
    field: str = Field("", description="The field that is wrong, if any.")
    response: str = Field("", description="The text of an answer that is incomplete JSON.")
    finish_reason: FinishReason | None = Field(None, description="Why that answer ended.")
    usage: Usage | None = Field(None, description="The tokens of that answer.")


class Failure(ErrorFields):
    """The error that takes the place of an answer."""

    chat_id: str | None = Field(description="Null if the query's `chat_id` cannot be read.")
    error_code: ErrorCode
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


class Error(ErrorFields):
    """Why a request was rejected or could not be answered."""

    error_code: ErrorCode | HttpCode


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
    window: int = Field(0, description="Number of concurrent queries that keep the server busy.")


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


class Page(Exact):
    """A part of a list. The ids are those of its first and last object."""

    object: Literal["list"]
    first_id: str | None
    last_id: str | None
    has_more: bool


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


class OpenAIFiles(Page):
    """One page of the files, newest first."""

    data: list[OpenAIFile]


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


class OpenAIBatches(Page):
    """One page of the batches, newest first."""

    data: list[OpenAIBatch]


class Version(Exact):
    """The version of the server."""

    version: str


class Status(Exact):
    """The state of the server."""

    status: Literal["ok", "ready", "loading", "draining", "full", "no_upstream", "dead", "stuck"]
