"""The nouns of smol: what goes in, what comes out. Imports nothing of ours."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as attribute
from enum import StrEnum
from http import HTTPStatus
from typing import Any


class ErrorCode(StrEnum):
    """What kind of fault an error record reports."""

    INVALID_JSON = "invalid_json"
    NOT_AN_OBJECT = "not_an_object"
    MISSING_FIELD = "missing_field"
    INVALID_VALUE = "invalid_value"
    UNKNOWN_FIELD = "unknown_field"
    DUPLICATE_CHAT_ID = "duplicate_chat_id"
    PROMPT_TOO_LONG = "prompt_too_long"
    INCOMPLETE_JSON = "incomplete_json"
    LINE_TOO_LONG = "line_too_long"
    INTERNAL = "internal"
    TIMEOUT = "timeout"
    CANCELLED = "cancelled"
    OVERLOADED = "overloaded"
    BACKEND_ERROR = "backend_error"

    @property
    def status(self) -> HTTPStatus:
        """The HTTP status that goes with it."""
        return _STATUSES.get(self, HTTPStatus.BAD_REQUEST)

    @property
    def is_transient(self) -> bool:
        """Whether the server failed rather than the query, so that a retry may succeed."""
        return self in _TRANSIENT


_STATUSES = {
    ErrorCode.INTERNAL: HTTPStatus.INTERNAL_SERVER_ERROR,
    ErrorCode.TIMEOUT: HTTPStatus.GATEWAY_TIMEOUT,
    ErrorCode.CANCELLED: HTTPStatus.SERVICE_UNAVAILABLE,
    ErrorCode.OVERLOADED: HTTPStatus.SERVICE_UNAVAILABLE,
    ErrorCode.BACKEND_ERROR: HTTPStatus.SERVICE_UNAVAILABLE,
}
_TRANSIENT = {
    ErrorCode.TIMEOUT,
    ErrorCode.CANCELLED,
    ErrorCode.OVERLOADED,
    ErrorCode.BACKEND_ERROR,
}


class FinishReason(StrEnum):
    """Why an answer ended: the model or a stop string ended it, or there was no room for more."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the tokens of one answer are chosen; complete, nothing left to be guessed."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0

    @property
    def is_plain(self) -> bool:
        """Whether the most likely token is taken as the model has it."""
        return self.is_greedy and self.repetition_penalty == 1.0

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """What every answer is: JSON that a schema allows, or one of some strings.

    `schema` is JSON text, so that equal schemas are equal and a format can be a key.
    """

    schema: str = ""
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Query:
    """One question, checked and complete.

    `top_logprobs` None: no likelihoods are told; `n`: how many answers there are to be.
    """

    chat_id: str
    messages: tuple[Message, ...]
    sampling: Sampling = attribute(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    format: AnswerFormat | None = None
    n: int = 1
    top_logprobs: int | None = None
    metadata: Mapping[str, Any] | None = None
    line: int | None = None

    @property
    def num_chars(self) -> int:
        """How long it is: its messages, and what its answer is to be."""
        answers = self.format or AnswerFormat()
        texts = (answers.schema, *answers.choices, *(m.content for m in self.messages))
        return sum(map(len, texts))


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one query's answers; `completion_tokens` counts the end token."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time of one answer went, in seconds since it was submitted."""

    queue_s: float
    first_token_s: float
    total_s: float

    def record(self) -> dict[str, float]:
        """The times as users see them."""
        return {name: round(getattr(self, name), 4) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class Result:
    """The outcome of one query: an answer, or an error in its place.

    `logprobs` has an entry in OpenAI's shape for each token of the text; `alternatives` are the
    answers after the first.
    """

    chat_id: str | None
    response: str | None = None
    finish_reason: FinishReason | None = None
    logprobs: Sequence[Mapping[str, Any]] | None = None
    alternatives: tuple["Result", ...] = ()
    usage: Usage | None = None
    error: str | None = None
    error_code: ErrorCode | None = None
    field: str | None = None
    metadata: Mapping[str, Any] | None = None
    line: int | None = None
    timings: Timings | None = None

    @property
    def is_error(self) -> bool:
        """Whether there is no answer."""
        return self.error_code is not None

    @property
    def num_chars(self) -> int:
        """About how long it is, likelihoods and further answers included."""
        texts = (self.chat_id, self.response, self.error, str(self.logprobs or ""))
        num_chars = sum(len(text) for text in texts if text is not None)
        return num_chars + sum(each.num_chars for each in self.alternatives)

    def record(self, with_timings: bool = False) -> dict[str, Any]:
        """The result as users see it: JSON types in a fixed order, without what is absent."""
        values: dict[str, Any] = {"chat_id": self.chat_id}
        if self.is_error:
            values |= {"error": self.error, "error_code": str(self.error_code)}
            if self.field is not None:
                values["field"] = self.field
        else:
            values |= self._answer()
        if self.alternatives:
            values["alternatives"] = [result._answer() for result in self.alternatives]
        if self.usage is not None:
            values["usage"] = {
                "prompt_tokens": self.usage.prompt_tokens,
                "completion_tokens": self.usage.completion_tokens,
            }
        if self.metadata is not None:
            values["metadata"] = self.metadata
        if self.line is not None:
            values["line"] = self.line
        if with_timings and self.timings is not None:
            values["timings"] = self.timings.record()
        return values

    def _answer(self) -> dict[str, Any]:
        values = {"response": self.response, "finish_reason": self.finish_reason}
        return values if self.logprobs is None else values | {"logprobs": self.logprobs}


def failure(query: Query, message: str, code: ErrorCode, field: str | None = None) -> Result:
    """The error result that takes the place of `query`'s answer."""
    return Result(
        chat_id=query.chat_id,
        error=message,
        error_code=code,
        field=field,
        metadata=query.metadata,
        line=query.line,
    )
