"""OpenAI's text completions: the parser of a request, and the format of its answers.

Text completions continue raw prompts. The parameters that they share with chat completions are
described in `openai.GenerationFields`.
"""

import codecs
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from smolcli.errors import QueryError
from smolcli.protocol.field_rules import forbid_violations, zero_tokens_rule
from smolcli.protocol.fields import (
    EMPTY,
    MAX_ANSWERS,
    MAX_LOGPROBS,
    Flag,
    Items,
    NumAnswers,
    NumLogprobs,
    NumTokens,
    PromptIds,
    RawText,
)
from smolcli.protocol.openai import (
    SHARED_COMBINATIONS,
    STREAM_COMBINATIONS,
    GenerationFields,
    check_stream,
    query_fields,
    rank_entries,
    usage_fields,
)
from smolcli.protocol.parameters import invalid_parameter, validated
from smolcli.protocol.prompt import split_answers
from smolcli.protocol.query import parse_query
from smolcli.settings import QueryDefaults
from smolcli.types import FinishReason, Query, Result, Usage

DEFAULT_MAX_TOKENS = 16  # of OpenAI's API
_CONTINUATION = [bytes([byte]) for byte in range(0x80, 0xC0)]  # bytes within a character of UTF-8
_RAW_TOKEN = re.compile(r"bytes:(\\x[0-9a-f]{2})+")

Prompts = (
    RawText
    | PromptIds
    | Annotated[Items[RawText], Field(min_length=1)]
    | Annotated[Items[PromptIds], Field(min_length=1)]
)

_COMBINATIONS: list[Any] = [
    zero_tokens_rule("max_tokens"),
    {
        "anyOf": [
            {"properties": {"best_of": {"enum": [*EMPTY]}}},
            {"properties": {"best_of": {"const": 1}, "n": {"enum": [*EMPTY, 1]}}},
            *(
                {"required": ["n"], "properties": {"best_of": {"const": n}, "n": {"const": n}}}
                for n in range(2, MAX_ANSWERS + 1)
            ),
        ]
    },
]


class TextCompletionFields(GenerationFields):
    """The parameters of a text completion; see `GenerationFields`."""

    model_config = ConfigDict(
        json_schema_extra=forbid_violations(
            [*SHARED_COMBINATIONS, *STREAM_COMBINATIONS, *_COMBINATIONS]
        )
    )

    prompt: Prompts = Field(
        description="a non-empty string, a list of token ids, or a list of several of either"
    )
    max_tokens: NumTokens | None = Field(
        None,
        description="a positive integer, or 0 if echo or prompt_logprobs is given; "
        f"the default is {DEFAULT_MAX_TOKENS}",
    )
    echo: Flag | None = Field(None, description="true or false")
    logprobs: NumLogprobs | None = Field(
        None, description=f"an integer from 0 to {MAX_LOGPROBS}: the number of alternatives"
    )
    best_of: NumAnswers | None = Field(
        None, description="the value of n: choosing among more is not supported"
    )
    suffix: None = Field(None, description="empty: inserting text is not supported")
    add_special_tokens: Literal[True] | None = Field(
        None, description="true: send token ids to leave them out"
    )

    @property
    def prompts(self) -> list[Any]:
        """The prompts, each of them text or token ids."""
        is_single = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if is_single else list(self.prompt)

    @property
    def num_choices(self) -> int:
        """Number of choices for each prompt."""
        return self.n or 1


