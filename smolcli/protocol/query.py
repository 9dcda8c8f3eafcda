"""The wire schema of a query, and its parser: JSON text to `Query`."""

import difflib
import hashlib
import json
import math
from typing import Annotated, Any, Literal, NoReturn

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from smolcli.errors import QueryError
from smolcli.settings import QueryDefaults
from smolcli.types import AnswerFormat, ErrorCode, Message, Query, Sampling

JSON_OBJECT = '{"type": "object"}'
SCHEMA_NAME = "answer"  # OpenAI's shape wants one
MAX_CHOICES = 1000


def _bare(value: object) -> object:
    """Answers come without outer white space, so a choice cannot have any."""
    if isinstance(value, str) and value != value.strip():
        raise ValueError("outer white space")
    return value


Choice = Annotated[
    str, Field(strict=True, min_length=1, max_length=1000), BeforeValidator(_bare, str)
]


class _Exact(BaseModel):
    model_config = ConfigDict(extra="forbid")


class JsonSchemaFields(_Exact):
    """A schema as OpenAI's API has it; only the schema itself changes anything."""

    name: Annotated[str, Field(strict=True)] = SCHEMA_NAME
    description: Annotated[str, Field(strict=True)] | None = None
    strict: Annotated[bool, Field(strict=True)] | None = None
    definition: dict[str, Any] = Field(alias="schema", description="a JSON Schema")


class TextFormat(_Exact):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(_Exact):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchemaFormat(_Exact):
    """JSON that a schema allows."""

    type: Literal["json_schema"]
    json_schema: JsonSchemaFields


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")
]
Choices = Annotated[list[Choice], Field(min_length=1, max_length=MAX_CHOICES)]

FORMAT_DESCRIPTION = (
    '{"type": "text"}, {"type": "json_object"}, '
    'or {"type": "json_schema", "json_schema": {"name": ..., "schema": {...}}}'
)
CHOICES_DESCRIPTION = (
    f"a list of 1 to {MAX_CHOICES:,} strings, not empty and without white space around them"
)


def schema_format(schema: dict[str, Any]) -> AnswerFormat:
    """The format of answers that a schema allows."""
    return AnswerFormat(schema=json.dumps(schema, ensure_ascii=False))


def answer_format(
    response_format: TextFormat | JsonObjectFormat | JsonSchemaFormat | None,
    choices: list[str] | None,
    default: AnswerFormat | None,
) -> AnswerFormat | None:
    """What a query's answers are to be; None: any text.

    Raises:
        QueryError: where it says two things.
    """
    if choices is not None:
        if response_format is not None:
            raise QueryError("choices cannot stand beside response_format", field="choices")
        return AnswerFormat(choices=tuple(dict.fromkeys(choices)))
    match response_format:
        case None:
            return default
        case TextFormat():
            return None
        case JsonObjectFormat():
            return AnswerFormat(schema=JSON_OBJECT)
        case JsonSchemaFormat():
            return schema_format(response_format.json_schema.definition)


def format_fields(answers: AnswerFormat | None) -> dict[str, Any]:
    """The fields of a query that say what its answers are to be."""
    if answers is None:
        return {}
    if answers.choices:
        return {"choices": list(answers.choices)}
    if answers.schema == JSON_OBJECT:
        return {"response_format": {"type": "json_object"}}
    schema = {"name": SCHEMA_NAME, "schema": json.loads(answers.schema)}
    return {"response_format": {"type": "json_schema", "json_schema": schema}}


MAX_SEED = 2**63 - 1
MAX_ANSWERS = 16
MAX_LOGPROBS = 20

Text = Annotated[str, Field(strict=True)]
Whole = Annotated[int, Field(strict=True)]
Flag = Annotated[bool, Field(strict=True)]
Number = Annotated[float, Field(strict=True)]
StopString = Annotated[str, Field(strict=True, min_length=1, max_length=1000)]
StopStrings = Annotated[list[StopString], Field(max_length=16)]
ChatId = Annotated[str, Field(strict=True, min_length=1)]
Count = Annotated[Whole, Field(ge=1)]
Temperature = Annotated[Number, Field(ge=0, le=100)]
TopP = Annotated[Number, Field(gt=0, le=1)]
TopK = Annotated[Whole, Field(ge=0)]
Penalty = Annotated[Number, Field(gt=0, le=100)]
Seed = Annotated[Whole, Field(ge=0, le=MAX_SEED)]
NumAnswers = Annotated[Whole, Field(ge=1, le=MAX_ANSWERS)]


