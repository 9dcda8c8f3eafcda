"""The types that every package shares: queries, results and sampling parameters."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as attribute
from enum import StrEnum
from http import HTTPStatus
from typing import Any, Self

ENTRY_CHARS = 100  # approximate length of one token's log probability as JSON


class ErrorCode(StrEnum):
    """The machine-readable kind of an error."""

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
        """The HTTP status of a response that reports it."""
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
    """Why an answer ended.

    A local model ends with an end token or stop string, with function calls, or at the token limit.
    The other reasons are those of upstream servers.
    """

    STOP = "stop"
    LENGTH = "length"
    CONTENT_FILTER = "content_filter"
    TOOL_CALLS = "tool_calls"
    FUNCTION_CALL = "function_call"


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the tokens of one answer are sampled.

    Args:
        max_new_tokens: token limit, the end token included.
        temperature: 0 is greedy decoding.
        top_p: sample from the most probable tokens whose probabilities add up to this.
        top_k: sample from this many of the most probable tokens; 0 means all.
        repetition_penalty: above 1, tokens that occurred before become less probable.
        seed: seed of this answer's random numbers.
        min_p: exclude tokens less probable than this fraction of the most probable one.
        presence_penalty: subtracted from the logit of every token that the answer contains.
        frequency_penalty: subtracted once for each time that the answer contains the token.
        logit_bias: pairs of a token id and a number to add to its logit.
        min_tokens: number of tokens before the answer may end.
        ignore_eos: continue after the model's end tokens.
        stop_token_ids: further tokens that end the answer.
        allowed_token_ids: the only tokens to choose from; empty allows all.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    allowed_token_ids: tuple[int, ...] = ()

    @property
    def is_plain(self) -> bool:
        """Whether decoding is greedy and leaves the logits of the allowed tokens unchanged."""
        return self.is_greedy and not self.changes_logits

    @property
    def changes_logits(self) -> bool:
        """Whether a penalty or a bias changes logits."""
        return bool(
            self.repetition_penalty != 1.0
            or self.presence_penalty
            or self.frequency_penalty
            or self.logit_bias
        )

    @property
    def is_greedy(self) -> bool:
        """Whether decoding always takes the most probable token."""
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True)
class PromptLimit:
    """How long a prompt may be.

    Args:
        num_tokens: length of the longest prompt.
        num_reserved: what the answer needs at least: one token, or none if none is wanted.
    """

    num_tokens: int
    num_reserved: int = 1

    @classmethod
    def of(cls, context_length: int, sampling: Sampling) -> Self:
        """The limit for a context that the prompt shares with its answer.

        Args:
            context_length: what the model or its KV cache has room for, in tokens.
            sampling: how many tokens are wanted.
        """
        num_reserved = min(sampling.max_new_tokens, 1)
        return cls(context_length - num_reserved, num_reserved)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a function, as the model wrote it.

    Args:
        id: names the call in the message that carries its result.
        name: the function's name.
        arguments: JSON text, as in OpenAI's API.
    """

    id: str
    name: str
    arguments: str

    def record(self) -> dict[str, Any]:
        """The call as a JSON object, in OpenAI's shape."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of a function call that is being generated.

    Args:
        index: position of the call in the answer.
        name: the function's name, in the call's first piece; empty in others.
        arguments: the next characters of the arguments.
    """

    index: int
    name: str = ""
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation.

    Args:
        role: system, user, assistant or tool.
        content: its text; the result of a function if the role is tool.
        tool_calls: the assistant's calls.
        tool_call_id: id of the call whose result the message holds.
    """

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""

    @property
    def num_chars(self) -> int:
        """Length of the content and the calls, in characters."""
        return len(self.content) + sum(len(c.name) + len(c.arguments) for c in self.tool_calls)


class ToolMode(StrEnum):
    """Whether an answer may or must call functions."""

    NONE = "none"
    AUTO = "auto"
    REQUIRED = "required"


@dataclass(frozen=True, slots=True)
class Function:
    """A function that an answer may call.

    Args:
        name: letters, digits, underscores and dashes.
        description: tells the model what the function does.
        parameters: a JSON Schema of the arguments, as text; "" if the function takes none.
        is_strict: OpenAI's `strict`, for upstream servers; arguments always follow the schema here.
    """

    name: str
    description: str = ""
    parameters: str = ""
    is_strict: bool | None = None


@dataclass(frozen=True, slots=True)
class Tools:
    """The functions that a query offers, and how its answer may use them.

    Args:
        functions: at least one.
        mode: whether an answer may or must call functions.
        allowed: names of the functions that may be called; () allows all.
        is_parallel: whether one answer may hold several calls.
    """

    functions: tuple[Function, ...]
    mode: ToolMode = ToolMode.AUTO
    allowed: tuple[str, ...] = ()
    is_parallel: bool = True

    @property
    def num_chars(self) -> int:
        """Length of all definitions, in characters."""
        return sum(
            len(text) for f in self.functions for text in (f.name, f.description, f.parameters)
        )


class TextPiece(str):
    """A piece of an answer's text, with what belongs to it.

    Attributes:
        logprobs: log probabilities of tokens, if requested. All pieces together carry the first
            entries of the result's `logprobs`; tokens whose text is not final yet may be among
            them.
        calls: pieces of function calls, usually with empty text.
    """

    __slots__ = ("calls", "logprobs")

    logprobs: Sequence[Mapping[str, Any]]
    calls: Sequence[ToolCallDelta]

    def __new__(
        cls,
        text: str,
        logprobs: Sequence[Mapping[str, Any]] | None = None,
        calls: Sequence[ToolCallDelta] = (),
    ) -> Self:
        """Attach log probabilities and calls to text."""
        piece = super().__new__(cls, text)
        piece.logprobs = logprobs or ()
        piece.calls = calls
        return piece

    @classmethod
    def whole(cls, result: "Result") -> Self:
        """A complete answer as one piece."""
        return cls(result.response or "", result.logprobs, whole_calls(result))

    @classmethod
    def joined(cls, pieces: Iterable[str]) -> Self:
        """Join pieces, of which some may be plain strings."""
        pieces = list(pieces)
        rich = [piece for piece in pieces if isinstance(piece, cls)]
        entries = [entry for piece in rich for entry in piece.logprobs]
        return cls("".join(pieces), entries, [call for piece in rich for call in piece.calls])


def is_blank(piece: str) -> bool:
    """Whether a piece of an answer holds neither text nor calls."""
    return not (piece or (isinstance(piece, TextPiece) and piece.calls))


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """What answers are constrained to; exactly one of these.

    Args:
        schema: a JSON Schema as text, which makes formats hashable; "" if there is none.
        choices: the only possible answers; () if there are none.
        regex: a regular expression that the whole answer matches; "" if there is none.
        grammar: a grammar in Lark's language or in GBNF; "" if there is none.
    """

    schema: str = ""
    choices: tuple[str, ...] = ()
    regex: str = ""
    grammar: str = ""


@dataclass(frozen=True, slots=True)
class Query:
    """One validated query, with every default filled in.

    Args:
        chat_id: the query's id.
        messages: the conversation, a system prompt included; () if there is a raw prompt instead.
        sampling: how tokens are sampled.
        stop: strings that end the answer.
        include_stop: whether the answer contains what ended it, a stop string or stop token.
        bad_words: texts whose tokens must not occur in the answer in sequence.
        format: what the answer is constrained to; None allows any text.
        continues: whether the answer continues the last message, which is then the assistant's.
        accepts_partial: whether an answer that ends before it matches its format is not an error,
            as in OpenAI's API.
        tools: functions that the answer may call, if any.
        n: number of answers.
        top_logprobs: alternatives to report for each token; None for no log probabilities.
        raw_prompt: text or token ids that the model continues, without the chat template.
        echo: whether the answer starts with the raw prompt.
        prompt_logprobs: like `top_logprobs`, for the tokens of the prompt.
        metadata: echoed in the result.
        line: its line number; None over HTTP.
        request_id: id of its HTTP request, which is passed on to upstream servers.
    """

    chat_id: str
    messages: tuple[Message, ...]
    sampling: Sampling = attribute(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    bad_words: tuple[str, ...] = ()
    format: AnswerFormat | None = None
    continues: bool = False
    accepts_partial: bool = False
    tools: Tools | None = None
    n: int = 1
    top_logprobs: int | None = None
    raw_prompt: str | tuple[int, ...] | None = None
    echo: bool = False
    prompt_logprobs: int | None = None
    metadata: Mapping[str, Any] | None = None
    line: int | None = None
    request_id: str | None = None

    @property
    def keeps_space(self) -> bool:
        """Whether white space around the answer is part of it.

        It continues a given text, or a regular expression or grammar says where white space is.
        """
        is_exact = self.format is not None and bool(self.format.regex or self.format.grammar)
        return self.raw_prompt is not None or self.continues or is_exact

    @property
    def num_chars(self) -> int:
        """Length of the prompt, the answer format and the tools, in characters."""
        answers = self.format or AnswerFormat()
        num_chars = sum(
            map(
                len,
                (
                    answers.schema,
                    *answers.choices,
                    answers.regex,
                    answers.grammar,
                    self.raw_prompt or "",
                ),
            )
        )
        num_chars += self.tools.num_chars if self.tools else 0
        return num_chars + sum(message.num_chars for message in self.messages)

    @property
    def last_text(self) -> str:
        """The last message, or the raw prompt; token ids as numbers."""
        if self.raw_prompt is None:
            return self.messages[-1].content
        return self.raw_prompt if isinstance(self.raw_prompt, str) else str(list(self.raw_prompt))


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one query.

    Args:
        prompt_tokens: tokens of the prompt.
        completion_tokens: tokens of the answers, end tokens included.
        cached_tokens: prompt tokens found in the prefix cache; None if unknown. The number depends
            on earlier queries, so it is not part of a result's record.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int | None = attribute(default=None, compare=False)

    def record(self) -> dict[str, int]:
        """The counts that depend on the query alone, as a JSON object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
        }