@dataclass(frozen=True, slots=True)
class TextCompletion:
    """A request for text completions, and the JSON of its responses.

    Args:
        id: the response's id.
        queries: one for each choice, all choices of a prompt in sequence.
        num_choices: number of choices for each prompt.
        model: the requested model.
        is_stream: whether to stream the choices.
        includes_usage: whether a stream ends with the usage.
        created: creation time in seconds since 1970.
    """

    id: str
    queries: tuple[Query, ...]
    num_choices: int
    model: str
    is_stream: bool
    includes_usage: bool
    created: int = field(default_factory=lambda: int(time.time()))

    def answer(self, results: Sequence[Result]) -> dict[str, Any]:
        """The body of a complete response.

        Args:
            results: one for each query, without errors.
        """
        choices = [text_choice(index, result) for index, result in enumerate(results)]
        return self._head() | {"choices": choices, "usage": usage_fields(self.usage(results))}

    def chunk(
        self,
        index: int,
        text: str,
        logprobs: Mapping[str, Any] | None = None,
        finish_reason: FinishReason | None = None,
    ) -> dict[str, Any]:
        """One chunk of a streamed choice.

        Args:
            index: the choice's index.
            text: the next piece of its text.
            logprobs: the piece's log probabilities, as `TextLogprobs.add` returns them.
            finish_reason: why the choice ended; only in its last chunk.
        """
        choice = {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }
        chunk = self._head() | {"choices": [choice]}
        return chunk | {"usage": None} if self.includes_usage else chunk

    def usage_chunk(self, results: Sequence[Result]) -> dict[str, Any]:
        """The final chunk of a stream, if its usage was requested."""
        return self._head() | {"choices": [], "usage": usage_fields(self.usage(results))}

    def usage(self, results: Sequence[Result]) -> Usage | None:
        """Tokens of all choices; each prompt counts once. None if a result does not report them."""
        usages = [result.usage for result in results if result.usage is not None]
        if len(usages) < len(results):
            return None
        of_prompts = usages[:: self.num_choices]
        cached = [usage.cached_tokens for usage in of_prompts if usage.cached_tokens is not None]
        return Usage(
            sum(usage.prompt_tokens for usage in of_prompts),
            sum(usage.completion_tokens for usage in usages),
            sum(cached) if len(cached) == len(of_prompts) else None,
        )

    def error(self, index: int, result: Result) -> Result:
        """The error of one choice as the error of the request, which names the prompt."""
        if len(self.queries) == self.num_choices or result.field not in (None, "raw_prompt"):
            return result
        path = f"prompt[{index // self.num_choices}]"
        error = str(result.error)
        is_named = error.startswith("raw_prompt ")
        error = error.replace("raw_prompt", path) if is_named else f"{path}: {error}"
        return replace(result, error=error, field=path)

    def _head(self) -> dict[str, Any]:
        kind = "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def text_choice(index: int, result: Result) -> dict[str, Any]:
    """One choice of a complete response.

    With `echo`, the log probabilities of the prompt are part of `logprobs`; otherwise they are a
    member of their own, in vLLM's format.
    """
    choice: dict[str, Any] = {
        "index": index,
        "text": result.response,
        "logprobs": _logprobs(result),
        "finish_reason": result.finish_reason,
    }
    if result.prompt_logprobs is not None and not (result.echo and result.logprobs is not None):
        choice["prompt_logprobs"] = rank_entries(result.prompt_logprobs)
    return choice


def text_answer_fields(result: Result) -> dict[str, Any]:
    """The members of a response for one prompt that depend on the result."""
    others = (replace(r, prompt_logprobs=result.prompt_logprobs) for r in result.alternatives)
    choices = [text_choice(index, each) for index, each in enumerate((result, *others))]
    return {"choices": choices, "usage": usage_fields(result.usage)}


def parse_text_fields(value: object) -> TextCompletionFields:
    """Validate the body of a request, except for what each prompt's query must satisfy.

    Raises:
        QueryError: naming the first invalid parameter by its path.
    """
    fields = validated(TextCompletionFields, value)
    check_stream(fields, value)
    if fields.best_of is not None and fields.best_of != fields.num_choices:
        raise invalid_parameter("best_of", TextCompletionFields)
    if fields.max_tokens == 0 and not fields.echo and fields.prompt_logprobs is None:
        raise invalid_parameter("max_tokens", TextCompletionFields)
    return fields


def text_completion(
    fields: TextCompletionFields,
    defaults: QueryDefaults,
    completion_id: str,
    default_model: str = "",
) -> TextCompletion:
    """The request that a body stands for.

    Args:
        fields: the body.
        defaults: values for the parameters that it leaves out.
        completion_id: id of the response, and start of the ids of its queries.
        default_model: the model's name if the body has none.

    Raises:
        QueryError: naming the first invalid parameter by its path.
    """
    queries: list[Query] = []
    for index, prompt in enumerate(fields.prompts):
        query = _query(fields, prompt, defaults, f"{completion_id}-{index}", None)
        # Every choice repeats the prompt's log probabilities.
        queries += [
            replace(each, prompt_logprobs=query.prompt_logprobs) for each in split_answers(query)
        ]
    return TextCompletion(
        id=completion_id,
        queries=tuple(queries),
        num_choices=fields.num_choices,
        model=fields.model or default_model,
        is_stream=bool(fields.stream),
        includes_usage=bool(fields.stream_options and fields.stream_options.include_usage),
    )