def decimal_id(value: object) -> object:
    """An integer id is taken as its decimal string."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _listed(value: object) -> object:
    """One stop string is a list of one."""
    return [value] if isinstance(value, str) else value


class MessageFields(BaseModel):
    """One turn of `messages`."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: Text


class QueryFields(BaseModel):
    """The fields a query may have; a description reads on from "<field> must be"."""

    model_config = ConfigDict(extra="forbid")

    chat_id: Annotated[ChatId, BeforeValidator(decimal_id, json_schema_input_type=ChatId | int)] = (
        Field(description="a non-empty string or an integer")
    )
    user_prompt: Text | None = Field(None, description="a string that is not blank")
    system_prompt: Text | None = Field(None, description="a string")
    messages: Annotated[list[MessageFields], Field(min_length=1)] | None = Field(
        None, description="a non-empty list of {role, content}, the last from the user"
    )
    max_new_tokens: Count | None = Field(None, description="a whole number from 1")
    temperature: Temperature | None = Field(None, description="a number from 0 (greedy) to 100")
    top_p: TopP | None = Field(None, description="a number above 0 and up to 1")
    top_k: TopK | None = Field(None, description="a whole number from 0 (off)")
    repetition_penalty: Penalty | None = Field(None, description="a number above 0 and up to 100")
    seed: Seed | None = Field(None, description="a whole number from 0 to 2^63 - 1")
    stop: (
        Annotated[
            StopStrings, BeforeValidator(_listed, json_schema_input_type=StopStrings | StopString)
        ]
        | None
    ) = Field(None, description="a non-empty string or a list of up to 16 of them")
    response_format: ResponseFormat | None = Field(None, description=FORMAT_DESCRIPTION)
    choices: Choices | None = Field(None, description=CHOICES_DESCRIPTION)
    n: NumAnswers | None = Field(None, description=f"a whole number from 1 to {MAX_ANSWERS}")
    logprobs: Flag | None = Field(None, description="true or false")
    top_logprobs: Annotated[Whole, Field(ge=0, le=MAX_LOGPROBS)] | None = Field(
        None, description=f"a whole number from 0 to {MAX_LOGPROBS}, where logprobs is true"
    )
    metadata: dict[str, Any] | None = Field(None, description="an object")


FIELDS = QueryFields.model_fields


MAX_DEPTH = 64
SAMPLING_FIELDS = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty")


def load_json(text: bytes) -> object:
    """Parse one JSON value as I-JSON (RFC 7493) has it: no NaN, no infinity, no duplicate key,
    no lone surrogate.

    Raises:
        QueryError: with code `invalid_json`, saying what is wrong and at which column.
    """
    try:
        value: object = _DECODER.decode(text.decode())
        if text.count(b"[") + text.count(b"{") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
            raise RecursionError
        if b"\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as exc:
        _refuse_json(f"not UTF-8: byte {exc.start + 1} is 0x{text[exc.start]:02x}", exc)
    except UnicodeEncodeError as exc:
        _refuse_json("a string holds a lone surrogate (\\ud800 to \\udfff), which is no text", exc)
    except json.JSONDecodeError as exc:
        _refuse_json(f"{exc.msg.removesuffix(' at')} at column {exc.colno}", exc)
    except RecursionError as exc:
        _refuse_json(f"nested more than {MAX_DEPTH} levels deep", exc)
    except ValueError as exc:
        _refuse_json(str(exc).partition(";")[0], exc)
    return value


def _refuse_json(reason: str, cause: Exception) -> NoReturn:
    raise QueryError(f"invalid JSON: {reason}", ErrorCode.INVALID_JSON) from cause


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"duplicate key {next(k for k in keys if keys.count(k) > 1)[:100]!r}")
    return values


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _depth(value: object) -> int:
    """How many arrays and objects stand inside one another."""
    level, depth = [value], 0
    while level := [v for v in level if isinstance(v, dict | list) and v]:
        depth += 1
        level = [item for v in level for item in (v.values() if isinstance(v, dict) else v)]
    return depth


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"the number {digits[:40]} is too large")
    return value


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_constant=_refuse_constant, parse_float=_finite
)


def chat_id_of(value: object) -> str | None:
    """The id that `value` carries, as far as one can be read from it."""
    chat_id = decimal_id(value.get("chat_id")) if isinstance(value, dict) else None
    return chat_id if isinstance(chat_id, str) else None


