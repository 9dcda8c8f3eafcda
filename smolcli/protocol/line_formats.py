"""The formats of an input line: smol's own, OpenAI's batch format, and lines without ids."""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from http import HTTPStatus
from itertools import islice
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from smolcli.errors import QueryError
from smolcli.protocol.bare_lines import bare_id, is_bare, parse_bare
from smolcli.protocol.chat_completions import answer_fields, parse_completion
from smolcli.protocol.fields import ChatId, decimal_id
from smolcli.protocol.openai import error_code, error_object
from smolcli.protocol.parameters import validated
from smolcli.protocol.query import chat_id_of, parse_query
from smolcli.protocol.text_completions import parse_text_line, text_answer_fields
from smolcli.settings import QueryDefaults, RowSettings
from smolcli.types import ErrorCode, Query, Result, Usage

SAMPLE_LINES = 64  # maximum number of lines that the format is detected from

_REQUEST_KEYS = {"custom_id", "method", "url", "body"}
_OWN_ID = re.compile(r"batch_req_[0-9a-f]{16}_(\d+)")


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What the result lines say about the run that wrote them.

    Args:
        run_id: prefix of the ids of OpenAI responses; the line number completes it.
        created: `created` of every OpenAI response, in seconds since 1970.
        model: `model` of every OpenAI response.
        with_timings: whether each line carries its timings.
    """

    run_id: str = ""
    created: int = 0
    model: str = ""
    with_timings: bool = False


@dataclass(frozen=True, slots=True)
class LineFormat(ABC):
    """How an input line is parsed, and how its result line is written and read back."""

    run: RunInfo = RunInfo()

    name: ClassVar[str]
    id_field: ClassVar[str]

    def for_run(self, run: RunInfo) -> Self:
        """The same format, writing the lines of `run`."""
        return replace(self, run=run)

    def for_line(self, line: int) -> "LineFormat":
        """The format of one line, for its `name` and `id_field`."""
        return self

    @abstractmethod
    def parse(self, value: object, defaults: QueryDefaults, line: int) -> Query:
        """Parse the JSON value of one line.

        Args:
            value: the parsed JSON value.
            defaults: values for the fields that the line leaves out.
            line: the line number that the query carries.

        Raises:
            QueryError: naming the first invalid field.
        """

    @abstractmethod
    def id_of(self, value: object, line: int) -> str | None:
        """The id of a line that may be invalid; None if it has none.

        Args:
            value: the JSON value of the line, or the bytes of one that is not valid JSON.
            line: the line's number.
        """

    @abstractmethod
    def resembles(self, value: object) -> bool:
        """Whether an invalid line was probably meant for this format; bytes are broken JSON."""

    @abstractmethod
    def record(self, result: Result) -> dict[str, Any]:
        """The output line of a result, as a JSON object."""

    @abstractmethod
    def read_back(self, record: dict[str, Any]) -> Result:
        """Parse an output line, without the text of its answer.

        Raises:
            ValueError, LookupError, TypeError: the line was not written by this run.
        """

    def accepts(self, value: object, defaults: QueryDefaults) -> bool:
        """Whether a line is valid in this format."""
        try:
            self.parse(value, defaults, 0)
        except QueryError:
            return False
        return True


@dataclass(frozen=True, slots=True)
class SmolFormat(LineFormat):
    """smol's own format: one query per line in, one result per line out."""

    name = "smol"
    id_field = "chat_id"

    def parse(self, value: object, defaults: QueryDefaults, line: int) -> Query:
        if _is_request(value):
            raise QueryError(
                "this line is in OpenAI's batch format, but the file is in smol's own format; "
                "a file cannot mix the two"
            )
        return parse_query(value, defaults, line)

    def id_of(self, value: object, line: int) -> str | None:
        return chat_id_of(value)

    def resembles(self, value: object) -> bool:
        if isinstance(value, bytes):
            return b'"chat_id"' in value
        return isinstance(value, dict) and "chat_id" in value

    def record(self, result: Result) -> dict[str, Any]:
        return result.record(self.run.with_timings)

    def read_back(self, record: dict[str, Any]) -> Result:
        chat_id, line = record["chat_id"], record["line"]
        code, usage = record.get("error_code"), record.get("usage")
        if not isinstance(line, int) or not isinstance(chat_id, str | None):
            raise TypeError
        return Result(
            chat_id=chat_id,
            error_code=ErrorCode(code) if code is not None else None,
            usage=Usage(**usage) if usage is not None else None,
            metadata=record.get("metadata"),
            line=line,
        )