def parse_text_line(value: object, defaults: QueryDefaults, chat_id: str, line: int) -> Query:
    """Validate the body of a batch line, which has one prompt.

    Args:
        value: the parsed JSON body.
        defaults: values for the parameters that it leaves out.
        chat_id: id for the query.
        line: the line number that the query carries.

    Raises:
        QueryError: naming the first invalid parameter by its path.
    """
    fields = parse_text_fields(value)
    if fields.stream:
        raise QueryError("stream cannot be true in a batch", field="stream")
    if len(fields.prompts) > 1:
        message = "a line can have only one prompt; write one line for each"
        raise QueryError(message, field="prompt")
    return _query(fields, fields.prompts[0], defaults, chat_id, line)


def entries_of(logprobs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The log probabilities of a choice as chat completions report them, one entry per token.

    Raises:
        LookupError, TypeError, ValueError: they are not in OpenAI's format.
    """

    def entry(token: str, logprob: float | None) -> dict[str, Any]:
        is_raw = _RAW_TOKEN.fullmatch(token)
        raw = bytes.fromhex(token[6:].replace("\\x", "")) if is_raw else token.encode()
        return {"token": raw.decode(errors="replace"), "logprob": logprob, "bytes": list(raw)}

    tokens = zip(logprobs["tokens"], logprobs["token_logprobs"], strict=True)
    likely = logprobs.get("top_logprobs") or [None] * len(logprobs["tokens"])
    return [
        entry(*token) | {"top_logprobs": [entry(*each) for each in (top or {}).items()]}
        for token, top in zip(tokens, likely, strict=True)
    ]


def _query(
    fields: TextCompletionFields,
    prompt: str | list[int],
    defaults: QueryDefaults,
    chat_id: str,
    line: int | None,
) -> Query:
    scored = fields.prompt_logprobs
    if scored is None and fields.echo:
        scored = fields.logprobs
    values = query_fields(fields, defaults) | {
        "chat_id": chat_id,
        "raw_prompt": prompt,
        "echo": fields.echo,
        "max_new_tokens": DEFAULT_MAX_TOKENS if fields.max_tokens is None else fields.max_tokens,
        "logprobs": None if fields.logprobs is None else True,
        "top_logprobs": fields.logprobs,
        "prompt_logprobs": scored,
    }
    return parse_query(values, defaults, line, accepts_partial=True)


def _logprobs(result: Result) -> dict[str, Any] | None:
    """The log probabilities of a whole text, if requested."""
    return None if result.logprobs is None else TextLogprobs().add(text_entries(result))


def text_entries(result: Result) -> list[Mapping[str, Any]]:
    """The log probabilities of a text's tokens; with `echo`, those of the prompt come first."""
    prompt = result.prompt_logprobs if result.echo else None
    return [*(prompt or ()), *(result.logprobs or ())]


class TextLogprobs:
    """Log probabilities in the format of text completions: parallel lists over a text's tokens."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._length = 0  # of the text so far, in characters

    def add(self, entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The lists for the next tokens of the text.

        Args:
            entries: the log probabilities of a result or of its prompt.
        """
        texts = [_token_text(entry) for entry in entries]
        return {
            "tokens": texts,
            "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": [
                None if entry["logprob"] is None else _likely(entry, text)
                for entry, text in zip(entries, texts, strict=True)
            ],
            "text_offset": [self._offset(bytes(entry["bytes"] or ())) for entry in entries],
        }

    def _offset(self, token: bytes) -> int:
        """Where the next token starts in the text, in characters."""
        ends_broken = bool(self._decoder.getstate()[0]) and token[:1] not in _CONTINUATION
        offset = self._length + ends_broken  # U+FFFD for the character that ends here
        self._length += len(self._decoder.decode(token))
        return offset


def _likely(entry: Mapping[str, Any], text: str) -> dict[str, float]:
    """The most likely tokens and the token itself. Of equal texts, the most likely one counts."""
    likely: dict[str, float] = {}
    for each in entry["top_logprobs"]:
        likely.setdefault(_token_text(each), each["logprob"])
    return likely | {text: entry["logprob"]} if text not in likely else likely


def _token_text(entry: Mapping[str, Any]) -> str:
    """The text of a token, or its bytes as OpenAI writes them if they are part of a character."""
    try:
        return bytes(entry["bytes"] or ()).decode() or str(entry["token"])
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in entry["bytes"])
