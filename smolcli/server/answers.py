"""The shapes of what the server answers; /openapi.json is made from them."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from smolcli.protocol.query import MAX_ANSWERS, QueryFields
from smolcli.server.errors import HttpCode
from smolcli.types import ErrorCode, FinishReason


class Exact(BaseModel):
    """An object without further fields."""

    model_config = ConfigDict(extra="forbid")


class Usage(Exact):
    """Tokens; `completion_tokens` counts the end token."""

    prompt_tokens: int
    completion_tokens: int


class TopLogprob(Exact):
    """A token and the natural logarithm of its likelihood."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """The same of a token that was chosen, with the likeliest ones."""

    top_logprobs: list[TopLogprob]


class Alternative(Exact):
    """One of several answers."""

    response: str
    finish_reason: FinishReason
    logprobs: list[TokenLogprob] = Field(default_factory=list, description="where asked for")


class Answer(Alternative):
    """A query's answer."""

    chat_id: str
    alternatives: list[Alternative] = Field(
        default_factory=list, description="the other answers, where n is above 1"
    )
    usage: Usage | None = Field(None, description="where the upstream server tells it")
    metadata: dict[str, Any] = Field(default_factory=dict, description="the query's own, if any")


class Failure(Exact):
    """What stands in the place of an answer; `chat_id` is null where none could be read."""

    chat_id: str | None
    error: str
    error_code: ErrorCode
    field: str = Field("", description="the field at fault, where there is one")
    metadata: dict[str, Any] = Field(default_factory=dict, description="the query's own, if any")


class IndexedAnswer(Answer):
    """An answer in a stream, with its query's place in the batch."""

    index: int


class IndexedFailure(Failure):
    """A failure in a stream, with its query's place in the batch."""

    index: int


class BatchRequest(Exact):
    """Queries; each is judged on its own, and a bad one gets a failure in its place."""

    queries: Annotated[list[QueryFields | Any], Field(min_length=1)]


class BatchAnswer(Exact):
    """Results in the order of the queries; the other two are there when any of them failed."""

    responses: list[Answer | Failure]
    partial_success: Literal[True] = True
    message: str = ""


class Error(Exact):
    """Why a request was refused, or could not be answered."""

    error: str = Field(description="a sentence for people")
    error_code: ErrorCode | HttpCode
    field: str = Field("", description="the field at fault, where there is one")


class OpenAIErrorDetail(Exact):
    """The same as OpenAI's clients read it."""

    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None
    code: ErrorCode | HttpCode


class OpenAIError(Exact):
    """Why a request under /v1 was refused, or could not be answered."""

    error: OpenAIErrorDetail


class OpenAIUsage(Usage):
    """Tokens, and their sum."""

    total_tokens: int


class OpenAIMessage(Exact):
    """The answer's text."""

    role: Literal["assistant"]
    content: str


class OpenAILogprobs(Exact):
    """How likely the tokens of an answer are."""

    content: list[TokenLogprob]


class OpenAIChoice(Exact):
    """One answer."""

    index: int
    message: OpenAIMessage
    logprobs: OpenAILogprobs | None
    finish_reason: FinishReason


class OpenAICompletion(Exact):
    """A whole answer; where `stream` is true it comes as server-sent events instead."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: Annotated[list[OpenAIChoice], Field(min_length=1, max_length=MAX_ANSWERS)]
    usage: OpenAIUsage


class ModelIdentity(BaseModel):
    """What decides a model's answers, and how many queries keep its server busy."""

    revision: str | None = None
    source: str | None = None
    dtype: str | None = None
    system_prompt: str = Field("", description="of queries without one, where the server has it")
    window: int = 0


class OpenAIModel(Exact):
    """A model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    smol: ModelIdentity | None = Field(None, description="once it is loaded")


class OpenAIModels(Exact):
    """The models there are: one."""

    object: Literal["list"]
    data: list[OpenAIModel]


class Status(Exact):
    """How the server is."""

    status: Literal["ok", "ready", "loading", "draining", "full", "no_upstream", "dead", "stuck"]