@dataclass(frozen=True, slots=True)
class BareFormat(SmolFormat):
    """Lines of messages, prompts or conversations without ids; the results are smol's own.

    Args:
        id_prefix: prefix for ids that are made from line numbers.
    """

    id_prefix: str = ""

    name = "bare"
    id_field = "id"

    def parse(self, value: object, defaults: QueryDefaults, line: int) -> Query:
        return parse_bare(value, defaults, self.id_of(value, line), line)

    def id_of(self, value: object, line: int) -> str:
        return bare_id(value, f"{self.id_prefix}{line}")

    def resembles(self, value: object) -> bool:
        if isinstance(value, bytes):
            return False
        return is_bare(value)


class RequestFields(BaseModel):
    """One line of an OpenAI batch file; descriptions complete "<field> must be ..."."""

    model_config = ConfigDict(extra="forbid")

    custom_id: ChatId = Field(description="a non-empty string or an integer")
    method: Literal["POST"] = Field(description="POST")
    url: Literal["/v1/chat/completions", "/v1/completions"] = Field(
        description="/v1/chat/completions or /v1/completions"
    )
    body: dict[str, Any] = Field(description="an object: the body of a request to the url")


@dataclass(frozen=True, slots=True)
class OpenAIBatchFormat(LineFormat):
    """OpenAI's batch format: requests in, responses out; a query's `chat_id` is its `custom_id`."""

    name = "openai"
    id_field = "custom_id"

    def request(self, value: object) -> RequestFields:
        """Parse one line, but not the body of its request.

        Raises:
            QueryError: naming the first invalid field.
        """
        if not isinstance(value, dict):
            raise QueryError("a request must be a JSON object", ErrorCode.NOT_AN_OBJECT)
        if "chat_id" in value:
            raise QueryError(
                "this line is in smol's own format, but the file is in OpenAI's batch format; "
                "a file cannot mix the two"
            )
        return validated(RequestFields, value)

    def parse(self, value: object, defaults: QueryDefaults, line: int) -> Query:
        request = self.request(value)
        body = request.body  # any model name is accepted: there is only one
        if request.url == "/v1/completions":
            return parse_text_line(body, defaults, request.custom_id, line)
        completion = parse_completion(body, defaults, request.custom_id, line)
        if completion.is_stream:
            raise QueryError("stream cannot be true in a batch", field="stream")
        return completion.query

    def id_of(self, value: object, line: int) -> str | None:
        custom_id = decimal_id(value.get("custom_id")) if isinstance(value, dict) else None
        return custom_id if isinstance(custom_id, str) else None

    def resembles(self, value: object) -> bool:
        if isinstance(value, bytes):
            return b'"custom_id"' in value and b'"chat_id"' not in value
        return _is_request(value)

    def record(self, result: Result) -> dict[str, Any]:
        assert result.line is not None
        status, body = self._failed(result) if result.is_error else self._answered(result)
        response = {
            "status_code": int(status),
            "request_id": self._id("req", result.line),
            "body": body,
        }
        record: dict[str, Any] = {
            "id": self._id("batch_req", result.line),
            "custom_id": result.chat_id,
            "response": response,
            "error": None,
        }
        if self.run.with_timings and result.timings is not None:
            record["timings"] = result.timings.record()
        return record

    def read_back(self, record: dict[str, Any]) -> Result:
        custom_id, body = record["custom_id"], record["response"]["body"]
        line = int(str(record["id"]).rpartition("_")[2])
        if record["id"] != self._id("batch_req", line):
            raise ValueError("the id belongs to another run")
        if not isinstance(custom_id, str | None):
            raise TypeError
        if "error" in body:
            code = error_code(body["error"]["code"])
            return Result(custom_id, error_code=code, line=line)
        usage = body["usage"]
        if usage is not None:
            usage = Usage(usage["prompt_tokens"], usage["completion_tokens"])
        return Result(custom_id, usage=usage, line=line)

    def _id(self, kind: str, line: int) -> str:
        return f"{kind}_{self.run.run_id}_{line}"

    def _answered(self, result: Result) -> tuple[HTTPStatus, dict[str, Any]]:
        if result.usage is not None:  # equal runs give equal bytes, whatever is in the cache
            result = replace(result, usage=replace(result.usage, cached_tokens=None))
        is_text = result.echo is not None
        head = {
            "id": f"{'cmpl' if is_text else 'chatcmpl'}-{self.run.run_id}_{result.line}",
            "object": "text_completion" if is_text else "chat.completion",
            "created": self.run.created,
            "model": self.run.model,
        }
        fields = text_answer_fields(result) if is_text else answer_fields(result)
        return HTTPStatus.OK, head | fields

    def _failed(self, result: Result) -> tuple[HTTPStatus, dict[str, Any]]:
        code = result.error_code
        assert code is not None
        error = error_object(code.status, str(result.error), code, result.field)
        return code.status, {"error": error | {"line": result.line}}


