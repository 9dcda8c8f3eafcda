"""The two formats that the lines of a file may have: smol's own, and OpenAI's for batches."""

from dataclasses import dataclass, field
from typing import Any, Protocol

from smolcli.errors import QueryError
from smolcli.protocol.openai_batch import BatchFormat, is_request
from smolcli.protocol.query import chat_id_of, parse_query
from smolcli.settings import QueryDefaults
from smolcli.types import ErrorCode, Query, Result, Usage


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
