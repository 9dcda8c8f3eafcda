"""The formats a line can have: smol's own, and OpenAI's batch format."""

from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Annotated, Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from smolcli.errors import QueryError
from smolcli.protocol.openai import (
    answer_fields,
    error_object,
    parameter_error,
    parse_completion,
)
from smolcli.protocol.query import Text, chat_id_of, parse_query
from smolcli.settings import QueryDefaults
from smolcli.types import ErrorCode, Query, Result, Usage

_REQUEST_KEYS = {"custom_id", "method", "url", "body"}


class RequestFields(BaseModel):
    """One line; a description reads on from "<field> must be"."""

    model_config = ConfigDict(extra="forbid")

    custom_id: Annotated[Text, Field(min_length=1)] = Field(description="a non-empty string")
    method: Literal["POST"] = Field(description="POST")
    url: Literal["/v1/chat/completions"] = Field(description="/v1/chat/completions")
    body: dict[str, Any] = Field(description="an object: a request for a chat completion")


def is_request(value: object) -> bool:
    """Whether a line was meant for this format, sound or not."""
    return (
        isinstance(value, dict) and "chat_id" not in value and len(value.keys() & _REQUEST_KEYS) > 1
    )


@dataclass(frozen=True, slots=True)
class BatchFormat:
    """Requests in, responses out; `chat_id` is what the format calls `custom_id`.

    Args:
        run_id: of the run; with the number of the line it makes the ids of a response.
        created: when the answers say they were made, in seconds since 1970.
        model: who they say made them.
        with_timings: whether each line says where its time went.
    """

    run_id: str = ""
    created: int = 0
    model: str = ""
    with_timings: bool = False

    @property
    def id_field(self) -> str:
        """What the format calls the id of a line."""
        return "custom_id"

    def parse(self, value: object, defaults: QueryDefaults, line: int) -> Query:
        """The query that a line asks.

        Raises:
            QueryError: naming the first field at fault, or the first parameter in the body.
        """
        if not isinstance(value, dict):
            raise QueryError("a request must be a JSON object", ErrorCode.NOT_AN_OBJECT)
        if "chat_id" in value:
            raise QueryError(
                "the line is in smol's own format, but the file begins in OpenAI's batch format; "
                "a file may not mix them"
            )
        try:
            request = RequestFields.model_validate(value)
        except ValidationError as exc:
            raise parameter_error(exc, RequestFields) from None
        body = {"model": ""} | request.body  # whatever it names is answered by the model there is
        completion = parse_completion(body, defaults, request.custom_id, line)
        if completion.is_stream:
            raise QueryError("stream cannot be true in a batch", field="stream")
        return completion.query

    def id_of(self, value: object) -> str | None:
        """The id that a line carries, as far as one can be read from it."""
        custom_id = value.get("custom_id") if isinstance(value, dict) else None
        return custom_id if isinstance(custom_id, str) else None

    def record(self, result: Result) -> dict[str, Any]:
        """The line that tells of a result: a response, of whatever status, for every request."""
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
        if self.with_timings and result.timings is not None:
            record["timings"] = result.timings.record()
        return record

    def read_back(self, record: dict[str, Any]) -> Result:
        """The result that a line told of, without its text.

        Raises:
            ValueError, LookupError, TypeError: where it is not a line of this run.
        """
        custom_id, body = record["custom_id"], record["response"]["body"]
        line = int(str(record["id"]).rpartition("_")[2])
        if record["id"] != self._id("batch_req", line):
            raise ValueError("an id of another run")
        if not isinstance(custom_id, str | None):
            raise TypeError
        if "error" in body:
            code = ErrorCode(body["error"]["code"])
            return Result(custom_id, error_code=code, line=line)
        usage = body["usage"]
        tokens = Usage(usage["prompt_tokens"], usage["completion_tokens"])
        return Result(custom_id, usage=tokens, line=line)

    def _id(self, kind: str, line: int) -> str:
        return f"{kind}_{self.run_id}_{line}"

    def _answered(self, result: Result) -> tuple[HTTPStatus, dict[str, Any]]:
        head = {
            "id": f"chatcmpl-{self.run_id}_{result.line}",
            "object": "chat.completion",
            "created": self.created,
            "model": self.model,
        }
        return HTTPStatus.OK, head | answer_fields(result)

    def _failed(self, result: Result) -> tuple[HTTPStatus, dict[str, Any]]:
        code = result.error_code
        assert code is not None
        error = error_object(code.status, str(result.error), code, result.field)
        return code.status, {"error": error | {"line": result.line}}


class LineFormat(Protocol):
    """How a line asks, and how a line answers."""

    @property
    def id_field(self) -> str:
        """What the format calls the id of a line."""
        ...

    def parse(self, value: object, defaults: QueryDefaults, line: int) -> Query:
        """The query that a line asks; raises QueryError."""
        ...

    def id_of(self, value: object) -> str | None:
        """The id that a line carries, as far as one can be read from it."""
        ...

    def record(self, result: Result) -> dict[str, Any]:
        """What the line that tells of a result holds, in JSON's types."""
        ...

    def read_back(self, record: dict[str, Any]) -> Result:
        """The result that a line told of, without its text.

        Raises:
            ValueError, LookupError, TypeError: where it is not a line of this run.
        """
        ...


@dataclass(frozen=True, slots=True)
class OwnFormat:
    """smol's own: a query in, a result out.

    Args:
        with_timings: whether each result says where its time went.
    """

    with_timings: bool = False

    @property
    def id_field(self) -> str:
        return "chat_id"

    def parse(self, value: object, defaults: QueryDefaults, line: int) -> Query:
        if is_request(value):
            raise QueryError(
                "the line is in OpenAI's batch format, but the file begins in smol's own; "
                "a file may not mix them"
            )
        return parse_query(value, defaults, line)

    def id_of(self, value: object) -> str | None:
        return chat_id_of(value)

    def record(self, result: Result) -> dict[str, Any]:
        return result.record(self.with_timings)

    def read_back(self, record: dict[str, Any]) -> Result:
        chat_id, line = record["chat_id"], record["line"]
        code, usage = record.get("error_code"), record.get("usage")
        if not isinstance(line, int) or not isinstance(chat_id, str | None):
            raise TypeError
        return Result(
            chat_id=chat_id,
            error_code=ErrorCode(code) if code is not None else None,
            usage=Usage(**usage) if usage is not None else None,
            line=line,
        )


@dataclass(frozen=True, slots=True)
class Formats:
    """Both formats as a run has them; the first line of its input decides between them."""

    own: OwnFormat = field(default_factory=OwnFormat)
    batch: BatchFormat = field(default_factory=BatchFormat)

    def of(self, is_batch: bool) -> LineFormat:
        """The one or the other."""
        return self.batch if is_batch else self.own


def is_batch(first: object) -> bool:
    """Whether a file whose first line holds this is in OpenAI's format; bytes are broken JSON."""
    if isinstance(first, bytes):
        return b'"custom_id"' in first and b'"chat_id"' not in first
    return is_request(first)