SMOL = SmolFormat()
OPENAI = OpenAIBatchFormat()
BARE = BareFormat()
FORMATS: tuple[LineFormat, ...] = (SMOL, OPENAI, BARE)


def stated_format(rows: RowSettings) -> LineFormat | None:
    """The format that `--input-format` states; None if it has to be detected."""
    return next((format for format in FORMATS if format.name == rows.input_format), None)


def detect_format(values: Iterable[object], defaults: QueryDefaults) -> LineFormat:
    """Decide the format of an input from its first lines.

    The first line that is valid in one of the formats decides. If none of the first
    SAMPLE_LINES is, the format that most of them resemble is chosen, and smol's own if none does.

    Args:
        values: the JSON value of each line, or the bytes of one that is not valid JSON. No more
            of them are consumed than the decision needs.
        defaults: as passed to `LineFormat.parse`.
    """
    counts = dict.fromkeys(FORMATS, 0)
    for value in islice(values, SAMPLE_LINES):
        for format in FORMATS:
            if format.accepts(value, defaults):
                return format
            counts[format] += format.resembles(value)
    return max(FORMATS, key=lambda format: counts[format])


def smol_record(record: dict[str, Any]) -> dict[str, Any]:
    """Convert a result record of either format to smol's own.

    Also accepts output files of OpenAI and of other servers; fields that they lack stay absent.

    Args:
        record: a line of a result file.

    Raises:
        ValueError, LookupError, TypeError, AttributeError: the record is in neither format.
    """
    if "custom_id" not in record:
        if "error_code" not in record and "response" not in record:
            raise ValueError("neither an answer nor an error")
        return record
    converted = {"chat_id": record["custom_id"]} | _response_fields(record)
    if own_id := _OWN_ID.fullmatch(str(record.get("id"))):
        converted["line"] = int(own_id[1])
    return converted | {name: record[name] for name in ("file", "timings") if name in record}


def _response_fields(record: dict[str, Any]) -> dict[str, Any]:
    response = record.get("response") or {}
    body = response.get("body") or {}
    if error := body.get("error") or record.get("error"):
        code = error.get("code") or error.get("type") or f"status_{response.get('status_code')}"
        converted = {"error": error.get("message") or str(code), "error_code": str(code)}
        return converted | ({"field": error["param"]} if error.get("param") else {})
    first, *others = [_answer_fields(choice) for choice in body["choices"]]
    usage = body.get("usage") or {}
    tokens = {name: usage[name] for name in ("prompt_tokens", "completion_tokens") if name in usage}
    return (
        first | ({"alternatives": others} if others else {}) | ({"usage": tokens} if tokens else {})
    )


def _answer_fields(choice: dict[str, Any]) -> dict[str, Any]:
    answer = {
        "response": choice["text"] if "text" in choice else choice["message"].get("content"),
        "finish_reason": choice.get("finish_reason"),
    }
    if calls := choice.get("message", {}).get("tool_calls"):
        answer["tool_calls"] = calls
    return answer | ({"logprobs": choice["logprobs"]} if choice.get("logprobs") else {})


def _is_request(value: object) -> bool:
    """Whether a line has the shape of an OpenAI request, valid or not."""
    return (
        isinstance(value, dict) and "chat_id" not in value and len(value.keys() & _REQUEST_KEYS) > 1
    )