def parse_query(value: object, defaults: QueryDefaults, line: int | None = None) -> Query:
    """Check one parsed JSON value and complete it with the defaults.

    Raises:
        QueryError: naming the first field at fault; unknown fields come first, for they
            are often the reason that another one is missing.
    """
    if not isinstance(value, dict):
        kind = {list: "an array", str: "a string", type(None): "null", bool: "a boolean"}.get(
            type(value), "a number"
        )
        raise QueryError(f"a query must be a JSON object, not {kind}", ErrorCode.NOT_AN_OBJECT)
    extra: dict[str, Any] = {}
    if defaults.extra_fields != "error":
        extra = {key: item for key, item in value.items() if key not in FIELDS}
        value = {key: item for key, item in value.items() if key in FIELDS}
    try:
        fields = QueryFields.model_validate(value)
    except ValidationError as exc:
        raise _query_error(exc) from None
    query = Query(
        chat_id=fields.chat_id,
        messages=_messages(fields, defaults.system_prompt),
        sampling=_sampling(fields, defaults.sampling),
        stop=tuple(fields.stop or ()),
        format=answer_format(fields.response_format, fields.choices, defaults.format),
        n=fields.n or 1,
        top_logprobs=(fields.top_logprobs or 0) if fields.logprobs else None,
        metadata=_metadata(fields.metadata, extra if defaults.extra_fields == "keep" else {}),
        line=line,
    )
    _check_together(fields, query)
    return query


def _check_together(fields: QueryFields, query: Query) -> None:
    """Refuse what is sound by itself and makes no sense with the rest."""
    if query.format is not None and query.stop:
        raise QueryError("stop cannot stand beside a format of the answer", field="stop")
    if fields.top_logprobs is not None and query.top_logprobs is None:
        raise QueryError("top_logprobs needs logprobs to be true", field="top_logprobs")
    if query.n > 1 and query.sampling.is_greedy:
        message = "n above 1 needs a temperature above 0: greedy answers are all the same"
        raise QueryError(message, field="n")


def _query_error(exc: ValidationError) -> QueryError:
    faults = exc.errors(include_url=False, include_context=False)
    fault = next((f for f in faults if f["type"] == "extra_forbidden"), faults[0])
    field = str(fault["loc"][0])
    if fault["type"] == "extra_forbidden" and len(fault["loc"]) == 1:
        return _unknown_field(field)
    if field == "chat_id" and (fault["type"] == "missing" or fault["input"] in (None, "")):
        return _required("chat_id")
    where = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in fault["loc"][1:])
    detail = f" (at {field}{where})" if where and field == "messages" else ""
    message = f"{field} must be {FIELDS[field].description}{detail}"
    return QueryError(message, ErrorCode.INVALID_VALUE, field)


def _required(field: str) -> QueryError:
    return QueryError(f"{field} is required and cannot be empty", ErrorCode.MISSING_FIELD, field)


def _unknown_field(field: str) -> QueryError:
    near = difflib.get_close_matches(field, FIELDS, n=1, cutoff=0.7)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    shown = field if len(field) <= 100 else f"{field[:100]}..."
    return QueryError(f"unknown field {shown!r}{hint}", ErrorCode.UNKNOWN_FIELD, shown)


def _messages(fields: QueryFields, system_prompt: str | None) -> tuple[Message, ...]:
    if fields.messages is None:
        if fields.user_prompt is None or not fields.user_prompt.strip():
            raise _required("user_prompt")
        turns = [Message("user", fields.user_prompt)]
        system = fields.system_prompt or system_prompt
    else:
        for other in ("user_prompt", "system_prompt"):
            if getattr(fields, other) is not None:
                raise QueryError(f"{other} cannot stand beside messages", field=other)
        turns = [Message(turn.role, turn.content) for turn in fields.messages]
        if turns[-1].role != "user" or not turns[-1].content.strip():
            raise QueryError("messages must end with a user's turn, not blank", field="messages")
        system = None if turns[0].role == "system" else system_prompt
    return (Message("system", system), *turns) if system else tuple(turns)


def _sampling(fields: QueryFields, defaults: Sampling) -> Sampling:
    given = {name: getattr(fields, name) for name in SAMPLING_FIELDS}
    values = {k: getattr(defaults, k) if v is None else v for k, v in given.items()}
    seed = fields.seed if fields.seed is not None else derived_seed(defaults.seed, fields.chat_id)
    return Sampling(**values, seed=seed)


def derived_seed(seed: int, name: str) -> int:
    """A query's seed depends on the run's seed and its id alone, not on what shares its batch."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") & MAX_SEED


def _metadata(metadata: dict[str, Any] | None, extra: dict[str, Any]) -> dict[str, Any] | None:
    return {**extra, **(metadata or {})} if extra else metadata