@dataclass(frozen=True, slots=True)
class Timings:
    """When one query was admitted, answered and finished, in seconds since it was submitted.

    Args:
        queue_s: when it was admitted to the batch.
        first_token_s: when its first token was generated.
        total_s: when it was finished.
    """

    queue_s: float
    first_token_s: float
    total_s: float

    def record(self) -> dict[str, float]:
        """The timings as a JSON object."""
        return {name: round(getattr(self, name), 4) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class Result:
    """The outcome of one query: an answer, or an error in its place.

    Args:
        chat_id: the query's id; None if it could not be read.
        response: the text of the answer; None if the answer consists of calls. For an error, the
            text generated before it, if any.
        finish_reason: why the answer ended; None if an upstream server did not say.
        tool_calls: functions that the answer calls. If the answer was cut off, the last call may
            be incomplete.
        logprobs: one entry per token of the text, in OpenAI's format.
        prompt_logprobs: one entry per token of the prompt, with the token's id and rank as well.
            The log probability and rank of the first one are null.
        echo: whether the text starts with the raw prompt; None if the query had messages.
        alternatives: the answers after the first, if several were requested.
        usage: token counts of all answers.
        error: human-readable message; None if there is an answer.
        error_code: the kind of error.
        field: the field that is wrong, if any.
        metadata: the query's metadata.
        line: the query's line number.
        timings: when the query was admitted, answered and finished.
        is_deduplicated: whether the answer is shared with an equal query, so that nothing was
            generated for this one.
    """

    chat_id: str | None
    response: str | None = None
    finish_reason: FinishReason | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: Sequence[Mapping[str, Any]] | None = None
    prompt_logprobs: Sequence[Mapping[str, Any]] | None = None
    echo: bool | None = None
    alternatives: tuple["Result", ...] = ()
    usage: Usage | None = None
    error: str | None = None
    error_code: ErrorCode | None = None
    field: str | None = None
    metadata: Mapping[str, Any] | None = None
    line: int | None = None
    timings: Timings | None = None
    is_deduplicated: bool = False

    @property
    def is_error(self) -> bool:
        """Whether it is an error."""
        return self.error_code is not None

    @property
    def num_chars(self) -> int:
        """Approximate length in characters, with calls, log probabilities and alternatives."""
        calls = (text for call in self.tool_calls for text in (call.id, call.name, call.arguments))
        texts = (self.chat_id, self.response, self.error, str(self.logprobs or ""), *calls)
        num_chars = sum(len(text) for text in texts if text is not None)
        for entry in self.prompt_logprobs or ():
            num_chars += ENTRY_CHARS * (1 + len(entry["top_logprobs"]))
        return num_chars + sum(each.num_chars for each in self.alternatives)

    def record(self, with_timings: bool = False) -> dict[str, Any]:
        """The result as a JSON object, in a fixed order and without absent members."""
        values: dict[str, Any] = {"chat_id": self.chat_id}
        if self.is_error:
            values |= {"error": self.error, "error_code": str(self.error_code)}
            if self.field is not None:
                values["field"] = self.field
            values |= self.partial
        else:
            values |= self._answer()
        if self.prompt_logprobs is not None:
            values["prompt_logprobs"] = self.prompt_logprobs
        if self.alternatives:
            values["alternatives"] = [result._answer() for result in self.alternatives]
        if self.usage is not None:
            values["usage"] = self.usage.record()
        if self.metadata is not None:
            values["metadata"] = self.metadata
        if self.line is not None:
            values["line"] = self.line
        if with_timings and self.timings is not None:
            values["timings"] = self.timings.record()
        return values

    @property
    def partial(self) -> dict[str, Any]:
        """The members of an error record that hold the text before the error, if any."""
        if self.response is None:
            return {}
        return {"response": self.response, "finish_reason": self.finish_reason}

    def _answer(self) -> dict[str, Any]:
        values: dict[str, Any] = {"response": self.response}
        if self.tool_calls:
            values["tool_calls"] = [call.record() for call in self.tool_calls]
        values["finish_reason"] = self.finish_reason
        return values if self.logprobs is None else values | {"logprobs": self.logprobs}


def whole_calls(result: Result) -> list[ToolCallDelta]:
    """The calls of an answer, each in one piece."""
    return [
        ToolCallDelta(index, call.name, call.arguments)
        for index, call in enumerate(result.tool_calls)
    ]


def failure(query: Query, message: str, code: ErrorCode, field: str | None = None) -> Result:
    """The error result of a query.

    Args:
        query: the query that failed.
        message: human-readable.
        code: the kind of error.
        field: the field that is wrong, if any.
    """
    return Result(
        chat_id=query.chat_id,
        error=message,
        error_code=code,
        field=field,
        metadata=query.metadata,
        line=query.line,
    )
